"""Published drafts: what ours computes from their files is what their own formulas say, row by row."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from published import CASES, DRAFT_VOCAB, HIDDEN, VICUNA, VOCAB, Case, Reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from trees import eagle_2, paths

from hf_dovetail import DovetailAssistantModel, DovetailCandidateGenerator, TreeShape, prepare_target, register
from hf_dovetail.calibrate import calibrate
from hf_dovetail.draft import DraftSession
from hf_dovetail.formats import read_tensors, recognise
from hf_dovetail.plugin.sampling import SHARPEST
from hf_dovetail.target import FeatureTap
from hf_dovetail.tree import DraftTree
from hf_dovetail.weights import feature_layers

COMMON = ["dgf", "eagle-vicuna", "eagle3", "speculators"]


def loaded(case: Case, folder: Path, target: PreTrainedModel | None = None) -> DovetailAssistantModel:
    """The draft of a published folder, ready for the target if one is given."""
    draft = DovetailAssistantModel.from_pretrained(case.write(folder))
    draft.draft_device, draft.tree = "cpu", TreeShape(nodes=10, depth=3, top_k=4)
    return draft if target is None else tiny.met(draft, target)


def own_features(draft: DovetailAssistantModel, target: PreTrainedModel, ids: Tensor) -> Tensor:
    """What our own tap takes."""
    with torch.no_grad():
        return FeatureTap(target, True, feature_layers(draft.config, target.config))(lambda: target(ids))[1]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_the_published_formulas(name: str, tmp_path: Path) -> None:
    """Guards every weight, norm, bias, position, feature and `d2t`: all logits of committed rows and four own steps."""
    case = CASES[name]
    target = case.target().double()
    draft, reference = tiny.met(loaded(case, tmp_path).double(), target), Reference(case, target)
    ids = tiny.prompt(20)
    known, path = ids[:, :14], tuple(ids[0, 14:18].tolist())
    features = reference.features(known[:, :-1])
    session = DraftSession(draft)
    session.begin(known[:, :1], 0)
    steps = session._steps
    hidden = steps.catch_up(known[:, 1:], draft.encode(own_features(draft, target, known[:, :-1])))
    seen = []
    for depth in range(5):
        found = torch.full((VOCAB,), float("-inf"))
        found[slice(None) if draft.target_ids is None else draft.target_ids] = steps.logits(hidden)[0, -1]
        expected = reference.logits(known, features, path[:depth]).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        seen.append(found)
        if depth < 4:
            hidden = steps.level(torch.tensor([[path[depth]]]), hidden, torch.ones(1, depth + 1, dtype=torch.bool))
    assert all(float((a - b).abs().nan_to_num(0).max()) > 0.05 for a, b in pairwise(seen))


@pytest.mark.parametrize("name", CASES)
def test_trees_are_eagle_2s_over_the_published_formulas(name: str, tmp_path: Path) -> None:
    """Guards the tree's tokens (the target's ids), log-probabilities, and their way back into the next row."""
    case, shape = CASES[name], TreeShape(8, 3, 3)
    target = case.target()
    draft, reference = loaded(case, tmp_path, target), Reference(case, target)
    ids = tiny.prompt(16)
    with torch.no_grad():
        features = reference.features(ids)
    session = DraftSession(draft)
    session.begin(ids[:, :1], 0)
    for held, known in ((1, 11), (11, 15)):
        session.commit(ids[:, held:known], own_features(draft, target, ids)[:, held - 1 : known - 1])
        tree = DraftTree.unpack(ids[:, known - 1 : known], session.grow(shape))
        expected = eagle_2(reference.continuations(ids[:, :known], features[:, : known - 1]), shape)
        found = paths(tree)
        assert set(found) == set(expected)
        assert [found[path] for path in expected] == pytest.approx(list(expected.values()), abs=2e-3)
    assert int(tree.depths.max()) > 1


@pytest.mark.parametrize("name", ["eagle-vicuna", "eagle3", "speculators"])
def test_a_fixed_round_is_the_hosts(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Guards accelerators: the same tree in fixed shapes, and nothing is read by the host."""
    case = CASES[name]
    target = case.target().double()
    draft = tiny.met(loaded(case, tmp_path).double(), target)
    ids, trees = tiny.prompt(30), []
    features = own_features(draft, target, ids)
    for on_host in (True, False):
        session = DraftSession(draft, on_host=on_host)
        session.begin(ids[:, :1], 0)
        session.commit(ids[:, 1:24], features[:, :23])
        session.grow(TreeShape(8, 2, 3))
        session.commit(ids[:, 24:27], features[:, 23:26])
        if not on_host:
            for read in ("item", "tolist", "__int__", "__float__", "__bool__", "cpu", "numpy"):
                monkeypatch.setattr(torch.Tensor, read, _forbidden)
        packed = session.grow(TreeShape(12, 3, 4))
        monkeypatch.undo()
        trees.append(DraftTree.unpack(ids[:, 26:27], packed))
    assert trees[0].tokens.tolist() == trees[1].tokens.tolist()
    assert trees[0].parents.tolist() == trees[1].parents.tolist()
    torch.testing.assert_close(trees[0].log_probs, trees[1].log_probs)


