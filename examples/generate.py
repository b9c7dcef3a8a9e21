"""Existing code plus one import and one argument: `model.generate(..., assistant_model=draft)`."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_dovetail  # noqa: F401  registers Dovetail with transformers
from hf_dovetail.demo import pair_path

target = AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=torch.float32)
draft = AutoModelForCausalLM.from_pretrained(pair_path("draft"), dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(pair_path("target"))

inputs = tokenizer("def add(a, b):\n", return_tensors="pt")
answer = target.generate(**inputs, assistant_model=draft, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(answer[0]))

plain = target.generate(**inputs, max_new_tokens=64, do_sample=False)
print("same as without the draft:", torch.equal(answer, plain))
print(f"{draft.last_stats.tokens_per_round:.2f} tokens per round")
