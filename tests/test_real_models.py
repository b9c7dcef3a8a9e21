"""Models trained by others, on real story openings; skipped where ../shared is absent."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import Extras, token_stream, train_draft

SHARED = Path(__file__).parents[2] / "shared"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="../shared (models and prompts of others) is not here")
MODELS = ("stories260K", "babyllama-tok105", "babyllama-tok361as105", "atome-vanilla-1m-bytes")


def prompts() -> list[str]:
    lines = (SHARED / "data/prompts/stories.jsonl").read_text().splitlines()
    return [json.loads(line)["turns"][0][:80] for line in lines[:3]]


def stories() -> list[str]:
    return (SHARED / "data/train/tinystories.txt").read_text()[:150_000].split("<|endoftext|>")


@pytest.mark.parametrize("name", MODELS)
def test_a_briefly_trained_draft_is_lossless_and_accepted(name: str, tmp_path: Path) -> None:
    folder = SHARED / "models" / name
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream = token_stream(tokenizer, stories())
    windows = stream[: len(stream) // 64 * 64].view(-1, 64)
    torch.manual_seed(0)
    draft, random = (DovetailAssistantModel.from_target(target) for _ in range(2))
    recipe = Recipe(steps=40, batch=8, window=64, learning_rate=3e-3, warmup=5, distribution_weight=1.0)
    train_draft(draft, target, windows, recipe, tmp_path, Extras(tokenizer))
    draft.tree = random.tree = TreeShape()  # automatic ones follow the clock, and look up what is copied
    kept = dict.fromkeys(("trained", "random"), 0)
    for seed, prompt in enumerate(prompts()):
        inputs = tokenizer(prompt, return_tensors="pt")
        for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 1.0, "top_k": 0}):
            torch.manual_seed(seed)
            plain = target.generate(**inputs, max_new_tokens=48, **sampling)
            for which, candidate in (("trained", draft), ("random", random)):
                torch.manual_seed(seed)
                assisted = target.generate(**inputs, max_new_tokens=48, assistant_model=candidate, **sampling)
                assert torch.equal(plain, assisted)
                kept[which] += candidate.last_stats.accepted
    assert kept["trained"] > kept["random"]