def _forbidden(*args: object) -> None:
    raise AssertionError("the host read a tensor")


@pytest.mark.parametrize("case", tiny.CASES)
@pytest.mark.parametrize("name", ["eagle-vicuna", "eagle3", "eagle3-qwen3"])
def test_every_tree_of_an_answer_is_the_published_drafts(name: str, case: str, tmp_path: Path) -> None:
    """Guards the tap and the seam: features of inner layers, of the accepted path, in every kind of prefill."""
    published = CASES[name]
    target = published.target()
    ids, options, start = tiny.prepared(case, target)
    draft, reference, rounds = loaded(published, tmp_path), Reference(published, target), []
    draft.watch = rounds.append
    answer = tiny.run(target, ids, draft, max_new_tokens=16, **options).sequences
    pad = 4 if case == "padded" else 0
    with torch.no_grad():
        features = reference.features(answer[:, pad:])[:, start - pad :]
    known = ids.shape[1] + 1
    for turn in rounds:
        shape = draft.tree.clipped(answer.shape[1] - known - 1)
        seen = answer[:, start:known], features[:, : known - start - 1]
        assert set(paths(turn.tree)) == set(eagle_2(reference.continuations(*seen, SHARPEST), shape))
        known += len(turn.accepted.tokens)
    assert known == answer.shape[1]
    assert len(rounds) > 5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7}], ids=["greedy", "sampled"])
def test_answers_are_plain_generates(name: str, sampling: dict, tmp_path: Path) -> None:
    case = CASES[name]
    target = case.target()
    draft = loaded(case, tmp_path)
    tiny.both(target, draft, tiny.prompt(), max_new_tokens=12, **sampling)
    assert draft.last_stats.drafted > 0


@torch.no_grad()
def test_a_draft_that_knows_its_target_is_accepted(tmp_path: Path) -> None:
    """Guards the way of a reduced vocabulary through the whole loop: ids off by one would never be accepted.

    The target's next token depends on the last one alone, and is in the draft's vocabulary. The draft's attention sees
    its own row only; a row's value takes the hidden state away again and leaves the token's embedding.
    """
    case = Case("eagle3", VICUNA, extra={"draft_vocab_size": DRAFT_VOCAB}, layers=(2, 4, 5))
    target, tensors, eye = case.target(), case.tensors(), torch.eye(HIDDEN)
    for layer in target.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    target.lm_head.weight[~tensors["t2d"]] = 0.0
    random = loaded(case, tmp_path)
    for name in tensors:
        if name not in ("d2t", "t2d"):
            tensors[name].fill_(1.0 if name.endswith("norm.weight") else 0.0)
    tensors["midlayer.self_attn.q_proj.weight"][:, :HIDDEN] = tensors["midlayer.self_attn.k_proj.weight"][
        :, :HIDDEN
    ] = 9 * eye
    tensors["midlayer.self_attn.v_proj.weight"].copy_(torch.cat((eye, -eye), dim=1))
    tensors["midlayer.self_attn.o_proj.weight"].copy_(eye)
    tensors["lm_head.weight"].copy_(target.lm_head.weight[tensors["t2d"]])
    case.write(tmp_path, tensors)
    knowing = DovetailAssistantModel.from_pretrained(tmp_path)
    for draft, least, most in ((knowing, 4.0, 5.0), (random, 1.0, 2.0)):
        draft.draft_device, draft.tree = "cpu", TreeShape(nodes=8, depth=3, top_k=2)
        tiny.both(target, draft, tiny.prompt(), max_new_tokens=30)
        assert least <= draft.last_stats.tokens_per_round <= most


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("name", ["eagle-vicuna", "eagle3-qwen3"])
def test_the_stock_loop_drafts_the_same_chains(name: str, tmp_path: Path) -> None:
    """Guards the features of `model_outputs.hidden_states`: those that our own tap takes."""
    case = CASES[name]
    target = case.target()
    draft = loaded(case, tmp_path)
    draft.tree, chains = TreeShape(nodes=3, depth=2, top_k=1), []

    class Watching(DovetailCandidateGenerator):
        def propose(self, shape: TreeShape, keep_going: Any = None) -> Tensor:
            chains.append(super().propose(shape, keep_going))
            return chains[-1]

    target._get_candidate_generator = lambda **kwargs: Watching(draft, target)
    plain = tiny.run(target, tiny.prompt(), max_new_tokens=12)
    stock = tiny.run(target, tiny.prompt(), prompt_lookup_num_tokens=1, max_new_tokens=12)
    tiny.assert_same(plain, stock)
    register()
    rounds: list[Any] = []
    draft.watch = rounds.append
    tiny.run(target, tiny.prompt(), draft, max_new_tokens=12)
    ours = [turn.tree.tokens[0, 1:].tolist() for turn in rounds]
    assert len(chains) > 5
    assert [chain[0, 0].tolist()[: len(own)] for chain, own in zip(chains, ours, strict=False)] == ours[: len(chains)]


