"""`draft.tree = "auto"`, the default: the answers are plain generate's, whatever the controller does."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from machines import at_these_costs
from observers import RecordingStreamer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail import plugin as plugin_module
from hf_dovetail.controller import PROBE, AutoController
from hf_dovetail.curves import ROW_POINTS, CostCurves
from hf_dovetail.decode import Round
from hf_dovetail.demo import demo_prompts, load_pair
from hf_dovetail.drafting import Drafting
from hf_dovetail.experience import LARGEST, Experience
from hf_dovetail.learned import learned_of
from hf_dovetail.lookup import Lookup

pytestmark = pytest.mark.usefixtures("own_cache")
FREE = CostCurves(ROW_POINTS, (0,), (tuple([10.0] * 7),), 0.1, 0.001, 0.05)
USUAL = CostCurves(ROW_POINTS, (0,), (tuple(10.0 + 0.3 * rows for rows in ROW_POINTS),), 1.0, 0.01, 0.5)


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, DovetailAssistantModel, PreTrainedTokenizerBase]:
    target, draft, tokenizer = load_pair()
    draft.draft_device = "cpu"
    return target, draft, tokenizer


def test_auto_is_the_default_and_other_words_are_refused(llama: PreTrainedModel) -> None:
    draft = DovetailAssistantModel.from_target(llama)
    assert draft.tree == "auto"
    for value in ("Auto", "", 16, None, 3.5):
        with pytest.raises(ValueError, match=r'expected a TreeShape, such as .*, or "auto"'):
            draft.tree = value
    draft.tree = TreeShape(3)
    draft.tree = "auto"
    assert copy.deepcopy(draft).tree == pickle.loads(pickle.dumps(draft)).tree == "auto"


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_the_real_pair_gives_plain_generates_answers(
    length: int, sample: bool, pair: tuple[PreTrainedModel, DovetailAssistantModel, PreTrainedTokenizerBase]
) -> None:
    """The first call probes, the second uses what it learned; tokens, scores and the streamer's calls are the same."""
    target, draft, tokenizer = pair
    ids = tokenizer(demo_prompts()[0], return_tensors="pt").input_ids
    for _ in range(2):
        streams = RecordingStreamer(), RecordingStreamer()
        plain = tiny.run(target, ids, max_new_tokens=length, do_sample=sample, streamer=streams[0])
        ours = tiny.run(target, ids, draft, max_new_tokens=length, do_sample=sample, streamer=streams[1])
        tiny.assert_same(plain, ours)
        assert streams[0].calls == streams[1].calls
    assert draft.last_stats.new_tokens == length


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("kind", tiny.DRAFTS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "lfm2"])
def test_trees_of_all_sizes_in_one_answer(
    family: str, kind: str, on_host: bool, monkeypatch: pytest.MonkeyPatch, ids: Tensor
) -> None:
    """Guards tokens and features that wait while rounds are plain: lost or doubled, later trees would be wrong."""
    target = tiny.build(family)
    draft = tiny.draft_for(target, "untrained") if family == "lfm2" else tiny.draft_for(target, kind)
    draft.tree, sizes, accepted = "auto", [], []
    experience = Experience()
    at_these_costs(monkeypatch, FREE, experience, on_host)
    plan = AutoController.plan

    def sometimes(self: AutoController, most: TreeShape, *arguments: int) -> TreeShape:
        shape = plan(self, most, *arguments)
        if len(sizes) % 4 in (1, 2) and shape.nodes:
            self._plan = shape = TreeShape(0, 0, 10)
        sizes.append(shape.nodes)
        return shape

    monkeypatch.setattr(AutoController, "plan", sometimes)
    for sample in (False, True):
        tiny.both(target, draft, ids, do_sample=sample, max_new_tokens=60)
        accepted.append(draft.last_stats.accepted)
    assert 0 in sizes
    assert max(sizes) > 5
    if kind == "accepting" and family != "lfm2":
        assert accepted[0] > 20
        assert accepted[1] > 5  # these models are hardly surer than a die


