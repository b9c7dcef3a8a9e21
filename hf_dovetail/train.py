"""Training a draft: the target's features over text, and the loss of the paper, unrolled as drafting unrolls.

Knows the draft network and how to run a target; knows nothing of generation. Source of the loss: arXiv
2412.18934, section 3.3 (SmoothL1 on features + 0.1 cross-entropy with the target's distribution); source of
the unrolling: HASS (arXiv 2408.15766) and EAGLE-3 (arXiv 2503.01840), training as it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .modeling import DovetailAssistantModel

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a draft is trained.

    Args:
        steps: optimizer steps.
        batch: windows per step.
        window: tokens per window.
        learning_rate: peak of AdamW, after a linear warm-up and before a linear decay to zero.
        warmup: steps of warm-up.
        betas: of AdamW.
        clip: largest norm of the gradient.
        feature_weight: of SmoothL1 between the predicted and the target's feature.
        distribution_weight: of the cross-entropy with the target's distribution.
        noise: features get uniform noise of +-`noise` * 512 / `window`.
        unroll: steps on the draft's own features; 1 is the paper's.
        unroll_decay: weight of each further step relative to the one before.
        precision: "no" (float32) or "bf16" (autocast).
        seed: of data order and noise.
        save_every: steps between checkpoints.

    Raises:
        ValueError: if a number is out of range.
    """

    steps: int = 1000
    batch: int = 16
    window: int = 256
    learning_rate: float = 1e-3
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 0.5
    feature_weight: float = 1.0
    distribution_weight: float = 0.1
    noise: float = 0.1
    unroll: int = 1
    unroll_decay: float = 0.8
    precision: str = "no"
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("window", 8), ("unroll", 1), ("save_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Recipe.{name} is {getattr(self, name)}; expected at least {least}")

    def rate(self, step: int) -> float:
        """Learning rate of a step that starts after `step` finished ones."""
        warm = min((step + 1) / max(self.warmup, 1), 1.0)
        return self.learning_rate * warm * (1.0 - step / self.steps)


def read_texts(paths: list[Path]) -> list[str]:
    """The texts in plain text files, or in the "text" field of JSONL files.

    Raises:
        ValueError: naming file and line of malformed JSONL, or if there is no text at all.
    """
    texts: list[str] = []
    for path in paths:
        if path.suffix != ".jsonl":
            texts.append(path.read_text(encoding="utf-8"))
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                texts.append(json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: expected a JSON object with a "text" field ({error!r})'
                ) from error
    if not any(texts):
        raise ValueError(f"no text in {', '.join(map(str, paths))}; give at least one file that is not empty")
    return texts


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
def capture(target: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The target's features (B, T, h), its LM head's inputs, and its logits (B, T, V) for ids (B, T)."""
    taken: list[Tensor] = []
    handle = target.get_decoder().register_forward_hook(lambda _m, _i, output: taken.append(output[0]))
    try:
        logits = target(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return taken[0], logits


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
    tree sees.

    Args:
        draft: the network, sharing the target's weights.
        ids: (B, T). features: (B, T, h). logits: (B, T, V), the target's.
        recipe: weights, noise and number of steps.
        generator: of the noise, on the CPU.
    """
    following, wanted = ids[:, 1:], features[:, 1:].float()  # (B, T-1): token t+1 and feature t+1
    distribution = logits[:, 1:].float().softmax(dim=-1)
    inputs = _noisy(features[:, :-1].to(draft.dtype), recipe, generator)
    rows = following.shape[1]
    slots = torch.arange(rows, device=ids.device).unsqueeze(0)
    cache, masks = DynamicCache(), draft.mask_builder()
    total = torch.zeros((), device=ids.device)
    for step in range(recipe.unroll):
        allowed, keys = _unrolled_mask(rows, step, ids.device)
        hidden = draft(following, inputs, slots, masks(allowed, slots, keys), cache)
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


class _State:
    """What a resumed run needs beside weights and optimizer; saved by accelerate."""

    def __init__(self, seed: int) -> None:
        self.step, self.generator = 0, torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict:
        return {"step": self.step, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.generator.set_state(state["generator"])


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
        target: the target it imitates; its weights do not change.
        windows: (N, W) int64 ids of the training text, W at least `recipe.window`.
        recipe: how to train.
        out: folder of the checkpoint and of the finished draft.
        tokenizer: the target's, saved beside the draft.

    Raises:
        ValueError: if there is too little text for one window.
        RuntimeError: if the loss is not finite; the last checkpoint stays usable.
    """
    if windows.ndim != 2 or windows.shape[1] < recipe.window or len(windows) == 0:
        raise ValueError(
            f"the training text is of shape {tuple(windows.shape)}; expected windows of {recipe.window} tokens"
        )
    accelerator, state = Accelerator(mixed_precision=recipe.precision), _State(recipe.seed)
    target = target.to(accelerator.device).eval().requires_grad_(False)
    draft.draft_device = accelerator.device
    draft.train().meet(target)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=recipe.learning_rate, betas=recipe.betas)
    network, optimizer = accelerator.prepare(draft, optimizer)
    accelerator.register_for_checkpointing(state)
    checkpoint = Path(out) / "checkpoint"
    if checkpoint.exists():
        accelerator.load_state(str(checkpoint))
        logger.info("resuming after step %d", state.step)
    bar = tqdm(
        total=recipe.steps,
        initial=state.step,
        desc="training the draft",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    for ids in _batches(windows, recipe, state):
        ids = ids.to(accelerator.device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(state.step)
        with accelerator.autocast():
            features, logits = capture(target, ids)
            loss = draft_loss(network, ids, features, logits, recipe, state.generator)
        if not math.isfinite(loss.item()):
            raise RuntimeError(
                f"the loss is {loss.item()} at step {state.step}; lower learning_rate (now {recipe.learning_rate}) "
                "and run again"
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(draft.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if state.step % recipe.save_every == 0:
            accelerator.save_state(str(checkpoint))
    bar.close()
    return _finish(accelerator.unwrap_model(network), recipe, Path(out), tokenizer)


def _batches(windows: Tensor, recipe: Recipe, state: _State) -> Iterator[Tensor]:
    """(B, W) ids of the steps that are left, drawn with the state's own generator."""
    while state.step < recipe.steps:
        rows = torch.randint(len(windows), (recipe.batch,), generator=state.generator)
        yield windows[rows, : recipe.window].long()


def _finish(
    draft: DovetailAssistantModel, recipe: Recipe, out: Path, tokenizer: PreTrainedTokenizerBase | None
) -> DovetailAssistantModel:
    """Write the finished draft, the recipe and the tokenizer."""
    draft.eval()
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    draft.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    return draft
