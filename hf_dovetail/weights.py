"""Rules for a draft's weights: which it shares with its target, which targets it fits, what a checkpoint must hold."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config import DovetailConfig, eagle3_layers
from .dispatch import dispatch_of
from .eight_bits import EightBitMatrix
from .packed import PackedWeight

_PADDING = 0.01
"""Largest part of a vocabulary that may be padding: Qwen 2.5 has 151,936 entries or 152,064, by size of the model."""

Place = tuple[torch.device, torch.dtype, int | None]
"""Where a draft is: its device, its precision, and the bits of its matrices if these are fewer."""


@dataclass(frozen=True)
class SharedWeights:
    """What a draft takes from its target: embeddings and LM head, on the draft's device and in its precision.

    Args:
        embedding: (V, h). head: (V, h), the same object where the target ties them. Each is None where the draft has
            its own.
        bias: (V,) of the head, or None.
        place: device, precision, and the bits of copied matrices if they are not the precision's own.
        sources: the target's own tensors (weakly) and their versions, to notice another or a changed target.

    The draft keeps them until it meets another target.
    """

    embedding: Tensor | EightBitMatrix | None
    head: Tensor | EightBitMatrix | None
    bias: Tensor | None
    place: Place
    sources: tuple[tuple[weakref.ref, int], ...]

    @classmethod
    @torch.inference_mode(False)
    def of(cls, target: PreTrainedModel, config: DovetailConfig, place: Place) -> SharedWeights:
        """Share where device and precision agree, copy (in 8 bits, if that is asked for) where they do not."""
        sources = _shared_tensors(target, config)
        copies = {id(t): _placed(t, place) for t in sources.values()}
        parts = {name: copies[id(t)] for name, t in sources.items()}
        references = tuple((weakref.ref(t), _version(t)) for t in sources.values())
        return cls(parts.get("embedding"), parts.get("head"), parts.get("bias"), place, references)

    @property
    def matrices(self) -> list[EightBitMatrix]:
        """What is in 8 bits of it."""
        return [part for part in (self.embedding, self.head) if isinstance(part, EightBitMatrix)]

    @property
    def tensors(self) -> list[Tensor]:
        """All that is shared, tied matrices once."""
        parts = {id(part): part for part in (self.embedding, self.head, self.bias) if part is not None}
        found: list[Tensor] = []
        for part in parts.values():
            found += part.buffers() if isinstance(part, EightBitMatrix) else [part]
        return found

    def still_of(self, target: PreTrainedModel, config: DovetailConfig, place: Place) -> bool:
        """Whether these are still the weights of `target`, in this place."""
        tensors = _shared_tensors(target, config).values()
        return (
            place == self.place
            and len(tensors) == len(self.sources)
            and all(ref() is t and v == _version(t) for t, (ref, v) in zip(tensors, self.sources, strict=True))
        )


def _placed(weight: Tensor, place: Place) -> Tensor | EightBitMatrix:
    """A target's weight where the draft wants it, itself if it is there already."""
    device, dtype, _ = place
    if not _in_eight_bits(weight, place):
        there = (weight.device, weight.dtype) == (device, dtype)
        return weight.detach() if there else weight.detach().to(device=device, dtype=dtype)
    return EightBitMatrix(weight.kernel.dense() if isinstance(weight, PackedWeight) else weight).to(device)


def _in_eight_bits(weight: Tensor, place: Place) -> bool:
    device, dtype, bits = place
    return bits is not None and weight.ndim == 2 and (weight.device, weight.dtype) != (device, dtype)


def shared_bytes(target: PreTrainedModel, config: DovetailConfig, place: Place) -> int:
    """Bytes of what a draft in this place shares with `target`, whether it holds a copy or the target's own."""
    sources = {id(t): t for t in _shared_tensors(target, config).values()}
    return sum(
        EightBitMatrix.nbytes(t.shape) if _in_eight_bits(t, place) else t.numel() * place[1].itemsize
        for t in sources.values()
    )


def _version(tensor: Tensor) -> int:
    """Counts the changes of a tensor in place; inference tensors are not counted."""
    return 0 if tensor.is_inference() else tensor._version


def _shared_tensors(target: PreTrainedModel, config: DovetailConfig) -> dict[str, Tensor]:
    """The target's embedding matrix, LM head matrix and LM head bias, those that are there and that the draft lacks."""
    tensors = {}
    if not config.own_embeddings:
        tensors["embedding"] = _embedding(target)
    if not config.own_head:
        head = target.get_output_embeddings()
        if head is None or getattr(head, "weight", None) is None:
            raise ValueError(
                f"{type(target).__name__} has no LM head with a weight matrix, which the draft would share"
            )
        bias = getattr(head, "bias", None)
        tensors |= {"head": head.weight} if bias is None else {"head": head.weight, "bias": bias}
    return tensors


