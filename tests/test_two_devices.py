"""The whole loop with the draft on another device, simulated: nothing mixes, nothing waits, every byte is counted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from two_devices import DEVICE, Accelerator, Remote

from hf_dovetail import DovetailAssistantModel, TreeShape, prepare, prepare_target
from hf_dovetail.anatomy import anatomy_of
from hf_dovetail.decode import Round
from hf_dovetail.devices import to_device, to_host
from hf_dovetail.dispatch import dispatch_of
from hf_dovetail.engines import onednn
from hf_dovetail.placement import Limits, planned

ROUND_KIB, HEAD_ROUND_KIB = 80, 144  # of a 7 B shape with 16 nodes, in both directions


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda here, there: here + there, "expected all tensors on one device"),
        (lambda here, there: torch.cat((here, there)), "expected all tensors on one device"),
        (lambda here, there: there[here > 0], "expected all tensors on one device|boolean mask"),
        (lambda here, there: there[there > 0], "boolean mask"),
        (lambda here, there: there.sum().item(), "would stop the host"),
        (lambda here, there: there.tolist(), "would stop the host|"),
        (lambda here, there: bool((there > 0).all()), "would stop the host"),
        (lambda here, there: there.nonzero(), "would stop the host"),
    ],
)
def test_the_simulation_notices(
    mistake: Callable[[Tensor, Tensor], Any], message: str, accelerator: Accelerator
) -> None:
    """The tests below prove something: each of these mistakes raises, and the same on the CPU alone does not."""
    here = torch.arange(4.0)
    mistake(here, here)
    with accelerator:
        there = here.to(DEVICE)
        with pytest.raises(RuntimeError, match=message):
            mistake(here, there)


def test_the_simulation_computes_and_counts(accelerator: Accelerator) -> None:
    here = torch.arange(12.0).view(3, 4)
    with accelerator:
        there = here.to(DEVICE)
        assert isinstance(there, Remote)
        assert there.device == DEVICE
        assert accelerator.bytes_in == 48
        made = torch.zeros(3, device=DEVICE)
        made[1:] = 2.0
        product = there.softmax(-1) * made[:, None] + torch.ones_like(there)
        assert isinstance(product, Remote)
        back = product.cpu()
        assert type(back) is Tensor
        assert (accelerator.bytes_in, accelerator.bytes_out) == (48, 48)
        there.copy_(here)
        assert accelerator.bytes_in == 96
        assert [way for way, _, _ in accelerator.blocking] == ["in", "out", "in"]
    torch.testing.assert_close(back, here.softmax(-1) * torch.tensor([0.0, 2, 2])[:, None] + 1)


@pytest.mark.parametrize("tree", ["auto", TreeShape(8, 3, 4)], ids=["auto", "fixed"])
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_loop_keeps_devices_apart(family: str, kind: str, tree: Any, ids: Tensor, accelerator: Accelerator) -> None:
    """The answers are plain generate's, what the statistics say crossed is what crossed, and once the draft is there,
    the host waits for nothing but the trees.
    """
    target = tiny.build(family)
    draft = tiny.draft_for(target, kind)
    draft.tree, draft.draft_device, draft.strict = tree, str(DEVICE), True
    options = {"max_new_tokens": 24}
    for sample in (False, True):
        plain = tiny.run(target, ids, do_sample=sample, **options)
        with accelerator:
            tiny.assert_same(plain, tiny.run(target, ids, draft, do_sample=sample, **options))
            assert {p.device for p in draft.parameters()} == {DEVICE}
            before, accelerator.awaited = (accelerator.bytes_in, accelerator.bytes_out), 0
            accelerator.copies.clear()
            accelerator.blocking.clear()
            tiny.assert_same(plain, tiny.run(target, ids, draft, do_sample=sample, **options))
            crossed = accelerator.bytes_in - before[0], accelerator.bytes_out - before[1]
        stats = draft.last_stats
        assert crossed == (stats.bytes_to_draft, stats.bytes_to_target)
        assert min(crossed) > 0
        assert accelerator.blocking == []
        assert accelerator.awaited == sum(way == "out" for way, _, _ in accelerator.copies) <= stats.rounds
    assert not any(isinstance(p, Remote) for p in target.parameters())


def test_copies_that_nobody_waits_for_happen_late(accelerator: Accelerator) -> None:
    """What `devices` promises, and that the simulation would notice if it did not hold."""
    here = torch.arange(12.0)
    with accelerator:
        there = to_device(here, DEVICE)
        here.zero_()  # as the caller may
        also = to_device(here, DEVICE)  # before the first has arrived
        arrival = to_host(there * 2)
        assert not torch.equal(arrival._data, torch.arange(12.0) * 2)
        assert torch.equal(arrival.wait(), torch.arange(12.0) * 2)
        assert torch.equal(to_host(also).wait(), here)
        assert accelerator.awaited == 2
        assert accelerator.blocking == []
        with pytest.raises(RuntimeError, match="needs pinned memory"):
            here.to(DEVICE, non_blocking=True)
        staged = here.pin_memory()
        staged.to(DEVICE, non_blocking=True)
        staged.fill_(1.0)
        with pytest.raises(RuntimeError, match="changed before it was copied"):
            to_host(there).wait()
        to_device(torch.zeros(1 << 22), DEVICE)
        assert not accelerator.blocking
        to_device(torch.zeros((1 << 22) + 1), DEVICE)  # pinned memory is kept small
        assert len(accelerator.blocking) == 1
    on_host = torch.ones(3)
    assert to_device(on_host, torch.device("cpu")) is on_host
    assert to_host(on_host).wait() is on_host


def repeating_target() -> PreTrainedModel:
    """Of 7 B width, with one small layer; always the same token, so that a draft is right about whole paths."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=4096,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    target = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    direction = torch.randn(4096, dtype=torch.bfloat16)
    with torch.no_grad():
        target.model.embed_tokens.weight.copy_(direction + 0.1 * torch.randn(64, 4096))
        target.lm_head.weight[7] = 0.2 * direction
    return target


