"""The choice of a token where nobody looks at the logits, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from hf_dovetail.plugin.selector import TokenSelector

AT = {
    "one best": [0.0, 3.0, 1.0],
    "equals": [2.0, 5.0, 5.0, 5.0],
    "both zeros": [-1.0, -0.0, 0.0],
    "infinities": [float("-inf"), float("inf"), float("inf")],
    "nothing allowed": [float("-inf")] * 3,
    "not a number": [1.0, float("nan"), float("inf"), float("nan")],
}


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("values", AT.values(), ids=AT)
def test_the_best_token_is_torchs_argmax(values: list[float], dtype: torch.dtype, changed: bool) -> None:
    """Guards ties, infinities and NaN, of raw logits and of what a processor has made of them."""
    logits = torch.tensor([values])

    def in_this_precision(_: Tensor, scores: Tensor) -> Tensor:
        return scores.to(dtype)

    selector = TokenSelector(
        torch.tensor([[1, 2]]),
        LogitsProcessorList([in_this_precision] if changed else []),
        StoppingCriteriaList([MaxLengthCriteria(3)]),
        GenerationConfig(max_length=3),
        None,
    )
    token, finished = selector(logits if changed else logits.to(dtype))
    assert (token, finished) == (int(logits.argmax()), True)
    assert selector.input_ids.tolist() == [[1, 2, token]]
