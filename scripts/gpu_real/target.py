"""Step 2: the target, a Llama trained from scratch in bf16 mixed precision against the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from .plan import MAX_POSITIONS, SEED, Size, Work, read_json, write_json
from .timed import (
    TimedRun,
    adamw,
    draw_windows,
    load_stream,
    optimize,
    reserve_s,
    size_facts,
    spread_windows,
)

WEIGHT_DECAY, CLIP, VALIDATION_WINDOWS = 0.1, 1.0, 128

Loss = Callable[[Tensor], Tensor]
"""Mean cross-entropy in nats of (B, W + 1) tokens."""


def new_target(size: Size) -> LlamaForCausalLM:
    """The untrained model, in float32."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def head_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of hidden (N, h) through the LM head (V, h) with labels (N,)."""
    return F.cross_entropy(F.linear(hidden, head).float(), labels)


def loss_function(model: LlamaForCausalLM, device: torch.device, compiled: bool) -> Loss:
    """The loss of a micro-batch; compiled layer by layer, so that one graph serves all of them.

    The masks stay outside the graph: there transformers sees that causal attention needs none. What cannot be
    compiled on this machine runs as it is.
    """
    head = head_loss
    if compiled:
        from torch._dynamo import config as compiler

        compiler.suppress_errors = True
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        head = torch.compile(head_loss, dynamic=False)

    def loss(windows: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
            return head(hidden.flatten(0, 1), model.lm_head.weight, windows[:, 1:].flatten())

    return loss


def train_target(
    work: Work, size: Size, minutes: float, device: torch.device, began: float, compiled: bool
) -> dict[str, Any]:
    """Train, and write the bf16 model, its tokenizer and `training.json`; return the latter's content."""
    done = work.target / "training.json"
    if done.exists():
        print(f"{done} is there already", flush=True)
        return read_json(done)
    stream = load_stream(work, "train", device, size.window + 1)
    held_out = load_stream(work, "held_out", device, size.window + 1)
    model = new_target(size).to(device).train()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(stream):,} tokens, on {device}", flush=True)
    work.target.mkdir(parents=True, exist_ok=True)
    budget_s = 60 * minutes - reserve_s(60 * minutes)
    optimizer, path = adamw(model, WEIGHT_DECAY, device), work.target / "checkpoint.pt"
    run = TimedRun(path, model, optimizer, budget_s, size.save_every_s, size_facts(size), began)
    loss, generator = loss_function(model, device, compiled), torch.Generator(device)
    parts = size.batch // size.micro_batch

    def losses(step: int) -> Iterator[Tensor]:
        generator.manual_seed(SEED + step)
        for _ in range(parts):
            yield loss(draw_windows(stream, size.micro_batch, size.window + 1, generator)) / parts

    optimize(run, losses, size.learning_rate, size.warmup, CLIP)
    facts = {
        "architecture": "LlamaForCausalLM",
        "parameters": parameters,
        "config": {k: v for k, v in vars(size).items() if k not in ("prompts", "new_tokens")},
        "compiled": compiled,
        **run.facts_of_training(size.tokens_per_step),
        "corpus_tokens": len(stream),
        "epochs": round(run.step * size.tokens_per_step / len(stream), 2),
        "validation_loss_nats": validation_loss(loss, held_out, size),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    AutoTokenizer.from_pretrained(work.corpus).save_pretrained(work.target)
    model.to(torch.bfloat16).save_pretrained(work.target)
    write_json(done, facts)
    run.finish()
    print(f"validation loss {facts['validation_loss_nats']} nats, {facts['tokens']:,} tokens seen", flush=True)
    return facts


def validation_loss(loss: Loss, held_out: Tensor, size: Size) -> float:
    """Mean loss over fixed windows of the held-out files.

    Gradients stay on: without them the compiled layers would be compiled once more.
    """
    windows = spread_windows(held_out, max(VALIDATION_WINDOWS, size.micro_batch), size.window + 1)
    batches = [b for b in windows.split(size.micro_batch) if len(b) == size.micro_batch]
    return round(sum(loss(batch).item() for batch in batches) / len(batches), 4)
