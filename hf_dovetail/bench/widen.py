"""A small trained Llama inside a larger geometry, without change of function: real text at a large model's cost.

The rule for every matrix (rows are outputs): the small matrix at the top left, zeros below it, noise to the right
of it. All that is added to the hidden state, the heads and the MLP is then exactly zero, so the noise only meets
zeros; it keeps int8 and 4-bit scales of the added rows away from zero, and makes the padding real memory.
RMSNorm divides by the mean square of all entries, most of which are now zero: its weights times sqrt(d/D) and its
eps times d/D give the small model's result, so the final features are the small ones followed by zeros.
"""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..config import DovetailConfig
from ..modeling import DovetailAssistantModel
from ..weights import check_fits

_NOISE_ENTRIES = 1 << 20
_SIZES = {"0.5B": (2048, 8, 8192), "1B": (2048, 16, 8192), "3B": (3072, 28, 8192)}
PRESETS = tuple(_SIZES)
"""Names of geometries: hidden size 2048, 2048 and 3072 with 8, 16 and 28 layers, intermediate size 8192."""


@dataclass(frozen=True)
class Geometry:
    """The sizes that `widen` changes, named as in `LlamaConfig`; vocabulary and head size stay."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int


def preset(name: str, small: LlamaConfig) -> Geometry:
    """A geometry by name, with the small model's head size and its query heads per key/value head.

    As many heads as it takes to be at least as wide as the hidden size.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in _SIZES:
        raise ValueError(f"the geometry is {name!r}; expected one of {', '.join(PRESETS)}")
    hidden_size, layers, intermediate_size = _SIZES[name]
    group = small.num_attention_heads // small.num_key_value_heads
    heads = math.ceil(hidden_size / (group * small.head_dim))
    return Geometry(hidden_size, layers, intermediate_size, group * heads, heads)


def check_can_widen(model: PreTrainedModel) -> None:
    """Refuse a model that `widen` does not know.

    Raises:
        ValueError: if it is not a Llama.
    """
    if type(model) is not LlamaForCausalLM:
        raise ValueError(
            f"the model is a {type(model).__name__}; widening knows LlamaForCausalLM only. Measure it as it is "
            "(--widen none)"
        )


@torch.no_grad()
def widen(
    model: PreTrainedModel,
    *,
    hidden_size: int,
    num_hidden_layers: int,
    intermediate_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
) -> LlamaForCausalLM:
    """A new Llama of the given sizes whose logits are `model`'s, but for rounding; in its precision, on the CPU.

    Its final features (B, T, D) are the model's (B, T, d) followed by zeros. Tied embeddings stay tied.

    Raises:
        ValueError: if the model is not a Llama, a size is smaller than the model's own, or the number of query
            heads per key/value head differs.
    """
    check_can_widen(model)
    geometry = Geometry(hidden_size, num_hidden_layers, intermediate_size, num_attention_heads, num_key_value_heads)
    small = model.config
    _check_geometry(geometry, small)
    config = _widened_config(small, geometry)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if small.tie_word_embeddings:
        del shapes["lm_head.weight"]
    state = _widened_state({k: v.cpu() for k, v in model.state_dict().items()}, shapes, small.hidden_size)
    wide = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=model.dtype,
        attn_implementation=small._attn_implementation,
    )
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide.eval()


@torch.no_grad()
def widen_draft(draft: DovetailAssistantModel, wide: PreTrainedModel) -> DovetailAssistantModel:
    """The draft itself in the geometry of a widened target: it proposes the same trees at a wide draft's cost.

    Raises:
        ValueError: if the draft is of another kind than DGF.
    """
    if not draft.reads_features:
        raise ValueError("this draft wraps a causal LM, which does not read the target's features; nothing to widen")
    if draft.config.fusion != "dgf":
        raise ValueError(f"this draft has fusion {draft.config.fusion!r}; only 'dgf' can be widened with its target")
    text, small = wide.config, draft.config
    geometry = Geometry(
        text.hidden_size,
        small.num_hidden_layers,
        text.intermediate_size,
        text.num_attention_heads,
        text.num_key_value_heads,
    )
    _check_geometry(geometry, small)
    config = _widened_config(small, geometry)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DovetailAssistantModel(config).state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:  # a checkpoint's names are fixed; those in memory are not
        path = Path(folder) / "model.safetensors"
        draft.save_pretrained(folder)
        state = _widened_state(load_file(path), shapes, small.hidden_size)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
        config.save_pretrained(folder)
        return DovetailAssistantModel.from_pretrained(folder, dtype=draft.dtype)


class MappedDraft(DovetailAssistantModel):
    """A small draft that drafts for the widened form of its target, with the small target's embeddings and LM head.

    Made by `map_draft`. Its configuration says the widened target's hidden size; all its weights are small.
    """

    _small: tuple[PreTrainedModel, DovetailConfig]  # the small target, and the draft's own configuration

    def meet(self, target: PreTrainedModel) -> torch.device:
        """Get ready to draft for the widened target; see `DovetailAssistantModel.meet`."""
        check_fits(self.config, target)
        mapped = self.config
        small, self.config = self._small
        try:
            return super().meet(small)
        finally:
            self.config = mapped

    @property
    def input_size(self) -> int:
        """Of the small draft."""
        return self._small[1].hidden_size

    def encode(self, features: Tensor) -> Tensor:
        """(B, T, D) features of the widened target -> (B, T, d), their first entries: those of the small one."""
        return super().encode(features)[..., : self.input_size]


