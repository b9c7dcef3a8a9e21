"""What raises tokens per round most at equal training time: one change of the recipe per trial, on the demo target.

    python benchmarks/ablation.py --list
    python benchmarks/ablation.py --work build/ablation --trial ours     # one trial; writes build/ablation/ours.json
    python benchmarks/ablation.py --work build/ablation --costs          # ms per round with 1 to 6 blocks
    python benchmarks/ablation.py --work build/ablation --collect        # all trials so far, as one result and a table

Equal time means equal work of the processor: before each trial a step of it and a step of the recipe "ours" are timed
in turns (CPU time, medians), and the trial gets as many steps as cost what `--steps` steps of "ours" cost. The
target's features are captured once and are no part of it. Tokens per round come from the real decode loop on
prompts from held-out files of the corpus (HumanEval is left for the final choice). Greedy answers are the same
text in every trial, so trials are compared prompt by prompt.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, write
from torch import Tensor, nn
from transformers import PreTrainedModel
from trials import OURS, TRIALS, WINDOW, Trial

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.config import MAX_BLOCKS, DovetailConfig
from hf_dovetail.demo import load_pair
from hf_dovetail.recipe import CHOICES, Recipe
from hf_dovetail.train import capture, continue_stream, draft_loss, token_stream

sys.path.append(str(ROOT / "scripts"))
from demo_corpus import split_corpus  # the demo's own corpus; scripts/ is no package

OWN_WINDOWS, READ_WINDOWS = 2048, 4096
PROMPTS, SAMPLED_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 40, 16, 64, 96


@dataclass
class Material:
    """What all trials share: the target, windows and their features, and the prompts.

    Args:
        ids: (N, W) windows, the target's own first. features: (N, W, h) bf16. prompts: (P, n).
    """

    target: PreTrainedModel
    ids: Tensor
    features: Tensor
    prompts: Tensor


def load_material(work: Path) -> Material:
    """The shared material, made once and kept in `work`."""
    target, _, tokenizer = load_pair()
    path = work / "material.pt"
    if not path.exists():
        training, held_out = (token_stream(tokenizer, texts) for texts in split_corpus())
        own = continue_stream(target, training, OWN_WINDOWS, WINDOW, seed=2)
        starts = torch.randint(len(training) - WINDOW, (READ_WINDOWS,), generator=torch.Generator().manual_seed(1))
        ids = torch.cat((own, torch.stack([training[s : s + WINDOW] for s in starts])))
        features = torch.cat([capture(target, part)[0].bfloat16() for part in ids.split(64)])
        begins = torch.linspace(0, len(held_out) - PROMPT_TOKENS, PROMPTS).long()
        prompts = torch.stack([held_out[s : s + PROMPT_TOKENS] for s in begins])
        torch.save({"ids": ids, "features": features, "prompts": prompts}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    return Material(target, **torch.load(path, weights_only=True))


@dataclass
class Training:
    """A draft in training: `step(n)` does the n-th step of `steps`."""

    trial: Trial
    material: Material
    steps: int
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe, target = replace(self.trial.recipe, steps=self.steps), self.material.target
        self.recipe, self.generator = recipe, torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        config = DovetailConfig.for_target(target.config, self.trial.blocks, self.trial.fusion)
        config.intermediate_size = round(config.intermediate_size * self.trial.mlp)
        self.draft = DovetailAssistantModel(config)
        self.draft.reset_parameters()
        self.draft.draft_device, self.draft.tree = "cpu", TreeShape()
        self.draft.train().meet(target)
        parameters = list(self.draft.parameters())
        if self.trial.own_embedding:
            shared = self.draft._shared
            own = nn.Parameter(shared.embedding.clone())
            self.draft._shared = replace(shared, embedding=own)
            parameters.append(own)
        self.optimizers = optimizers(parameters, recipe)

    def step(self, number: int) -> None:
        """One optimizer step."""
        rows = self._rows()
        ids, features = self.material.ids[rows, : self.recipe.window], self.material.features[rows].float()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.rate(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            with torch.no_grad():
                logits = self.draft.logits(features) * self.trial.sharpness
            loss = draft_loss(self.draft, ids, features, logits, self.recipe, self.generator)
        self.losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(self.draft.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def save(self, path: Path, cost: float, training_s: float) -> None:
        """Write what `restore` needs."""
        state = {
            "draft": self.draft.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "embedding": self.draft._shared.embedding if self.trial.own_embedding else None,
            "losses": self.losses,
            "cost": cost,
            "training_s": training_s,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def restore(self, state: dict[str, Any]) -> float:
        """Go on where `save` was called; the CPU seconds until then."""
        self.draft.load_state_dict(state["draft"])
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        self.generator.set_state(state["generator"])
        if state["embedding"] is not None:
            with torch.no_grad():
                self.draft._shared.embedding.copy_(state["embedding"])
        self.losses = state["losses"]
        return state["training_s"]

    def _rows(self) -> Tensor:
        """(batch,) windows, so many of them the target's own."""
        own = round(self.recipe.batch * self.trial.own_share)
        chosen = torch.randint(OWN_WINDOWS, (own,), generator=self.generator)
        read = torch.randint(READ_WINDOWS, (self.recipe.batch - own,), generator=self.generator)
        return torch.cat((chosen, OWN_WINDOWS + read))


