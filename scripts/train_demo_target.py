"""Train the demo pair's target: a small Llama on Python source (see `demo_corpus`).

    python scripts/train_demo_target.py --out build/demo/target

Two cores need about 40 minutes. Most steps see short windows, which are cheaper; the last ones see the whole
context. The run writes a checkpoint every few minutes and resumes from it; the result is a bfloat16
`save_pretrained` folder with its tokenizer and `training.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from demo_corpus import SEPARATOR, split_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_dovetail.train import token_stream

VOCAB_SIZE, CONTEXT, TOKENS_PER_STEP = 4096, 1024, 8192
SHORT_WINDOW, SHORT_SHARE = 256, 0.75  # window of the first steps, and their share of all steps
PEAK_LR_MATRIX, PEAK_LR_OTHER, WARMUP_SHARE, COOLDOWN_SHARE = 0.02, 3e-3, 0.02, 0.5
SAVE_EVERY_STEPS = 100


def train_tokenizer(
    texts: list[str], vocab_size: int = VOCAB_SIZE, max_length: int = CONTEXT
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` entries, for a model of `max_length` positions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attention_bias=False,
    )
    return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    other = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR_MATRIX, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(other, lr=PEAK_LR_OTHER, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(progress: float) -> float:
    """Share of the peak learning rate at `progress` in 0..1: warm-up, plateau, linear cool-down."""
    return min(progress / WARMUP_SHARE, 1.0, (1.0 - progress) / COOLDOWN_SHARE)


def sample_batch(stream: torch.Tensor, window: int, generator: torch.Generator) -> torch.Tensor:
    """`TOKENS_PER_STEP` tokens in windows that start anywhere in the stream."""
    starts = torch.randint(len(stream) - window - 1, (TOKENS_PER_STEP // window,), generator=generator)
    return torch.stack([stream[s : s + window + 1] for s in starts]).long()  # (B, T + 1)


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1]).logits  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean loss in nats per token over fixed windows of the held-out stream."""
    generator = torch.Generator().manual_seed(1)
    return sum(loss_of(model, sample_batch(stream, CONTEXT, generator)).item() for _ in range(8)) / 8


def save_checkpoint(path: Path, model: LlamaForCausalLM, optims: list, generator: torch.Generator, step: int) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optims],
        "generator": generator.get_state(),
        "step": step,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optims: list, generator: torch.Generator) -> int:
    """Restore everything that the next step depends on; return the number of finished steps."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optim, value in zip(optims, state["optimizers"], strict=True):
        optim.load_state_dict(value)
    generator.set_state(state["generator"])
    return state["step"]


def train(out: Path, steps: int) -> None:
    """Train for `steps` steps in all, however often the run was interrupted."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    training, held_out = split_corpus()
    tokenizer = train_tokenizer(training)
    tokenizer.save_pretrained(out)
    stream, validation = token_stream(tokenizer, training), token_stream(tokenizer, held_out)
    model, generator, checkpoint = new_model().train(), torch.Generator().manual_seed(0), out / "checkpoint.pt"
    optims = optimizers(model)
    first = load_checkpoint(checkpoint, model, optims, generator)
    print(f"{len(stream):,} training tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for step in range(first, steps):
        progress, begin = (step + 1) / (steps + 1), time.perf_counter()
        for optim, peak in zip(optims, (PEAK_LR_MATRIX, PEAK_LR_OTHER), strict=True):
            for group in optim.param_groups:
                group["lr"] = peak * rate(progress)
        window = SHORT_WINDOW if progress < SHORT_SHARE else CONTEXT
        loss = loss_of(model, sample_batch(stream, window, generator))
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}; lower the learning rates")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        if (step + 1) % 10 == 0:
            print(
                f"step {step + 1}/{steps} loss {loss.item():.3f} {time.perf_counter() - begin:.2f} s/step", flush=True
            )
        if (step + 1) % SAVE_EVERY_STEPS == 0:
            save_checkpoint(checkpoint, model, optims, generator, step + 1)
            print(f"validation loss {validation_loss(model, validation):.3f}", flush=True)
    finish(out, model.eval(), len(stream), validation_loss(model, validation), steps)


def finish(out: Path, model: LlamaForCausalLM, corpus_tokens: int, loss: float, steps: int) -> None:
    """Write the bfloat16 model and the facts of its training."""
    facts = {
        "steps": steps,
        "trained_tokens": steps * TOKENS_PER_STEP,
        "corpus_tokens": corpus_tokens,
        "validation_loss_nats": round(loss, 4),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps)
