"""Training on several processes: the same steps as on one, also where FSDP splits the weights, and after a resume."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.utils import compare_versions
from training import RECIPE, ROOT, Interrupting, losses, metrics, new_draft, weights
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import Extras, StoredFeatures, Windows, train_draft

SPLIT = replace(RECIPE, steps=6, save_every=2, validate_every=2)
HALF = replace(RECIPE, steps=2, precision="bf16")

BEGIN = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from accelerate.state import AcceleratorState
from hf_dovetail.train import Windows, capture_features, train_draft
from hf_dovetail.train.processes import this_process
from test_train_processes import HALF, SPLIT, extras
from training import Interrupting, load_target, new_draft
torch.set_num_threads(1)
folder = Path(sys.argv[1])
data = torch.load(folder / "data.pt")
windows = Windows(data["ids"], data["counted"])
target = load_target()

def train(out, text=windows):
    return train_draft(new_draft(target), target, text, SPLIT, folder / out, extras=extras(windows))

def interrupted(out, batches):
    try:
        train(out, Interrupting(windows, batches))
    except KeyboardInterrupt:
        return
    raise AssertionError("nothing interrupted the run")
"""

WHOLE = (
    BEGIN
    + """
capture_features(target, Windows(data["ids"][:12]), folder / "features", shard_windows=3)
assert this_process().num_processes == 2
train("draft")
interrupted("from two", 3)
train("from one", Interrupting(windows, 4))  # two of six steps are done; a run from the start would be interrupted
"""
)

FSDP = """
import os
from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)  # accelerate has FSDP for accelerators only; all that it does with one runs on CPUs too
assert PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
os.environ |= {{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}}
"""

DEEPSPEED = """
from accelerate import PartialState
PartialState(backend="gloo")  # accelerate names a backend for accelerators only
"""

SPLITTING = (
    BEGIN
    + """
from torch.distributed.tensor import DTensor
interrupted("split", 5)
draft = train("split", Interrupting(windows, 2))
assert AcceleratorState().num_processes == 2
assert not any(isinstance(p, DTensor) for p in draft.parameters())
torch.save(draft.state_dict(), folder / f"weights{{this_process().process_index}}.pt")
train_draft(new_draft(target), target, windows, HALF, folder / "half")
(folder / "type.txt").write_text(AcceleratorState().distributed_type.value)
try:
    train("from one")
except ValueError as error:
    (folder / "refused.txt").write_text(str(error))
"""
)

ON_CPU = {"ACCELERATE_USE_CPU": "true"}


def extras(windows: Windows) -> Extras:
    return Extras(prompts=list(windows.ids[:3].long().split(1)), new_tokens=8)


def launch(script: str, windows: Windows, folder: Path, kind: str = "--multi_gpu", **environment: str) -> None:
    """Run a script on two CPU processes, as users do."""
    (folder / "run.py").write_text(script.format(tests=str(ROOT / "tests")))
    torch.save({"ids": windows.ids, "counted": windows.counted}, folder / "data.pt")
    command = ["-m", "accelerate.commands.launch", *kind.split(), "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *command, *options, str(folder / "run.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or ON_CPU)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def one(target: PreTrainedModel, windows: Windows, tmp_path_factory) -> Path:
    """What one process trains, as a folder."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("processes") / "one"
    train_draft(new_draft(target), target, windows, SPLIT, out, extras=extras(windows))
    return out


def interrupt(target: PreTrainedModel, windows: Windows, recipe: Recipe, out: Path) -> None:
    """A run of one process, cut after its first checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        train_draft(new_draft(target), target, Interrupting(windows, 3), recipe, out, extras=extras(windows))


def same_run(out: Path, one: Path, draft: DovetailAssistantModel | None = None) -> None:
    """Losses, validations and weights, up to the order of sums."""
    assert losses(out) == pytest.approx(losses(one), rel=1e-4)
    rates = [[row["tokens_per_round"] for row in metrics(folder)] for folder in (out, one)]
    assert rates[0] == rates[1]
    ours = weights(draft or DovetailAssistantModel.from_pretrained(out))
    torch.testing.assert_close(ours, weights(DovetailAssistantModel.from_pretrained(one)), rtol=1e-3, atol=1e-4)


def test_two_processes_train_what_one_does(target, windows, one: Path, tmp_path: Path) -> None:
    """Guards a draft whose own methods a wrapper hides, gradients that are not averaged, parts that both processes
    read, and a resume that depends on how many there were."""
    interrupt(target, windows, SPLIT, tmp_path / "from one")
    launch(WHOLE, windows, tmp_path)
    same_run(tmp_path / "draft", one)
    same_run(tmp_path / "from one", one)
    left = Interrupting(windows, 4)
    train_draft(new_draft(target), target, left, SPLIT, tmp_path / "from two", extras=extras(windows))
    same_run(tmp_path / "from two", one)
    assert len(StoredFeatures(tmp_path / "features")) == 12
    other = train_draft(new_draft(target), target, windows, replace(RECIPE, seed=1), tmp_path / "other")
    assert losses(tmp_path / "other")[:4] != pytest.approx(losses(one)[:4], rel=1e-3)
    assert not torch.allclose(weights(other), weights(DovetailAssistantModel.from_pretrained(one)), atol=1e-2)


@pytest.mark.skipif(
    compare_versions("accelerate", "<", "1.13"), reason="such an accelerate refuses to resume with FSDP"
)
def test_split_weights_train_what_whole_ones_do(target, windows, one: Path, tmp_path: Path) -> None:
    """accelerate's FSDP 2, checkpoints and gathering on two CPU processes: steps, validation by decoding, resume, and
    the finished draft, which all processes get whole. A checkpoint of whole weights is refused."""
    interrupt(target, windows, SPLIT, tmp_path / "from one")
    launch(FSDP + SPLITTING, windows, tmp_path)
    assert (tmp_path / "type.txt").read_text() == "FSDP"
    split_like_whole(tmp_path, one, target, windows)


@pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_what_one_process_does(stage: int, target, windows, one: Path, tmp_path: Path) -> None:
    """The same with ZeRO, whose configuration is told what a data loader would tell it."""
    interrupt(target, windows, SPLIT, tmp_path / "from one")
    kind = f"--use_deepspeed --zero_stage {stage} --zero3_save_16bit_model true --gradient_clipping {SPLIT.clip}"
    launch(DEEPSPEED + SPLITTING, windows, tmp_path, kind, DS_ACCELERATOR="cpu")
    assert (tmp_path / "type.txt").read_text() == "DEEPSPEED"
    split_like_whole(tmp_path, one, target, windows)


def split_like_whole(folder: Path, one: Path, target: PreTrainedModel, windows: Windows) -> None:
    """What `SPLITTING` leaves: the run of one process, in bfloat16 too, whole drafts, and a refusal."""
    same_run(folder / "split", one)
    finished = weights(DovetailAssistantModel.from_pretrained(folder / "split"))
    for process in (0, 1):
        state = torch.load(folder / f"weights{process}.pt")
        assert torch.equal(torch.cat([tensor.flatten() for tensor in state.values()]), finished)
    assert "its weights is whole, this run's is split" in (folder / "refused.txt").read_text()
    train_draft(new_draft(target), target, windows, HALF, folder / "half of one")
    half = losses(folder / "half of one")
    assert losses(folder / "half") == pytest.approx(half, rel=5e-4)
    assert half[0] not in (losses(one)[0], pytest.approx(losses(one)[0], rel=1e-6))
