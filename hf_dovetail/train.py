"""Training a draft: the target's features over text, and the loss of the paper, unrolled as drafting unrolls.

Knows the draft network and how to run a target; knows nothing of generation. Source of the loss: arXiv
2412.18934, section 3.3 (SmoothL1 on features + 0.1 cross-entropy with the target's distribution); source of
the unrolling: HASS (arXiv 2408.15766) and EAGLE-3 (arXiv 2503.01840), training as it is used.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .modeling import DovetailAssistantModel
from .recipe import Recipe
from .target import FeatureTap
from .weights import feature_layers

logger = logging.get_logger(__name__)


def read_texts(paths: list[Path]) -> list[str]:
    """The texts in plain text files, or in the "text" field of JSONL files.

    Raises:
        ValueError: naming file and line of malformed JSONL, or if there is no text at all.
    """
    texts: list[str] = []
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error})") from error
        texts.extend(_json_texts(path, content) if path.suffix == ".jsonl" else [content])
    if not any(texts):
        raise ValueError(f"no text in {', '.join(map(str, paths))}; give at least one file that is not empty")
    return texts


def _json_texts(path: Path, content: str) -> Iterator[str]:
    """The "text" fields of JSONL; blank lines are passed over."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected a JSON object with a "text" field ({error!r})'
            ) from error
        if not isinstance(text, str):
            raise ValueError(f'{path}, line {number}: "text" is {text!r}; expected a string')
        yield text


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """All texts as one stream of ids (length,), each opened as the tokenizer opens a text, or by its EOS."""
    ids: list[int] = []
    for text in texts:
        encoded = tokenizer(text, verbose=False).input_ids
        if tokenizer.eos_token_id is not None and encoded[:1] != [tokenizer.bos_token_id]:
            ids.append(tokenizer.eos_token_id)
        ids.extend(encoded)
    return torch.tensor(ids)


@torch.no_grad()
def capture(target: PreTrainedModel, ids: Tensor, layers: Sequence[int] = (-1,)) -> tuple[Tensor, Tensor]:
    """The target's features (B, T, f) of these layers (see `FeatureTap`), and its logits (B, T, V), for ids (B, T)."""
    output, features = FeatureTap(target, enabled=True, layers=layers)(lambda: target(input_ids=ids, use_cache=False))
    return features, output.logits


@torch.no_grad()
def continue_stream(
    target: PreTrainedModel, stream: Tensor, count: int, window: int, seed: int, batch: int = 64
) -> Tensor:
    """Windows (count, window) of the target's own greedy text, each begun by a quarter window of `stream`.

    A draft is asked about text that its target writes; this is that text.
    """
    generator, prompt = torch.Generator().manual_seed(seed), window // 4
    windows = []
    for begin in tqdm(range(0, count, batch), desc="the target writes", unit="batch"):
        starts = torch.randint(len(stream) - prompt, (min(batch, count - begin),), generator=generator)
        prompts = torch.stack([stream[s : s + prompt] for s in starts]).to(target.device)
        windows.append(
            target.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                min_new_tokens=window - prompt,
                max_new_tokens=window - prompt,
                do_sample=False,
            ).cpu()
        )
    return torch.cat(windows)


def draft_loss(
    draft: DovetailAssistantModel,
    ids: Tensor,
    features: Tensor,
    logits: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
) -> Tensor:
    """The loss of one batch, summed over the unrolled steps.

    Step 1 reads the target's features. Step j reads, at row t, what step j-1 predicted at row t-1, and sees
    the true rows up to t-j+1 and its own path of predictions behind them: just what a node at depth j-1 of a
    tree sees. EAGLE-3's hidden states imitate no feature: it learns from the distribution alone, over the tokens that
    it can propose (arXiv 2503.01840, section 3.1).

    Args:
        draft: the network, sharing the target's weights.
        ids: (B, T). features: (B, T, f). logits: (B, T, V), the target's.
        recipe: weights, noise and number of steps.
        generator: of the noise, on the CPU.
    """
    following, wanted = ids[:, 1:], features[:, 1:].float()  # (B, T-1): token t+1 and feature t+1
    ranked = logits if draft.target_ids is None else logits[..., draft.target_ids]
    distribution = ranked[:, 1:].float().softmax(dim=-1)
    inputs = draft.encode(_noisy(features[:, :-1].to(draft.dtype), recipe, generator))
    rows = following.shape[1]
    slots = torch.arange(rows, device=ids.device).unsqueeze(0)
    cache, masks = DynamicCache(), draft.mask_builder()
    total = torch.zeros((), device=ids.device)
    for step in range(recipe.unroll):
        allowed, keys = _unrolled_mask(rows, step, ids.device)
        hidden = draft(following, inputs, slots, masks(allowed, slots, keys), cache)
        feature_loss = 0.0
        if draft.predicts_features:
            feature_loss = F.smooth_l1_loss(hidden[:, step:].float(), wanted[:, step:])
        log_probs = draft.logits(hidden[:, step:]).log_softmax(dim=-1)
        distribution_loss = -(distribution[:, step:] * log_probs).sum(dim=-1).mean()
        loss = recipe.feature_weight * feature_loss + recipe.distribution_weight * distribution_loss
        total = total + recipe.unroll_decay**step * loss
        inputs = torch.cat((inputs[:, :1], hidden[:, :-1].to(inputs.dtype)), dim=1)
    return total


