"""The draft network: Dynamic Gating Fusion and decoder blocks, or any small causal LM in their place.

Knows weights and one forward step; knows nothing of trees, rounds or generation. Embeddings and the LM head
are the target's own (`SharedWeights`); a checkpoint does not hold them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import logging

from .attention import BranchingMask, why_not_branching
from .cache import GrowingCache, num_cache_layers
from .config import DovetailConfig, TreeShape

logger = logging.get_logger(__name__)


class DynamicGatingFusion(nn.Module):
    """Fuses the target's feature of a token with the embedding of the next one (arXiv 2412.18934, section 3.2).

    `e = RMSNorm(embedding)`, `h1 = f W_1`, `h2 = SiLU(e W_2)`, `z = sigmoid([h1; h2] W_z)`, and the result is
    `z * h1 + (1 - z) * h2`. `W_1`, `W_2`: (h, h); `W_z`: (2h, h); used as `x @ W`, without bias.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(hidden_size, eps=eps)
        self.W_1 = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.W_2 = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.W_z = nn.Parameter(torch.empty(2 * hidden_size, hidden_size))

    def forward(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Fuse (B, T, h) embeddings of tokens t+1 with (B, T, h) features of tokens t."""
        from_feature = features @ self.W_1
        from_token = F.silu(self.input_layernorm(embeddings) @ self.W_2)
        gate = torch.sigmoid(torch.cat((from_feature, from_token), dim=-1) @ self.W_z)
        return gate * from_feature + (1 - gate) * from_token


@dataclass(frozen=True)
class SharedWeights:
    """The target's embeddings and LM head, on the draft's device and in its precision.

    Args:
        embedding: (V, h). head: (V, h), the same tensor where the target ties them. bias: (V,) or None.
        sources: the target's own tensors (weakly) and their versions, to notice another or a changed target.
    """

    embedding: Tensor
    head: Tensor
    bias: Tensor | None
    sources: tuple[tuple[weakref.ref, int], ...]

    @classmethod
    def of(cls, target: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> SharedWeights:
        """Share where device and precision agree, copy where they do not."""
        sources = _shared_tensors(target)
        copies = {id(t): t.detach().to(device=device, dtype=dtype) for t in sources}
        embedding, head, *bias = (copies[id(t)] for t in sources)
        return cls(embedding, head, bias[0] if bias else None, tuple((weakref.ref(t), t._version) for t in sources))

    def still_of(self, target: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether these are still the weights of `target`, on this device and in this precision."""
        tensors = _shared_tensors(target)
        return (
            (self.head.device, self.head.dtype) == (device, dtype)
            and len(tensors) == len(self.sources)
            and all(ref() is t and v == t._version for t, (ref, v) in zip(tensors, self.sources, strict=True))
        )


def _shared_tensors(target: PreTrainedModel) -> list[Tensor]:
    """The target's embedding matrix, LM head matrix and LM head bias, if it has one."""
    head = target.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ValueError(f"{type(target).__name__} has no LM head with a weight matrix, which the draft would share")
    tensors = [target.get_input_embeddings().weight, head.weight]
    bias = getattr(head, "bias", None)
    return tensors if bias is None else [*tensors, bias]


class DovetailAssistantModel(PreTrainedModel):
    """A draft for `target.generate(..., assistant_model=draft)`.

    Attributes:
        draft_device: where it drafts: "auto" (the GPU if there is one, else the CPU), or a torch device.
        tree: the `TreeShape` of a round.
        last_stats: `GenerationStats` of the last call, or None.
        watch: called with each `decode.Round` of a call, or None.
    """

    config_class = DovetailConfig
    base_model_prefix = "draft"
    main_input_name = "input_ids"
    _no_split_modules = ["LlamaDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: DovetailConfig, lm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.draft_device: str | torch.device = "auto"
        self.last_stats: Any = None
        self.watch: Callable[[Any], None] | None = None
        self._tree = TreeShape()
        self._shared: SharedWeights | None = None
        if config.fusion == "none":
            self.lm = lm if lm is not None else AutoModelForCausalLM.from_config(_lm_config(config))
        else:
            self.fusion = DynamicGatingFusion(config.hidden_size, config.rms_norm_eps)
            self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
            self.layers[0].input_layernorm = nn.Identity()  # the fusion's output goes in as it is
            self.rotary_emb = LlamaRotaryEmbedding(config)
        if lm is None:
            self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights that nothing has set yet are NaN, so that a draft that was never loaded cannot draft."""
        if isinstance(module, LlamaRotaryEmbedding):
            super()._init_weights(module)
            return
        for parameter in module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                nn.init.constant_(parameter, float("nan"))

    @classmethod
    def from_target(
        cls, target: PreTrainedModel, num_hidden_layers: int = 1, fusion: str = "dgf"
    ) -> DovetailAssistantModel:
        """A new, untrained draft for `target`, in its precision.

        Raises:
            ValueError: if the number of blocks or the fusion is unknown, or the target is an encoder-decoder.
        """
        if target.config.is_encoder_decoder:
            raise ValueError(f"{type(target).__name__} is an encoder-decoder; Dovetail drafts for decoder-only targets")
        config = DovetailConfig.for_target(target.config, num_hidden_layers, fusion)
        if config.fusion == "none":
            raise ValueError('fusion="none" wraps an existing language model; use DovetailAssistantModel.from_causal_lm(lm)')
        draft = cls(config)
        draft.reset_parameters()
        return draft.to(target.dtype).eval()

    @classmethod
    def from_causal_lm(cls, lm: PreTrainedModel) -> DovetailAssistantModel:
        """Draft trees with an ordinary causal LM that has the target's vocabulary; `lm` is shared, not copied.

        Raises:
            ValueError: if `lm` cannot compute branches in one forward pass.
        """
        reason = why_not_branching(lm)
        if reason:
            raise ValueError(f"this model cannot draft a tree: {reason}")
        return cls(DovetailConfig.for_causal_lm(lm.config), lm=lm).eval()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values for training: the feature passes through, the token enters by half."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif parameter.ndim == 1 or name.endswith("W_z"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)
        nn.init.eye_(self.fusion.W_1)

    @property
    def tree(self) -> TreeShape:
        """The shape of a round's tree."""
        return self._tree

    @tree.setter
    def tree(self, shape: TreeShape) -> None:
        if not isinstance(shape, TreeShape):
            raise ValueError(f"tree is {shape!r}; expected a TreeShape, such as TreeShape(nodes=16, depth=7, top_k=10)")
        self._tree = shape

    @property
    def reads_features(self) -> bool:
        """Whether drafting needs the target's features."""
        return self.config.fusion != "none"

    def place(self) -> torch.device:
        """Move the network to `draft_device`, wherever a pipeline put it, and return that device."""
        device = resolve_device(self.draft_device)
        if self.device != device:
            self.to(device)
        return self.device

    def share_weights(self, target: PreTrainedModel) -> None:
        """Meet a target: take its embeddings and LM head to the draft's device, if they are not there yet.

        Raises:
            ValueError: if the draft does not fit the target, or its own weights were never loaded.
        """
        check_fits(self, target)
        if self._shared is None:
            check_finite(self)
        if self.reads_features and (
            self._shared is None or not self._shared.still_of(target, self.device, self.dtype)
        ):
            self._shared = SharedWeights.of(target, self.device, self.dtype)

    def new_cache(self, capacity: int) -> GrowingCache:
        """An empty cache for one drafting session."""
        layers = num_cache_layers(self.lm.config) if self.config.fusion == "none" else len(self.layers)
        return GrowingCache(layers, capacity)

    def mask_builder(self) -> BranchingMask:
        """Builds the masks that `forward` takes."""
        return BranchingMask(self.lm if self.config.fusion == "none" else self)

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        past_key_values: GrowingCache | None = None,
    ) -> Tensor:
        """One step of the draft.

        Args:
            input_ids: (B, T) tokens t+1 (with `fusion="none"`: the tokens themselves).
            features: (B, T, h) features of tokens t, the target's or the draft's own; None with `fusion="none"`.
            position_ids: (B, T); by default 0..T-1.
            attention_mask: from `mask_builder()`, or None for plain causal attention over these rows alone.
            past_key_values: the session's cache.

        Returns:
            (B, T, h): the predicted features, or the LM's hidden states; `logits` maps both to (B, T, V).
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        if self.config.fusion == "none":
            decoder = self.lm.get_decoder()
            return decoder(
                input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask,
                past_key_values=past_key_values, use_cache=past_key_values is not None,
            ).last_hidden_state
        hidden = self.fusion(F.embedding(input_ids, self._weights.embedding), features)
        rotary = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=attention_mask, position_embeddings=rotary, past_key_values=past_key_values)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, V) float32 logits of (B, T, h) hidden states, through the target's LM head."""
        if self.config.fusion == "none":
            logits = self.lm.get_output_embeddings()(hidden).float()
        else:
            logits = F.linear(hidden, self._weights.head, self._weights.bias).float()
        logits, cap = logits * self.config.logit_scale, self.config.final_logit_softcapping
        return cap * torch.tanh(logits / cap) if cap else logits

    @property
    def _weights(self) -> SharedWeights:
        if self._shared is None:
            raise RuntimeError("this draft has not met its target yet; call draft.share_weights(target) first")
        return self._shared

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the target's weights behind; they are shared again at the next meeting."""
        return {**self.__dict__, "_shared": None}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a draft strictly: every weight is there, has its shape and is finite.

        Raises:
            ValueError: naming the weights that are missing, left over, misshapen or not finite.
            OSError: if the checkpoint's file is damaged.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            draft, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True,
                **{**kwargs, "ignore_mismatched_sizes": True},
            )
        except SafetensorError as error:
            raise OSError(
                f"the weights in {pretrained_model_name_or_path} are damaged ({error}); copy or download them again"
            ) from error
        check_loaded(info, str(pretrained_model_name_or_path))
        check_finite(draft)
        draft.eval()
        return (draft, info) if wants_info else draft

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write config, weights (safetensors) and the target's tokenizer, if it can be found locally."""
        super().save_pretrained(save_directory, *args, **kwargs)
        # A pipeline looks for its assistant's class inside transformers, by these names.
        saved = DovetailConfig.from_pretrained(save_directory)
        saved.architectures = [type(self).__name__, "AutoModelForCausalLM"]
        saved.save_pretrained(save_directory)
        save_tokenizer([self.config.name_or_path, self.config.target_name], save_directory)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that `device` names; "auto" is the accelerator if there is one, else the CPU."""
    if device != "auto":
        device = torch.device(device)
    else:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return device


def check_fits(draft: DovetailAssistantModel, target: PreTrainedModel) -> None:
    """Refuse a target that the draft was not made for.

    Raises:
        ValueError: naming what differs, with both values.
    """
    if target.config.is_encoder_decoder:
        raise ValueError(f"{type(target).__name__} is an encoder-decoder; Dovetail drafts for decoder-only targets")
    config, text = draft.config, target.config.get_text_config(decoder=True)
    pairs = [("vocab_size", config.vocab_size, text.vocab_size)]
    if draft.reads_features:
        pairs.append(("hidden_size", config.hidden_size, text.hidden_size))
        pairs.append(("model type", config.target_type or text.model_type, text.model_type))
    for name, made_for, found in pairs:
        if made_for != found:
            raise ValueError(
                f"this draft does not fit the target: the draft was made for {name} {made_for}, the target "
                f"{type(target).__name__} has {found}; use the draft of this target, or train one with DovetailAssistantModel.from_target"
            )


def check_finite(draft: DovetailAssistantModel) -> None:
    """Refuse a draft with a weight that is NaN or infinite, such as one that was never loaded.

    Raises:
        ValueError: naming the first such weight.
    """
    for name, parameter in draft.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"weight {name} of the draft is not finite: it was never loaded, or its checkpoint is damaged; "
                "use from_pretrained, or from_target and train it"
            )


def check_loaded(info: dict[str, Any], source: str) -> None:
    """Refuse a checkpoint whose weights are not exactly the network's.

    Raises:
        ValueError: naming the weights.
    """
    misshapen = [f"{key} has shape {tuple(found)}, expected {tuple(expected)}" for key, found, expected in info["mismatched_keys"]]
    problems = [
        f"{word}: {', '.join(sorted(keys))}"
        for word, keys in (
            ("missing", info["missing_keys"]), ("not part of the network", info["unexpected_keys"]), ("misshapen", misshapen),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"the weights in {source} are not those of this draft; " + "; ".join(problems))


def save_tokenizer(sources: list[str | None], directory: str | os.PathLike) -> None:
    """Save the tokenizer of the first source that has one on this machine beside a draft."""
    if os.path.exists(os.path.join(directory, "tokenizer_config.json")):
        return
    for source in filter(None, sources):
        try:
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(directory)
            return
        except (OSError, ValueError):
            continue
    logger.warning("no tokenizer found for this draft; save the target's into %s to use it in a pipeline by path", directory)


def _lm_config(config: DovetailConfig) -> Any:
    """The wrapped model's configuration."""
    if config.causal_lm is None:
        raise ValueError('fusion="none" needs the wrapped model\'s configuration in causal_lm; use from_causal_lm(lm)')
    values = dict(config.causal_lm)
    return AutoConfig.for_model(values.pop("model_type"), **values)
