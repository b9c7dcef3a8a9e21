"""The seam to `transformers.generation`: the only part that knows its loops, processors and criteria.

`dovetail_decoding` stands in for `GenerationMixin._assisted_decoding` when the assistant is a Dovetail draft;
`requests.check_request` refuses, before anything runs, what Dovetail does not decode. `register` installs both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..anatomy import CACHE
from ..config import TreeShape
from ..controller import Controller
from ..decode import decode
from ..devices import Move
from ..dispatch import Dispatch, dispatch_of
from ..drafting import Drafting
from ..experience import LARGEST
from ..learned import Learned, learned_of
from ..levels import tree_rows
from ..modeling import DovetailAssistantModel
from ..rows import ROUND_ROWS
from ..sharing import SharedCores
from ..stats import GenerationStats
from ..target import Context, FeatureTap, Target, open_target
from ..threads import target_threads
from .candidates import DovetailCandidateGenerator, is_out_of_memory
from .requests import PREPARED, changes_rope, check_inputs
from .sampling import draws_of, sharpness_of
from .selector import TokenSelector

logger = logging.get_logger(__name__)


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
    check_inputs(target, input_ids, generation_config, model_kwargs, synced_gpus)
    call = _Call(
        target,
        assistant_model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer,
        model_kwargs,
    )
    if changes_rope(target, input_ids.shape[1], generation_config.max_length):
        logger.warning(
            "this answer may cross the length at which %s changes its RoPE; it is decoded plainly",
            type(target).__name__,
        )
        return call.plainly()
    largest = _largest(assistant_model)
    drafter = call.drafter(largest)
    if drafter is None:
        return call.plainly()
    learned, controller = _controller(assistant_model, target, generation_config.do_sample)
    controller.largest = largest
    context, selector = call.context(), call.selector()
    tap = FeatureTap(target, drafter.reads_features and largest.nodes > 0, drafter.feature_layers)
    verifier = open_target(target, context, tap, largest.nodes)
    call.run(verifier, drafter, controller, selector)
    if learned is not None:
        learned.refresh()
    if streamer is not None:
        streamer.end()
    return call.result(verifier, selector, context)


@dataclass(frozen=True)
class _Call:
    """One call of `generate`, and the parts that its answer is decoded with.

    Args:
        target, draft: the models.
        input_ids: (1, n) int64, the prompt.
        processors, criteria, config, streamer: as `generate` prepared them.
        model_kwargs: further arguments of the target's forward, the cache among them.
        stats: what happens in this call.
    """

    target: PreTrainedModel
    draft: DovetailAssistantModel
    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: BaseStreamer | None
    model_kwargs: dict[str, Any]
    stats: GenerationStats = field(default_factory=GenerationStats)

    @property
    def dispatch(self) -> Dispatch | None:
        """Where the target's last layers are, if not on the host."""
        return dispatch_of(self.target)

    @property
    def _on_host(self) -> bool:
        """Whether the whole target computes on the CPU."""
        return self.dispatch is None and self.target.device.type == "cpu"

    @property
    def move(self) -> Move:
        """How what the target reads gets to a device; counted where its layers are on two."""
        return Tensor.to if self.dispatch is None else self.stats.moved

    def plainly(self) -> GenerateDecoderOnlyOutput | Tensor:
        """The answer without a draft."""
        answer = self.target._sample(
            self.input_ids, self.processors, self.criteria, self.config, streamer=self.streamer, **self.model_kwargs
        )
        sequences = answer.sequences if self.config.return_dict_in_generate else answer
        self.stats.new_tokens = sequences.shape[1] - self.input_ids.shape[1]
        self.draft.last_stats = self.stats
        return answer

    def drafter(self, largest: TreeShape) -> DovetailCandidateGenerator | None:
        """The drafting session, for trees up to `largest`; None, with a warning, if its device has no memory for it."""
        draft, target, config = self.draft, self.target, self.config
        try:
            draws = draws_of(target, config, self.processors, self.input_ids)
            return DovetailCandidateGenerator(draft, target, self._capacity(largest), sharpness_of(config), draws)
        except Exception as error:
            if draft.strict or not is_out_of_memory(error):
                raise
            draft.release(out_of_memory=True)
            self.stats.draft_failed = True
            logger.warning(
                "the draft does not fit into the memory of %s (%s); this answer is decoded plainly. Choose another "
                "draft.draft_device, or set draft.strict = True to raise the error instead",
                draft.draft_device,
                error,
            )
            return None

    def _capacity(self, largest: TreeShape) -> int:
        """Positions to reserve in the draft's cache."""
        known = self.input_ids.shape[1]
        if self.dispatch is None:
            return known + largest.nodes
        # room was planned for; growing would take it twice for a moment
        known = max(known, min(self.config.max_length, self.dispatch.context))
        return known + max(ROUND_ROWS, largest.nodes, tree_rows(largest))

    def selector(self) -> TokenSelector:
        """What chooses tokens as plain decoding does."""
        return TokenSelector(self.input_ids, self.processors, self.criteria, self.config, self.streamer, self.move)

    def context(self) -> Context:
        """Where the sequence stands."""
        return Context(
            cache=self.model_kwargs[CACHE],
            attention_mask=self._at_target(self.model_kwargs.get("attention_mask")),
            position_ids=self._at_target(self.model_kwargs.get("position_ids")),
            prompt_length=self.input_ids.shape[1],
            max_length=self.config.max_length,
            options={k: v for k, v in self.model_kwargs.items() if k not in PREPARED and v is not None},
            move=self.move,
        )

    def _at_target(self, data: Tensor | None) -> Tensor | None:
        return None if data is None else self.move(data, self.target.device)

    def run(
        self, verifier: Target, drafter: DovetailCandidateGenerator, controller: Controller, selector: TokenSelector
    ) -> None:
        """Run the loop; the statistics are the draft's also when an exception ends it."""
        drafting = Drafting(drafter, controller, self.stats, self.draft.strict)
        try:
            with target_threads() as threads, SharedCores(threads, self._on_host) as cores, verifier:
                decode(
                    verifier,
                    drafting,
                    self._at_target(self.input_ids),
                    self._prefill,
                    selector,
                    selector.remaining,
                    self.stats,
                    cores,
                    self.draft.watch,
                )
        finally:
            self.draft.last_stats = self.stats

    def _prefill(self, cache: Cache) -> Any:
        """Run the prompt with this cache."""
        return self.target._prefill(self.input_ids, self.config, {**self.model_kwargs, CACHE: cache})

    def result(self, verifier: Target, selector: TokenSelector, context: Context) -> GenerateDecoderOnlyOutput | Tensor:
        """What `generate` returns, the cache included where it is asked for or the user's own."""
        returns_more = self.config.return_dict_in_generate
        keeps_cache = returns_more or getattr(context.cache, "_is_user_defined", False)
        cache = verifier.finish() if keeps_cache else None
        if not returns_more:
            return selector.input_ids
        return GenerateDecoderOnlyOutput(
            sequences=selector.input_ids, scores=selector.scores, logits=selector.logits, **{CACHE: cache}
        )


def _largest(draft: DovetailAssistantModel) -> TreeShape:
    """The largest tree of a call; after each lack of memory, half as many nodes at half the width, at least one."""
    shape = draft.tree if isinstance(draft.tree, TreeShape) else LARGEST
    if draft.setbacks == 0 or shape.nodes == 0:
        return shape
    return TreeShape(max(shape.nodes >> draft.setbacks, 1), shape.depth, max(shape.top_k >> draft.setbacks, 1))


def _controller(
    draft: DovetailAssistantModel, target: PreTrainedModel, do_sample: bool
) -> tuple[Learned | None, Controller]:
    """What chooses this call's trees, and what it learns into unless the shape is fixed."""
    if isinstance(draft.tree, TreeShape):
        return None, Controller(draft.tree)
    learned = learned_of(draft, target)
    return learned, learned.controller(do_sample, on_host=draft.device.type == "cpu")