def _unrolled_mask(rows: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a row sees in unrolled step `step` (0-based): (1, T, T * (step + 1)) bool, and the keys' slots."""
    index = torch.arange(rows, device=device)
    behind = index[:, None] - index[None, :]
    blocks = [behind >= step] + [behind == step - block for block in range(1, step + 1)]
    return torch.cat(blocks, dim=1).unsqueeze(0), index.repeat(step + 1).unsqueeze(0)


def _noisy(features: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Features with uniform noise, against errors that the draft's own features will have."""
    noise = torch.rand(features.shape, generator=generator).to(features) - 0.5
    return features + noise * (2 * recipe.noise * 512 / recipe.window)


class _Run:
    """What a resumed run needs beside weights and optimizer, and what it must have in common with the first."""

    def __init__(self, recipe: Recipe, draft: DovetailAssistantModel, windows: Tensor, out: Path) -> None:
        self.step, self.generator = 0, torch.Generator().manual_seed(recipe.seed)
        self.checkpoint = out / "checkpoint"
        self.facts = {
            "recipe": json.loads(json.dumps(asdict(recipe))),
            "draft": {
                k: getattr(draft.config, k)
                for k in ("fusion", "num_hidden_layers", "hidden_size", "target_type", "vocab_size")
            },
            "text": {"windows": list(windows.shape), "sum": int(windows.sum())},
        }

    def state_dict(self) -> dict:
        return {"step": self.step, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.generator.set_state(state["generator"])

    def save(self, accelerator: Accelerator) -> None:
        """Write a checkpoint; an interruption leaves the one before."""
        fresh = self.checkpoint.with_name("checkpoint.new")
        shutil.rmtree(fresh, ignore_errors=True)
        accelerator.save_state(str(fresh))
        (fresh / "run.json").write_text(json.dumps(self.facts))
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        fresh.rename(self.checkpoint)

    def resume(self, accelerator: Accelerator) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            ValueError: if it belongs to another run, naming what differs.
        """
        if not self.checkpoint.exists():
            return
        before = json.loads((self.checkpoint / "run.json").read_text())
        for name, value in self.facts.items():
            if before[name] != value:
                raise ValueError(
                    f"{self.checkpoint} belongs to another run: its {name} is {before[name]}, this run's is {value}; "
                    "choose another folder, or delete the checkpoint"
                )
        accelerator.load_state(str(self.checkpoint))
        logger.info("resuming after step %d", self.step)


def train_draft(
    draft: DovetailAssistantModel,
    target: PreTrainedModel,
    windows: Tensor,
    recipe: Recipe,
    out: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DovetailAssistantModel:
    """Train `draft` in place for `target`, and save it to `out`; resumes from the checkpoint in `out`, if any.

    Args:
        draft: a new draft, in float32.
        target: the target it imitates; it is moved to the training device, and nothing else of it changes.
        windows: (N, W) int64 ids of the training text, W at least `recipe.window`.
        recipe: how to train.
        out: folder of the checkpoint and of the finished draft.
        tokenizer: the target's, saved beside the draft.

    Raises:
        ValueError: if there is too little text for one window, or `out` holds a finished draft or another run.
        FloatingPointError: if the loss is not finite; the last checkpoint stays usable.
    """
    out = Path(out)
    if windows.ndim != 2 or windows.shape[1] < recipe.window or len(windows) == 0:
        raise ValueError(
            f"the training text is of shape {tuple(windows.shape)}; expected windows of {recipe.window} tokens, "
            "so give more text or a smaller window"
        )
    if (out / "recipe.json").exists():
        raise ValueError(f"{out} holds a finished draft; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    accelerator, run = Accelerator(mixed_precision=recipe.precision), _Run(recipe, draft, windows, out)
    draft.draft_device, training = accelerator.device, target.training
    target.to(accelerator.device).eval()
    try:
        _optimize(draft, target, windows, recipe, accelerator, run)
    finally:
        target.train(training)
    return _finish(draft, recipe, run, tokenizer)


def _optimize(
    draft: DovetailAssistantModel,
    target: PreTrainedModel,
    windows: Tensor,
    recipe: Recipe,
    accelerator: Accelerator,
    run: _Run,
) -> None:
    """All steps that are left."""
    draft.train().meet(target)
    layers = feature_layers(draft.config, target.config)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=recipe.learning_rate, betas=recipe.betas)
    draft, optimizer = accelerator.prepare(draft, optimizer)
    accelerator.register_for_checkpointing(run)
    run.resume(accelerator)
    bar = tqdm(total=recipe.steps, initial=run.step, desc="training the draft", unit="step")
    for ids in _batches(windows, recipe, run):
        ids = ids.to(accelerator.device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(run.step)
        with accelerator.autocast():
            features, logits = capture(target, ids, layers)
            loss = draft_loss(draft, ids, features, logits, recipe, run.generator)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {run.step}; lower learning_rate (now {recipe.learning_rate}) "
                "and run again"
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(draft.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if run.step % recipe.save_every == 0:
            run.save(accelerator)
    bar.close()


def _batches(windows: Tensor, recipe: Recipe, run: _Run) -> Iterator[Tensor]:
    """(B, W) ids of the steps that are left, drawn with the run's own generator."""
    while run.step < recipe.steps:
        rows = torch.randint(len(windows), (recipe.batch,), generator=run.generator)
        yield windows[rows, : recipe.window].long()


def _finish(
    draft: DovetailAssistantModel, recipe: Recipe, run: _Run, tokenizer: PreTrainedTokenizerBase | None
) -> DovetailAssistantModel:
    """Write the finished draft, the recipe and the tokenizer; the checkpoint has done its work."""
    out = run.checkpoint.parent
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    draft.eval().save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    shutil.rmtree(run.checkpoint, ignore_errors=True)
    return draft
