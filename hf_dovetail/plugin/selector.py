"""The target's choice of a token, as plain decoding makes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..devices import HOST, Move


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
        if self._needs_only_the_best:
            return self._take(self._move(_best(logits.float()), device))
        raw = self._move(logits, device).to(copy=True, dtype=torch.float32)
        processed = self._processors(self.input_ids, raw)
        if self.scores is not None:
            self.scores += (processed,)
        if self.logits is not None:
            self.logits += (raw,)
        if self._do_sample:
            token = torch.multinomial(nn.functional.softmax(processed, dim=-1), num_samples=1).squeeze(1)
        else:
            token = _best(processed)
        return self._take(token)

    @property
    def _needs_only_the_best(self) -> bool:
        """Whether nobody looks at the logits: then they stay where they are."""
        return not (self._do_sample or self._processors or self.scores is not None or self.logits is not None)

    def _take(self, token: Tensor) -> tuple[int, bool]:
        """Enter a chosen token (1,); it, and whether the answer ends with it."""
        self.input_ids = torch.cat([self.input_ids, token[:, None]], dim=-1)
        finished = bool(self._move(self._criteria(self.input_ids, self.scores), HOST))
        token = self._move(token, HOST)
        if self._streamer is not None:
            self._streamer.put(token)
        return int(token), finished

    def remaining(self) -> int:
        """Tokens that fit below the maximum length."""
        return self._max_length - self.input_ids.shape[1]


def _best(logits: Tensor) -> Tensor:
    """(1,) the place of the largest of (1, V) logits, the first of equals; NumPy finds it several times faster."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.numpy().argmax(axis=-1))
