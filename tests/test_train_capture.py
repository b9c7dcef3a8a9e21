"""Captured features: the same loss as on the fly, whole shards after a kill, a wrong target refused."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.demo import pair_path
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import LiveFeatures, StoredFeatures, Windows, capture_features, train_draft

RECIPE = Recipe(steps=4, batch=4, window=32, learning_rate=3e-3, warmup=1, distribution_weight=1.0, unroll=2)


@pytest.fixture(scope="module")
def target():
    return AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows() -> Windows:
    ids = torch.randint(4, 4096, (22, 32), generator=torch.Generator().manual_seed(0))
    return Windows(ids, torch.rand(22, 32, generator=torch.Generator().manual_seed(1)) < 0.5)


@pytest.fixture(scope="module")
def captured(target, windows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    capture_features(target, windows, folder, shard_windows=5, batch=2)
    return folder


def new_draft(target) -> DovetailAssistantModel:
    torch.manual_seed(0)
    draft = DovetailAssistantModel.from_target(target).float()
    draft.draft_device = "cpu"
    return draft


def test_what_is_read_is_what_the_target_computes(target, windows, captured: Path) -> None:
    """Rows of several shards, in any order, cut to a length; bfloat16's rounding is all that differs."""
    draft, rows = new_draft(target), torch.tensor([21, 4, 5, 4])
    draft.meet(target)
    live = LiveFeatures(target, windows).batch(rows, 20, draft)
    stored = StoredFeatures(captured, target).batch(rows, 20, draft)
    assert torch.equal(stored.ids, live.ids)
    torch.testing.assert_close(stored.features, live.features, rtol=2**-7, atol=1e-4)
    assert not torch.equal(stored.features[0], stored.features[1])
    assert (stored.logits - live.logits).abs().max() < 0.1 < live.logits.std()
    assert torch.equal(StoredFeatures(captured).counted, windows.counted)


def test_training_from_disk_needs_no_layers_and_learns_the_same(target, windows, captured: Path, tmp_path) -> None:
    """The stand-in has no weights in its layers; losses agree up to bfloat16, and other features give other losses."""

    def losses(draft, model, text, out) -> list[float]:
        train_draft(draft, model, text, RECIPE, out)
        return [float(line.split(",")[1]) for line in (out / "metrics.csv").read_text().splitlines()[1:]]

    stored = StoredFeatures(captured)
    assert stored.target.model.layers[0].self_attn.q_proj.weight.is_meta
    from_disk = losses(new_draft(stored.target), stored.target, stored, tmp_path / "disk")
    live = losses(new_draft(target), target, windows, tmp_path / "live")
    assert from_disk == pytest.approx(live, rel=2e-3)
    everything = losses(new_draft(target), target, windows.ids, tmp_path / "unmasked")
    assert live != pytest.approx(everything, rel=2e-3)
    assert DovetailAssistantModel.from_pretrained(tmp_path / "disk").config.target_name == "target"


def test_a_killed_capture_makes_only_what_is_missing(target, windows, captured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    shutil.copytree(captured, folder)
    (folder / "shard-00001.safetensors").unlink()
    kept = (folder / "shard-00002.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"lacks 1 of 5 shards, the first is 1; run hf-dovetail capture again"):
        StoredFeatures(folder)
    capture_features(target, windows, folder, shard_windows=5, batch=2)
    assert (folder / "shard-00002.safetensors").stat().st_mtime_ns == kept
    for path in captured.glob("shard-*"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_another_target_or_text_is_refused(target, windows, captured: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="belongs to another run: its target is"):
        StoredFeatures(captured, other)
    with pytest.raises(ValueError, match="its target is"):
        capture_features(other, windows, captured, shard_windows=5)
    with pytest.raises(ValueError, match="its text is"):
        capture_features(target, Windows(windows.ids), captured, shard_windows=5)
    with pytest.raises(ValueError, match="its shard_windows is 5, this run's is 6"):
        capture_features(target, windows, captured, shard_windows=6)
    half = AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=torch.bfloat16)
    StoredFeatures(captured, half)  # precision makes no other target


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no captured features; make them with hf-dovetail capture"):
        StoredFeatures(tmp_path)


def test_a_full_disk_loses_no_shard(target, windows, captured: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the writing itself fails, half-way."""
    folder = tmp_path / "features"
    shutil.copytree(captured, folder)
    (folder / "shard-00003.safetensors").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not write a shard to .*shard-00003.*run the same command again"):
            capture_features(target, windows, folder, shard_windows=5, batch=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder.glob("*.new"))
    assert len(list(folder.glob("shard-*"))) == 4
    capture_features(target, windows, folder, shard_windows=5, batch=2)
    assert len(StoredFeatures(folder)) == 22


def test_features_shorter_than_the_recipes_window_are_refused(target, captured: Path, tmp_path: Path) -> None:
    stored = StoredFeatures(captured, target)
    with pytest.raises(ValueError, match=r"shape \(22, 32\); expected windows of 64"):
        train_draft(new_draft(target), target, stored, replace(RECIPE, window=64), tmp_path)


def test_the_manifest_names_no_folder_of_this_machine(captured: Path) -> None:
    manifest = json.loads((captured / "manifest.json").read_text())
    assert manifest["target_name"] == "target"
    assert str(pair_path()) not in (captured / "config.json").read_text() + str(manifest)
