"""A small causal LM as the network of a draft: its own weights, in the blocks of `blocks`.

The layers of transformers serve every purpose, and for one row of a small model most of their time is Python. In lean
blocks the same weights propose the same trees sooner, and in fixed shapes, so that a round can be one CUDA graph.
Only for families whose layers are known to compute what a block computes, each model compared with its own forward
pass first; for all others, and wherever somebody has a hook in between, the model's own layers do it.
"""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .anatomy import decoder_layers
from .attention import BranchingMask
from .blocks import DecoderBlock, KeyValueStore, RMSNorm, RotaryTable, Rotation, fold_mask
from .config import ROPE_TYPES_KEPT, DovetailConfig
from .devices import to_host
from .forwards import is_hooked
from .levels import likeliest
from .rows import RowBuffer

logger = logging.get_logger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers compute what `blocks.DecoderBlock` does."""
_TRIED = 12  # tokens that both ways are compared on
_TOLERANCE = 0.1  # of the hidden states' norm; more than rounding, less than another formula


class RecastLM:
    """A `steps.Network` of a causal LM's own modules; made by `recast`.

    Args:
        lm: the model.
        config: its geometry.
        tokens: how many of its tokens may be proposed, from the first.
    """

    input_size = 0
    target_ids = None
    best = staticmethod(likeliest)
    fusion = None

    def __init__(self, lm: PreTrainedModel, config: DovetailConfig, tokens: int) -> None:
        decoder = lm.get_decoder()
        self._embedding, self._head = lm.get_input_embeddings(), lm.get_output_embeddings()
        self.blocks, self._norm = [_block(layer, config) for layer in decoder_layers(decoder)], _norm(decoder.norm)
        self.rotary = RotaryTable(config, decoder.rotary_emb)
        self.device, self.dtype = lm.device, lm.dtype
        self._tokens, self._groups = tokens, config.num_attention_heads // config.num_key_value_heads
        self._rows = config.num_hidden_layers, config.num_key_value_heads, config.head_dim

    def step(
        self,
        tokens: Tensor,
        inputs: Tensor,
        rotation: Rotation,
        mask: Tensor | None = None,
        store: KeyValueStore | None = None,
    ) -> Tensor:
        """See `steps.Network`; tokens are all that it reads."""
        hidden = self.embed(tokens)
        if mask is not None:
            mask = fold_mask(mask, self._groups)
        for block in self.blocks:
            hidden = block(hidden, rotation, mask, store)
        return self.finish(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) tokens to (B, T, h), what the first block reads."""
        return self._embedding(tokens)

    def finish(self, hidden: Tensor) -> Tensor:
        """(B, T, h) of the last block, as the LM head reads them."""
        return self._norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `steps.Network`."""
        return self._head(hidden)[..., : self._tokens].float()

    def new_rows(self, capacity: int) -> RowBuffer:
        """See `steps.Network`."""
        return RowBuffer(*self._rows, capacity, self.device, self.dtype)

    def addresses(self) -> tuple:
        """See `steps.Network`."""
        parts = (self._embedding, *self.blocks, self._norm, self._head)
        tensors = (tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))
        return tuple((id(tensor) if _is_wrapped(tensor) else tensor.data_ptr(), tensor.dtype) for tensor in tensors)


_known: WeakKeyDictionary[PreTrainedModel, tuple[tuple, RecastLM | None]] = WeakKeyDictionary()


def recast(lm: PreTrainedModel, tokens: int) -> RecastLM | None:
    """The model in lean blocks that share its modules, where they are now; None where its own layers must do it.

    Args:
        lm: a causal LM in evaluation mode.
        tokens: how many of its tokens may be proposed, from the first.
    """
    reason, config = why_not(lm), None
    if reason is None:
        config = _geometry(lm)
        parts = (tokens, lm.device, lm.dtype, *map(id, _shared(lm)))
    else:
        parts = (reason,)
    if lm not in _known or _known[lm][0] != parts:
        found = None if config is None else RecastLM(lm, config, tokens)
        if found is not None and not _agrees(found, lm):
            found, reason = None, "they would compute something else"
        how = "in lean blocks" if found is not None else f"with its own layers: {reason}"
        logger.info("%s drafts %s", type(lm).__name__, how)
        _known[lm] = parts, found
    return _known[lm][1]


def why_not(lm: PreTrainedModel) -> str | None:
    """Why a model cannot be recast, or None."""
    decoder = lm.get_decoder()
    config, layers = decoder.config, decoder_layers(decoder)
    if config.model_type not in FAMILIES or layers is None:
        return f"models of type {config.model_type!r} are not known to fit"
    if not all(type(module).__module__.startswith("transformers.models.") for module in (decoder, *layers)):
        return "its layers are not those of transformers"
    if getattr(config, "sliding_window", None) or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return "its attention sees a window only"
    if decoder.rotary_emb.rope_type not in ROPE_TYPES_KEPT:
        return f"its RoPE of type {decoder.rotary_emb.rope_type!r} depends on more than the position"
    if len({tensor.device for tensor in lm.parameters()}) != 1:
        return "it is on several devices"
    if any(map(is_hooked, _left_out(decoder, layers))):
        return "its layers have hooks, or a forward of their own"
    return None


def _left_out(decoder: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """The modules whose `forward` lean blocks do not call."""
    yield from (decoder, decoder.norm, decoder.rotary_emb)
    for layer in layers:
        yield from (layer, layer.self_attn, *_norms(layer))


def _norms(layer: nn.Module) -> Iterator[nn.Module]:
    yield from (layer.input_layernorm, layer.post_attention_layernorm)
    if hasattr(layer.self_attn, "q_norm"):
        yield from (layer.self_attn.q_norm, layer.self_attn.k_norm)


def _shared(lm: PreTrainedModel) -> Iterator[nn.Module | nn.Parameter]:
    """What lean blocks take from the model."""
    decoder = lm.get_decoder()
    yield from (lm.get_input_embeddings(), lm.get_output_embeddings(), decoder.norm.weight, decoder.rotary_emb)
    for layer in decoder_layers(decoder):
        attention = layer.self_attn
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, layer.mlp)
        yield from (norm.weight for norm in _norms(layer))


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether it is another library's kind of tensor, which need not have an address."""
    return type(tensor) not in (Tensor, nn.Parameter)


