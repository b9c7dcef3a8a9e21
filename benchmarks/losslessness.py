"""How often Dovetail's answer is plain generate's, token for token, on real prompts and real models.

    python benchmarks/losslessness.py [--prompts 164] [--max-new-tokens 128]

Modes: float32 greedy, float32 sampled under a seed, bfloat16 greedy with eager attention. Every difference is
recorded with what explains it: at the first differing token, the two candidates' logits in both runs, and the
spacing of bfloat16 numbers at that size. float32 must show none.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from common import SHARED, Tally, humaneval_prompts, story_prompts, write
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.demo import load_pair, pair_path

MODES: dict[str, dict[str, Any]] = {
    "fp32_greedy": {"dtype": torch.float32, "attention": "sdpa", "sampling": {"do_sample": False}},
    "fp32_sampled": {
        "dtype": torch.float32,
        "attention": "sdpa",
        "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0},
    },
    "bf16_greedy_eager": {"dtype": torch.bfloat16, "attention": "eager", "sampling": {"do_sample": False}},
}


def compare(
    target: PreTrainedModel,
    draft: DovetailAssistantModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    length: int,
    sampling: dict[str, Any],
) -> dict[str, Any]:
    """Both answers to every prompt, under the same seed."""
    differences, tally, draft.tree = [], Tally(), TreeShape()  # trees in every round, whether they pay or not
    for index, prompt in enumerate(tqdm(prompts, leave=False)):
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"max_new_tokens": length, "return_dict_in_generate": True, "output_logits": True, **sampling}
        torch.manual_seed(index)
        plain = target.generate(**inputs, **options)
        torch.manual_seed(index)
        assisted = target.generate(**inputs, **options, assistant_model=draft)
        tally.add(draft.last_stats)
        if not torch.equal(plain.sequences, assisted.sequences):
            differences.append({"prompt": index, **explain(plain, assisted, inputs.input_ids.shape[1])})
    identical = len(prompts) - len(differences)
    return {"tried": len(prompts), "identical": identical, **tally.result(), "differences": differences}


def explain(plain: Any, assisted: Any, prompt_length: int) -> dict[str, Any]:
    """The first differing token: both candidates' logits in both runs, and bfloat16's spacing there."""
    answers = [output.sequences[0, prompt_length:] for output in (plain, assisted)]
    shared = min(map(len, answers))
    at = int((answers[0][:shared] != answers[1][:shared]).int().argmax())
    candidates = [int(answer[at]) for answer in answers]
    logits = [[float(output.logits[at][0, token]) for token in candidates] for output in (plain, assisted)]
    size = max(abs(value) for row in logits for value in row)
    return {
        "at_token": at,
        "plain_token": candidates[0],
        "dovetail_token": candidates[1],
        "plain_logits": logits[0],
        "dovetail_logits": logits[1],
        "bf16_spacing": 2.0 ** (math.floor(math.log2(size)) - 7),
        "largest_logit_difference": float((plain.logits[at] - assisted.logits[at]).abs().max()),
    }


def demo_models(dtype: torch.dtype, attention: str) -> tuple[Any, Any, Any]:
    _, draft, tokenizer = load_pair(dtype)
    target = AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=dtype, attn_implementation=attention)
    return target, draft, tokenizer


def baby_llamas(dtype: torch.dtype, attention: str) -> tuple[Any, Any, Any]:
    folder = SHARED / "models"
    target = AutoModelForCausalLM.from_pretrained(
        folder / "babyllama-tok361as105", dtype=dtype, attn_implementation=attention
    )
    lm = AutoModelForCausalLM.from_pretrained(folder / "babyllama-tok105", dtype=dtype)
    return (
        target,
        DovetailAssistantModel.from_causal_lm(lm),
        AutoTokenizer.from_pretrained(folder / "babyllama-tok361as105"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=164)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    pairs = {"demo pair, HumanEval": (demo_models, humaneval_prompts())}
    if SHARED.exists():
        pairs["babyllama pair, stories"] = (baby_llamas, story_prompts())
    results: dict[str, dict[str, Any]] = {}
    for pair, (load, prompts) in pairs.items():
        for mode, how in MODES.items():
            models = load(how["dtype"], how["attention"])
            found = compare(*models, prompts[: arguments.prompts], arguments.max_new_tokens, how["sampling"])
            results.setdefault(pair, {})[mode] = found
            print(
                f"{pair}: {mode:18} {found['identical']} of {found['tried']} identical, "
                f"{found['tokens_per_round']} tokens per round"
            )
    modes = {mode: {k: str(v) for k, v in how.items()} for mode, how in MODES.items()}
    write("losslessness", {"modes": modes, "max_new_tokens": arguments.max_new_tokens, "results": results})


if __name__ == "__main__":
    main()
