"""A draft's rows on the CPU out of the native kernels: few calls a block, weights packed as the kernels read them.

For some ten rows of a small network, torch's operations take longer to begin than to compute. Here a block is two
calls, and a level of a tree takes about a third of the time. What is proposed may differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from .blocks import DecoderBlock, DynamicGatingFusion, KeyValueStore, LinearFusion, RMSNorm, Rotation
from .curves import MAX_ROWS
from .engines import activations, native, norms, onednn
from .engines.best import best
from .engines.decoder_layer import DecoderLayer, Linears
from .engines.fused import NO_NORM, Norm
from .engines.quantised import fingerprint
from .forwards import is_hooked
from .network import DraftNetwork
from .packed import PackedWeight
from .recast import RecastLM
from .steps import Network

logger = logging.get_logger(__name__)

_MOST_BYTES = 64 << 20
"""Of weights that are copied to be packed; a pass over more of them is as long as reading them takes."""
_MOST_BYTES_WITHOUT_ONEDNN = 1 << 30
"""The same where oneDNN has no bfloat16: torch's own products then take some ten times as long as reading."""
_DTYPES = (torch.bfloat16, torch.float32)


class _Parts:
    """What rows are computed with; knows the modules that it comes from, not the network that they are in.

    Args:
        network: whose weights, for which `why_not` has no reason.
    """

    def __init__(self, network: DraftNetwork | RecastLM) -> None:
        copies = _copies(network)
        self.fusion = None if network.fusion is None else _FUSIONS[type(network.fusion)](network.fusion, copies)
        self.blocks = [(_kernels(block, copies), block.self_attn) for block in network.blocks]


