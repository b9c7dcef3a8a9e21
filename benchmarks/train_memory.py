"""Memory that training a draft needs on one GPU, computed: a whole step of the real modules on tensors without data.

    python benchmarks/train_memory.py          # writes benchmarks/results/train_memory.json and prints a table

The target's forward pass, the loss and its backward pass run under torch's FakeTensorMode; every storage is counted
from where an operation makes it to where the last reference to it goes. What is not counted: the CUDA context
(0.3 to 0.5 GiB), kernels' workspaces, fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import write
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.config import DovetailConfig
from hf_dovetail.recipe import Recipe, default_recipe
from hf_dovetail.train import LiveFeatures, StoredFeatures, Windows
from hf_dovetail.train.steps import DraftLoss, optimizers, windows_of_a_part
from hf_dovetail.weights import SharedWeights

GIB = 2**30
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_8B = {**LLAMA_2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
TARGETS = {"Llama-2-7B": {**LLAMA_2_7B, "vocab_size": 32000}, "Llama-3.1-8B": LLAMA_3_8B}


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that are alive.

    Attributes:
        peak: the most that was alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result

    def note(self, tree: Any) -> None:
        """Count the tensors in `tree` too."""
        self.now()
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._alive[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, self.now())

    def now(self) -> int:
        """Bytes that are alive."""
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        return sum(size for _, size in self._alive.values())


@dataclass(frozen=True)
class Need:
    """Bytes of one training process.

    Args:
        target: weights of the target on the GPU. shared: embeddings and LM head for the draft. draft: weights.
        gradients: of the draft. optimizer: its moments.
        step: the most that a step holds beside all these.
    """

    target: int
    shared: int
    draft: int
    gradients: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class CapturedFeatures(StoredFeatures):
    """What reading captured features makes, without the files."""

    def __init__(self, target: Any, windows: Windows) -> None:
        self.target, self.facts, self._ids = target, {"layers": [-1]}, windows.ids

    def _read(self, rows: Tensor, length: int, names: Any) -> list[Tensor]:
        width = self.target.config.hidden_size
        return [self._ids[rows, :length], torch.empty(len(rows), length, width, dtype=torch.bfloat16)]


def needed(shape: dict[str, int], recipe: Recipe, captured: bool, blocks: int = 1, fake: bool = True) -> Need:
    """What one step needs, on the fly (target in bfloat16 beside the draft) or from captured features.

    Args:
        shape: of a Llama. recipe: whose step it is, on one process. blocks: of the draft.
        fake: whether the tensors have no data.
    """
    windows, rows = Windows(torch.zeros(64, recipe.window).long()), torch.arange(windows_of_a_part(recipe, processes=1))
    source = (CapturedFeatures if captured else LiveFeatures)(None, windows)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        target = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).eval()
        draft = DovetailAssistantModel(DovetailConfig.for_target(target.config, blocks, "dgf")).train()
        draft._shared = SharedWeights.of(target, draft.config, (draft.device, draft.dtype, None))
        source.target = target
        module, ledger = DraftLoss(draft, recipe), Ledger()
        held = [*draft.parameters(), *draft._weights.tensors, *([] if captured else target.parameters())]
        with ledger:
            ledger.note(held)
            before = ledger.now()
            for _ in range(min(recipe.accumulate, 2)):  # from the second part on the gradients are there before
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                    batch = source.batch(rows, recipe.window, draft)
                    loss = module(batch, range(len(rows)), None)
                loss.backward()
                del batch, loss
    weights, gradients = _bytes(draft.parameters()), _bytes(p.grad for p in draft.parameters())
    return Need(
        target=0 if captured else _bytes(target.parameters()),
        shared=_bytes(draft._weights.tensors),
        draft=weights,
        gradients=gradients,
        optimizer=_moments(module, recipe),
        step=ledger.peak - before - gradients,
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _moments(module: nn.Module, recipe: Recipe) -> int:
    """Bytes of the optimizers' state: as many tensors of each parameter's size as a real step makes for a small one."""
    small = nn.ParameterList([torch.zeros(8, 8), torch.zeros(8)])
    chosen = optimizers(small, recipe, sharded=False)
    total = 0
    for optimizer, real in zip(chosen, optimizers(module, recipe, sharded=False), strict=True):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        parameter = optimizer.param_groups[0]["params"][0]
        states = sum(state.shape == parameter.shape for state in optimizer.state[parameter].values())
        total += states * _bytes(real.param_groups[0]["params"])
    return total


def rows() -> Iterator[dict[str, Any]]:
    """The table."""
    for name, shape in TARGETS.items():
        recipe = default_recipe(shape["hidden_size"], muon=hasattr(torch.optim, "Muon"))
        for captured in (False, True):
            for accumulate in (1, 4, 16):
                for unroll in (1, 3):
                    need = needed(shape, replace(recipe, accumulate=accumulate, unroll=unroll), captured)
                    yield {
                        "model": name,
                        "features": "captured" if captured else "on the fly",
                        "windows_at_a_time": recipe.batch // accumulate,
                        "unroll": unroll,
                        **{part: round(size / GIB, 2) for part, size in asdict(need).items()},
                        "total": round(need.total / GIB, 2),
                    }


def main() -> None:
    found = list(rows())
    print("| " + " | ".join(found[0]) + " |")
    for row in found:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    write("train_memory", {"unit": "GiB, computed", "rows": found})


if __name__ == "__main__":
    main()