def _embedding(target: PreTrainedModel) -> Tensor:
    """The target's embedding matrix; of a tied one whose LM head is on a device, the copy that is there."""
    dispatch = dispatch_of(target)
    if dispatch is not None and dispatch.tied:
        return target.get_output_embeddings().weight
    return target.get_input_embeddings().weight


def check_fits(config: DovetailConfig, target: PreTrainedModel) -> None:
    """Refuse a target that the draft was not made for.

    Raises:
        ValueError: naming what differs, with both values.
    """
    check_fits_config(config, target.config, type(target).__name__)


def check_fits_config(config: DovetailConfig, target: PreTrainedConfig, name: str) -> None:
    """Refuse a target that the draft was not made for, by its configuration; `name` is what errors call it.

    Raises:
        ValueError: naming what differs, with both values.
    """
    if target.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; Dovetail drafts for decoder-only targets")
    text = target.get_text_config(decoder=True)
    pairs = [("vocab_size", config.vocab_size, text.vocab_size)]
    if config.fusion == "none" and differs_by_padding(config.vocab_size, text.vocab_size):
        pairs = []
    if config.fusion != "none":
        pairs.append(("hidden_size", config.target_hidden_size or config.hidden_size, text.hidden_size))
        pairs.append(("model type", config.target_type or text.model_type, text.model_type))
    for what, made_for, found in pairs:
        if made_for != found:
            raise ValueError(
                f"this draft does not fit the target: the draft was made for {what} {made_for}, the target "
                f"{name} has {found}; use the draft of this target, or train one with "
                "DovetailAssistantModel.from_target"
            )
    if max(feature_layers(config, target), default=0) >= text.num_hidden_layers:
        raise ValueError(
            f"this draft does not fit the target: it reads the inputs of layers {config.feature_layers}, the target "
            f"{name} has {text.num_hidden_layers} layers, numbered from 0; use the draft of this target"
        )


def differs_by_padding(one: int, other: int) -> bool:
    """Whether two sizes of a vocabulary may belong to one tokenizer: families pad it, each model as suits it."""
    return abs(one - other) <= _PADDING * max(one, other)


def feature_layers(config: DovetailConfig, target: PreTrainedConfig) -> tuple[int, ...]:
    """The target's hidden states that a draft reads, as `DovetailConfig.feature_layers` numbers them.

    Raises:
        ValueError: if the draft leaves the choice to EAGLE-3's rule and the target has too few layers for it.
    """
    if config.feature_layers is None:
        return tuple(eagle3_layers(target.get_text_config(decoder=True).num_hidden_layers))
    return tuple(config.feature_layers)


def check_evaluating(lm: nn.Module) -> None:
    """Refuse a causal LM in training mode, where dropout would draw from the random generator of the answer.

    Raises:
        ValueError: saying what to call.
    """
    if lm.training:
        raise ValueError(f"{type(lm).__name__} is in training mode and cannot draft; call eval() on it first")


def check_finite(draft: nn.Module) -> None:
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


def check_weight_bits(bits: int | None) -> None:
    """Refuse `weight_bits` that there are not.

    Raises:
        ValueError: saying what there is.
    """
    if bits is not None and (bits != 8 or isinstance(bits, bool)):
        raise ValueError(f"weight_bits is {bits!r}; expected 8, or None to keep the precision")


def check_reads_features(config: DovetailConfig, bits: int, source: str) -> None:
    """Refuse to bring an ordinary language model into fewer bits; `source` is what errors call it.

    Raises:
        ValueError: saying how transformers does it.
    """
    if config.fusion == "none":
        raise ValueError(
            f"weight_bits={bits} is for drafts that read their target's features; {source} is an ordinary language "
            "model, for which transformers has its own quantisation: load it with AutoModelForCausalLM."
            "from_pretrained(..., quantization_config=...), and wrap it with DovetailAssistantModel.from_causal_lm"
        )


def check_own_precision(bits: int | None, wanted: str) -> None:
    """Refuse what needs weights in the precision of the checkpoint; `wanted`: the participle that errors use.

    Raises:
        ValueError: if the weights are in fewer bits.
    """
    if bits is not None:
        raise ValueError(
            f"the weights of this draft are in {bits} bits and cannot be {wanted}; load it again without weight_bits"
        )


def check_loaded(info: dict[str, Any], source: str) -> None:
    """Refuse a checkpoint whose weights are not exactly the network's.

    Raises:
        ValueError: naming the weights.
    """
    misshapen = [
        f"{key} has shape {tuple(found)}, expected {tuple(expected)}"
        for key, found, expected in info["mismatched_keys"]
    ]
    problems = [
        f"{word}: {', '.join(sorted(keys))}"
        for word, keys in (
            ("missing", info["missing_keys"]),
            ("not part of the network", info["unexpected_keys"]),
            ("misshapen", misshapen),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"the weights in {source} are not those of this draft; " + "; ".join(problems))
