"""What 8 and 4 bits cost in quality: perplexity on real text against bf16, and which layers are to blame in 8 bits.

    python benchmarks/perplexity.py [--texts 64] [--engines-only] [--name perplexity]

The demo target on HumanEval prompts; where ../shared is present, the real Llamas there on stories ("atome" there is a
GPT-2, which has no nn.Linear to quantise). "only" quantises one kind of layer, "without" all others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import SHARED, humaneval_prompts, story_prompts, write
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_dovetail.demo import pair_path
from hf_dovetail.engines import int4, int8, onednn, quantised

LENGTH = 256
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = ("stories260K", "babyllama-tok105", "babyllama-tok361as105")


@torch.no_grad()
def losses(model: PreTrainedModel, texts: list[Tensor]) -> Tensor:
    """(tokens,) float32 losses of every token but each text's first."""
    found = []
    for ids in texts:
        logits = model(ids).logits[0, :-1].float()
        found.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(found)


def compare(plain: Tensor, changed: Tensor) -> dict[str, float]:
    """Perplexities, their relative difference, and the standard error of that difference."""
    difference = changed - plain
    error = difference.std() / len(difference) ** 0.5
    return {
        "perplexity": round(float(changed.mean().exp()), 4),
        "change_percent": round(100 * float(difference.mean().exp() - 1), 3),
        "standard_error_percent": round(100 * float(error), 3),
    }


def quantise_some(model: PreTrainedModel, chosen: Callable[[str], bool]) -> None:
    """Quantise the linear weights whose names are `chosen`, and leave the others as they are."""
    head = model.get_output_embeddings().weight

    def pack(name: str, weight: Tensor, is_embedding: bool) -> quantised.QuantisedKernel | None:
        if is_embedding or weight.data_ptr() == head.data_ptr() or not chosen(name):
            return None
        return quantised.QuantisedKernel(name, weight, int8.Int8Matrix())

    quantised.QuantisedSwap(model).pack(model, pack)


def unclipped(model: PreTrainedModel) -> None:
    """Quantise to 4 bits with each group's whole range."""
    with mock.patch.object(int4, "_KEPT_RANGES", (1.0,)):
        int4.prepare(model)


def measure(folder: Path, prompts: list[str], by_layer: bool) -> dict[str, Any]:
    """One model: bf16, onednn, int8, int4, and, if asked for, int8 for some layers only."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(text, return_tensors="pt").input_ids[:, :LENGTH] for text in prompts]
    texts = [ids for ids in texts if ids.shape[1] > 1]

    def loss_of(change: Callable[[PreTrainedModel], Any] | None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        if change is not None:
            change(model)
        return losses(model, texts)

    plain = loss_of(None)
    last = AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers - 1
    groups: dict[str, Callable[[str], bool]] = {kind: lambda name, kind=kind: f".{kind}." in name for kind in KINDS}
    groups["first layer"] = lambda name: "layers.0." in name
    groups["last layer"] = lambda name: f"layers.{last}." in name
    result: dict[str, Any] = {
        "tokens": len(plain),
        "bf16": round(float(plain.mean().exp()), 4),
        "fp32": compare(plain, loss_of(None, torch.float32)),
        "onednn": compare(plain, loss_of(onednn.prepare)),
        "int8": compare(plain, loss_of(int8.prepare)),
        "int8 of the fp32 model": compare(plain, loss_of(int8.prepare, torch.float32)),
        "int4": compare(plain, loss_of(int4.prepare)),
        "int4 without clipping": compare(plain, loss_of(unclipped)),
    }
    for name, group in groups.items() if by_layer else ():
        alone = loss_of(lambda model, group=group: quantise_some(model, group))
        others = loss_of(lambda model, group=group: quantise_some(model, lambda weight: not group(weight)))
        result[f"only {name}"], result[f"without {name}"] = compare(plain, alone), compare(plain, others)
    return result


def stories() -> list[str]:
    """Story openings and, for more tokens, whole stories from the end of the file."""
    text = (SHARED / "data/train/tinystories.txt").read_text(encoding="utf-8")[-60_000:]
    return story_prompts() + [story.strip() for story in text.split("<|endoftext|>")[1:] if story.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=164, help="at most so many texts per model")
    parser.add_argument("--engines-only", action="store_true", help="leave out the rows of single kinds of layer")
    parser.add_argument("--name", default="perplexity")
    arguments = parser.parse_args()
    jobs = {"demo target, HumanEval prompts": (pair_path("target"), humaneval_prompts())}
    if SHARED.exists():
        jobs |= {f"{name}, stories": (SHARED / "models" / name, stories()) for name in MODELS}
    results = {}
    for name, (folder, texts) in jobs.items():
        results[name] = measure(folder, texts[: arguments.texts], not arguments.engines_only)
        print(f"{name}: {results[name]['tokens']} tokens, bf16 {results[name]['bf16']}")
        for which, found in results[name].items():
            if isinstance(found, dict):
                change = f"{found['change_percent']:+7.3f} % +- {found['standard_error_percent']:.3f}"
                print(f"  {which:24} {found['perplexity']:9.4f} {change}", flush=True)
    write(arguments.name, {"longest_text_tokens": LENGTH, "results": results})


if __name__ == "__main__":
    main()
