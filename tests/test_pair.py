"""The pair in the package: its size, its card, and what its draft is worth on prompts that training never saw."""

from __future__ import annotations

import pytest
import torch
from texts import humaneval_prompts

from hf_dovetail import DovetailAssistantModel, GenerationStats, TreeShape
from hf_dovetail.demo import demo_prompts, load_pair, pair_path


def held_out(every: int) -> list[str]:
    """Every so-many-th problem of HumanEval."""
    return humaneval_prompts()[::every]


def tokens_per_round(stats: list[GenerationStats]) -> float:
    return sum(s.new_tokens - 1 for s in stats) / sum(s.rounds for s in stats)


def test_the_pair_is_small_and_has_a_card() -> None:
    assert sum(path.stat().st_size for path in pair_path().rglob("*") if path.is_file()) < 12e6
    card = (pair_path() / "README.md").read_text(encoding="utf-8")
    for word in ("licence", "Python Software Foundation", "BSD-3-Clause", "1600", "1200", "tokens per round"):
        assert word in card
    assert len(demo_prompts()) == 3


@pytest.mark.parametrize(
    ("sampling", "least"), [({"do_sample": False}, 4.0), ({"do_sample": True, "temperature": 1.0, "top_k": 0}, 1.8)]
)
def test_the_draft_is_accepted_and_the_answers_are_plain_generates(sampling: dict, least: float) -> None:
    """The thresholds leave room: all of HumanEval gives 5.16 and 3.18 (benchmarks/acceptance.py)."""
    target, draft, tokenizer = load_pair()
    torch.manual_seed(0)
    random = DovetailAssistantModel.from_target(target, num_hidden_layers=2)
    draft.tree = random.tree = TreeShape()
    trained, untrained = [], []
    for number, prompt in enumerate(held_out(every=14)):
        inputs = tokenizer(prompt, return_tensors="pt")

        def answer(**assistant: DovetailAssistantModel) -> list[int]:
            torch.manual_seed(7)
            return target.generate(**inputs, max_new_tokens=96, **assistant, **sampling)[0].tolist()  # noqa: B023

        plain = answer()
        assert answer(assistant_model=draft) == plain
        trained.append(draft.last_stats)
        if number < 3:
            assert answer(assistant_model=random) == plain
            untrained.append(random.last_stats)
    assert len(trained) == 12
    assert tokens_per_round(trained) > least > 1.4 > tokens_per_round(untrained) >= 1.0