def _geometry(lm: PreTrainedModel) -> DovetailConfig:
    """The model's geometry as that of blocks."""
    decoder = lm.get_decoder()
    config, attention = decoder.config, decoder_layers(decoder)[0].self_attn
    return DovetailConfig(
        fusion="none",
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        hidden_act=config.hidden_act,
        qk_norm=hasattr(attention, "q_norm"),
    )


def _block(layer: nn.Module, config: DovetailConfig) -> DecoderBlock:
    """A block of a layer's own modules."""
    with torch.device("meta"):  # what it is made with is replaced at once
        block = DecoderBlock(config, layer=layer.self_attn.layer_idx)
    ours, theirs = block.self_attn, layer.self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(ours, name, getattr(theirs, name))
    if config.qk_norm:
        ours.q_norm, ours.k_norm = _norm(theirs.q_norm), _norm(theirs.k_norm)
    block.input_layernorm = _norm(layer.input_layernorm)
    block.post_attention_layernorm = _norm(layer.post_attention_layernorm)
    block.mlp = layer.mlp
    return block.eval()


def _norm(theirs: nn.Module) -> RMSNorm:
    """A norm with the weight of transformers' own."""
    with torch.device("meta"):
        norm = RMSNorm(theirs.weight.shape[0], theirs.variance_epsilon)
    norm.weight = theirs.weight
    return norm


@torch.no_grad()
def _agrees(network: RecastLM, lm: PreTrainedModel) -> bool:
    """Whether both ways compute the same hidden states, but for rounding."""
    tokens = torch.arange(1, _TRIED + 1, device=network.device).unsqueeze(0) % lm.get_input_embeddings().num_embeddings
    places = torch.arange(_TRIED, device=network.device).unsqueeze(0)
    allowed = places[:, None, :] <= places[:, :, None]
    mask = BranchingMask(lm)(allowed, places, places)
    cos, sin = network.rotary.table(_TRIED, network.device, network.dtype)
    decoder = lm.get_decoder()
    with torch.autocast(network.device.type, enabled=False):
        found = network.step(tokens, tokens, (cos[:, :_TRIED], sin[:, :_TRIED]), allowed[:, None])
        output = decoder(input_ids=tokens, position_ids=places, attention_mask=mask, use_cache=False)
    expected = output.last_hidden_state.float()
    agrees = (found - expected).norm() <= _TOLERANCE * expected.norm()
    return bool(to_host(agrees).wait())
