"""Text as it is written: a `TextIteratorStreamer`, with `generate` in a thread."""

from threading import Thread

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

import hf_dovetail  # noqa: F401  registers Dovetail with transformers
from hf_dovetail.demo import pair_path

target = AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=torch.float32)
draft = AutoModelForCausalLM.from_pretrained(pair_path("draft"), dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(pair_path("target"))

inputs = tokenizer("import os\n\ndef list_files(path):\n", return_tensors="pt")
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
options = {"assistant_model": draft, "max_new_tokens": 64, "do_sample": False, "streamer": streamer}
thread = Thread(target=target.generate, kwargs={**inputs, **options})
thread.start()
for piece in streamer:
    print(piece, end="", flush=True)
thread.join()
print(f"\n{draft.last_stats.tokens_per_round:.2f} tokens per round")
