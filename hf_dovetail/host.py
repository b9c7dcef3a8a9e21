"""A draft's rows on the CPU out of the native kernels: few calls a block, weights packed as the kernels read them.

For some ten rows of a small network, torch's operations take longer to begin than to compute. Here a block is two
calls, and a level of a tree takes about a third of the time. What is proposed may differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from .anatomy import is_hooked
from .blocks import Attention, DecoderBlock, DynamicGatingFusion, KeyValueStore, LinearFusion, RMSNorm, Rotation
from .curves import MAX_ROWS
from .engines import activations, native, norms, rotary
from .engines.best import best
from .engines.exact import exact_attention, takes
from .engines.fused import FusedLayer, Geometry, Products
from .engines.native import NativeBf16
from .engines.quantised import fingerprint
from .network import DraftNetwork
from .packed import PackedWeight
from .recast import RecastLM
from .steps import Network

logger = logging.get_logger(__name__)

_MOST_BYTES = 64 << 20
"""Of weights that are copied to be packed; a pass over more of them is as long as reading them takes."""
_DTYPES = (torch.bfloat16, torch.float32)


class _Parts:
    """What rows are computed with; knows the modules that it comes from, not the network that they are in.

    Args:
        network: whose weights, for which `why_not` has no reason.
    """

    def __init__(self, network: DraftNetwork | RecastLM) -> None:
        packs = _packs(network)
        self.fusion = None if network.fusion is None else _FUSIONS[type(network.fusion)](network.fusion, packs)
        self.blocks = [_Block(block, packs) for block in network.blocks]


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
        hidden = self._network.embed(tokens)[0]
        if self._parts.fusion is not None:
            hidden = self._parts.fusion(hidden, inputs[0])
        cosines, sines = (each.expand(1, rows, 1, -1).reshape(1, rows, -1).contiguous() for each in rotation)
        sines = torch.cat((-sines[..., : sines.shape[-1] // 2], sines[..., sines.shape[-1] // 2 :]), dim=-1)
        for block in self._parts.blocks:
            hidden = block(hidden, (cosines, sines), mask, store)
        return self._network.finish(hidden.unsqueeze(0))


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


def _packs(network: DraftNetwork | RecastLM) -> bool:
    """Whether its weights are few enough to be copied."""
    return sum(each.nbytes for each in _tensors(network) if not isinstance(each, PackedWeight)) <= _MOST_BYTES


def _identity(network: DraftNetwork | RecastLM) -> tuple:
    """Changes with the weights that are computed with: if they are copied, with their content."""
    packs = _packs(network)
    found: list = [packs]
    for tensor in _tensors(network):
        if isinstance(tensor, PackedWeight):
            found.append(id(tensor.kernel))
        else:
            found.append((tensor.data_ptr(), fingerprint(tensor.detach()) if packs else tuple(tensor.shape)))
    return tuple(found)


class _Products:
    """Products of rows with matrices of one input, which lie side by side if they are packed here.

    Args:
        weights: (n, K) each.
        biases: (n,) or None, of each.
        packs: whether weights may be copied.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], packs: bool) -> None:
        self._weights, self._biases = tuple(weights), tuple(biases)
        self._sizes = [len(weight) for weight in weights]
        self._stack, self._stacked_bias = None, None
        if packs and not any(isinstance(weight, PackedWeight) for weight in weights):
            self._stack = NativeBf16.of(torch.cat([weight.detach() for weight in weights]))
            if self._stack is not None and any(bias is not None for bias in biases):
                whole = [
                    torch.zeros_like(weight[:, 0]) if bias is None else bias.detach()
                    for weight, bias in zip(weights, biases, strict=True)
                ]
                self._stacked_bias = torch.cat(whole)

    @classmethod
    def of(cls, packs: bool, *linears: nn.Linear) -> _Products:
        """Those of linear layers."""
        return cls([linear.weight for linear in linears], [linear.bias for linear in linears], packs)

    def native(self) -> Products | None:
        """The same for native kernels, if it is these that multiply."""
        if self._stack is not None:
            return Products([self._stack], [self._stacked_bias, *[None] * (len(self._sizes) - 1)], self._sizes)
        if not all(isinstance(weight, PackedWeight) for weight in self._weights):
            return None
        return Products.of([weight.kernel for weight in self._weights], self._biases)

    def __call__(self, rows: Tensor) -> Sequence[Tensor]:
        """(R, K) to (R, n), for each."""
        if self._stack is not None:
            return self._stack.product(rows, self._stacked_bias).split(self._sizes, dim=1)
        pairs = zip(self._weights, self._biases, strict=True)
        return [F.linear(rows, weight, bias) for weight, bias in pairs]


