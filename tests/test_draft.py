"""The drafting session against brute force that computes every path from scratch, without any cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import GenerationConfig
from trees import eagle_2, features_of, from_scratch, paths

from hf_dovetail import TreeShape
from hf_dovetail.draft import DraftSession
from hf_dovetail.plugin.sampling import SHARPEST, sharpness_of
from hf_dovetail.recast import RecastLM
from hf_dovetail.tree import DraftTree


@pytest.mark.parametrize(
    "shape", [TreeShape(12, 3, 3), TreeShape(6, 5, 2), TreeShape(4, 6, 1), TreeShape(9, 0, 9), TreeShape(1, 4, 3)]
)
@pytest.mark.parametrize(
    ("kind", "family"), [("dgf", "llama"), ("lm", "llama"), ("lm", "mistral"), ("lm", "gemma2"), ("lm", "gpt2")]
)
def test_a_grown_tree_is_eagle_2s(kind: str, family: str, shape: TreeShape) -> None:
    """Guards the vectorised expansion: masks, positions, features and parents of every level; in two rounds."""
    target, draft = tiny.random_pair(kind, family, blocks=2)
    ids = tiny.prompt(15)
    features = features_of(target, ids)
    session = DraftSession(draft)
    session.begin(ids[:, :1], 0)
    deepest = 0
    for held, known in ((1, 11), (11, 15)):
        session.commit(ids[:, held:known], features[:, held - 1 : known - 1] if kind == "dgf" else None)
        tree = DraftTree.unpack(ids[:, known - 1 : known], session.grow(shape))
        expected = eagle_2(from_scratch(draft, ids[:, :known], features[:, : known - 1]), shape)
        found = paths(tree)
        assert set(found) == set(expected)
        assert [found[path] for path in expected] == pytest.approx(list(expected.values()), abs=1e-4)
        assert session.length == known - (kind == "dgf")
        deepest = max(deepest, int(tree.depths.max()))
    assert deepest == 1 or shape.nodes > 1
    assert deepest > 1 or min(shape.depth, shape.nodes - 1) == 0 or shape.top_k > 2


@pytest.mark.parametrize(
    ("kind", "family", "blocks"), [("dgf", "llama", 1), ("dgf", "qwen3", 3), ("lm", "phi3", 1), ("lm", "gemma3", 1)]
)
def test_incremental_rows_are_those_of_one_full_pass(kind: str, family: str, blocks: int) -> None:
    """Guards the draft's cache: rows committed in turns, with trees grown and forgotten in between."""
    target, draft = tiny.random_pair(kind, family, blocks)
    ids = tiny.prompt(30)
    features = features_of(target, ids)
    session = DraftSession(draft, capacity=3)
    session.begin(ids[:, :1], 0)
    known = 1
    for count in (9, 1, 1, 4, 2, 7, 3):
        session.commit(
            ids[:, known : known + count], features[:, known - 1 : known + count - 1] if kind == "dgf" else None
        )
        known += count
        tree = DraftTree.unpack(ids[:, known - 1 : known], session.grow(TreeShape(tiny.VOCAB, 0, tiny.VOCAB)))
        expected = from_scratch(draft, ids[:, :known], features[:, : known - 1])(())
        found = torch.empty(tiny.VOCAB)
        found[tree.tokens[0, 1:]] = tree.log_probs[0, 1:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert known == 28
    assert session.length == 28 - (kind == "dgf")
    if kind == "lm":
        session._steps.cache.check_integrity(28)


@torch.no_grad()
def test_a_session_that_starts_in_the_middle_counts_positions_from_there() -> None:
    """Guards continued conversations: the first row of the draft stands at the first new position."""
    target, draft = tiny.random_pair("dgf", "llama")
    ids = tiny.prompt(20)
    features = features_of(target, ids)
    session = DraftSession(draft)
    session.begin(ids[:, 12:13], 12)
    session.commit(ids[:, 13:], features[:, 12:19])
    tree = DraftTree.unpack(ids[:, -1:], session.grow(TreeShape(6, 0, 6)))
    hidden = draft(ids[:, 13:], features[:, 12:19], position_ids=torch.arange(12, 19).unsqueeze(0))
    expected = draft.logits(hidden)[0, -1].log_softmax(-1).topk(6)
    assert sorted(tree.tokens[0, 1:].tolist()) == sorted(expected.indices.tolist())
    assert session.length == 19


def test_growing_happens_on_the_device_in_one_packed_tensor(monkeypatch: Any) -> None:
    """Guards the one copy per round: on an accelerator no tensor is read by the host while a tree grows."""
    target, draft = tiny.random_pair("dgf", "llama")
    ids = tiny.prompt(9)
    session, pruning = DraftSession(draft, on_host=False), DraftSession(draft)
    for each in (session, pruning):
        each.begin(ids[:, :1], 0)
        each.commit(ids[:, 1:], features_of(target, ids)[:, :8])
    rows: list[int] = []
    level = pruning._steps.level
    monkeypatch.setattr(
        pruning._steps, "level", lambda tokens, *args: rows.append(tokens.shape[1]) or level(tokens, *args)
    )
    pruned = pruning.grow(TreeShape(10, 3, 4))
    assert 0 < sum(rows) < 3 * 4, "nothing was pruned"

    def forbidden(*args: object) -> None:
        raise AssertionError("the host read a tensor")

    for name in ("item", "tolist", "__int__", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    packed = session.grow(TreeShape(10, 3, 4))
    monkeypatch.undo()
    assert packed.shape == (1, 3, 10)
    assert packed.dtype == torch.int32
    assert torch.equal(packed[:, :2], pruned[:, :2])  # tokens and parents
    log_probs = [tree[:, 2].contiguous().view(torch.float32) for tree in (packed, pruned)]
    torch.testing.assert_close(*log_probs)


@pytest.mark.parametrize(
    ("sampling", "sharpness"),
    [
        ({"do_sample": False}, SHARPEST),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.8}, 1.25),
        ({"do_sample": True, "temperature": 2.0}, 0.5),
        ({"do_sample": True, "temperature": 0.1}, SHARPEST),
    ],
)
def test_a_draft_is_as_sure_as_the_targets_way_of_choosing(sampling: dict, sharpness: float) -> None:
    assert sharpness_of(GenerationConfig(**sampling)) == pytest.approx(sharpness)