def optimizers(parameters: list[nn.Parameter], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """What the recipe names."""
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, lr=0.0, betas=recipe.betas)]
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.0, betas=recipe.betas),
    ]


def relative_cost(trial: Trial, material: Material, pairs: int = 4) -> float:
    """CPU time of a step of `trial` over that of a step of "ours", timed in turns if they compute different things."""
    costly = ("batch", "window", "top_k", "unroll", "optimizer")
    other = replace(trial, recipe=OURS, sharpness=1.0, own_share=Trial().own_share, vocabulary=0) != Trial()
    if not other and all(getattr(trial.recipe, name) == getattr(OURS, name) for name in costly):
        return 1.0
    ours = Trial(replace(OURS, precision=trial.recipe.precision))
    runs = [Training(t, material, steps=1000) for t in (ours, trial)]
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs + 1):
        for run, taken in zip(runs, times, strict=True):
            begin = time.process_time()
            run.step(number)
            if number:  # the first step warms up
                taken.append(time.process_time() - begin)
    return statistics.median(times[1]) / statistics.median(times[0])


def restrict_vocabulary(draft: DovetailAssistantModel, material: Material, size: int) -> None:
    """Let `draft` propose only the `size` tokens that the training text has most often."""
    counts = torch.bincount(material.ids.flatten(), minlength=draft.config.vocab_size)
    bias = torch.full((draft.config.vocab_size,), -1e4)
    bias[counts.topk(size).indices] = 0.0
    draft._shared = replace(draft._shared, bias=bias)


def decode(draft: DovetailAssistantModel, material: Material, prompts: int, **sampling: Any) -> list[tuple[int, int]]:
    """(tokens, rounds) of each prompt; the prefill's token is no round's."""
    found = []
    for prompt in material.prompts[:prompts]:
        torch.manual_seed(0)
        material.target.generate(
            prompt.unsqueeze(0),
            attention_mask=torch.ones(1, PROMPT_TOKENS, dtype=torch.long),
            assistant_model=draft,
            max_new_tokens=NEW_TOKENS,
            **sampling,
        )
        found.append((draft.last_stats.new_tokens - 1, draft.last_stats.rounds))
    return found