class _Norm:
    """`blocks.RMSNorm`, or nothing in place of `nn.Identity`."""

    def __init__(self, norm: nn.Module) -> None:
        self.parts = (norm.weight.detach(), norm.eps) if isinstance(norm, RMSNorm) else (None, 0.0)

    def __call__(self, states: Tensor) -> Tensor:
        """(..., n), its last dimension without gaps."""
        return states if self.parts[0] is None else norms.normalised(states, *self.parts)


class _Block:
    """`blocks.DecoderBlock` for one sequence."""

    def __init__(self, block: DecoderBlock, packs: bool) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._attention: Attention = attention
        self._norms = _Norm(block.input_layernorm), _Norm(block.post_attention_layernorm)
        self._head_norms = _Norm(attention.q_norm), _Norm(attention.k_norm)
        self._states = _Products.of(packs, attention.q_proj, attention.k_proj, attention.v_proj)
        self._output = _Products.of(packs, attention.o_proj)
        self._gates, self._down = _Products.of(packs, mlp.gate_proj, mlp.up_proj), _Products.of(packs, mlp.down_proj)
        self._activation = activations.function_of(mlp.act_fn)
        self._fused = self._as_fused()

    def _as_fused(self) -> FusedLayer | None:
        """The block in two calls, if native kernels multiply."""
        products = [each.native() for each in (self._states, self._output, self._gates, self._down)]
        if any(each is None for each in products):
            return None
        width, sizes = self._attention.head_dim, products[0].sizes
        heads, groups = sizes[0] // width, sizes[1] // width
        dtype = self._attention.q_proj.weight.dtype
        geometry = Geometry(products[1].sizes[0], heads, groups, width, dtype, self._activation)
        norms, head_norms = (tuple(norm.parts for norm in each) for each in (self._norms, self._head_norms))
        return FusedLayer(geometry, *products, norms, head_norms)

    def __call__(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, store: KeyValueStore | None
    ) -> Tensor:
        """(R, h) to (R, h); rotation in transformers' form, (1, R, D) each."""
        fused = self._fused
        if fused is not None:
            given = hidden.contiguous().unsqueeze(0)
            query, key, value = fused.states(given, *rotation)
        else:
            query, key, value = self._query_key_value(hidden, rotation)
        if store is not None:
            key, value = store.update(key, value, self._attention.layer)
        if fused is not None and takes(query, key, value, mask):
            return fused.rest(given, query, key, value, mask, self._attention.head_dim**-0.5)[0]
        attended = exact_attention(self._attention, query, key, value, mask)[0]
        hidden = hidden + self._output(attended.view(len(hidden), -1))[0]
        gate, up = self._gates(self._norms[1](hidden))
        return hidden + self._down(activations.gated(self._activation, gate, up))[0]

    def _query_key_value(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(1, H, R, D), (1, G, R, D) twice."""
        rows, width = len(hidden), self._attention.head_dim
        query, key, value = (each.view(1, rows, -1, width) for each in self._states(self._norms[0](hidden)))
        query, key = self._head_norms[0](query), self._head_norms[1](key)
        return *rotary.rotate(query, key, *rotation), value.transpose(1, 2)


class _GatingFusion:
    """`blocks.DynamicGatingFusion`."""

    def __init__(self, fusion: DynamicGatingFusion, packs: bool) -> None:
        self._norm = _Norm(fusion.input_layernorm)
        self._from_feature, self._from_token, self._gate = (
            _Products([weight.t()], [None], packs) for weight in (fusion.W_1, fusion.W_2, fusion.W_z)
        )

    def __call__(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """(R, h) each to (R, h)."""
        from_feature = self._from_feature(features)[0]
        from_token = F.silu(self._from_token(self._norm(embeddings))[0])
        gate = torch.sigmoid(self._gate(torch.cat((from_feature, from_token), dim=-1))[0])
        return torch.lerp(from_token, from_feature, gate)


class _LinearFusion:
    """`blocks.LinearFusion`."""

    def __init__(self, fusion: LinearFusion, packs: bool) -> None:
        self._product = _Products.of(packs, fusion.fc)

    def __call__(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """(R, h) each to (R, h)."""
        return self._product(torch.cat((embeddings, features), dim=-1))[0]


_FUSIONS: dict[type[nn.Module], Callable] = {DynamicGatingFusion: _GatingFusion, LinearFusion: _LinearFusion}