@pytest.mark.parametrize("name", COMMON)
def test_what_was_loaded_can_be_saved_as_ours(name: str, tmp_path: Path) -> None:
    """Guards the own format: configuration, buffers and norms come back, and the second load is the first."""
    case = CASES[name]
    target = case.target()
    published, ours = tmp_path / "published", tmp_path / "ours"
    published.mkdir()
    first = loaded(case, published, target)
    first.save_pretrained(ours)
    again = tiny.met(DovetailAssistantModel.from_pretrained(ours), target)
    changed = {"_name_or_path", "architectures", "transformers_version"}
    saved = [{k: v for k, v in draft.config.to_dict().items() if k not in changed} for draft in (first, again)]
    assert saved[0] == saved[1]
    assert first.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in again.state_dict().items())


def test_curves_are_measured_with_inner_layers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards calibration and the automatic tree, for drafts that read several layers."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    case = CASES["eagle3"]
    target = case.target()
    draft = loaded(case, tmp_path)
    curves = calibrate(target, draft, progress=False, budget_s=0.1)
    assert curves.level_ms >= 0
    draft.tree = "auto"
    tiny.both(target, draft, tiny.prompt(), max_new_tokens=12)


def test_a_prepared_target_hands_over_the_same_features(tmp_path: Path) -> None:
    """Guards the tap on an engine's target: same trees, same answer; and a graph's key names all that it reads."""
    case = CASES["eagle3-qwen3"]
    target = case.target()
    draft, answers, trees = loaded(case, tmp_path), [], []
    for prepare in (lambda model: model, prepare_target):
        turns: list[Any] = []
        draft.watch = turns.append
        answers.append(tiny.run(prepare(target), tiny.prompt(), draft, max_new_tokens=10).sequences.tolist())
        trees.append([sorted(paths(turn.tree)) for turn in turns])
    assert answers[0] == answers[1]
    assert trees[0] == trees[1]
    assert {draft.vocabulary.data_ptr(), draft.embed_tokens.weight.data_ptr()} <= {
        place for place, _ in draft.addresses()
    }


