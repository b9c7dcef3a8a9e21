"""How often Dovetail's answer is plain generate's, token for token, on real prompts and real models.

    python benchmarks/losslessness.py [--prompts 164] [--max-new-tokens 128] [--tree auto]

Modes: the model's own layers in float32, greedy and sampled under a seed, and in bfloat16 with eager attention; and
prepared targets, whose logits must be the same bit for bit. Trees have 16 nodes in every round, or are "auto", of all
sizes and now and then none. Every difference is recorded with what explains it: at the
first differing token, the two candidates' logits in both runs, and the spacing of bfloat16 numbers at that size.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from common import SHARED, Tally, humaneval_prompts, story_prompts, write
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_dovetail import DovetailAssistantModel, TreeShape, prepare_target
from hf_dovetail.demo import load_pair, pair_path

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
MODES: dict[str, tuple[torch.dtype, str, str, dict[str, Any]]] = {
    "fp32_greedy": (torch.float32, "sdpa", "eager", GREEDY),
    "fp32_sampled": (torch.float32, "sdpa", "eager", SAMPLED),
    "bf16_greedy_eager": (torch.bfloat16, "eager", "eager", GREEDY),
    "bf16_greedy_onednn": (torch.bfloat16, "sdpa", "onednn", GREEDY),
    "bf16_sampled_onednn": (torch.bfloat16, "sdpa", "onednn", SAMPLED),
    "bf16_sampled_int8": (torch.bfloat16, "sdpa", "int8", SAMPLED),
    "bf16_sampled_int4": (torch.bfloat16, "sdpa", "int4", SAMPLED),
    "fp32_sampled_onednn": (torch.float32, "sdpa", "onednn", SAMPLED),
}
"""Precision, attention and engine of the target, and arguments of `generate`."""


def compare(
    target: PreTrainedModel,
    draft: DovetailAssistantModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    length: int,
    sampling: dict[str, Any],
    tree: TreeShape | str,
) -> dict[str, Any]:
    """Both answers to every prompt, under the same seed."""
    differences, tally, draft.tree = [], Tally(), tree
    same_bits = 0
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
        else:
            same_bits += torch.equal(torch.cat(plain.logits), torch.cat(assisted.logits))
    identical = len(prompts) - len(differences)
    found = {"tried": len(prompts), "identical": identical, "logits_identical_bit_for_bit": same_bits}
    return {**found, **tally.result(), "differences": differences}


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
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--tree", choices=("fixed", "auto"), default="fixed")
    parser.add_argument("--name", default="losslessness", help="of the result's file")
    arguments = parser.parse_args()
    pairs = {"demo pair, HumanEval": (demo_models, humaneval_prompts())}
    if SHARED.exists():
        pairs["babyllama pair, stories"] = (baby_llamas, story_prompts())
    tree = "auto" if arguments.tree == "auto" else TreeShape()
    results: dict[str, dict[str, Any]] = {}
    for pair, (load, prompts) in pairs.items():
        for mode in arguments.modes:
            dtype, attention, engine, sampling = MODES[mode]
            target, draft, tokenizer = load(dtype, attention)
            prepare_target(target, engine=engine)
            chosen = prompts[: arguments.prompts]
            found = compare(target, draft, tokenizer, chosen, arguments.max_new_tokens, sampling, tree)
            results.setdefault(pair, {})[mode] = found
            print(
                f"{pair}: {mode:19} {found['identical']} of {found['tried']} identical, "
                f"{found['logits_identical_bit_for_bit']} with the same bits, "
                f"{found['tokens_per_round']} tokens per round"
            )
    names = ("dtype", "attention", "engine", "sampling")
    modes = {mode: dict(zip(names, map(str, MODES[mode]), strict=True)) for mode in arguments.modes}
    write(
        arguments.name,
        {"modes": modes, "tree": str(tree), "max_new_tokens": arguments.max_new_tokens, "results": results},
    )


if __name__ == "__main__":
    main()