def draft_for(target: PreTrainedModel) -> DovetailAssistantModel:
    """Its draft, in float32 where the CPU would take 20 times as long in bfloat16; the target's features stay in it."""
    draft = DovetailAssistantModel.from_target(target)
    return draft if onednn.has_bf16() else draft.float()


def test_a_round_of_a_7_b_shape_moves_at_most_80_kib(ids: Tensor, accelerator: Accelerator) -> None:
    """Of the target only the accepted nodes' features and ids, of the draft only the packed tree, also with paths of
    eight nodes accepted; no round moves what another has moved."""
    target = repeating_target()
    draft = draft_for(target)
    draft.tree, draft.draft_device, moved = TreeShape(16, 7, 10), str(DEVICE), []

    def watch(done: Round) -> None:
        moved.append((len(done.accepted.tokens), accelerator.bytes_in + accelerator.bytes_out))

    draft.watch = watch
    with accelerator:
        ours = tiny.run(target, ids % 64, draft, max_new_tokens=24)
    assert ours.sequences.tolist() == tiny.run(target, ids % 64, max_new_tokens=24).sequences.tolist()
    accepted = [tokens for tokens, _ in moved]
    assert len(accepted) > 2
    assert max(accepted) == 9
    for (tokens, before), (_, after) in pairwise(moved):
        features = tokens * 4096 * 2
        assert features < after - before <= features + 512
        assert after - before <= ROUND_KIB * 1024
    assert {shape for way, shape, _ in accelerator.copies if way == "out"} >= {(1, 3, 16)}


@pytest.mark.parametrize("layers", [0, 1])
def test_with_the_lm_head_on_the_device_a_round_moves_at_most_144_kib(
    layers: int, ids: Tensor, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states of root and nodes cross once, for logits and draft alike; of the logits only the choices."""
    monkeypatch.setattr(prepare, "head_times_ms", lambda head, rows, device: (2.0, 1.0))
    target = repeating_target()
    plain = target.generate(ids % 64, max_new_tokens=24, do_sample=False)
    draft = draft_for(target)
    draft.tree, draft.draft_device, moved = TreeShape(16, 7, 10), str(DEVICE), []

    def watch(done: Round) -> None:
        moved.append((len(done.accepted.tokens), accelerator.bytes_in + accelerator.bytes_out))

    draft.watch = watch
    sizes, draft_sizes = prepare.target_sizes_of(target, anatomy_of(target)), prepare.draft_sizes_of(draft, target)
    least = planned(sizes, draft_sizes, Limits(0, 128, 16, 0), layers).total
    with accelerator:
        prepare_target(target, "eager", least * 64 // 63 + 1, draft, context=128)
        assert dispatch_of(target).layers == layers
        ours = target.generate(ids % 64, assistant_model=draft, max_new_tokens=24, do_sample=False)
    assert torch.equal(ours, plain)
    assert len(moved) > 2
    assert max(tokens for tokens, _ in moved) == 9
    hidden = 17 * 4096 * 2
    for (_, before), (_, after) in pairwise(moved[:-1]):
        assert hidden < after - before <= hidden + 2048 <= HEAD_ROUND_KIB * 1024
    stats = draft.last_stats
    assert hidden * (stats.rounds - 1) < stats.bytes_to_draft < (hidden + 2048) * stats.rounds + 8192 * ids.shape[1]
    assert stats.bytes_to_target < 512 * stats.rounds
