"""A pipeline that is given the draft by its path."""

import torch
from transformers import pipeline

import hf_dovetail  # noqa: F401  registers Dovetail with transformers
from hf_dovetail.demo import pair_path

write = pipeline(
    "text-generation",
    model=str(pair_path("target")),
    assistant_model=str(pair_path("draft")),
    dtype=torch.float32,
    device="cpu",
)
prompt = "class Stack:\n    def __init__(self):\n"
print(write(prompt, max_new_tokens=64, do_sample=False)[0]["generated_text"])
print(f"{write.assistant_model.last_stats.tokens_per_round:.2f} tokens per round")
