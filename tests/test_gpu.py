"""The real setting: draft on the accelerator, target on the CPU. Skipped where there is no accelerator."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from published import CASES, Reference
from transformers import pipeline

from hf_dovetail import DovetailAssistantModel, TreeShape, graphs
from hf_dovetail.demo import demo_prompts, load_pair, pair_path
from hf_dovetail.devices import to_device, to_host
from hf_dovetail.draft import DraftSession
from hf_dovetail.eight_bits import EightBitMatrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
]


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}])
def test_the_draft_goes_to_the_gpu_and_the_answer_stays(sampling: dict) -> None:
    target, draft, tokenizer = load_pair()
    inputs = tokenizer(demo_prompts()[0], return_tensors="pt")
    torch.manual_seed(0)
    plain = target.generate(**inputs, max_new_tokens=64, **sampling)
    torch.manual_seed(0)
    assisted = target.generate(**inputs, max_new_tokens=64, assistant_model=draft, **sampling)
    assert torch.equal(plain, assisted)
    assert draft.device == torch.device(torch.accelerator.current_accelerator().type, 0)
    assert target.device == torch.device("cpu")
    assert draft.last_stats.accepted > 0
    assert draft.last_stats.bytes_to_target < 16 * 1024


def test_a_pipeline_cannot_pull_the_draft_to_the_cpu() -> None:
    write = pipeline(
        "text-generation", model=str(pair_path("target")), assistant_model=str(pair_path("draft")),
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    assert write.assistant_model.device == torch.device("cpu")
    write("def add(a, b):\n", max_new_tokens=16, do_sample=False)
    assert write.assistant_model.device.type == torch.accelerator.current_accelerator().type
    assert write.model.device == torch.device("cpu")


def test_a_draft_that_is_told_to_stay_stays() -> None:
    target, draft, tokenizer = load_pair()
    draft.draft_device = "cpu"
    target.generate(**tokenizer("x = 1\n", return_tensors="pt"), max_new_tokens=8, assistant_model=draft)
    assert draft.device == torch.device("cpu")


def dgf_pair(bits: int | None = None) -> tuple:
    """The package's pair, met on the accelerator, and a prompt's ids and features there."""
    target, draft, tokenizer = load_pair(torch.float32)
    if bits:
        draft = DovetailAssistantModel.from_pretrained(pair_path("draft"), dtype=torch.float32, weight_bits=bits)
    device = draft.meet(target)
    ids = tokenizer(demo_prompts()[0], return_tensors="pt").input_ids
    with torch.no_grad():
        ids = target.generate(ids, max_new_tokens=80, do_sample=False)
        features = target(ids, output_hidden_states=True).hidden_states[-1]
    return draft, ids.to(device), features.to(device)


def trees(draft: DovetailAssistantModel, ids: torch.Tensor, features: torch.Tensor | None) -> list[torch.Tensor]:
    """The packed trees of one answer's rounds, four tokens a round."""
    session, grown, held = DraftSession(draft), [], 0
    session.begin(ids[:, :1], 0)
    for known in range(ids.shape[1] - 80, ids.shape[1], 4):
        session.commit(ids[:, held + 1 : known + 1], None if features is None else features[:, held:known])
        grown.append(session.grow(TreeShape(16, 7, 10)).cpu())
        held = known
    return grown


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[:, :2], other[:, :2])
        torch.testing.assert_close(
            *(tree[:, 2].contiguous().view(torch.float32) for tree in (one, other)), rtol=1e-3, atol=1e-3
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
def test_graphs_grow_the_trees_of_eager_rounds_and_are_reused() -> None:
    draft, ids, features = dgf_pair()
    with_graphs = trees(draft, ids, features)
    bench = draft.pool.bench
    captured = {kind: known for kind, known in bench.graphs.items() if isinstance(known, graphs.Captured)}
    assert captured
    assert not draft.pool.taken
    again = trees(draft, ids, features)
    assert draft.pool.bench is bench
    assert all(bench.graphs[kind] is known for kind, known in captured.items())
    bench.captures = False
    bench.graphs.clear()
    eager = trees(draft, ids, features)
    assert not any(isinstance(known, graphs.Captured) for known in bench.graphs.values())
    assert_close(with_graphs, eager)
    assert_close(again, eager)
    assert not torch.equal(eager[0], eager[-1])
    draft.draft_device = "cpu"
    draft.to("cpu")._shared = None
    target = load_pair()[0]
    draft.meet(target)
    assert_close(trees(draft, ids.cpu(), features.cpu()), eager)


@pytest.mark.parametrize("name", ["eagle-vicuna", "eagle3", "speculators-new"])
def test_published_kinds_grow_the_trees_that_they_grow_on_the_cpu(name: str, tmp_path: Path) -> None:
    """Guards reduced vocabularies and inner layers in fixed shapes and graphs."""
    case = CASES[name]
    target, ids = case.target(), tiny.prompt(120)
    with torch.no_grad():
        features = Reference(case, target).features(ids)
    draft = DovetailAssistantModel.from_pretrained(case.write(tmp_path))
    device = draft.meet(target)
    found = trees(draft, ids.to(device), features.to(device))
    draft.draft_device = "cpu"
    draft.meet(target)
    assert_close(found, trees(draft, ids, features))
    assert not torch.equal(found[0], found[-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
def test_two_threads_with_one_draft_grow_their_own_trees() -> None:
    draft, ids, features = dgf_pair()
    reversed_ids, reversed_features = ids.flip(1), features.flip(1)
    alone = [trees(draft, ids, features), trees(draft, reversed_ids, reversed_features)]
    jobs = [(ids, features), (reversed_ids, reversed_features)] * 3
    with ThreadPoolExecutor(max_workers=2) as pool:
        together = list(pool.map(lambda job: trees(draft, *job), jobs))
    for index, found in enumerate(together):
        assert_close(found, alone[index % 2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
@pytest.mark.parametrize("bits", [None, 8])
def test_the_host_waits_for_nothing_but_the_tree(bits: int | None) -> None:
    """Features and ids up, the tree down, in eager rounds and replayed ones."""
    draft, ids, features = dgf_pair(bits)
    ids, features, device = ids.cpu(), features.cpu(), ids.device
    session, shifts = DraftSession(draft), np.zeros((8, 10), dtype=np.float32)
    session.begin(to_device(ids[:, :1], device), 0)
    for turn in range(4):  # eager (and the table of RoPE is made), eager, captured, replayed
        if turn in (1, 3):
            torch.cuda.set_sync_debug_mode("error")
        try:
            rows = slice(5 * turn, 5 * turn + 5)
            session.commit(to_device(ids[:, 1:][:, rows], device), to_device(features[:, rows], device))
            arrival = to_host(session.grow(TreeShape(16, 7, 10), shifts=shifts))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert arrival.wait()[0, 1].max() < 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="delays need CUDA")
def test_copies_that_nobody_waits_for_arrive_whole() -> None:
    """Guards pinned memory that is given out again, or changed by the caller, before its copy is done: all copies are
    queued behind a delay.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    warm = [
        torch.empty(16, 1024, device="cpu", pin_memory=True) for _ in range(401)
    ]  # to make some may wait for the device
    to_host(to_device(torch.zeros(16, 1024), device)).wait()
    del warm
    torch.cuda._sleep(1_000_000_000)
    arrivals = []
    for value in range(200):
        data = torch.full((16, 1024), float(value))
        arrivals.append(to_host(to_device(data, device)))
        data.fill_(-1.0)
    assert not torch.cuda.current_stream().query()
    for value, arrival in enumerate(arrivals):
        assert bool((arrival.wait() == value).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
def test_graphs_grow_the_trees_of_a_small_lms_own_layers() -> None:
    """Guards a causal LM in lean blocks, in graphs on this GPU, against transformers' forward pass."""
    target, _, tokenizer = load_pair(torch.float32)
    draft = DovetailAssistantModel.from_causal_lm(load_pair(torch.float32)[0])
    device = draft.meet(target)
    ids = tokenizer(demo_prompts()[0], return_tensors="pt").input_ids
    ids = target.generate(ids, max_new_tokens=80, do_sample=False).to(device)
    lean = trees(draft, ids, None)
    assert any(isinstance(known, graphs.Captured) for known in draft.pool.bench.graphs.values())
    draft._recast = None
    assert_close(lean, trees(draft, ids, None))
    assert not torch.equal(lean[0], lean[-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
def test_8_bits_grow_trees_in_graphs_without_unpacking_and_in_less_memory() -> None:
    """Guards the integer product on this GPU, also captured, against the same weights unpacked."""
    found = []
    for unpacked in (False, True):
        draft, ids, features = dgf_pair(8)
        shared = draft._shared
        matrices = {m for m in (*draft.modules(), shared.embedding, shared.head) if isinstance(m, EightBitMatrix)}
        assert len(matrices) == 3 + 7 * len(draft.layers) + 1  # embeddings and LM head are tied
        for matrix in matrices:
            assert matrix._integers
            matrix._integers = not unpacked
        found.append(trees(draft, ids, features))
        if not unpacked:
            assert any(isinstance(known, graphs.Captured) for known in draft.pool.bench.graphs.values())
        held = sum(t.nbytes for t in (*draft.parameters(), *draft.buffers(), *shared.tensors))
        assert held == draft.weight_bytes(load_pair(torch.float32)[0])
    same = sum(torch.equal(one[:, :2], other[:, :2]) for one, other in zip(*found, strict=True))
    assert same >= 0.9 * len(found[0])