class HostNetwork:
    """Computes what another network computes, for passes of up to `MAX_ROWS` rows; that one computes the others.

    Args:
        network: a draft, or a causal LM in its blocks.
        parts: made of its weights.
    """

    def __init__(self, network: DraftNetwork | RecastLM, parts: _Parts) -> None:
        self._network, self._parts = network, parts
        self.device, self.dtype, self.rotary = network.device, network.dtype, network.rotary
        self.input_size, self.target_ids = network.input_size, network.target_ids
        self.logits, self.new_rows, self.addresses = network.logits, network.new_rows, network.addresses
        self.best = best

    def step(
        self,
        tokens: Tensor,
        inputs: Tensor,
        rotation: Rotation,
        mask: Tensor | None = None,
        store: KeyValueStore | None = None,
    ) -> Tensor:
        """See `steps.Network`."""
        batch, rows = tokens.shape
        fits = batch == 1 and 0 < rows <= MAX_ROWS and (mask is not None or rows == 1)
        if not fits or rotation[0].shape[1] not in (1, rows):
            return self._network.step(tokens, inputs, rotation, mask, store)
        hidden = self._network.embed(tokens)
        if self._parts.fusion is not None:
            hidden = self._parts.fusion(hidden, inputs)
        cosines, sines = (each.expand(1, rows, 1, -1).reshape(1, rows, -1).contiguous() for each in rotation)
        sines = torch.cat((-sines[..., : sines.shape[-1] // 2], sines[..., sines.shape[-1] // 2 :]), dim=-1)
        for kernels, attention in self._parts.blocks:
            hidden = kernels.compute(attention, hidden, (cosines, sines), mask, store, {})
        return self._network.finish(hidden)


_known: WeakKeyDictionary[DraftNetwork | RecastLM, tuple[tuple, _Parts | None]] = WeakKeyDictionary()


def for_host(network: DraftNetwork | RecastLM) -> Network:
    """The network out of native kernels, with its weights as they are now; itself where that cannot be.

    Args:
        network: on the CPU.
    """
    reason = why_not(network)
    key = (reason,) if reason is not None else _identity(network)
    if network not in _known or _known[network][0] != key:
        if reason is not None:
            logger.info("the draft runs on torch's operations: %s", reason)
        _known[network] = key, None if reason is not None else _Parts(network)
    parts = _known[network][1]
    return network if parts is None else HostNetwork(network, parts)


def why_not(network: DraftNetwork | RecastLM) -> str | None:
    """Why the kernels cannot run a network, or None."""
    if native.why_not() is not None:
        return native.why_not()
    if network.dtype not in _DTYPES:
        return f"its weights are {network.dtype}, not bfloat16 or float32"
    if network.fusion is not None and type(network.fusion) not in _FUSIONS:
        return f"there are no kernels for {type(network.fusion).__name__}"
    if not all(type(block) is DecoderBlock and block.self_attn.head_dim % 2 == 0 for block in network.blocks):
        return "there are no kernels for its blocks"
    if any(tensor.dtype != network.dtype or not tensor.is_cpu for tensor in _tensors(network)):
        return "its weights are in several precisions, or on several devices"
    if any(is_hooked(module) for part in _computed(network) for module in part.modules()):
        return "its modules have hooks, or a forward of their own"
    linears = (linear for block in network.blocks for linear in _linears(block))
    if not all(type(linear) is nn.Linear for linear in linears):
        return "its linear layers are of another kind"
    if not all(type(norm) in (RMSNorm, nn.Identity) for block in network.blocks for norm in _norms(block)):
        return "its norms are of another kind"
    if not all(activations.function_of(block.mlp.act_fn) for block in network.blocks):
        return "there is no kernel for its activation"
    return None


def _linears(block: DecoderBlock) -> tuple[nn.Module, ...]:
    attention, mlp = block.self_attn, block.mlp
    return (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )


def _norms(block: DecoderBlock) -> tuple[nn.Module, ...]:
    attention = block.self_attn
    return block.input_layernorm, block.post_attention_layernorm, attention.q_norm, attention.k_norm


def _computed(network: DraftNetwork | RecastLM) -> tuple[nn.Module, ...]:
    """The modules that are computed here, by whatever is within them."""
    return tuple(network.blocks) if network.fusion is None else (network.fusion, *network.blocks)


def _tensors(network: DraftNetwork | RecastLM) -> list[Tensor]:
    """The weights that are computed with here."""
    return [parameter for part in _computed(network) for parameter in part.parameters()]


def _copies(network: DraftNetwork | RecastLM) -> bool:
    """Whether its weights are few enough to be copied."""
    most = _MOST_BYTES if onednn.has_bf16() else _MOST_BYTES_WITHOUT_ONEDNN
    return sum(each.nbytes for each in _tensors(network) if not isinstance(each, PackedWeight)) <= most


def _identity(network: DraftNetwork | RecastLM) -> tuple:
    """Changes with the weights that are computed with: if they are copied, with their content."""
    copies = _copies(network)
    found: list = [copies, *(_settings(block) for block in network.blocks)]
    for tensor in _tensors(network):
        if isinstance(tensor, PackedWeight):
            found.append(id(tensor.kernel))
        else:
            found.append((tensor.data_ptr(), fingerprint(tensor.detach()) if copies else tuple(tensor.shape)))
    return tuple(found)


def _norm(module: nn.Module) -> Norm:
    """`blocks.RMSNorm`, or none in place of `nn.Identity`."""
    return (module.weight.detach(), module.eps) if isinstance(module, RMSNorm) else NO_NORM


def _settings(block: DecoderBlock) -> tuple:
    """What a block is computed with besides weights."""
    return activations.function_of(block.mlp.act_fn), *(_norm(norm)[1] for norm in _norms(block))


def _kernels(block: DecoderBlock, copies: bool) -> DecoderLayer:
    """What computes a block."""
    query, key, value, out, gate, up, down = _linears(block)
    linears = [Linears.of(*each, copies=copies) for each in ((query, key, value), (out,), (gate, up), (down,))]
    norms, activation = tuple(map(_norm, _norms(block))), activations.function_of(block.mlp.act_fn)
    head_dim = block.self_attn.head_dim
    return DecoderLayer(*linears, norms[:2], norms[2:], head_dim=head_dim, activation=activation)


class _GatingFusion:
    """`blocks.DynamicGatingFusion`."""

    def __init__(self, fusion: DynamicGatingFusion, copies: bool) -> None:
        self._norm = _norm(fusion.input_layernorm)
        self._from_feature, self._from_token, self._gate = (
            Linears([weight.t()], [None], copies) for weight in (fusion.W_1, fusion.W_2, fusion.W_z)
        )

    def __call__(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """(B, T, h) each to (B, T, h)."""
        from_feature = self._from_feature(features)[0]
        from_token = F.silu(self._from_token(norms.normalised(embeddings, *self._norm))[0])
        gate = torch.sigmoid(self._gate(torch.cat((from_feature, from_token), dim=-1))[0])
        return torch.lerp(from_token, from_feature, gate)


class _LinearFusion:
    """`blocks.LinearFusion`."""

    def __init__(self, fusion: LinearFusion, copies: bool) -> None:
        self._product = Linears.of(fusion.fc, copies=copies)

    def __call__(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """(B, T, h) each to (B, T, h)."""
        return self._product(torch.cat((embeddings, features), dim=-1))[0]


_FUSIONS: dict[type[nn.Module], Callable] = {DynamicGatingFusion: _GatingFusion, LinearFusion: _LinearFusion}
