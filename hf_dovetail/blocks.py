"""The parts of a draft's network: fusion, decoder blocks and RoPE, lean enough for one row at a time.

Knows tensors and weights; knows nothing of targets, sessions or trees. One `forward` serves training (autograd,
whole sequences) and drafting (a few rows against preallocated buffers). A block's parameters have the names and
the meaning of transformers' `LlamaDecoderLayer`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .config import DovetailConfig
from .eight_bits import EightBitMatrix

Rotation = tuple[Tensor, Tensor]
"""cos and sin of rows, (B or 1, T or 1, 1, D); the first half of sin is negated (see `rotate`)."""

_SMALLEST_TABLE = 512


class KeyValueStore(Protocol):
    """Where a block's keys and values live: `rows.RowBuffer` when drafting, transformers' `Cache` in training."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add (B, H, T, D) states of block `layer`; return all that its rows may look at, (B, H, K, D)."""


def finish_logits(logits: Tensor, logit_scale: float, final_logit_softcapping: float | None) -> Tensor:
    """What a target does behind its LM head to (B, T, V) logits: a factor (Cohere, Granite), a soft cap (Gemma 2)."""
    logits = logits if logit_scale == 1.0 else logits * logit_scale
    cap = final_logit_softcapping
    return cap * torch.tanh(logits / cap) if cap else logits


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 whatever the precision."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.eps)


class DynamicGatingFusion(nn.Module):
    """Fuses the target's feature of a token with the embedding of the next one (arXiv 2412.18934, section 3.2).

    `e = RMSNorm(embedding)`, `h1 = f W_1`, `h2 = SiLU(e W_2)`, `z = sigmoid([h1; h2] W_z)`, and the result is
    `z * h1 + (1 - z) * h2`. `W_1`, `W_2`: (h, h); `W_z`: (2h, h); used as `x @ W`, without bias.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.W_1 = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.W_2 = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.W_z = nn.Parameter(torch.empty(2 * hidden_size, hidden_size))

    def forward(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Fuse (B, T, h) embeddings of tokens t+1 with (B, T, h) features of tokens t."""
        from_feature = _product(features, self.W_1)
        from_token = F.silu(_product(self.input_layernorm(embeddings), self.W_2))
        gate = torch.sigmoid(_product(torch.cat((from_feature, from_token), dim=-1), self.W_z))
        return torch.lerp(from_token, from_feature, gate)


def _product(rows: Tensor, weight: Tensor | EightBitMatrix) -> Tensor:
    return weight(rows) if isinstance(weight, EightBitMatrix) else rows @ weight


