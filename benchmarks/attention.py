"""Attention of 1 to 32 rows over 256 to 4096 keys on the CPU: the exact kernel, grouped products, and sdpa.

    python benchmarks/attention.py [--repeats 15]

Medians in microseconds of one call, the three in turns, with the mask that a tree brings (none for one row).
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from common import write
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_dovetail.engines import native
from hf_dovetail.engines.exact import exact_attention
from hf_dovetail.grouped import grouped_attention
from hf_dovetail.threads import target_threads

HEADS = ((32, 8, 64), (32, 8, 128), (28, 4, 128), (16, 2, 64), (32, 32, 128))  # query heads, key heads, width
ROWS, KEYS = (1, 4, 8, 16, 17, 32), (256, 1024, 4096)


def compare(heads: int, groups: int, width: int, rows: int, keys: int, dtype: torch.dtype, repeats: int) -> dict:
    """Medians of both for one size."""
    query = torch.randn(1, rows, heads, width, dtype=dtype).transpose(1, 2)
    states = [torch.randn(1, groups, keys + 64, width, dtype=dtype)[:, :, :keys] for _ in range(2)]
    module: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True, training=False)
    allowed = torch.rand(1, 1, rows, keys) > 0.1
    additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    scaling = width**-0.5
    ways = {
        "sdpa": lambda: sdpa_attention_forward(module, query, *states, allowed if rows > 1 else None, 0.0, scaling),
        "grouped": lambda: grouped_attention(query, *states, additive if rows > 1 else None, scaling),
        "exact": lambda: exact_attention(module, query, *states, additive if rows > 1 else None, 0.0, scaling),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 2):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if repeat >= 2:
                times[name].append(1e6 * (time.perf_counter() - begin))
    return {name: round(statistics.median(values), 1) for name, values in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if native.why_not():
        raise SystemExit(native.why_not())
    results, worst = [], {"grouped": 0.0, "exact": 0.0}
    with target_threads() as threads:
        for dtype in (torch.bfloat16, torch.float32):
            for size in HEADS:
                for keys in KEYS:
                    for rows in ROWS:
                        medians = compare(*size, rows, keys, dtype, arguments.repeats)
                        ratios = {f"{name}_over_sdpa": round(medians[name] / medians["sdpa"], 3) for name in worst}
                        worst = {name: max(worst[name], ratios[f"{name}_over_sdpa"]) for name in worst}
                        precision = str(dtype).removeprefix("torch.")
                        entry = {"dtype": precision, "heads": size, "rows": rows, "keys": keys}
                        results.append({**entry, "us": medians, **ratios})
                        print(f"{precision:8} {size!s:14} rows {rows:2} keys {keys:4}: {medians}, {ratios}")
    write("attention", {"threads": threads, "worst_over_sdpa": worst, "results": results})


if __name__ == "__main__":
    main()
