"""Captured features: the same loss as on the fly, whole shards after a kill, a wrong target refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training import ROOT, load_target, new_draft
from transformers import AutoModelForCausalLM

from hf_dovetail import DovetailAssistantModel, DovetailConfig, prepare_target
from hf_dovetail.demo import pair_path
from hf_dovetail.engines import engine_of
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import LiveFeatures, StoredFeatures, Windows, capture, capture_features, train_draft

RECIPE = Recipe(steps=4, batch=4, window=32, learning_rate=3e-3, warmup=1, distribution_weight=1.0, unroll=2)


@pytest.fixture(scope="module")
def windows() -> Windows:
    ids = torch.randint(4, 4096, (22, 32), generator=torch.Generator().manual_seed(0))
    return Windows(ids, torch.rand(22, 32, generator=torch.Generator().manual_seed(1)) < 0.5)


@pytest.fixture(scope="module")
def captured(target, windows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    capture_features(target, windows, folder, shard_windows=5, batch=2)
    return folder


@pytest.fixture(scope="module")
def captured_layers(target, windows, tmp_path_factory) -> Path:
    """What an EAGLE-3 draft reads."""
    folder = tmp_path_factory.mktemp("layers")
    capture_features(target, windows, folder, shard_windows=5, batch=2, layers=[2, 4, 5])
    return folder


@pytest.mark.parametrize("fusion", ["dgf", "eagle3"])
def test_what_is_read_is_what_the_target_computes(
    fusion: str, target, windows, captured: Path, captured_layers: Path
) -> None:
    """Rows of several shards, in any order, cut to a length; bfloat16's rounding is all that differs."""
    draft, rows = new_draft(target, fusion), torch.tensor([21, 4, 5, 4])
    draft.meet(target)
    live = LiveFeatures(target, windows).batch(rows, 20, draft)
    stored = StoredFeatures(captured if fusion == "dgf" else captured_layers, target).batch(rows, 20, draft)
    assert torch.equal(stored.ids, live.ids)
    torch.testing.assert_close(stored.features, live.features, rtol=2**-7, atol=1e-4)
    assert not torch.equal(stored.features[0], stored.features[1])
    assert (stored.logits - live.logits).abs().max() < 0.1 < live.logits.std()
    assert torch.equal(StoredFeatures(captured).counted, windows.counted)


@pytest.mark.parametrize("fusion", ["dgf", "eagle3"])
def test_training_from_disk_needs_no_layers_and_learns_the_same(
    fusion: str, target, windows, captured: Path, captured_layers: Path, tmp_path
) -> None:
    """The stand-in has no weights in its layers; losses agree up to bfloat16, and other features give other losses."""

    def losses(draft, model, text, out) -> list[float]:
        train_draft(draft, model, text, RECIPE, out)
        return [float(line.split(",")[1]) for line in (out / "metrics.csv").read_text().splitlines()[1:]]

    stored = StoredFeatures(captured if fusion == "dgf" else captured_layers)
    assert stored.target.model.layers[0].self_attn.q_proj.weight.is_meta
    from_disk = losses(new_draft(stored.target, fusion), stored.target, stored, tmp_path / "disk")
    live = losses(new_draft(target, fusion), target, windows, tmp_path / "live")
    assert from_disk == pytest.approx(live, rel=2e-3)
    everything = losses(new_draft(target, fusion), target, windows.ids, tmp_path / "unmasked")
    assert live != pytest.approx(everything, rel=2e-3)
    assert DovetailAssistantModel.from_pretrained(tmp_path / "disk").config.target_name == "target"


@pytest.mark.parametrize("family", ["cohere", "gemma2"])
def test_the_teacher_is_the_whole_target(family: str, tmp_path: Path) -> None:
    """A factor and a soft cap behind the LM head, which a draft with a head of its own does not have."""
    target = tiny.build(family)
    layers = [0, 1]
    capture_features(target, Windows(tiny.prompt(20)), tmp_path, layers=layers)
    draft = DovetailAssistantModel(_reading(target, layers))
    draft.reset_parameters()
    stored = StoredFeatures(tmp_path).batch(torch.tensor([0]), 20, draft)
    features, logits = capture(target, tiny.prompt(20), layers)
    torch.testing.assert_close(stored.features, features, rtol=2**-7, atol=1e-4)
    off = (stored.logits - logits).abs().max()
    assert off < 0.05 * logits.std()
    one_layer_off = capture(target, tiny.prompt(20), [1, 1])[0]
    assert (stored.features - one_layer_off).abs().max() > 0.1


@pytest.mark.parametrize(("engine", "expected"), [("eager", "onednn"), ("int8", "int8")])
def test_the_target_captures_on_the_best_engine_and_is_given_back(engine: str, expected: str, tmp_path: Path) -> None:
    """What somebody has prepared stays so; and a failure in the middle leaves nothing behind."""
    target, windows, seen = tiny.build("llama"), Windows(tiny.prompt(40).view(2, 20)), []
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    prepare_target(target, engine)
    hook = target.register_forward_pre_hook(lambda *_: seen.append(engine_of(target)))
    capture_features(target, windows, tmp_path / "whole", shard_windows=1, batch=1)
    assert seen == [expected, expected]
    assert engine_of(target) == engine
    hook.remove()
    hook = target.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture_features(target, windows, tmp_path / "failed")
    assert engine_of(target) == engine
    if engine == "eager":
        assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def _reading(target, layers: list[int]) -> DovetailConfig:
    config = DovetailConfig.for_target(target.config, 1, "eagle3")
    config.feature_layers = layers
    return config


