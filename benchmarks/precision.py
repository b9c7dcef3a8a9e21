"""What a training step takes in float32 and under bf16 autocast on this machine's CPU, in turns (CPU time).

    python benchmarks/precision.py

The default recipe on the demo target, features captured beforehand; every pair of steps reads the same windows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from common import humaneval_prompts, write
from torch import Tensor

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.demo import load_pair
from hf_dovetail.recipe import CHOICES, MEASURED_WIDTH, Recipe, default_recipe
from hf_dovetail.train import capture, draft_loss, token_stream
from hf_dovetail.train.steps import autocast, fast_precision, optimizers


class Run:
    """A draft in training at one precision."""

    def __init__(self, target: torch.nn.Module, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.draft = recipe, DovetailAssistantModel.from_target(target).float().train()
        self.draft.meet(target)
        self.optimizers = optimizers(self.draft, recipe, sharded=False)
        self.generator = torch.Generator().manual_seed(recipe.seed)

    def step(self, ids: Tensor, features: Tensor) -> float:
        """One optimizer step; its seconds of CPU time."""
        begin = time.process_time()
        with autocast(self.recipe, ids.device):
            with torch.no_grad():
                logits = self.draft.logits(features)
            loss = draft_loss(self.draft, ids, features, logits, self.recipe, self.generator)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each precision")
    parser.add_argument("--batch", type=int, default=Recipe().batch)
    parser.add_argument("--window", type=int, default=Recipe().window)
    parser.add_argument("--name", default="precision")
    arguments = parser.parse_args()
    target, _, tokenizer = load_pair()
    recipe = replace(default_recipe(MEASURED_WIDTH, muon=True), batch=arguments.batch, window=arguments.window)
    stream = token_stream(tokenizer, humaneval_prompts())
    starts = torch.arange(recipe.batch) * 64
    ids = torch.stack([stream[s : s + recipe.window] for s in starts])
    features = capture(target, ids)[0]
    runs = {precision: Run(target, replace(recipe, precision=precision)) for precision in CHOICES["precision"]}
    taken: dict[str, list[float]] = {precision: [] for precision in runs}
    for number in range(arguments.steps + 1):
        for precision, run in runs.items():
            seconds = run.step(ids, features)
            if number:  # the first step warms up
                taken[precision].append(round(seconds, 3))
    medians = {precision: round(statistics.median(seconds), 3) for precision, seconds in taken.items()}
    print(medians)
    write(
        arguments.name,
        {
            "default": fast_precision(ids.device),
            "batch": recipe.batch,
            "window": recipe.window,
            "steps": arguments.steps,
            "median_step_cpu_s": medians,
            "step_cpu_s": taken,
        },
    )


if __name__ == "__main__":
    main()
