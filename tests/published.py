"""Checkpoints as others publish them, with their names and shapes, and what their own code computes from them.

The formulas are transcriptions on the published tensors, with no cache and no code of the package: `cnets.py` and
`cnets1.py` of SafeAILab/EAGLE, `eagle3/` of vllm-project/speculators, and section 3.2 of arXiv 2412.18934.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

Continuations = Callable[[tuple[int, ...]], Tensor]
HIDDEN, INNER, VOCAB, DRAFT_VOCAB = 32, 48, tiny.VOCAB, 40
NORMS = ("post_attention_layernorm.weight",)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Geometry:
    """Heads and RoPE of a draft, as its configuration states them; what is None stays unstated."""

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    theta: float | None = None
    scaling: dict[str, Any] | None = None
    biases: str = ""
    qk_norm: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads or self.heads, self.head_dim or HIDDEN // self.heads

    def stated(self) -> dict[str, Any]:
        values = {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 200,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_theta": self.theta,
            "rope_scaling": self.scaling,
        }
        return {name: value for name, value in values.items() if value is not None}


VICUNA, LLAMA_3 = Geometry(), Geometry(kv_heads=2, theta=500000.0)
LLAMA_31 = Geometry(kv_heads=2, theta=500000.0, scaling=LLAMA3)
QWEN_2, QWEN_3 = Geometry(kv_heads=2, theta=1e6, biases="qkv"), Geometry(kv_heads=1, head_dim=16, theta=1e6)


@dataclass(frozen=True)
class Case:
    """One published draft.

    Args:
        kind: "dgf", "eagle", "eagle3" or "speculators".
        geometry, blocks: of its blocks.
        extra: what its configuration says besides, at the top level.
        options: "bias" (of `fc`), "embeddings", "full" (the whole vocabulary), "input_norm", "fc_norm", "head",
            "headless" (EAGLE-3 without an LM head of its own).
        file: "bin", "safetensors" or "sharded".
        layers: the layers whose inputs it reads; None: the last hidden state.
        family: of its target.
        prefix: before every name.
        target_width: hidden size of its target.
    """

    kind: str
    geometry: Geometry
    blocks: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    file: str = "safetensors"
    layers: tuple[int, ...] | None = None
    family: str = "llama"
    prefix: str = ""
    target_width: int = HIDDEN

    @property
    def recurrent(self) -> bool:
        return self.kind in ("eagle3", "speculators")

    @property
    def first(self) -> str:
        return "midlayer." if self.kind == "eagle3" else "layers.0."

    def target(self) -> PreTrainedModel:
        return tiny.build(self.family, num_hidden_layers=8, hidden_size=self.target_width)

    def config(self) -> dict[str, Any]:
        if self.kind != "speculators":
            stated = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": self.blocks}
            return {**stated, **self.geometry.stated(), **self.extra}
        layer = {"model_type": "qwen3" if self.geometry.qk_norm else "llama", "num_hidden_layers": self.blocks}
        verifier = {"name_or_path": "someone/some-target", "architectures": ["LlamaForCausalLM"]}
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_config": {"algorithm": "eagle3", "verifier": verifier},
            "transformer_layer_config": {**layer, **self.geometry.stated()},
            "draft_vocab_size": DRAFT_VOCAB,
            **self.extra,
        }

    def tensors(self, seed: int = 7) -> dict[str, Tensor]:
        """Random weights: large enough that every term changes the result."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in self._shapes().items():
            random = torch.randn(shape, generator=generator)
            tensors[name] = 1 + 0.3 * random if name.endswith("norm.weight") or "fc_norm" in name else 0.2 * random
        if self.recurrent and "full" not in self.options:
            ids = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
            tensors["d2t"] = ids - torch.arange(DRAFT_VOCAB)
            tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True)
        return {self.prefix + name: tensor for name, tensor in tensors.items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        wide, options = HIDDEN, self.options
        shapes: dict[str, tuple[int, ...]] = {}
        if self.kind == "dgf":
            shapes |= {"W_1": (wide, wide), "W_2": (wide, wide), "W_z": (2 * wide, wide)}
            shapes["input_layernorm.weight"] = (wide,)
        else:
            shapes["fc.weight"] = (wide, len(self.layers) * self.target_width if self.recurrent else 2 * wide)
        if self.recurrent:
            rows = VOCAB if "full" in options else DRAFT_VOCAB
            shapes |= {"norm.weight": (wide,)}
            shapes |= {} if "headless" in options else {"lm_head.weight": (rows, wide)}
            shapes[self.first + "hidden_norm.weight"] = shapes[self.first + "input_layernorm.weight"] = (wide,)
        for block in range(self.blocks):
            name = f"layers.{block}." if block else self.first
            shapes |= self._block(name, 2 * wide if self.recurrent and block == 0 else wide)
            if block:
                shapes[name + "input_layernorm.weight"] = (wide,)
        shapes |= {"embed_tokens.weight": (VOCAB, wide)} if "embeddings" in options else {}
        shapes |= {"lm_head.weight": (VOCAB, wide)} if "head" in options else {}
        shapes |= {"fc.bias": (wide,)} if "bias" in options else {}
        shapes |= {"input_norm.weight": (len(self.layers) * wide,)} if "input_norm" in options else {}
        shapes |= (
            {f"fc_norm.{i}.weight": (wide,) for i in range(len(self.layers)) if "fc_norm" in options}
            if (self.layers)
            else {}
        )
        return shapes

    def _block(self, name: str, width: int) -> dict[str, tuple[int, ...]]:
        heads, kv_heads, size = self.geometry.sizes
        rows = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
        shapes = {f"{name}self_attn.{one}_proj.weight": (count, width) for one, count in rows.items()}
        shapes |= {f"{name}self_attn.{one}_proj.bias": (rows[one],) for one in self.geometry.biases}
        shapes |= {f"{name}self_attn.o_proj.weight": (HIDDEN, heads * size)}
        shapes |= {f"{name}self_attn.{one}_norm.weight": (size,) for one in "qk" if self.geometry.qk_norm}
        shapes |= {f"{name}mlp.{one}_proj.weight": (INNER, HIDDEN) for one in ("gate", "up")}
        return {**shapes, f"{name}mlp.down_proj.weight": (HIDDEN, INNER), name + NORMS[0]: (HIDDEN,)}

    def write(self, folder: Path, tensors: dict[str, Tensor] | None = None, config: dict | None = None) -> Path:
        """The checkpoint as a folder."""
        tensors = self.tensors() if tensors is None else tensors
        (folder / "config.json").write_text(json.dumps(self.config() if config is None else config))
        if self.file == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        elif self.file == "safetensors":
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            names, place = sorted(tensors), {}
            for part, keys in enumerate((names[::2], names[1::2])):
                place |= dict.fromkeys(keys, f"model-0000{part + 1}-of-00002.safetensors")
                save_file({key: tensors[key] for key in keys}, folder / place[keys[0]], metadata={"format": "pt"})
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
        return folder


CASES = {
    "dgf": Case("dgf", VICUNA, blocks=3, options=("embeddings", "head"), prefix="model."),
    "dgf-llama3": Case("dgf", LLAMA_3),
    "eagle-vicuna": Case("eagle", VICUNA, options=("bias", "embeddings"), file="bin"),
    "eagle-llama3": Case("eagle", LLAMA_3, extra={"bias": False}, file="bin"),
    "eagle-qwen2": Case("eagle", QWEN_2, extra={"bias": True, "qkv_bias": True}, options=("bias",), family="qwen2"),
    "eagle3": Case(
        "eagle3",
        Geometry(kv_heads=2),
        extra={"draft_vocab_size": 40, "num_hidden_layers": 40},  # as EAGLE3-Vicuna1.3-13B says of its one block
        file="bin",
        layers=(2, 4, 5),
    ),
    "eagle3-qwen3": Case(
        "eagle3",
        QWEN_3,
        extra={"draft_vocab_size": 40, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 6]}},
        layers=(1, 3, 7),
        options=("embeddings",),
        family="qwen3",
    ),
    "eagle3-full": Case("eagle3", LLAMA_3, extra={"draft_vocab_size": VOCAB}, options=("full",), layers=(2, 4, 5)),
    "eagle3-headless": Case(
        "speculators",
        LLAMA_31,
        extra={"draft_vocab_size": VOCAB, "norm_before_residual": False},  # as NVIDIA's for gpt-oss
        options=("full", "headless"),
        layers=(2, 4, 5),
    ),
    "eagle3-narrow": Case(
        "eagle3",
        VICUNA,
        extra={"draft_vocab_size": 40, "target_hidden_size": 48},
        layers=(2, 4, 5),
        options=("embeddings",),
        target_width=48,
    ),
    "speculators": Case(
        "speculators",
        LLAMA_31,
        extra={"norm_before_residual": True, "eagle_aux_hidden_state_layer_ids": [0, 3, 6]},
        options=("embeddings",),
        file="sharded",
        layers=(0, 3, 6),
    ),
    "speculators-new": Case(
        "speculators",
        Geometry(kv_heads=2, head_dim=16, theta=1e6, qk_norm=True),
        blocks=2,
        extra={"norm_before_residual": False, "norm_before_fc": True, "norm_output": True},
        options=("input_norm",),
        layers=(2, 4, 5),
        family="qwen3",
    ),
    "speculators-fc-norm": Case(
        "speculators",
        LLAMA_3,
        extra={"norm_before_residual": False, "fc_norm": True, "eagle_aux_hidden_state_layer_ids": [1, 2]},
        options=("fc_norm",),
        layers=(1, 2),
    ),
}


