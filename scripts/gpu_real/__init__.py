"""A real target of 143 M parameters, trained on real code on one GPU, its drafts, and Dovetail measured with both.

    python scripts/gpu_real data                  # about a minute: corpus and tokenizer, from the installed packages
    python scripts/gpu_real target --minutes 6    # the target
    python scripts/gpu_real draft --minutes 3     # its drafts, of one and of two blocks
    python scripts/gpu_real measure --minutes 4   # target on the CPU, draft on the GPU; writes gpu_real.json

Every step but `data` ends within its minutes with what it has, and goes on where it was when it was killed and
is started again. All take `--work FOLDER` (build/gpu_real), `--device` and `--toy`, a size for seconds on a CPU.
Nothing is downloaded and nothing need be installed but torch, transformers, accelerate and numpy.
"""
