"""Whether `torch.compile` would make a faster engine: one verification of a widened target, against the engines.

    python benchmarks/compiled.py --widen 1B        # writes results/compiled.json

Compiled as is best for it: one graph per number of rows, static shapes, a static cache; plainly, and with the weights
frozen into the graph, where Inductor packs them for oneDNN (at the price of a second copy while it compiles).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from torch._inductor import config as inductor
from transformers import PreTrainedModel, StaticCache
from transformers.utils import logging

from hf_dovetail import TreeShape, prepare_target
from hf_dovetail.anatomy import CACHE
from hf_dovetail.bench.machine import read_bandwidth
from hf_dovetail.bench.models import load_models
from hf_dovetail.bench.parts import verify_ms

ROWS = (1, 16)
CONTEXT = 300


def compiled_ms(model: PreTrainedModel, text: torch.Tensor, rows: int, repeats: int) -> dict[str, Any]:
    """Seconds of compiling a pass of `rows` rows behind `CONTEXT` positions, and its median time in ms."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + max(ROWS))
    model(text[:, :CONTEXT], **{CACHE: cache})
    held = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    run = torch.compile(model.forward, dynamic=False, fullgraph=False)
    places = torch.arange(CONTEXT, CONTEXT + rows).unsqueeze(0)
    mask = (torch.arange(CONTEXT + max(ROWS)) <= places[0][:, None])[None, None]
    tokens = text[:, CONTEXT : CONTEXT + rows]

    def once() -> float:
        for layer, (keys, values) in zip(cache.layers, held, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(CONTEXT)
        begin = time.perf_counter()
        run(input_ids=tokens, position_ids=places, attention_mask=mask, **{CACHE: cache})
        return 1e3 * (time.perf_counter() - begin)

    compiling = once() / 1e3
    once()
    return {"compiling_s": round(compiling, 1), "ms": round(statistics.median(once() for _ in range(repeats)), 3)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widen", default="1B")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cycles", type=int, default=2)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    models = load_models(None, None, None, arguments.widen, torch.bfloat16, TreeShape())
    text = torch.randint(5, 4000, (1, 512), generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {}

    def engine(name: str) -> Callable[[PreTrainedModel], dict[str, Any]]:
        def timed(model: PreTrainedModel) -> dict[str, Any]:
            prepare_target(model, engine=name)
            found = verify_ms(model, text[:, :CONTEXT], arguments.repeats)
            return {str(rows): {"ms": round(found[rows], 3)} for rows in ROWS}

        return timed

    def compiling(freezing: bool) -> Callable[[PreTrainedModel], dict[str, Any]]:
        def timed(model: PreTrainedModel) -> dict[str, Any]:
            found = {}
            for rows in ROWS:
                torch._dynamo.reset()
                with inductor.patch(freezing=freezing):
                    found[str(rows)] = compiled_ms(model, text, rows, arguments.repeats)
            return found

        return timed

    ways = {
        "eager": engine("eager"),
        "onednn": engine("onednn"),
        "compile": compiling(False),
        "compile, frozen": compiling(True),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    bandwidth = []
    for _ in range(arguments.cycles):
        for name, timed in ways.items():
            bandwidth.append(read_bandwidth(repeats=3)["read_gb_s"])
            model = models.make_target()
            results[name].append(timed(model))
            print(name, results[name][-1], flush=True)
            del model
            torch._dynamo.reset()
            gc.collect()
    common.write(
        "compiled", {"widened": arguments.widen, "context": CONTEXT, "read_gb_s": bandwidth, "each_turn": results}
    )


if __name__ == "__main__":
    main()