def test_the_draft_knows_what_it_slept_through(
    pair: tuple[PreTrainedModel, DovetailAssistantModel, PreTrainedTokenizerBase],
    ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tree grown after many plain rounds is the tree that a draft proposes which followed every round."""
    target, draft, tokenizer = pair
    prompt = tokenizer(demo_prompts()[1], return_tensors="pt").input_ids
    trees = []
    for pauses in (False, True):
        rounds: list[Round] = []
        draft.tree, draft.watch = TreeShape(6, 3, 4), rounds.append
        if pauses:
            monkeypatch.setattr(
                plugin_module.Controller,
                "plan",
                lambda self, most, context, waiting, remaining: (
                    most if context >= prompt.shape[1] + 30 else TreeShape(0)
                ),
            )
        tiny.run(target, prompt, draft, max_new_tokens=60)
        trees.append({int(_position(rounds, i)): r.tree.tokens.tolist() for i, r in enumerate(rounds)})
    draft.tree, draft.watch = "auto", None
    common = [at for at in set(trees[0]) & set(trees[1]) if len(trees[1][at][0]) > 1 and len(trees[0][at][0]) > 1]
    assert common
    assert all(trees[0][at] == trees[1][at] for at in common)
    assert min(len(tokens[0]) for tokens in trees[1].values()) == 1


def _position(rounds: list[Round], index: int) -> int:
    return sum(len(r.accepted.tokens) for r in rounds[:index])


def test_a_random_draft_ends_in_plain_decoding(
    pair: tuple[PreTrainedModel, DovetailAssistantModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in rounds and draft passes at fixed costs: no clock. The trained draft at the same costs stays awake."""
    target, trained, tokenizer = pair
    torch.manual_seed(0)
    random = DovetailAssistantModel.from_target(target)
    random.draft_device = "cpu"
    ids = tokenizer(demo_prompts()[2], return_tensors="pt").input_ids
    grown, propose = [], Drafting._propose
    for draft in (random, trained):
        at_these_costs(monkeypatch, USUAL, Experience())
        rounds: list[Round] = []
        asked: list[int] = []

        def counted(*arguments: Any, asked: list[int] = asked, rounds: list[Round] = rounds) -> Any:
            asked.append(len(rounds))
            return propose(*arguments)

        monkeypatch.setattr(Drafting, "_propose", counted)
        draft.watch = rounds.append
        for _ in range(2):
            tiny.run(target, ids, draft, max_new_tokens=128, min_new_tokens=128)
        draft.watch = None
        half = len(rounds) // 2
        grown.append(sum(turn >= half for turn in asked) / (len(rounds) - half))
    assert grown[0] < 0.05
    assert grown[1] > 0.9


def test_the_second_call_goes_on_with_what_the_first_learned(llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards what is kept between calls, by draft and target; another draft starts anew."""
    draft = tiny.draft_for(llama, "accepting")
    draft.tree, rounds = "auto", []
    draft.watch = rounds.append
    tiny.run(llama, ids, draft, max_new_tokens=60)
    assert rounds[0].tree.num_nodes == PROBE[0].nodes == 0
    assert rounds[1].tree.num_nodes == PROBE[1].nodes == 7
    known = learned_of(draft, llama)
    assert known.costs.level.weight >= 1
    first = len(rounds)
    tiny.run(llama, ids, draft, max_new_tokens=60)
    assert learned_of(draft, llama) is known
    assert known.costs.probes > 1
    assert rounds[first].tree.num_nodes > 0
    tiny.run(llama, ids, draft, max_new_tokens=60, do_sample=True)
    assert learned_of(draft, llama) is known  # what rounds cost is the same when sampling
    assert learned_of(tiny.met(tiny.draft_for(llama, "accepting"), llama), llama) is not known


@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_threads_share_what_is_learned(kind: str, llama: PreTrainedModel) -> None:
    draft = tiny.draft_for(llama, kind)
    draft.tree = "auto"
    prompts = [tiny.prompt(length, seed=length) for length in (5, 9, 14, 20)]

    def answer(prompt: Tensor, *drafts: DovetailAssistantModel) -> list[int]:
        options = {"assistant_model": drafts[0]} if drafts else {}
        return llama.generate(prompt, max_new_tokens=80, do_sample=False, **options)[0].tolist()

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(max_workers=2) as pool:
        together = list(pool.map(lambda prompt: answer(prompt, draft), prompts * 2))
    assert together == alone * 2
    assert learned_of(draft, llama).costs.probes > 1


def test_waiting_tokens_do_not_hide_the_drafts_last_position(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the room of a draft that sleeps: what waits counts; its positions end, the answer does not."""
    target = tiny.build("llama")
    draft = tiny.draft_for(target, "accepting")
    draft.tree, draft.config.max_position_embeddings = "auto", 40
    at_these_costs(monkeypatch, FREE, Experience())
    rounds: list[Round] = []
    draft.watch = rounds.append
    monkeypatch.setattr(Lookup, "continuation", lambda self, most: ([], 0))  # it has no last position
    tiny.both(target, draft, ids, max_new_tokens=60)
    ends = [ids.shape[1] + _position(rounds, i) + 1 + int(r.tree.depths.max()) for i, r in enumerate(rounds)]
    assert max(end for end, r in zip(ends, rounds, strict=True) if r.tree.num_nodes) <= 41
    assert max(r.tree.num_nodes for r in rounds) > LARGEST.nodes // 2
    assert sum(r.tree.num_nodes == 0 for r in rounds) > 20
