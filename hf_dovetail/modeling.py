"""The draft network: a fusion and decoder blocks (`blocks`), or any small causal LM in their place.

Knows weights and one forward step; knows nothing of trees, rounds or generation. Embeddings and the LM head
are the target's own (`SharedWeights`); a checkpoint does not hold them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from .attention import BranchingMask, why_not_branching
from .blocks import KeyValueStore, RMSNorm, RotaryTable, Rotation, finish_logits, fold_mask, make_blocks, make_fusion
from .cache import GrowingCache, num_cache_layers
from .config import DovetailConfig, TreeShape
from .devices import resolve_device
from .eight_bits import EightBitMatrix, look_up, multiply, quantise, try_integers
from .formats import hub_options, read_config, read_published
from .recast import RecastLM, recast
from .register import model_is_ready
from .rows import Pool, RowBuffer
from .weights import (
    SharedWeights,
    check_evaluating,
    check_finite,
    check_fits,
    check_loaded,
    check_own_precision,
    check_reads_features,
    check_weight_bits,
    save_tokenizer,
    shared_bytes,
)

logger = logging.get_logger(__name__)


class DovetailAssistantModel(PreTrainedModel):
    """A draft for `target.generate(..., assistant_model=draft)`.

    Attributes:
        draft_device: where it drafts: "auto" (the GPU if there is one, else the CPU), or a torch device.
        tree: the `TreeShape` of every round, or "auto": each round's own, chosen for this machine and this text.
        strict: whether a failure of the draft in the middle of an answer is raised. By default it costs a warning, and
            the answer goes on plainly.
        setbacks: how often the draft's device ran out of memory; each halves the trees of later answers.
        last_stats: `GenerationStats` of the last call, or None.
        watch: called with each `decode.Round` of a call, or None.
        known_tokens: how many tokens it shares with the target that it met last, from the first.
        weight_bits: 8 if it was loaded with `weight_bits=8`, else None.
        tokenizer_source: folder or name of the tokenizer that `save_pretrained` saves beside the draft, or None.
    """

    strict = False
    config_class = DovetailConfig
    base_model_prefix = "draft"
    main_input_name = "input_ids"
    _no_split_modules = ["DecoderBlock", "PairBlock"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: DovetailConfig, lm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.draft_device: str | torch.device = "auto"
        self.setbacks = 0
        self.last_stats: Any = None
        self.watch: Callable[[Any], None] | None = None
        self.tokenizer_source: str | None = config.name_or_path or None
        self.weight_bits: int | None = None
        self._tree: TreeShape | Literal["auto"] = "auto"
        self._shared: SharedWeights | None = None
        self._recast: RecastLM | None = None
        self.known_tokens = config.vocab_size
        self.pool = Pool()
        if config.fusion == "none":
            self.lm = lm if lm is not None else AutoModelForCausalLM.from_config(_lm_config(config))
        else:
            self.fusion, self.layers = make_fusion(config), make_blocks(config)
            self.rotary = RotaryTable(config)
            self._add_own_weights()
        if lm is None:
            self.post_init()

    def _add_own_weights(self) -> None:
        """What the draft does not share with its target."""
        config = self.config
        if config.own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.embed_tokens.weight.requires_grad_(False)  # as in all published training code
        if config.fusion == "eagle3":
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size or config.vocab_size, bias=False)
            if config.draft_vocab_size:
                self.register_buffer("vocabulary", torch.full((config.draft_vocab_size,), -1))

    def _init_weights(self, module: nn.Module) -> None:
        """Weights that nothing has set yet are NaN, so that a draft that was never loaded cannot draft."""
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
        if isinstance(target, cls):
            raise ValueError("this target is itself a Dovetail draft; give the model that it drafts for")
        config = DovetailConfig.for_target(target.config, num_hidden_layers, fusion)
        if config.fusion == "none":
            raise ValueError(
                'fusion="none" wraps an existing language model; use DovetailAssistantModel.from_causal_lm(lm)'
            )
        draft = cls(config)
        draft.reset_parameters()
        if config.fusion == "eagle3":
            draft.lm_head.weight.data.copy_(target.get_output_embeddings().weight)
        draft.tokenizer_source = target.name_or_path
        return draft.to(target.dtype).eval()

    @classmethod
    def from_causal_lm(cls, lm: PreTrainedModel) -> DovetailAssistantModel:
        """Draft trees with an ordinary causal LM that has the target's vocabulary; `lm` is shared, not copied.

        Raises:
            ValueError: if `lm` is no transformers model, cannot compute branches in one forward pass, or is in
                training mode.
        """
        if not isinstance(lm, PreTrainedModel):
            raise ValueError(
                f"lm is a {type(lm).__name__}, expected a transformers model; of a wrapper (PEFT, torch.compile) give "
                "the model inside, such as model.merge_and_unload()"
            )
        if isinstance(lm, cls):
            raise ValueError("this model is a Dovetail draft already; pass it to generate as assistant_model")
        reason = why_not_branching(lm)
        if reason:
            raise ValueError(f"this model cannot draft a tree: {reason}")
        check_evaluating(lm)
        draft = cls(DovetailConfig.for_causal_lm(lm.config), lm=lm)
        draft.training = False  # not eval(): the model is the caller's
        draft.tokenizer_source = lm.name_or_path
        return draft

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values for training: the last feature passes the fusion, the token adds little (DGF: by half)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif parameter.ndim == 1 or name.endswith("W_z"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)
        if self.config.fusion == "dgf":
            nn.init.eye_(self.fusion.W_1)
        else:
            nn.init.eye_(self.fusion.fc.weight[:, -self.config.hidden_size :])

    @property
    def tree(self) -> TreeShape | Literal["auto"]:
        """The shape of a round's tree; "auto" chooses it anew in every round."""
        return self._tree

    @tree.setter
    def tree(self, shape: TreeShape | Literal["auto"]) -> None:
        if not isinstance(shape, TreeShape) and not (isinstance(shape, str) and shape == "auto"):
            raise ValueError(
                f'tree is {shape!r}; expected a TreeShape, such as TreeShape(nodes=16, depth=7, top_k=10), or "auto"'
            )
        self._tree = shape

    @property
    def reads_features(self) -> bool:
        """Whether drafting needs the target's features."""
        return self.config.fusion != "none"

    @property
    def predicts_features(self) -> bool:
        """Whether its hidden states imitate the target's features; EAGLE-3's are free."""
        return self.config.fusion in ("dgf", "eagle")

    def meet(self, target: PreTrainedModel) -> torch.device:
        """Get ready to draft for `target`: go to `draft_device`, wherever a pipeline put the draft, and take the
        target's embeddings and LM head there, if they are not there yet.

        Returns:
            The device of the draft.

        Raises:
            ValueError: if the draft does not fit the target, its own weights were never loaded, or it is a causal
                LM (or has dropout) in training mode.
        """
        check_fits(self.config, target)
        if not self.reads_features:
            check_evaluating(self.lm)
            if self.lm is not target:  # a target that drafts for itself stays where it is
                self._place()
            self._know(target.config.get_text_config(decoder=True).vocab_size)
            self._recast = recast(self.lm, self.known_tokens)
            return self.device
        if self.config.attention_dropout:
            check_evaluating(self)
        if self._shared is None:
            check_finite(self)
        self._place()
        place = self.device, self.dtype, self.weight_bits
        if self._shared is None or not self._shared.still_of(target, self.config, place):
            self._shared = SharedWeights.of(target, self.config, place)
        if self.weight_bits is not None:
            try_integers((*self.modules(), *self._shared.matrices))
        return self.device

    def _know(self, size: int) -> None:
        """Take a difference to the target's vocabulary of `size` tokens for padding."""
        own = self.config.vocab_size
        self.known_tokens = min(own, size)
        if own != size:
            logger.warning_once(
                f"the draft's vocabulary has {own} entries, the target's {size}: taken for padding of the same "
                "tokenizer. If their tokenizers differ, answers stay right but hardly anything is accepted"
            )

    @property
    def network(self) -> DovetailAssistantModel | RecastLM | None:
        """What computes a session's rows, a `steps.Network`; None where a wrapped LM's own layers must do it."""
        return self if self.reads_features else self._recast

    def weight_bytes(self, target: PreTrainedModel) -> int:
        """Bytes of all weights on `draft_device` that drafting for `target` reads, those shared with it included."""
        own = sum(t.nbytes for t in (*self.parameters(), *self.buffers()))
        if not self.reads_features:
            return own
        return own + shared_bytes(
            target, self.config, (resolve_device(self.draft_device), self.dtype, self.weight_bits)
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of the keys and values of one position in a draft that reads features."""
        config = self.config
        return 2 * len(self.layers) * config.num_key_value_heads * config.head_dim * self.dtype.itemsize

    def train(self, mode: bool = True) -> DovetailAssistantModel:
        """As for any module.

        Raises:
            ValueError: if the weights are in 8 bits, which cannot be trained.
        """
        if mode:
            check_own_precision(self.weight_bits, "trained")
        return super().train(mode)

    def _place(self) -> None:
        device = resolve_device(self.draft_device)
        if self.device != device:
            self.to(device)

    def release(self, out_of_memory: bool = False) -> None:
        """Free what is kept on the device between answers; later trees are smaller if that was out of memory."""
        self.setbacks += out_of_memory
        self.pool.bench = None
        empty_cache = getattr(torch.get_device_module(self.device), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()

    def new_cache(self, capacity: int) -> GrowingCache:
        """An empty cache for one drafting session of a wrapped causal LM."""
        return GrowingCache(num_cache_layers(self.lm.config), capacity)

    def new_rows(self, capacity: int) -> RowBuffer:
        """Empty buffers for one drafting session of the network's own blocks."""
        config = self.config
        return RowBuffer(
            len(self.layers), config.num_key_value_heads, config.head_dim, capacity, self.device, self.dtype
        )

    def addresses(self) -> tuple:
        """Where all weights that drafting reads lie in memory, the target's included; graphs hold on to these."""
        tensors = (*self.parameters(), *self.buffers(), *self._weights.tensors)
        return tuple((t.data_ptr(), t.dtype) for t in tensors)

    @property
    def input_size(self) -> int:
        """Width of what a row reads beside its token: an encoded feature, or the hidden state of the row before."""
        return self.config.hidden_size

    @property
    def target_ids(self) -> Tensor | None:
        """(draft_vocab_size,) int64: the target's ids of what `logits` ranks; None: the places are the ids."""
        return self.vocabulary if self.config.draft_vocab_size else None

    def encode(self, features: Tensor) -> Tensor:
        """(B, T, f) features of the target -> (B, T, h), what `forward` reads: EAGLE-3 makes one of several."""
        return self.fusion.encode(features) if self.config.fusion == "eagle3" else features

    def mask_builder(self) -> BranchingMask:
        """Builds the masks that `forward` takes."""
        return BranchingMask(self.lm if self.config.fusion == "none" else self)

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        past_key_values: KeyValueStore | None = None,
    ) -> Tensor:
        """One step of the draft.

        Args:
            input_ids: (B, T) tokens t+1 (with `fusion="none"`: the tokens themselves).
            features: (B, T, h) features of tokens t: the target's, through `encode`, or the draft's own; None with
                `fusion="none"`.
            position_ids: (B, T); by default 0..T-1.
            attention_mask: from `mask_builder()`, or None for plain causal attention over these rows alone.
            past_key_values: a cache; with `fusion="none"` the session's.

        Returns:
            (B, T, h): the predicted features, or the LM's hidden states; `logits` maps both to the vocabulary.
        """
        rows = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(rows, device=input_ids.device).unsqueeze(0)
        if self.config.fusion == "none":
            decoder = self.lm.get_decoder()
            return decoder(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
            ).last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, rows, rows, dtype=torch.bool, device=input_ids.device).tril()
        rotation = self.rotary.at(position_ids, features.dtype)
        return self.step(input_ids, features, rotation, attention_mask, past_key_values)

    def step(
        self,
        tokens: Tensor,
        features: Tensor,
        rotation: Rotation,
        mask: Tensor | None = None,
        store: KeyValueStore | None = None,
    ) -> Tensor:
        """`forward` for fusion drafts, with all that depends on positions and branches made by the caller.

        Args:
            tokens: (B, T). features: (B, T, h).
            rotation: of the rows' positions, from `rotary`.
            mask: (B or 1, 1, T, K) bool, or to be added, in the network's precision; None: all keys for all rows.
            store: earlier rows' keys and values.
        """
        hidden = self.fusion(look_up(tokens, self._embedding, features.dtype), features)
        if mask is not None:
            mask = fold_mask(mask, self.config.num_attention_heads // self.config.num_key_value_heads)
        for layer in self.layers:
            hidden = layer(hidden, rotation, mask, store)
        return self.norm(hidden) if self.config.norm_output else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, V) float32 logits of (B, T, h) hidden states, through the target's LM head.

        EAGLE-3 has a norm and a head of its own, which ranks the tokens of `target_ids`.
        """
        if self.config.fusion == "none":
            logits = self.lm.get_output_embeddings()(hidden)[..., : self.known_tokens].float()
        elif self.config.fusion == "eagle3":
            logits = self.lm_head(hidden if self.config.norm_output else self.norm(hidden)).float()
        else:
            logits = multiply(hidden, self._weights.head, self._weights.bias).float()
        return finish_logits(logits, self.config.logit_scale, self.config.final_logit_softcapping)

    def shared_tensors(self) -> list[Tensor]:
        """What it has taken from the target that it met last."""
        return [] if self._shared is None else self._shared.tensors

    @property
    def _weights(self) -> SharedWeights:
        if self._shared is None:
            raise RuntimeError("this draft has not met its target yet; call draft.meet(target) first")
        return self._shared

    @property
    def _embedding(self) -> Tensor | EightBitMatrix:
        if not self.config.own_embeddings:
            return self._weights.embedding
        return self.embed_tokens if isinstance(self.embed_tokens, EightBitMatrix) else self.embed_tokens.weight

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the target's weights behind; they are shared again at the next meeting."""
        return {**self.__dict__, "_shared": None, "_recast": None}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a draft strictly: every weight is there, has its shape and is finite.

        It may be a draft of this package, a published one (`formats.FORMATS`), or an ordinary small language model,
        which then drafts as `from_causal_lm` lets it.

        Args:
            pretrained_model_name_or_path, args, kwargs: as for any model of transformers.
            weight_bits: 8 keeps the draft's matrices in 8 bits, and those that it copies from its target: about half
                the memory. Such a draft neither trains nor saves. None (the default) keeps the precision.

        Raises:
            ValueError: naming the weights that are missing, left over, misshapen or not finite, or what else is wrong.
            OSError: if the checkpoint's file is damaged.
        """
        source, wants_info = str(pretrained_model_name_or_path), kwargs.pop("output_loading_info", False)
        weight_bits, place = kwargs.pop("weight_bits", None), hub_options(kwargs)
        saved = read_config(source, place)
        check_weight_bits(weight_bits)
        if saved.get("model_type") == DovetailConfig.model_type:
            draft, info = cls._load(source, source, *args, **kwargs)
        elif published := read_published(source, saved, place):
            config, state = published
            rest = {name: value for name, value in kwargs.items() if name not in place}
            draft, info = cls._load(source, None, *args, config=config, state_dict=state, **rest)
        else:
            lm, info = AutoModelForCausalLM.from_pretrained(source, *args, output_loading_info=True, **kwargs)
            check_loaded(info, source)
            draft = cls.from_causal_lm(lm.eval())
        if weight_bits is not None:
            draft._quantise(weight_bits, source)
        return (draft, info) if wants_info else draft

    def _quantise(self, bits: int, source: str) -> None:
        """Bring the matrices into 8 bits, for good; `source` is what errors call the checkpoint."""
        check_reads_features(self.config, bits, source)
        quantise(self, transposed=("W_1", "W_2", "W_z"))
        self.weight_bits = bits

    @classmethod
    def _load(cls, name: str, *args: Any, **kwargs: Any) -> tuple[DovetailAssistantModel, dict]:
        """transformers' own loading, strict; `name` is what errors call the checkpoint."""
        options = {**kwargs, "ignore_mismatched_sizes": True}
        try:
            draft, info = super().from_pretrained(*args, output_loading_info=True, **options)
        except SafetensorError as error:
            raise OSError(f"the weights in {name} are damaged ({error}); copy or download them again") from error
        check_loaded(info, name)
        check_finite(draft)
        return draft.eval(), info

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Write config, weights (safetensors) and the target's tokenizer, if it can be found locally.

        Raises:
            ValueError: if the weights are in 8 bits: their own precision is gone.
        """
        check_own_precision(self.weight_bits, "saved")
        if is_main_process:
            save_tokenizer(self.tokenizer_source, save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)


def _lm_config(config: DovetailConfig) -> Any:
    """The wrapped model's configuration."""
    if config.causal_lm is None:
        raise ValueError('fusion="none" needs the wrapped model\'s configuration in causal_lm; use from_causal_lm(lm)')
    values = dict(config.causal_lm)
    return AutoConfig.for_model(values.pop("model_type"), **values)


model_is_ready()