class Reference:
    """What a published draft says, by its own formulas.

    Args:
        case: the draft. target: what it drafts for.
    """

    def __init__(self, case: Case, target: PreTrainedModel) -> None:
        self.case, self.target = case, target
        self.weights = {
            name.removeprefix("model."): tensor.to(target.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in case.tensors().items()
        }

    def features(self, ids: Tensor) -> Tensor:
        """(1, n, f): the last hidden state behind the final norm, or the inputs of layers, side by side."""
        states = self.target(ids, output_hidden_states=True).hidden_states
        if self.case.layers is None:
            return states[-1]
        return torch.cat([states[layer] for layer in self.case.layers], dim=-1)

    @torch.no_grad()
    def logits(self, known: Tensor, features: Tensor, path: tuple[int, ...]) -> Tensor:
        """Logits of what follows `path` behind `known` (1, n), whose features but the last's are (1, n - 1, f).

        (V,) of the target's vocabulary, -inf for tokens that the draft does not have.
        """
        tokens = torch.cat((known[0, 1:], torch.tensor(path, dtype=torch.long)))
        start = features[0] if not self.case.recurrent else self.projected(features[0])
        states = start
        for _ in range(len(path) + 1):  # one more row of the draft's own in each turn
            out = self.rows(tokens[: len(states)], states)
            states = torch.cat((start, out[len(start) - 1 :]))
        return self.head(out[-1])

    def continuations(self, known: Tensor, features: Tensor, sharpness: float = 1.0) -> Continuations:
        """Log-probabilities (V,) of what follows a path."""
        return lambda path: (sharpness * self.logits(known, features, path)).log_softmax(-1)

    def projected(self, features: Tensor) -> Tensor:
        """EAGLE-3: features of several layers -> one."""
        if "input_norm" in self.case.options:
            features = self.norm(features, "input_norm")
        if "fc_norm" in self.case.options:
            parts = features.split(HIDDEN, dim=-1)
            features = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)], dim=-1)
        return features @ self.weights["fc.weight"].T

    def rows(self, tokens: Tensor, states: Tensor) -> Tensor:
        """All rows: (T,) tokens t+1 and (T, h) states of tokens t -> (T, h), at positions 0 to T - 1."""
        embedding = self.weights.get("embed_tokens.weight", self.target.get_input_embeddings().weight)[tokens]
        kind = self.case.kind
        if kind == "dgf":
            e = self.norm(embedding, "input_layernorm")
            h1, h2 = states @ self.weights["W_1"], F.silu(e @ self.weights["W_2"])
            z = torch.sigmoid(torch.cat([h1, h2], -1) @ self.weights["W_z"])
            hidden = z * h1 + (1 - z) * h2
        elif kind == "eagle":
            hidden = F.linear(
                torch.cat([embedding, states], -1), self.weights["fc.weight"], self.weights.get("fc.bias")
            )
        for block in range(self.case.blocks):
            name = f"layers.{block}." if block else self.case.first
            if block:
                read, residual = self.norm(hidden, name + "input_layernorm"), hidden
            elif self.case.recurrent:
                normed = self.norm(states, name + "hidden_norm")
                read = torch.cat([self.norm(embedding, name + "input_layernorm"), normed], -1)
                residual = normed if self.case.extra.get("norm_before_residual") else states
            else:
                read, residual = hidden, hidden
            hidden = residual + self.attention(read, name + "self_attn.")
            read = self.norm(hidden, name + "post_attention_layernorm")
            gate, up = (read @ self.weights[f"{name}mlp.{one}_proj.weight"].T for one in ("gate", "up"))
            hidden = hidden + (F.silu(gate) * up) @ self.weights[name + "mlp.down_proj.weight"].T
        return self.norm(hidden, "norm") if self.case.extra.get("norm_output") else hidden

    def head(self, hidden: Tensor) -> Tensor:
        if not self.case.recurrent:
            return hidden @ self.target.get_output_embeddings().weight.T
        if not self.case.extra.get("norm_output"):
            hidden = self.norm(hidden, "norm")
        found = hidden @ self.weights.get("lm_head.weight", self.target.get_output_embeddings().weight).T
        if "full" in self.case.options:
            return found
        logits = found.new_full((VOCAB,), float("-inf"))
        for token, offset in enumerate(self.weights["d2t"].tolist()):
            logits[token + offset] = found[token]
        return logits

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.weights[name + ".weight"]

    def attention(self, x: Tensor, name: str) -> Tensor:
        """Causal attention of all rows, head by head."""
        heads, kv_heads, size = self.case.geometry.sizes
        parts = {}
        for one, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            bias = self.weights.get(f"{name}{one}_proj.bias")
            parts[one] = F.linear(x, self.weights[f"{name}{one}_proj.weight"], bias).view(len(x), count, size)
            if self.case.geometry.qk_norm and one != "v":
                parts[one] = self.norm(parts[one], f"{name}{one}_norm")
        queries, keys = self.turned(parts["q"]), self.turned(parts["k"])
        later = torch.ones(len(x), len(x)).triu(1).bool()
        mixed = []
        for head in range(heads):
            own = head * kv_heads // heads
            scores = (queries[:, head] @ keys[:, own].T / math.sqrt(size)).masked_fill(later, float("-inf"))
            mixed.append(scores.softmax(-1) @ parts["v"][:, own])
        return torch.cat(mixed, -1) @ self.weights[name + "o_proj.weight"].T

    def turned(self, x: Tensor) -> Tensor:
        """RoPE on (T, heads, D), row i at position i."""
        size, geometry = x.shape[-1], self.case.geometry
        frequencies = [(geometry.theta or 10000.0) ** (-i / size) for i in range(0, size, 2)]
        if geometry.scaling:
            frequencies = [_llama3(each, geometry.scaling) for each in frequencies]
        angles = torch.arange(len(x))[:, None, None] * x.new_tensor(frequencies)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def _llama3(frequency: float, scaling: dict[str, Any]) -> float:
    """Llama 3.1's scaling of one frequency."""
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = length * frequency / (2 * math.pi)
    if turns > high:
        return frequency
    smooth = (turns - low) / (high - low)
    return frequency / factor if turns < low else (1 - smooth) * frequency / factor + smooth * frequency
