"""The draft that `generate` takes: how it is made, loaded, saved, and made ready for a target.

What it computes is the network's (`network`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from .attention import why_not_branching
from .config import DovetailConfig, TreeShape
from .devices import resolve_device
from .eight_bits import quantise, try_integers
from .formats import hub_options, read_config, read_published
from .network import DraftNetwork
from .recast import recast
from .register import model_is_ready
from .weights import (
    SharedWeights,
    check_evaluating,
    check_finite,
    check_fits,
    check_loaded,
    check_own_precision,
    check_reads_features,
    check_weight_bits,
    shared_bytes,
)

logger = logging.get_logger(__name__)


class DovetailAssistantModel(DraftNetwork):
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

    def __init__(self, config: DovetailConfig, lm: PreTrainedModel | None = None) -> None:
        is_new = lm is None
        if is_new and config.fusion == "none":
            lm = AutoModelForCausalLM.from_config(_lm_config(config))
        super().__init__(config, lm)
        self.draft_device: str | torch.device = "auto"
        self.setbacks = 0
        self.last_stats: Any = None
        self.watch: Callable[[Any], None] | None = None
        self.tokenizer_source: str | None = config.name_or_path or None
        self._tree: TreeShape | Literal["auto"] = "auto"
        if is_new:
            self.post_init()

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
        if config.own_head:
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

    def weight_bytes(self, target: PreTrainedModel) -> int:
        """Bytes of all weights on `draft_device` that drafting for `target` reads, those shared with it included.

        Before the first answer it says whether a draft fits into a GPU beside its cache, and what 8 bits save.
        """
        own = sum(t.nbytes for t in (*self.parameters(), *self.buffers()))
        if not self.reads_features:
            return own
        return own + shared_bytes(
            target, self.config, (resolve_device(self.draft_device), self.dtype, self.weight_bits)
        )

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

    def _quantise(self, bits: int, source: str) -> None:
        """Bring the matrices into 8 bits, for good; `source` is what errors call the checkpoint."""
        check_reads_features(self.config, bits, source)
        quantise(self, transposed=("W_1", "W_2", "W_z"))
        self.weight_bits = bits

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Write config, weights (safetensors) and the target's tokenizer, if it can be found locally.

        Raises:
            ValueError: if the weights are in 8 bits: their own precision is gone.
        """
        check_own_precision(self.weight_bits, "saved")
        if is_main_process:
            _save_tokenizer(self.tokenizer_source, save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)


def _lm_config(config: DovetailConfig) -> Any:
    """The wrapped model's configuration."""
    if config.causal_lm is None:
        raise ValueError('fusion="none" needs the wrapped model\'s configuration in causal_lm; use from_causal_lm(lm)')
    values = dict(config.causal_lm)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _save_tokenizer(source: str | None, directory: str | os.PathLike) -> None:
    """Save the tokenizer of `source` beside a draft, unless one is there; say so if it is not on this machine."""
    if os.path.exists(os.path.join(directory, "tokenizer_config.json")):
        return
    from transformers import AutoTokenizer  # here, since importing it imports this module (see `register`)

    try:
        if source:
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(directory)
            return
    except (OSError, ValueError):
        pass  # said below
    logger.warning(
        "no tokenizer found for this draft; save the target's into %s to use it in a pipeline by path", directory
    )


model_is_ready()