class LinearFusion(nn.Module):
    """EAGLE-1's and EAGLE-2's fusion: one product with the embedding beside the feature, in this order.

    Source: `cnets1.py` in SafeAILab/EAGLE. `fc`: (h, 2h), with a bias unless the checkpoint has none.
    """

    def __init__(self, hidden_size: int, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * hidden_size, hidden_size, bias=bias)

    def forward(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Fuse (B, T, h) embeddings of tokens t+1 with (B, T, h) features of tokens t."""
        return self.fc(torch.cat((embeddings, features), dim=-1))


class LayersFusion(nn.Module):
    """EAGLE-3's fusion: features of several layers become one of the draft's width, beside the embedding.

    Sources: `cnets.py` in SafeAILab/EAGLE (`fc`: (h, n * target's h), no bias); `eagle3/core.py` in
    vllm-project/speculators for the norms before it: over all of them (`norm_before_fc`: `input_norm`) or over each
    (`fc_norm`).
    """

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__()
        size, eps = config.feature_size, config.rms_norm_eps
        each = config.target_hidden_size or config.hidden_size
        self.fc = nn.Linear(size, config.hidden_size, bias=False)
        self.input_norm = RMSNorm(size, eps) if config.norm_before_fc else nn.Identity()
        self.fc_norm = nn.ModuleList(RMSNorm(each, eps) for _ in range(size // each) if config.fc_norm)

    def encode(self, features: Tensor) -> Tensor:
        """(B, T, n * target's h) features of the target -> (B, T, h), the form of the draft's own hidden states."""
        features = self.input_norm(features)
        if self.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def forward(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """(B, T, h) embeddings of tokens t+1 beside encoded features of tokens t: (B, T, 2h), for `PairBlock`."""
        return torch.cat((embeddings, features), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention whose groups are folded into the rows: no key or value is repeated."""

    def __init__(self, config: DovetailConfig, layer: int, input_size: int) -> None:
        super().__init__()
        self.layer_idx, self.dropout, self.scaling = layer, config.attention_dropout, config.head_dim**-0.5
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        size, kv_size, bias = self.heads * self.head_dim, self.kv_heads * self.head_dim, config.attention_bias
        self.q_proj = nn.Linear(input_size, size, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=config.attention_out_bias)
        norms = [RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)]
        self.q_norm, self.k_norm = norms

    def forward(self, hidden: Tensor, rotation: Rotation, mask: Tensor | None, store: KeyValueStore | None) -> Tensor:
        """(B, T, input size) -> (B, T, h); `mask` is `fold_mask`'s."""
        batch, rows, _ = hidden.shape
        heads, kv_heads, groups = self.heads, self.kv_heads, self.heads // self.kv_heads
        queries = self.q_norm(self.q_proj(hidden).view(batch, rows, heads, self.head_dim))
        keys = self.k_norm(self.k_proj(hidden).view(batch, rows, kv_heads, self.head_dim))
        queries, keys = rotate(torch.cat((queries, keys), dim=2), rotation).split((heads, kv_heads), dim=2)
        queries = queries.reshape(batch, rows, kv_heads, groups, self.head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        keys = keys.transpose(1, 2)  # (B, H, T, D)
        values = self.v_proj(hidden).view(batch, rows, kv_heads, self.head_dim).transpose(1, 2)
        if store is not None:
            keys, values = store.update(keys, values, self.layer_idx)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, dropout)  # (B, H, G * T, D)
        mixed = mixed.view(batch, kv_heads, groups, rows, self.head_dim).permute(0, 3, 1, 2, 4)
        return self.o_proj(mixed.reshape(batch, rows, heads * self.head_dim))


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, h) -> (B, T, h)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class DecoderBlock(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual; without the first norm, behind a fusion."""

    def __init__(self, config: DovetailConfig, layer: int) -> None:
        super().__init__()
        norm = layer > 0  # the fusion's output goes in as it is
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if norm else nn.Identity()
        self.self_attn = Attention(config, layer, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def entrance(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the attention reads of the block's input, and the residual beside it."""
        return self.input_layernorm(hidden), hidden

    def forward(
        self, hidden: Tensor, rotation: Rotation, mask: Tensor | None = None, store: KeyValueStore | None = None
    ) -> Tensor:
        """One block.

        Args:
            hidden: (B, T, h).
            rotation: of the rows' positions.
            mask: of `fold_mask`; None: every row sees every key.
            store: earlier rows' keys and values; None: the rows see each other only.
        """
        inputs, residual = self.entrance(hidden)
        hidden = residual + self.self_attn(inputs, rotation, mask, store)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class PairBlock(DecoderBlock):
    """EAGLE-3's first block: its attention reads normed embedding and normed hidden state side by side, (B, T, 2h).

    The residual is the hidden state (`LlamaDecoderLayeremb` in `cnets.py` of SafeAILab/EAGLE), or the normed one
    with `norm_before_residual` (`eagle3/model_definitions.py` in vllm-project/speculators).
    """

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__(config, 0)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.hidden_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.self_attn = Attention(config, 0, 2 * size)
        self._normed_residual = config.norm_before_residual

    def entrance(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of (B, T, 2h), embeddings first: (B, T, 2h) for the attention, (B, T, h) beside it."""
        embeddings, hidden = hidden.chunk(2, dim=-1)
        normed = self.hidden_norm(hidden)
        inputs = torch.cat((self.input_layernorm(embeddings), normed), dim=-1)
        return inputs, normed if self._normed_residual else hidden


def make_fusion(config: DovetailConfig) -> nn.Module:
    """The fusion that the configuration names."""
    if config.fusion == "eagle":
        return LinearFusion(config.hidden_size, config.fusion_bias)
    if config.fusion == "eagle3":
        return LayersFusion(config)
    return DynamicGatingFusion(config.hidden_size, config.rms_norm_eps)


def make_blocks(config: DovetailConfig) -> nn.ModuleList:
    """The decoder blocks behind the fusion."""
    pairs = config.fusion == "eagle3"
    blocks = range(config.num_hidden_layers)
    return nn.ModuleList(PairBlock(config) if pairs and i == 0 else DecoderBlock(config, i) for i in blocks)


def fold_mask(mask: Tensor, groups: int) -> Tensor:
    """(B or 1, 1, T, K) bool or additive mask -> (B or 1, 1, groups * T, K), as `Attention` orders its rows."""
    return mask if groups == 1 else torch.cat((mask,) * groups, dim=2)


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """RoPE on (B, T, heads, D) states: `x cos + (-x2, x1) sin`, with the sign kept in sin."""
    cos, sin = rotation
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


class RotaryTable:
    """cos and sin of RoPE for the positions of a draft; computed once, in float32, and looked up from then on.

    No module and no buffer: a change of the network's precision leaves the frequencies as they are.

    Args:
        config: whose RoPE it is.
        rope: a model's own module, with `inv_freq` and `attention_scaling`, in place of what the configuration says.
    """

    def __init__(self, config: DovetailConfig, rope: nn.Module | None = None) -> None:
        self._config, self._rope = config, rope
        self._frequencies: dict[torch.device, Tensor] = {}
        self._tables: dict[tuple[torch.device, torch.dtype], Rotation] = {}

    def __reduce__(self) -> tuple:
        """Copies and pickles compute their own."""
        return RotaryTable, (self._config,)

    @torch.no_grad()
    @torch.inference_mode(False)  # a table that a draft has filled may serve in training
    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of (B, T) positions."""
        if self._rope is None:
            # Here, since a model of transformers imports the Auto classes, which import `modeling` (see `register`).
            from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

            with torch.device("cpu"):
                self._rope = LlamaRotaryEmbedding(self._config)
        if positions.device not in self._frequencies:  # so that they cross to a device once
            self._frequencies[positions.device] = self._rope.inv_freq.to(positions.device)
        angles = positions[..., None].float() * self._frequencies[positions.device]  # (B, T, D / 2)
        scale = self._rope.attention_scaling
        cos, sin = angles.cos() * scale, angles.sin() * scale
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.unsqueeze(2).to(dtype), sin.unsqueeze(2).to(dtype)

    def table(self, length: int, device: torch.device, dtype: torch.dtype) -> Rotation:
        """cos and sin of at least the positions 0 to `length - 1`, (1, length or more, 1, D) each."""
        held = self._tables.get((device, dtype))
        if held is None or held[0].shape[1] < length:
            size = max(_SMALLEST_TABLE, 1 << (length - 1).bit_length())
            held = self._tables[device, dtype] = self.at(torch.arange(size, device=device).unsqueeze(0), dtype)
        return held
