"""The real setting: draft on the accelerator, target on the CPU. Skipped where there is no accelerator."""

import pytest
import torch
from transformers import pipeline

from hf_dovetail.demo import demo_prompts, load_pair, pair_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
]


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}])
def test_the_draft_goes_to_the_gpu_and_the_answer_stays(sampling: dict) -> None:
    target, draft, tokenizer = load_pair()
    inputs = tokenizer(demo_prompts()[0], return_tensors="pt")
    torch.manual_seed(0)
    plain = target.generate(**inputs, max_new_tokens=64, **sampling)
    torch.manual_seed(0)
    assisted = target.generate(**inputs, max_new_tokens=64, assistant_model=draft, **sampling)
    assert torch.equal(plain, assisted)
    assert draft.device == torch.device(torch.accelerator.current_accelerator().type, 0)
    assert target.device == torch.device("cpu")
    assert draft.last_stats.accepted > 0
    assert draft.last_stats.bytes_to_target < 16 * 1024


def test_a_pipeline_cannot_pull_the_draft_to_the_cpu() -> None:
    write = pipeline(
        "text-generation", model=str(pair_path("target")), assistant_model=str(pair_path("draft")),
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    assert write.assistant_model.device == torch.device("cpu")
    write("def add(a, b):\n", max_new_tokens=16, do_sample=False)
    assert write.assistant_model.device.type == torch.accelerator.current_accelerator().type
    assert write.model.device == torch.device("cpu")


def test_a_draft_that_is_told_to_stay_stays() -> None:
    target, draft, tokenizer = load_pair()
    draft.draft_device = "cpu"
    target.generate(**tokenizer("x = 1\n", return_tensors="pt"), max_new_tokens=8, assistant_model=draft)
    assert draft.device == torch.device("cpu")