@pytest.mark.parametrize("case", tiny.CASES)
@pytest.mark.parametrize(("kind", "family"), [("untrained", "llama"), ("untrained", "gemma2"), ("noisy", "mistral")])
def test_every_tree_of_an_answer_is_drafted_from_the_answer_so_far(kind: str, family: str, case: str) -> None:
    """Guards the seam between the models: tokens and features of the accepted path, none shifted, lost or twice."""
    target = tiny.build(family)
    ids, options, start = tiny.prepared(case, target)
    draft = tiny.draft_for(target, kind)
    draft.tree, rounds = TreeShape(6, 3, 3), []
    draft.watch = rounds.append
    answer = tiny.run(target, ids, draft, max_new_tokens=60, **options).sequences
    pad = 4 if case == "padded" else 0
    features = features_of(target, answer[:, pad:])[:, start - pad :]
    known = ids.shape[1] + 1
    for turn in rounds:
        shape = draft.tree.clipped(answer.shape[1] - known - 1)
        seen = answer[:, start:known], features[:, : known - start - 1]
        expected = eagle_2(from_scratch(draft, *seen, sharpness=SHARPEST), shape)
        assert set(paths(turn.tree)) == set(expected)
        known += len(turn.accepted.tokens)
    assert known == answer.shape[1]
    assert draft.last_stats.accepted > 1


def counting(step: Callable[..., Tensor], widths: list[int]) -> Callable[..., Tensor]:
    """`RecastLM.step`, with the number of rows of every call entered in `widths`."""

    def counted(network: RecastLM, tokens: Tensor, *rest: Any) -> Tensor:
        widths.append(tokens.shape[1])
        return step(network, tokens, *rest)

    return counted


@torch.no_grad()
@pytest.mark.parametrize("shape", [TreeShape(4, 7, 4), TreeShape(8, 7, 6), TreeShape(16, 7, 10)])
def test_pruning_on_the_cpu_leaves_the_same_tree(shape: TreeShape) -> None:
    """Guards the bound of `levels`: a node dropped too early costs its descendants their place."""
    target = tiny.build("llama")
    target.lm_head.weight.mul_(4.0)  # as sure as trained models are: trees become deep
    draft = tiny.met(tiny.draft_for(target, "accepting"), target)
    depths, saved = set(), 0
    for seed in range(20):
        ids, trees, rows = tiny.prompt(10, seed=seed), [], []
        for prunes in (True, False):
            session = DraftSession(draft, on_host=prunes)
            session.begin(ids[:, :1], 0)
            session.commit(ids[:, 1:], None)
            widths = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(RecastLM, "step", counting(RecastLM.step, widths))
                trees.append(DraftTree.unpack(ids[:, -1:], session.grow(shape)))
            rows.append(sum(widths[1:]))  # the first are the committed rows
        assert trees[0].tokens.tolist() == trees[1].tokens.tolist()
        assert trees[0].parents.tolist() == trees[1].parents.tolist()
        depths.add(int(trees[0].depths.max()))
        saved += rows[1] - rows[0]
    assert saved > 0
    assert len(depths) > 1
