"""Any small causal LM with the target's vocabulary drafts trees; here the demo target drafts for itself."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.demo import pair_path

target = AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=torch.float32)
small = AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=torch.float32)  # in your code: a smaller one
tokenizer = AutoTokenizer.from_pretrained(pair_path("target"))

draft = DovetailAssistantModel.from_causal_lm(small)
draft.tree = TreeShape(nodes=7, depth=4, top_k=10)  # the paper's laptop setting
inputs = tokenizer("def is_prime(n):\n", return_tensors="pt")
torch.manual_seed(0)
answer = target.generate(**inputs, assistant_model=draft, max_new_tokens=64, do_sample=True, temperature=0.8)
print(tokenizer.decode(answer[0]))
print(f"{draft.last_stats.tokens_per_round:.2f} tokens per round of at most {draft.tree.levels + 1}")