def map_draft(draft: DovetailAssistantModel, small: PreTrainedModel, wide: PreTrainedModel) -> MappedDraft:
    """A copy of `small`'s draft that drafts for `wide`, the widened form of `small`, at the small draft's cost.

    Raises:
        ValueError: if the draft does not fit the small model, or reads no features and so needs no mapping.
    """
    if not draft.reads_features:
        raise ValueError("this draft wraps a causal LM: it reads no features, and drafts for the wide target as it is")
    if not draft.predicts_features:
        raise ValueError("an EAGLE-3 draft reads inner layers of its target, which are not mapped; use another draft")
    check_fits(draft.config, small)
    mapped = copy.deepcopy(draft)
    mapped.__class__ = MappedDraft
    mapped._small = (small, mapped.config)
    mapped.config = copy.deepcopy(draft.config)
    mapped.config.hidden_size = mapped.config.target_hidden_size = wide.config.hidden_size
    return mapped


def _check_geometry(geometry: Geometry, small: LlamaConfig | DovetailConfig) -> None:
    for name, size in asdict(geometry).items():
        if size < getattr(small, name):
            raise ValueError(f"{name} is {size}, the model's own is {getattr(small, name)}; widening cannot shrink it")
    heads, kv_heads = geometry.num_attention_heads, geometry.num_key_value_heads
    if heads * small.num_key_value_heads != kv_heads * small.num_attention_heads:
        raise ValueError(
            f"{heads} query heads on {kv_heads} key/value heads do not keep the model's ratio of "
            f"{small.num_attention_heads} to {small.num_key_value_heads}"
        )


def _widened_config(small: Any, geometry: Geometry) -> Any:
    """The small configuration with the new sizes, the same head size, and eps for the larger mean."""
    config = copy.deepcopy(small)
    config.head_dim = small.head_dim
    config.rms_norm_eps = small.rms_norm_eps * small.hidden_size / geometry.hidden_size
    for name, size in asdict(geometry).items():
        setattr(config, name, size)
    if isinstance(config, DovetailConfig):
        config.target_hidden_size = geometry.hidden_size
    return config


def _widened_state(small: dict[str, Tensor], shapes: dict[str, torch.Size], live_size: int) -> dict[str, Tensor]:
    """Widen each tensor to its shape; layers that the small model lacks add nothing to the hidden state."""
    noise = torch.empty(_NOISE_ENTRIES).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    state = {}
    for name, shape in shapes.items():
        like, exists = small.get(name), name in small
        if like is None:  # an added layer: sizes and precision of the first one's
            like = small[_first_layers(name)]
        if name.endswith("norm.weight"):
            state[name] = _widened_norm(like, shape[0], live_size)
        elif len(shape) == 1:
            state[name] = like.new_zeros(shape)
            state[name][: len(like)] = like if exists else 0
        elif name.endswith("embed_tokens.weight"):
            state[name] = torch.nn.functional.pad(like, (0, shape[1] - like.shape[1]))
        elif "fusion.W_" in name:  # used as x @ W; the gate reads two hidden states side by side
            parts = zip(like.split(live_size), torch.empty(shape, device="meta").split(shape[1]), strict=True)
            state[name] = torch.cat([_widened_matrix(part.T, wide.T.shape, noise).T for part, wide in parts])
        else:
            state[name] = _widened_matrix(like, shape, noise, exists)
    return state


def _first_layers(name: str) -> str:
    """The name of the same tensor in the first layer: "model.layers.9.x" -> "model.layers.0.x"."""
    before, _, after = name.partition("layers.")
    return f"{before}layers.0.{after.partition('.')[2]}"


def _widened_norm(small: Tensor, size: int, live_size: int) -> Tensor:
    """(D,) weights that undo the smaller mean square; those of the added entries meet zeros only."""
    wide = small.new_ones(size, dtype=torch.float32)
    wide[: len(small)] = small.float()
    return (wide * math.sqrt(live_size / size)).to(small.dtype)


def _widened_matrix(small: Tensor, shape: tuple[int, ...], noise: Tensor, exists: bool = True) -> Tensor:
    """The small matrix, zeros below it and noise to its right; of an added layer (`exists` False) zeros in its place.

    The noise is smaller than the matrix's own largest entries, so no row's quantisation scale grows by it.
    """
    rows, columns = small.shape
    tile = (noise * small.abs().float().mean()).to(small.dtype)
    wide = small.new_empty(tuple(shape))
    for part in wide.view(-1).split(len(tile)):
        part.copy_(tile[: len(part)])
    wide[:, :columns] = 0
    if exists:
        wide[:rows, :columns] = small
    return wide
