"""Train the demo pair's draft for the target that `train_demo_target.py` has made.

    python scripts/train_demo_draft.py --target build/demo/target --out build/demo/draft

Two cores need about 15 minutes. The draft learns from the target's training corpus and from text that the
target writes itself, since that is what it will be asked about. Resumes when it was interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo_corpus import split_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import Extras, continue_stream, token_stream, train_draft

BLOCKS, OWN_WINDOWS = 2, 4096
RECIPE = Recipe(
    steps=1200,
    batch=32,
    window=128,
    learning_rate=2e-3,
    feature_weight=1.0,
    distribution_weight=1.0,
    noise=0.0,
    unroll=3,
    precision="bf16",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--own-windows", type=int, default=OWN_WINDOWS, help="windows that the target writes itself")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32)
    training, _ = split_corpus()
    stream = token_stream(tokenizer, training)
    recipe = Recipe(**{**vars(RECIPE), "steps": arguments.steps})
    written = own_text(target, stream, arguments.own_windows, recipe.window, arguments.out)
    rows = torch.randint(len(stream) - recipe.window, (4 * len(written),), generator=torch.Generator().manual_seed(1))
    read = torch.stack([stream[s : s + recipe.window] for s in rows])
    windows = torch.cat((written.repeat(2, 1), read))  # a third is the target's own
    draft = DovetailAssistantModel.from_target(target, num_hidden_layers=arguments.blocks)
    train_draft(draft, target, windows, recipe, arguments.out, Extras(tokenizer))
    draft.to(torch.bfloat16).save_pretrained(arguments.out)


def own_text(target: AutoModelForCausalLM, stream: torch.Tensor, count: int, window: int, out: Path) -> torch.Tensor:
    """The windows that the target writes, kept in a file for a run that resumes."""
    path = out / "own_windows.pt"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        torch.save(continue_stream(target, stream, count, window, seed=2), path)
    return torch.load(path, weights_only=True)


if __name__ == "__main__":
    main()
