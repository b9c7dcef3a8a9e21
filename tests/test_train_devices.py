"""Training with the target elsewhere: on another device, simulated, or where a device map has put its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from training import RECIPE, load_target, losses, new_draft, python_windows
from transformers import AutoModelForCausalLM
from two_devices import DEVICE, Accelerator, Remote

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.demo import pair_path
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import LiveFeatures, Windows, train_draft
from hf_dovetail.train.steps import DraftLoss, parts_of_step

SHORT = Recipe(steps=3, batch=4, window=16, unroll=2, noise=0.1)


@pytest.fixture
def accelerator(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """The simulated device, with what of torch makes no tensors by way of its dispatcher: generators, `tensor`."""
    generator, tensor = torch.Generator, torch.tensor
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    there = lambda data, device=None, **options: tensor(data, **options).to(device)  # noqa: E731
    monkeypatch.setattr(torch, "tensor", there)
    return accelerator


def trained(fusion: str, device: torch.device | str, copies: list) -> tuple[list[float], DovetailAssistantModel]:
    """Losses and draft of three steps; copies are counted from when draft and target have met."""
    target = tiny.build("llama")
    torch.manual_seed(0)
    draft = DovetailAssistantModel.from_target(target, fusion=fusion)
    draft.draft_device = str(device)
    draft.train().meet(target)
    ids = torch.randint(4, tiny.VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))
    source, module = LiveFeatures(target, Windows(ids, ids % 2 == 0)), DraftLoss(draft, SHORT)
    optimizer, generator = torch.optim.SGD(module.parameters(), 0.1, foreach=False), torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    copies.clear()
    for _ in range(SHORT.steps):
        (part,) = parts_of_step(source, SHORT, generator, 0, 1)
        batch = source.batch(part.rows, SHORT.window, draft)
        loss = module(batch, part.seeds, part.weights.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    assert not any(isinstance(p, Remote) for p in target.parameters())
    return [loss.cpu().item() for loss in found], draft


@pytest.mark.parametrize("fusion", ["dgf", "eagle3"])
def test_only_text_and_features_cross(fusion: str, accelerator: Accelerator) -> None:
    """Per step: ids, what counts, features, and of a draft with an LM head of its own the target's logits; nothing
    comes back but the losses, when they are asked for. And the losses are those of one device."""
    here, on_one = trained(fusion, "cpu", accelerator.copies)
    with accelerator:
        there, on_two = trained(fusion, DEVICE, accelerator.copies)
        assert {p.device for p in on_two.parameters()} == {DEVICE}
        crossed = {copy for copy in accelerator.copies if copy[2] and copy[0] == "in"}
        back = [copy for copy in accelerator.copies if copy[0] == "out"]
        moved = [p.detach().cpu() for p in on_two.parameters()]
    assert there == pytest.approx(here, rel=1e-5)
    assert here[0] != pytest.approx(here[1], rel=1e-3)
    for ours, theirs in zip(moved, on_one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)
    width = on_one.config.feature_size
    per_step = {(4, 16): 8, (4, 15): 4, (4, 16, width): 4} | ({} if fusion == "dgf" else {(4, 16, tiny.VOCAB): 4})
    once = {(on_one.config.head_dim // 2,)}  # RoPE's frequencies
    assert {shape for _, shape, _ in crossed} == per_step.keys() | once
    sizes = [size for _, shape, size in accelerator.copies if shape in per_step]
    assert sum(sizes) == SHORT.steps * sum(torch.Size(shape).numel() * size for shape, size in per_step.items())
    assert back == [("out", (), 4)] * SHORT.steps


def test_a_target_that_a_device_map_spreads_stays_where_it_is(tmp_path: Path) -> None:
    """accelerate keeps one layer on the disk; moving such a model is an error."""
    torch.set_num_threads(1)
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {f"model.layers.{i}": "disk" if i == 3 else "cpu" for i in range(8)}
    spread = AutoModelForCausalLM.from_pretrained(
        pair_path("target"), dtype=torch.float32, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert spread.model.layers[3].mlp.up_proj.weight.is_meta
    whole, windows = load_target(), python_windows()
    train_draft(new_draft(whole), spread, windows, RECIPE, tmp_path / "spread")
    train_draft(new_draft(whole), whole, windows, RECIPE, tmp_path / "whole")
    assert losses(tmp_path / "spread") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