def test_a_nested_geometry_is_the_same_draft() -> None:
    """Guards vLLM's form of EAGLE's configuration, and old tensors that nobody needs."""
    case = CASES["eagle-llama3"]
    shapes = {name: tuple(tensor.shape) for name, tensor in case.tensors().items()}
    flat = recognise(case.config(), shapes, "flat")
    shapes["layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    nested = recognise({"model_type": "eagle", "model": case.config()}, shapes, "nested")
    assert nested.config.to_dict() == flat.config.to_dict()
    assert nested.names == flat.names
    assert recognise(case.config(), {"model.layers.0.input_layernorm.weight": (32,)}, "a language model") is None


def test_model_optimizers_names_are_the_same_draft() -> None:
    """Guards NVIDIA's EAGLE-3: speculators' names without `t2d`, under a flat configuration."""
    case = CASES["eagle3"]
    tensors, config = case.tensors(), {**case.config(), "num_hidden_layers": 1}
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items() if name != "t2d"}
    stated = {**config, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [], "use_aux_hidden_state": True}}
    ours, theirs = (
        recognise(said, {name: tuple(tensor.shape) for name, tensor in held.items()}, "a draft")
        for said, held in ((config, tensors), (stated, renamed))
    )
    assert theirs.config.to_dict() == ours.config.to_dict()
    first, second = ours.state(tensors), theirs.state(renamed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_new_drafts_start_by_passing_the_feature_on() -> None:
    target = tiny.build("llama", num_hidden_layers=8)
    for fusion, width in (("eagle", 64), ("eagle3", 96)):
        draft = DovetailAssistantModel.from_target(target, fusion=fusion)
        assert draft.fusion.fc.weight.shape == (32, width)
        assert torch.equal(draft.fusion.fc.weight[:, -32:], torch.eye(32))
        assert 0 < float(draft.fusion.fc.weight[:, :32].detach().std()) < 0.1
    assert draft.config.feature_layers == [2, 4, 5]
    assert torch.equal(draft.lm_head.weight, target.lm_head.weight)


def test_precision_is_the_checkpoints_or_the_one_asked_for(tmp_path: Path) -> None:
    case = CASES["eagle3"]
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in case.tensors().items()}
    case.write(tmp_path, half)
    for asked, found in (({}, torch.float16), ({"dtype": "auto"}, torch.float16), ({"dtype": torch.bfloat16},) * 2):
        found = torch.bfloat16 if isinstance(found, dict) else found
        draft, info = DovetailAssistantModel.from_pretrained(tmp_path, output_loading_info=True, **asked)
        assert draft.dtype == found
        assert draft.vocabulary.dtype == torch.int64
        assert not info["missing_keys"]


def test_a_plain_language_model_drafts_as_it_is(tmp_path: Path) -> None:
    target = tiny.build("llama")
    target.save_pretrained(tmp_path)
    draft = DovetailAssistantModel.from_pretrained(tmp_path)
    draft.draft_device, draft.tree = "cpu", TreeShape(nodes=12, depth=4, top_k=4)
    assert draft.config.fusion == "none"
    tiny.both(target, draft, tiny.prompt())
    assert draft.last_stats.tokens_per_round > 3
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        DovetailAssistantModel.from_pretrained(tmp_path)


def test_the_target_may_change_and_the_own_weights_stay(tmp_path: Path) -> None:
    """Guards what is shared: own embeddings and head are never replaced, the target's are taken anew."""
    (tmp_path / "own").mkdir()
    case = CASES["speculators"]
    target = case.target()
    draft = loaded(case, tmp_path / "own", target)
    assert draft._shared.tensors == []
    own = draft.embed_tokens.weight.clone()
    tiny.met(draft, tiny.build("llama", seed=3, num_hidden_layers=8))
    assert torch.equal(draft.embed_tokens.weight, own)
    shares = loaded(CASES["eagle3"], tmp_path)
    for made in (target, tiny.build("llama", seed=3, num_hidden_layers=8)):
        tiny.met(shares, made)
        assert [t.data_ptr() for t in shares._shared.tensors] == [made.model.embed_tokens.weight.data_ptr()]


def without(name: str) -> Any:
    return lambda tensors, config: tensors.pop(name)


def changed(**values: Any) -> Any:
    return lambda tensors, config: config.update(values)


