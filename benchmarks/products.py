"""Products of 1 to 32 rows with one matrix on the CPU: torch's own, and those of the engines, by number of rows.

    python benchmarks/products.py [--outputs 8192] [--inputs 2048] [--repeats 9] [--name products]

Medians in microseconds of one product, all ways in turns; each way has several matrices, which no cache holds together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from common import write
from torch import Tensor
from torch.nn import functional as F

from hf_dovetail.engines import int4, native, onednn
from hf_dovetail.engines.int8 import Int8Matrix
from hf_dovetail.threads import target_threads

ROWS = (1, 2, 4, 8, 12, 16, 24, 32)
_COLD_BYTES = 128 << 20  # of the matrices of one way

Product = Callable[[Tensor], Tensor]


def ways(outputs: int, inputs: int) -> dict[str, tuple[torch.dtype, list[Product]]]:
    """The ways to multiply that there are here, each with its precision and products with matrices of its own."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) / inputs**0.5
    makers: dict[str, tuple[torch.dtype, float, Callable[[], Product]]] = {
        "torch float32": (torch.float32, 4, lambda: partial(F.linear, weight=weight.clone())),
        "torch bfloat16": (torch.bfloat16, 2, lambda: partial(F.linear, weight=weight.bfloat16())),
        "onednn float32": (torch.float32, 4, lambda: partial(onednn.pack(weight).linear, bias=None)),
        "onednn bfloat16": (torch.bfloat16, 2, lambda: partial(onednn.pack(weight.bfloat16()).linear, bias=None)),
        "int8": (torch.bfloat16, 1, lambda: _quantised(Int8Matrix(native.NativeInt8), weight)),
        "int4": (torch.bfloat16, 0.625, lambda: _quantised(int4.Int4Matrix(), weight)),
    }
    return {
        name: (dtype, [make() for _ in range(max(2, int(_COLD_BYTES / (bytes_each * weight.numel()))))])
        for name, (dtype, bytes_each, make) in makers.items()
    }


def _quantised(matrix: Int8Matrix | int4.Int4Matrix, weight: Tensor) -> Product:
    matrix.add(weight)
    return matrix.product


def measure(ways_here: dict[str, tuple[torch.dtype, list[Product]]], inputs: int, rows: int, repeats: int) -> dict:
    """Medians in microseconds of one product, by way."""
    times: dict[str, list[float]] = {name: [] for name in ways_here}
    wide = torch.randn(rows, inputs)
    for repeat in range(repeats + 1):
        for name, (dtype, products) in ways_here.items():
            given = wide.to(dtype)
            begin = time.perf_counter()
            for product in products:
                product(given)
            if repeat:  # the first one warms up
                times[name].append(1e6 * (time.perf_counter() - begin) / len(products))
    return {name: round(statistics.median(values), 1) for name, values in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--name", default="products")
    arguments = parser.parse_args()
    if native.why_not():
        raise SystemExit(native.why_not())
    results = {}
    with target_threads() as threads:
        here = ways(arguments.outputs, arguments.inputs)
        for rows in ROWS:
            results[rows] = measure(here, arguments.inputs, rows, arguments.repeats)
            print(rows, results[rows], flush=True)
    size = {"outputs": arguments.outputs, "inputs": arguments.inputs}
    instructions = native.instruction_set().name
    write(arguments.name, {"threads": threads, "instructions": instructions, **size, "us": results})


if __name__ == "__main__":
    main()
