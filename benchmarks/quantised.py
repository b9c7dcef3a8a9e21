"""A whole forward pass on each engine at 1 to 31 rows, in turns, on a random Llama of 1 B parameters in bfloat16.

    python benchmarks/quantised.py [--layers 16] [--repeats 9] [--rows 1 2 4 8 16 24 31] [--name quantised_1b]

Width 2048, MLP 8192, 32/8 heads, vocabulary 32,000, 300 keys in the cache; medians in ms. `int8` runs on both kernels,
oneDNN's and the native one. The read bandwidth is measured in the same run, between the passes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any
from unittest import mock

import torch
from common import write
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_dovetail import prepare_target
from hf_dovetail.anatomy import CACHE
from hf_dovetail.bench.machine import read_bandwidth
from hf_dovetail.bench.parts import read_bytes, weight_shapes
from hf_dovetail.engines import int4, int8, native
from hf_dovetail.threads import target_threads

ENGINES = ("onednn", "int8 (oneDNN)", "int8 (native)", "int4")
KEYS = 300


def build(layers: int) -> PreTrainedModel:
    """A Llama with random weights."""
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=layers,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=32000,
    )
    with no_init_weights():
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                for part in parameter.view(-1).split(len(noise)):
                    part.copy_(noise[: len(part)])
    return model


def prepared(engine: str, model: PreTrainedModel) -> PreTrainedModel:
    """The model on one of `ENGINES`."""
    name = engine.split()[0]
    if engine != "int8 (oneDNN)":
        return prepare_target(model, engine=name)
    with mock.patch.object(native, "why_not", return_value="switched off for comparison"):
        return prepare_target(model, engine=name)


class Pass:
    """Forward passes of some rows over a filled cache."""

    def __init__(self, engine: str, layers: int) -> None:
        model = build(layers)
        shapes = weight_shapes(model)
        self.model = prepared(engine, model)
        self.read_bytes = read_bytes(model, shapes, KEYS)
        self.cache = DynamicCache(config=model.config)
        self.ids = torch.randint(0, 32000, (1, KEYS), generator=torch.Generator().manual_seed(0))
        self.model(self.ids, logits_to_keep=1, **{CACHE: self.cache})

    def ms(self, rows: int) -> float:
        begin = time.perf_counter()
        self.model(self.ids[:, :rows], **{CACHE: self.cache})
        spent = 1e3 * (time.perf_counter() - begin)
        self.cache.crop(-rows)
        return spent


def summary(times: dict[str, dict[int, float]], read: dict[str, int], bandwidth: float) -> dict[str, Any]:
    """The aims: 16 rows against one row and against onednn, and one row's share of the read bandwidth."""
    found = {}
    for engine, by_rows in times.items():
        rate = read[engine] / by_rows[1] / 1e6
        found[engine] = {
            "bytes_read": read[engine],
            "one_row_gb_s": round(rate, 1),
            "one_row_share_of_bandwidth": round(rate / bandwidth, 3),
            "rows_16_over_1": round(by_rows[16] / by_rows[1], 2),
            "rows_16_over_onednn": round(by_rows[16] / times["onednn"][16], 3),
        }
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24, 31], help="1 and 16 among them")
    parser.add_argument("--name", default="quantised_1b")
    arguments = parser.parse_args()
    for engine in (int8, int4):
        reason = engine.why_not(build(1))
        if reason is not None:
            raise SystemExit(f"not measured: {reason}")
    with target_threads() as threads:
        passes = {engine: Pass(engine, arguments.layers) for engine in ENGINES}
        times: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in arguments.rows} for name in passes}
        bandwidths = []
        for repeat in range(arguments.repeats + 1):
            for rows in arguments.rows:
                for engine, forward in passes.items():
                    spent = forward.ms(rows)
                    if repeat:
                        times[engine][rows].append(spent)
            bandwidths.append(read_bandwidth(repeats=1)["read_gb_s"])
    medians = {
        engine: {rows: round(statistics.median(spent), 2) for rows, spent in by_rows.items()}
        for engine, by_rows in times.items()
    }
    bandwidth = statistics.median(bandwidths)
    aims = summary(medians, {engine: forward.read_bytes for engine, forward in passes.items()}, bandwidth)
    for engine in medians:
        print(f"{engine:14}", medians[engine], aims[engine])
    print(f"read bandwidth {bandwidth} GB/s ({min(bandwidths)} to {max(bandwidths)})")
    write(
        arguments.name,
        {
            "layers": arguments.layers,
            "keys": KEYS,
            "threads": threads,
            "repeats": arguments.repeats,
            "read_gb_s": {"median": bandwidth, "lowest": min(bandwidths), "highest": max(bandwidths)},
            "median_ms": medians,
            "aims": aims,
        },
    )


if __name__ == "__main__":
    main()
