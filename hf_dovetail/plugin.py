"""The seam to `transformers.generation`: the only file that knows its loops, processors and criteria.

`dovetail_decoding` stands in for `GenerationMixin._assisted_decoding` when the assistant is a Dovetail draft;
`check_request` refuses, before anything runs, what Dovetail does not decode. `register` installs both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    CandidateGenerator,
    GenerateDecoderOnlyOutput,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .config import TreeShape
from .controller import LARGEST, Controller
from .decode import decode
from .devices import HOST, Move, to_device, to_host
from .dispatch import dispatch_of
from .draft import DraftSession
from .drafting import Drafting
from .draws import SharedDraws
from .learned import Learned, learned_of
from .levels import KeepGoing, tree_rows
from .modeling import DovetailAssistantModel
from .rows import ROUND_ROWS
from .stats import GenerationStats
from .target import Context, FeatureTap, open_target
from .threads import target_threads
from .weights import check_fits, feature_layers

logger = logging.get_logger(__name__)

_MODES = ("greedy_search", "sample", "assisted_generation")
_OTHER_ASSISTANTS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type")
SHARPEST = 1.7
"""See `sharpness_of`."""
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
COUPLED_SHARPNESS = 1.3
"""Of drafts that know the target's draws; `SHARPEST`'s counterpart."""
_PREPARED = ("past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position")


class DovetailCandidateGenerator(CandidateGenerator):
    """One call's drafting session: a tree for Dovetail's loop, a chain for transformers' own assisted loop.

    Args:
        draft: the draft.
        target: the model that verifies.
        capacity: positions to reserve in the draft's cache; a hint.
        sharpness: how much surer the target's choice is than its distribution, see `sharpness_of`.
        draws: of a target that samples, if they can be known; for drafts on the CPU.

    Raises:
        ValueError: if the draft does not fit the target, or was never loaded.
    """

    requires_model_outputs = True

    def __init__(
        self,
        draft: DovetailAssistantModel,
        target: PreTrainedModel,
        capacity: int = 0,
        sharpness: float = 1.0,
        draws: SharedDraws | None = None,
    ) -> None:
        self.draft, self.device = draft, draft.meet(target)
        self.reads_features = draft.reads_features
        self.feature_layers = feature_layers(draft.config, target.config)
        self.model_kwargs_overrides = {"output_hidden_states": True} if self.reads_features else {}
        self.session = DraftSession(draft, capacity, sharpness=sharpness, draws=draws)
        self._known = 0  # tokens of `input_ids` that the session has; for the stock loop
        self._warned = False

    def begin(self, first: Tensor, start: int) -> None:
        """Open the session with the first token (1, 1) that the target has read, at position `start`."""
        self.session.begin(first, start)

    def commit(self, tokens: Tensor, features: Tensor | None) -> None:
        """Add certain tokens (1, T) and the features (1, T, f) of the positions before them."""
        self.session.commit(tokens, features)

    def propose(
        self, shape: TreeShape, keep_going: KeepGoing | None = None, shifts: np.ndarray | None = None
    ) -> Tensor:
        """(1, 3, N) int32: the packed tree of a round (`tree.rerank`)."""
        return self.session.grow(shape, keep_going, shifts)

    @property
    def noise_bytes(self) -> int:
        """What the noise of the target's draws has taken to the draft's device."""
        return self.session.noise_bytes

    def give_up(self, error: Exception) -> None:
        """Leave the session after a failure, and free what it holds; after a lack of memory the next one is smaller."""
        self.session = None
        self.draft.release(out_of_memory=is_out_of_memory(error))

    def room(self, waiting: int = 0) -> int:
        """Levels that the draft's positions still allow behind `waiting` tokens that are not committed yet; without
        room the target goes on alone.
        """
        end, length = self.draft.config.max_position_embeddings, self.session.length + waiting
        room = max(end - length, 0)
        if room == 0 and not self._warned:
            self._warned = True
            logger.warning(
                "the sequence has reached the draft's last position (%d of %d): the target goes on alone, "
                "at plain speed; the output stays the same",
                length,
                end,
            )
        return room

    @torch.no_grad()
    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, None]:
        """A chain of candidates behind `input_ids` (1, n), for transformers' stock assisted loop.

        The first iteration proposes nothing, since it has no features yet. No logits are returned, so the
        stock loop accepts by comparing tokens.
        """
        if is_first_iteration or model_outputs is None:
            return input_ids, None
        if self._known == 0:  # a continued conversation starts in the middle
            first = input_ids.shape[1] - 1 - model_outputs.hidden_states[-1].shape[1] if self.reads_features else 0
            self.begin(to_device(input_ids[:, first : first + 1], self.device), first)
            self._known = first + 1
        tokens = to_device(input_ids[:, self._known :], self.device)
        features = None
        if self.reads_features:
            states = [model_outputs.hidden_states[layer][:, : tokens.shape[1]] for layer in self.feature_layers]
            features = torch.cat([to_device(each, self.device) for each in states], dim=-1)
        self.commit(tokens, features)
        self._known = input_ids.shape[1]
        tree = self.draft.tree
        shape = (tree if isinstance(tree, TreeShape) else TreeShape()).as_chain().clipped(self.room())
        if shape.nodes == 0:
            return input_ids, None
        chain = to_host(self.propose(shape)).wait()[:, 0].to(input_ids)
        return torch.cat((input_ids, chain), dim=1), None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: Tensor, num_matches: int) -> None:
        """Nothing to adapt; older transformers call it after each round."""


class TokenSelector:
    """Plain decoding's choice of the next token, and all that follows from it: scores, streamer, criteria.

    A transcription of the body of `GenerationMixin._sample`'s loop, in its order, for one row.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        move: Move = Tensor.to,
    ) -> None:
        self.input_ids, self._move = input_ids, move
        self._processors, self._criteria, self._streamer = processors, criteria, streamer
        self._do_sample, self._max_length = config.do_sample, config.max_length
        keeps = config.return_dict_in_generate
        self.scores: tuple | None = () if keeps and config.output_scores else None
        self.logits: tuple | None = () if keeps and config.output_logits else None

    def __call__(self, logits: Tensor) -> tuple[int, bool]:
        """Choose from (1, V) logits; return the token and whether the answer ends with it."""
        device = self.input_ids.device
        if logits.device != device and self._needs_only_the_best:
            return self._take(self._move(logits.float().argmax(dim=-1), device))
        raw = self._move(logits, device).to(copy=True, dtype=torch.float32)
        processed = self._processors(self.input_ids, raw)
        if self.scores is not None:
            self.scores += (processed,)
        if self.logits is not None:
            self.logits += (raw,)
        if self._do_sample:
            token = torch.multinomial(nn.functional.softmax(processed, dim=-1), num_samples=1).squeeze(1)
        else:
            token = torch.argmax(processed, dim=-1)
        return self._take(token)

    @property
    def _needs_only_the_best(self) -> bool:
        """Whether nobody looks at the logits: then those of a target on another device stay there."""
        return not (self._do_sample or self._processors or self.scores is not None or self.logits is not None)

    def _take(self, token: Tensor) -> tuple[int, bool]:
        """Enter a chosen token (1,); it, and whether the answer ends with it."""
        self.input_ids = torch.cat([self.input_ids, token[:, None]], dim=-1)
        finished = bool(self._move(self._criteria(self.input_ids, self.scores), HOST).all())
        token = self._move(token, HOST)
        if self._streamer is not None:
            self._streamer.put(token)
        return int(token), finished

    def remaining(self) -> int:
        """Tokens that fit below the maximum length."""
        return self._max_length - self.input_ids.shape[1]