def put(name: str, value: Tensor) -> Any:
    return lambda tensors, config: tensors.update({name: value})


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        ("eagle3", without("midlayer.hidden_norm.weight"), "missing: midlayer.hidden_norm.weight"),
        ("eagle3", without("lm_head.weight"), r"draft_vocab_size 40, it has no lm_head, and the target's ranks 101"),
        ("eagle3", without("d2t"), r"d2t is missing: it draws on 40 of the target's 101"),
        ("eagle3", put("d2t", torch.zeros(DRAFT_VOCAB, dtype=torch.long)), "d2t and t2d name different tokens"),
        ("eagle3", put("d2t", torch.full((DRAFT_VOCAB,), 90)), "d2t names 40 tokens between 90 and 129"),
        (
            "eagle3",
            lambda tensors, config: tensors.update(t2d=tensors["t2d"][:-1]),
            "t2d has 100 entries for 101 tokens",
        ),
        ("eagle3", changed(draft_vocab_size=41), "says draft_vocab_size 41, lm_head has 40 rows"),
        ("eagle3", changed(rope_scaling={"rope_type": "longrope", "factor": 2.0}), "RoPE is of type 'longrope'"),
        ("eagle-vicuna", changed(num_hidden_layers=2), "num_hidden_layers 2, its tensors are those of 1"),
        ("eagle3", changed(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state false"),
        ("eagle3", changed(hidden_size=64), r"fusion.fc.weight has shape \(32, 96\), expected \(64, 192\)"),
        (
            "eagle3",
            changed(target_hidden_size=48),
            "another width needs embeddings and an LM head of its own",
        ),
        ("eagle-vicuna", changed(bias=False), "says bias False, yet fc.bias is there"),
        ("eagle-llama3", changed(bias=True), "says bias True, yet fc.bias is missing"),
        ("eagle-llama3", put("medusa.0.weight", torch.zeros(2)), "left over: medusa.0.weight"),
        (
            "eagle-llama3",
            put("fc.weight", torch.full((32, 64), float("nan"))),
            "fusion.fc.weight of the draft is not finite",
        ),
        ("dgf-llama3", without("W_z"), "looks like Dovetail .DGF., but its tensors do not fit: missing: W_z"),
        (
            "speculators",
            changed(speculators_model_type="dflash"),
            "a speculator of type 'dflash'; supported are 'eagle3'",
        ),
        ("speculators", changed(norm_before_residual=None), "lacks norm_before_residual"),
        ("speculators", changed(norm_before_fc=True), "says norm_before_fc True, yet input_norm.weight is missing"),
        (
            "speculators",
            changed(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 3, 6]}),
            "which are other layers; delete the wrong one",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, break_it: Any, message: str, tmp_path: Path) -> None:
    """Guards strictness: nothing is guessed, filled with random numbers or passed over."""
    case = CASES[name]
    tensors, config = case.tensors(), case.config()
    break_it(tensors, config)
    case.write(tmp_path, tensors, config)
    with pytest.raises(ValueError, match=message):
        DovetailAssistantModel.from_pretrained(tmp_path)


def test_pickles_that_run_code_are_not_loaded(tmp_path: Path) -> None:
    """Guards `weights_only`: a `.bin` file is a program of its author."""
    case = CASES["eagle-vicuna"]
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (mark,)

    case.write(tmp_path)
    torch.save({**case.tensors(), "x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds more than tensors and is not loaded"):
        DovetailAssistantModel.from_pretrained(tmp_path)
    assert not mark.exists()
    torch.save({**case.tensors(), "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"entries that are no tensors: epoch; ask for a safetensors file"):
        DovetailAssistantModel.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises((OSError, ValueError), match=r"pytorch_model.bin"):
        DovetailAssistantModel.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match=r"holds no weights; expected one of model.safetensors"):
        DovetailAssistantModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"holds no config.json; expected the folder or the name of a model"):
        DovetailAssistantModel.from_pretrained(tmp_path)
    for content in ("{", "{}", "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(OSError, match=r"model.safetensors.index.json is no index of weights"):
            read_tensors(str(tmp_path), {})
    config = {"model_type": "vit"}
    CASES["dgf"].write(tmp_path, {"x": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"is no draft: its model_type is 'vit'.*EAGLE-3"):
        DovetailAssistantModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 103}, r"made for vocab_size 101, the target LlamaForCausalLM has 103"),
        ({"hidden_size": 64}, r"made for hidden_size 32, the target LlamaForCausalLM has 64"),
        ({"num_hidden_layers": 4}, r"the target has 4 layers, expected at least 7"),
    ],
)
def test_a_target_of_another_size_is_refused_with_both_numbers(changes: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    draft = loaded(CASES["eagle3"], tmp_path)
    target = tiny.build("llama", **{"num_hidden_layers": 8, **changes})
    with pytest.raises(ValueError, match=message):
        tiny.run(target, tiny.prompt(), draft)
    named = loaded(CASES["speculators"], tmp_path / "named")
    with pytest.raises(ValueError, match=r"inputs of layers \[0, 3, 6\], the target LlamaForCausalLM has 4 layers"):
        tiny.met(named, tiny.build("llama", num_hidden_layers=4))