def run_trial(
    name: str, trial: Trial, material: Material, reference_steps: int, path: Path, minutes: float
) -> dict[str, Any] | None:
    """Train and measure one trial, or None when the minutes are over: the next call goes on from `path`."""
    end = time.perf_counter() + 60 * minutes
    saved = torch.load(path, weights_only=True) if path.exists() else None
    cost = saved["cost"] if saved else relative_cost(trial, material)
    run = Training(trial, material, max(1, round(reference_steps / cost)))
    training_s = run.restore(saved) if saved else 0.0
    begin = time.process_time()
    while len(run.losses) < run.steps:
        run.step(len(run.losses))
        if not math.isfinite(run.losses[-1]):
            raise FloatingPointError(f"the loss of trial {name!r} is {run.losses[-1]} at step {len(run.losses) - 1}")
        over = time.perf_counter() > end or len(run.losses) == run.steps  # measuring is a piece of its own
        if over and minutes < math.inf:
            run.save(path, cost, training_s + time.process_time() - begin)
            return None
    training_s += time.process_time() - begin
    run.draft.eval()
    if trial.vocabulary:
        restrict_vocabulary(run.draft, material, trial.vocabulary)
    greedy = decode(run.draft, material, PROMPTS, do_sample=False)
    sampled = decode(run.draft, material, SAMPLED_PROMPTS, do_sample=True, temperature=1.0, top_k=0)
    return {
        "name": name,
        "trial": asdict(replace(trial, recipe=run.recipe)),
        "cost_of_a_step": round(cost, 3),
        "steps": run.steps,
        "training_cpu_s": round(training_s, 1),
        "losses": [round(loss, 4) for loss in run.losses[:: max(1, run.steps // 20)]],
        "greedy_tokens_rounds": greedy,
        "sampled_tokens_rounds": sampled,
        "draws_known": True,
    }


def rate_of(pairs: list[list[int]]) -> float:
    """Tokens per round over all prompts together."""
    return sum(tokens for tokens, _ in pairs) / sum(rounds for _, rounds in pairs)


def paired_error(pairs: list[list[int]], reference: list[list[int]]) -> float:
    """Standard error of the difference in tokens per round, by leaving out one prompt at a time (jackknife)."""

    def difference(skip: int) -> float:
        return rate_of(pairs[:skip] + pairs[skip + 1 :]) - rate_of(reference[:skip] + reference[skip + 1 :])

    left_out = [difference(i) for i in range(len(pairs))]
    return math.sqrt((len(pairs) - 1) * statistics.pvariance(left_out))


def summaries(work: Path, compared_with: str) -> Iterator[dict[str, Any]]:
    """One line for each trial that is there, best first, with its difference to the trial `compared_with`."""
    found = [json.loads(path.read_text()) for path in sorted(work.glob("*.json"))]
    reference = next((r for r in found if r["name"] == compared_with), None)
    if reference is None:
        raise ValueError(f'{work} holds no trial "{compared_with}", which the others are compared with; run it first')
    key: Callable[[dict], float] = lambda r: -rate_of(r["greedy_tokens_rounds"])  # noqa: E731
    for result in sorted(found, key=key):
        greedy = result["greedy_tokens_rounds"]
        yield {
            "name": result["name"],
            "tokens_per_round": round(rate_of(greedy), 3),
            "difference": round(rate_of(greedy) - rate_of(reference["greedy_tokens_rounds"]), 3),
            "standard_error": round(paired_error(greedy, reference["greedy_tokens_rounds"]), 3),
            "at_temperature_1": round(rate_of(result["sampled_tokens_rounds"]), 3),
            "draws_known": result.get("draws_known", False),  # not by the loop of the first trials
            "cost_of_a_step": result["cost_of_a_step"],
            "steps": result["steps"],
            "trial": result["trial"],
        }


def costs(material: Material, name: str, repeats: int = 5) -> None:
    """Write what a round costs with 1 to 6 blocks: medians over prompts in turns, an untrained draft's full trees."""
    drafts = {}
    for blocks in range(1, MAX_BLOCKS + 1):
        torch.manual_seed(0)
        drafts[blocks] = DovetailAssistantModel.from_target(material.target, num_hidden_layers=blocks)
        drafts[blocks].draft_device, drafts[blocks].tree = "cpu", TreeShape()
    times: dict[int, list[tuple[float, float]]] = {blocks: [] for blocks in drafts}
    for prompt in material.prompts[: repeats + 1]:
        for blocks, draft in drafts.items():
            ids = prompt.unsqueeze(0)
            material.target.generate(
                ids, attention_mask=torch.ones_like(ids), assistant_model=draft, max_new_tokens=24, do_sample=False
            )
            stats = draft.last_stats
            times[blocks].append((stats.draft_ms / stats.rounds, stats.verify_ms / stats.rounds))
    rows = []
    for blocks, taken in times.items():
        draft_ms, verify_ms = (round(statistics.median(column), 2) for column in zip(*taken[1:], strict=True))
        size = sum(p.numel() for p in drafts[blocks].parameters())
        rows.append({"blocks": blocks, "parameters": size, "draft_ms": draft_ms, "verify_ms": verify_ms})
        print(rows[-1])
    write(name, {"shape": vars(TreeShape()), "rounds": rows})


def collect(work: Path, name: str, compared_with: str) -> None:
    """Write all trials as one result and print them as a Markdown table."""
    rows = list(summaries(work, compared_with))
    write(name, {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "compared_with": compared_with, "trials": rows})
    print("| trial | tokens per round | difference | at temperature 1 | steps | cost of a step |")
    print("|---|--:|--:|--:|--:|--:|")
    for row in rows:
        against = f"{row['difference']:+.2f} ± {row['standard_error']:.2f}"
        print(
            f"| {row['name']} | {row['tokens_per_round']:.2f} | {against} | {row['at_temperature_1']:.2f} | "
            f"{row['steps']} | {row['cost_of_a_step']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "ablation")
    parser.add_argument("--trial", choices=list(TRIALS), help="the trial to run; nothing is done if it is there")
    parser.add_argument("--steps", type=int, default=150, help='steps of "ours"; other trials get the same time')
    parser.add_argument("--precision", choices=CHOICES["precision"], default=OURS.precision, help="of all trials")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after these, and go on in the next call")
    parser.add_argument("--list", action="store_true", help="print the trials' names")
    parser.add_argument("--costs", action="store_true", help="measure what a round costs with 1 to 6 blocks")
    parser.add_argument("--collect", action="store_true", help="write the result of all trials so far")
    parser.add_argument("--reference", choices=list(TRIALS), default="ours", help="what --collect compares with")
    parser.add_argument("--name", default="ablation")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(TRIALS))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.collect:
        collect(arguments.work, arguments.name, arguments.reference)
        return
    material = load_material(arguments.work)
    if arguments.costs:
        costs(material, f"{arguments.name}_costs")
        return
    path = arguments.work / f"{arguments.trial}.json"
    if arguments.trial and not path.exists():
        trial = TRIALS[arguments.trial]
        trial = replace(trial, recipe=replace(trial.recipe, precision=arguments.precision))
        saved = path.with_suffix(".pt")
        result = run_trial(arguments.trial, trial, material, arguments.steps, saved, arguments.minutes)
        if result is None:
            return
        path.write_text(json.dumps(result) + "\n")
        print(f"{arguments.trial}: {rate_of(result['greedy_tokens_rounds']):.2f} tokens per round", flush=True)


if __name__ == "__main__":
    main()