def check_request(target: PreTrainedModel, draft: DovetailAssistantModel, mode: str, config: GenerationConfig) -> None:
    """Refuse what Dovetail does not decode, before the prompt is run.

    Raises:
        ValueError: saying what was asked for and what to do.
    """
    check_fits(draft.config, target)
    if str(getattr(mode, "value", mode)) not in _MODES:
        raise ValueError(
            f"Dovetail decodes greedily or by sampling, but these arguments ask for {getattr(mode, 'value', mode)} "
            f"(num_beams={config.num_beams}); set num_beams=1, or leave out assistant_model"
        )
    dola = getattr(config, "dola_layers", None)
    if dola is not None:
        raise ValueError(
            f"dola_layers={dola!r} asks for DoLa, which Dovetail does not decode; leave out one of the "
            "two, it or assistant_model"
        )
    for name in _OTHER_ASSISTANTS:
        if getattr(config, name, None):
            raise ValueError(
                f"{name}={getattr(config, name)!r} asks for another way of drafting; leave out one of the two, "
                "it or assistant_model"
            )


@torch.no_grad()
def dovetail_decoding(
    target: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    assistant_model: DovetailAssistantModel,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    inputs_tensor: Tensor | None = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Decode one answer with a draft; same arguments and result as `GenerationMixin._assisted_decoding`.

    Raises:
        ValueError: for input that cannot be decoded with a draft, saying what was given and what to do.
    """
    _check_inputs(target, input_ids, generation_config, model_kwargs, synced_gpus)
    stats = GenerationStats()

    def plainly() -> GenerateDecoderOnlyOutput | Tensor:
        answer = target._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
        )
        sequences = answer.sequences if generation_config.return_dict_in_generate else answer
        stats.new_tokens = sequences.shape[1] - input_ids.shape[1]
        assistant_model.last_stats = stats
        return answer

    if _changes_rope(target, input_ids.shape[1], generation_config.max_length):
        logger.warning(
            "this answer may cross the length at which %s changes its RoPE; it is decoded plainly",
            type(target).__name__,
        )
        return plainly()
    shape = assistant_model.tree if isinstance(assistant_model.tree, TreeShape) else LARGEST
    largest = smaller(shape, assistant_model.setbacks)
    nodes, sharpness = largest.nodes, sharpness_of(generation_config)
    try:
        draws = draws_of(target, generation_config, logits_processor, input_ids)
        known, dispatch = input_ids.shape[1], dispatch_of(target)
        if dispatch is not None:  # room was planned for; growing would take it twice for a moment
            known = max(known, min(generation_config.max_length, dispatch.context))
        capacity = known + (nodes if dispatch is None else max(ROUND_ROWS, nodes, tree_rows(largest)))
        drafter = DovetailCandidateGenerator(assistant_model, target, capacity, sharpness, draws)
    except Exception as error:
        if assistant_model.strict or not is_out_of_memory(error):
            raise
        assistant_model.release(out_of_memory=True)
        stats.draft_failed = True
        logger.warning(
            "the draft does not fit into the memory of %s (%s); this answer is decoded plainly. Choose another "
            "draft.draft_device, or set draft.strict = True to raise the error instead",
            assistant_model.draft_device,
            error,
        )
        return plainly()
    move = Tensor.to if dispatch is None else stats.moved
    prompt, mask, positions = (
        None if data is None else move(data, target.device)
        for data in (input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
    )
    selector = TokenSelector(input_ids, logits_processor, stopping_criteria, generation_config, streamer, move)
    context = Context(
        cache=model_kwargs["past_key_values"],
        attention_mask=mask,
        position_ids=positions,
        prompt_length=input_ids.shape[1],
        max_length=generation_config.max_length,
        options={k: v for k, v in model_kwargs.items() if k not in _PREPARED and v is not None},
        move=move,
    )
    learned, controller = _controller(assistant_model, target, generation_config.do_sample)
    controller.largest = largest
    drafting = Drafting(drafter, controller, stats, assistant_model.strict)

    def prefill(cache: Any) -> Any:
        return target._prefill(input_ids, generation_config, {**model_kwargs, "past_key_values": cache})

    tap = FeatureTap(target, drafter.reads_features and nodes > 0, drafter.feature_layers)
    verifier = open_target(target, context, tap, nodes)
    try:
        with target_threads(), verifier:
            watch = assistant_model.watch
            decode(verifier, drafting, prompt, prefill, selector, selector.remaining, stats, watch)
    finally:
        assistant_model.last_stats = stats
    if learned is not None:
        learned.refresh()
    if streamer is not None:
        streamer.end()
    keeps_cache = generation_config.return_dict_in_generate or getattr(context.cache, "_is_user_defined", False)
    cache = verifier.finish() if keeps_cache else None
    if not generation_config.return_dict_in_generate:
        return selector.input_ids
    return GenerateDecoderOnlyOutput(
        sequences=selector.input_ids, scores=selector.scores, logits=selector.logits, past_key_values=cache
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host, had no memory left; not every backend has an exception of its own for it."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error).lower() for words in ("out of memory", "can't allocate memory"))


def smaller(shape: TreeShape, setbacks: int) -> TreeShape:
    """The shape, its nodes and width halved `setbacks` times; one of each is left."""
    if setbacks == 0 or shape.nodes == 0:
        return shape
    return TreeShape(max(shape.nodes >> setbacks, 1), shape.depth, max(shape.top_k >> setbacks, 1))


def draws_of(
    target: PreTrainedModel, config: GenerationConfig, processors: LogitsProcessorList, input_ids: Tensor
) -> SharedDraws | None:
    """The draws of a target that samples with the CPU's generator."""
    if not config.do_sample or input_ids.device.type != "cpu":
        return None
    warpers = [processor for processor in processors if isinstance(processor, _WARPERS)]
    return SharedDraws(target.config.get_text_config(decoder=True).vocab_size, warpers, COUPLED_SHARPNESS)


def sharpness_of(config: GenerationConfig) -> float:
    """The inverse temperature at which a draft should rank its nodes for a target that decodes like this.

    A target that samples at temperature T chooses from its distribution sharpened by 1 / T, and so should its draft.
    Greedy decoding is T = 0, but a draft is never that sure of the target's choice: beyond `SHARPEST`, trees become
    chains and lose more than they win (`benchmarks/acceptance.py --sharpness`).
    """
    if not config.do_sample:
        return SHARPEST
    return min(1 / (config.temperature or 1.0), SHARPEST)


def _controller(
    draft: DovetailAssistantModel, target: PreTrainedModel, do_sample: bool
) -> tuple[Learned | None, Controller]:
    """What chooses this call's trees, and what it learns into unless the shape is fixed."""
    if isinstance(draft.tree, TreeShape):
        return None, Controller(draft.tree)
    learned = learned_of(draft, target)
    return learned, learned.controller(do_sample, on_host=draft.device.type == "cpu")


def _check_inputs(
    target: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
) -> None:
    """Refuse inputs that cannot be decoded with a draft."""
    rows, length = input_ids.shape
    if rows != 1:
        raise ValueError(f"Dovetail decodes one prompt at a time, got a batch of {rows}; call generate once per prompt")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "Dovetail needs token ids to draft from, got inputs_embeds; pass input_ids, or leave out assistant_model"
        )
    if length == 0:
        raise ValueError(
            "the prompt is empty (0 tokens); pass at least one token, such as the tokenizer's bos_token_id"
        )
    if not model_kwargs.get("use_cache") or model_kwargs.get("past_key_values") is None:
        raise ValueError(
            "Dovetail needs the target's key/value cache; pass use_cache=True, or leave out assistant_model"
        )
    if target.training and any(getattr(module, "gradient_checkpointing", False) for module in target.modules()):
        raise ValueError(
            "gradient checkpointing turns the target's cache off in training mode; call target.eval() first"
        )
    if synced_gpus:
        raise ValueError("synced_gpus=True is not supported with a Dovetail draft; leave out assistant_model")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name) and config.return_dict_in_generate:
            raise ValueError(
                f"{name}=True is not supported with a Dovetail draft; leave it out, or leave out assistant_model"
            )
    tensors = [k for k, v in model_kwargs.items() if isinstance(v, Tensor) and k not in _PREPARED]
    if tensors:
        raise ValueError(
            f"Dovetail decodes text prompts only, got {', '.join(tensors)}; leave out assistant_model for these inputs"
        )


def _changes_rope(target: PreTrainedModel, length: int, max_length: int) -> bool:
    """Whether the answer may cross the length at which a longrope model recomputes its cache (Phi-3)."""
    text = target.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    original = getattr(text, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    return rope.get("rope_type") == "longrope" and original is not None and length <= original < max_length
