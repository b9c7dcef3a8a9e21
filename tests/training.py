"""What the tests of training share: a short recipe, real text and a real small target, and how runs are compared."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from texts import humaneval_prompts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.demo import pair_path
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import Windows, pack, token_stream
from hf_dovetail.train.records import Record
from hf_dovetail.train.text import encode

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Recipe(
    steps=8,
    batch=4,
    window=32,
    learning_rate=3e-3,
    warmup=1,
    distribution_weight=1.0,
    noise=0.1,
    unroll=2,
    save_every=3,
)


def load_target() -> PreTrainedModel:
    """The demo's."""
    return AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=torch.float32).eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The demo target's."""
    return AutoTokenizer.from_pretrained(pair_path("target"))


def python_rows() -> Tensor:
    """(N, 64) ids of real Python, all of which count."""
    stream = token_stream(load_tokenizer(), humaneval_prompts())
    return stream[: len(stream) // 64 * 64].view(-1, 64)


def python_windows() -> Windows:
    """Real Python of which every second token counts."""
    all_count = pack([encode(load_tokenizer(), Record("here", "\n".join(humaneval_prompts()[:60])))], 32)
    return Windows(all_count.ids, all_count.ids % 2 == 0)


def new_draft(target: PreTrainedModel, fusion: str = "dgf", seed: int = 0) -> DovetailAssistantModel:
    torch.manual_seed(seed)
    draft = DovetailAssistantModel.from_target(target, fusion=fusion)
    draft.draft_device = "cpu"
    return draft


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in metrics(folder)]


def weights(draft: DovetailAssistantModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in draft.parameters()])


class Interrupting(Windows):
    """Windows that are interrupted after so many batches, as by Ctrl-C."""

    def __init__(self, windows: Windows, batches: int) -> None:
        ids = _Counting(windows.ids, batches)
        super().__init__(ids, windows.counted)


class _Counting(torch.Tensor):
    @staticmethod
    def __new__(cls, data, batches):
        made = torch.Tensor._make_subclass(cls, data)
        made.left = [batches]
        return made

    def __getitem__(self, index):
        if isinstance(index, tuple) and hasattr(self, "left"):
            self.left[0] -= 1
            if self.left[0] < 0:
                raise KeyboardInterrupt
        return super().__getitem__(index).as_subclass(torch.Tensor)