def test_layers_that_are_not_there_are_refused(target, windows, captured: Path, captured_layers: Path) -> None:
    """And one capture serves all kinds of draft that read no more than it holds."""
    rows = torch.tensor([3, 1])
    eagle3, dgf = new_draft(target, "eagle3"), new_draft(target)
    for draft in (eagle3, dgf):
        draft.meet(target)
    few, many = StoredFeatures(captured, target), StoredFeatures(captured_layers, target)
    with pytest.raises(ValueError, match=r"holds the features of layers \[-1\].*reads \[2, 4, 5\].*--fusion eagle3"):
        few.batch(rows, 20, eagle3)
    eagle3.config.feature_layers = [1, 4, 5]
    with pytest.raises(ValueError, match=r"holds the features of layers \[-1, 2, 4, 5\].*reads \[1, 4, 5\]"):
        many.batch(rows, 20, eagle3)
    with pytest.raises(ValueError, match=r"its layers is \[-1\], this run's is \[-1, 2, 4, 5\]"):
        capture_features(target, windows, captured, shard_windows=5, layers=[2, 4, 5])
    for name in ("ids", "features", "logits"):
        assert torch.equal(getattr(few.batch(rows, 20, dgf), name), getattr(many.batch(rows, 20, dgf), name))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from hf_dovetail.demo import pair_path
from hf_dovetail.train import Windows
from hf_dovetail.train.capture import capture_features, save_file
torch.set_num_threads(1)
data = torch.load(Path(sys.argv[1]) / "data.pt")
target = AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=torch.float32).eval()

def save_half(tensors, path):
    save_file(tensors, path)
    if "00002" in str(path):
        os.truncate(path, 20_000)
        os.kill(os.getpid(), signal.SIGKILL)

capture_features.__globals__["save_file"] = save_half
folder, windows = Path(sys.argv[1]) / "features", Windows(data["ids"], data["counted"])
capture_features(target, windows, folder, shard_windows=5, batch=2, layers=[2, 4, 5])
"""


def test_a_killed_capture_makes_only_what_is_missing(target, windows, captured_layers: Path, tmp_path: Path) -> None:
    """SIGKILL while the third of five shards is being written."""
    folder, layers = tmp_path / "features", [2, 4, 5]
    torch.save({"ids": windows.ids, "counted": windows.counted}, tmp_path / "data.pt")
    command, environment = [sys.executable, "-c", KILLED, str(tmp_path)], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.safetensors")}
    assert len(kept) == 2
    with pytest.raises(ValueError, match=r"lacks 3 of 5 shards, the first is 2; run hf-dovetail capture again"):
        StoredFeatures(folder)
    with pytest.raises(ValueError, match=r"its layers is \[-1, 2, 4, 5\], this run's is \[-1\]"):
        capture_features(target, windows, folder, shard_windows=5, batch=2)
    capture_features(target, windows, folder, shard_windows=5, batch=2, layers=layers)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(folder.glob("*.new"))
    for path in captured_layers.glob("shard-*"):
        ours, whole = load_file(folder / path.name), load_file(path)
        assert ours.keys() == whole.keys()
        for name, tensor in whole.items():  # another process may round otherwise
            torch.testing.assert_close(ours[name], tensor, rtol=2**-6, atol=1e-3)


def test_another_target_or_text_is_refused(target, windows, captured: Path) -> None:
    other = load_target()
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="belongs to another run: its target is"):
        StoredFeatures(captured, other)
    with pytest.raises(ValueError, match="its target is"):
        capture_features(other, windows, captured, shard_windows=5)
    with pytest.raises(ValueError, match=r"its text.counted is|its text.sha256 is"):
        capture_features(target, Windows(windows.ids), captured, shard_windows=5)
    with pytest.raises(ValueError, match="its shard_windows is 5, this run's is 6"):
        capture_features(target, windows, captured, shard_windows=6)
    half = AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=torch.bfloat16)
    StoredFeatures(captured, half)  # precision makes no other target


def test_numbers_out_of_range_are_refused(target, windows, tmp_path: Path) -> None:
    long = Windows(torch.zeros(1, 1025, dtype=torch.int32))
    with pytest.raises(ValueError, match="windows have 1025 tokens, the target has 1024 positions"):
        capture_features(target, long, tmp_path / "long")
    with pytest.raises(ValueError, match="batch is 0 and shard_windows 256; expected at least 1"):
        capture_features(target, windows, tmp_path / "none", batch=0)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(target, captured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    shutil.copytree(captured, folder)
    os.truncate(folder / "shard-00002.safetensors", 5_000)
    with pytest.raises(OSError, match=r"shard-00002.safetensors is damaged .* makes what is missing"):
        StoredFeatures(folder, target)
    os.truncate(folder / "shared.safetensors", 5_000)
    with pytest.raises(OSError, match=r"shared.safetensors is damaged"):
        StoredFeatures(folder)
    for content, what in (("{}", "it does not say target, target_name"), ('{"tar', "Unterminated"), ("3", "iterable")):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(OSError, match=rf"manifest.json is damaged .*{what}"):
            StoredFeatures(folder)


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
