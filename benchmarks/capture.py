"""What `hf-dovetail capture` takes on a CPU: seconds per 1,000 tokens and peak memory, on the demo target widened.

    python benchmarks/capture.py [--dtypes float32 bfloat16]

The command itself runs, once on few windows and once on more: the difference is what windows cost, without loading.
CPU time, which is wall time where one thread has a core for itself.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import humaneval_prompts, write

from hf_dovetail.bench.widen import widen
from hf_dovetail.demo import load_pair
from hf_dovetail.train import token_stream

TOKENS = 1000
WIDENED = {
    "hidden_size": 1536,
    "num_hidden_layers": 14,
    "intermediate_size": 6144,
    "num_attention_heads": 48,
    "num_key_value_heads": 16,
}


def run(command: list[str]) -> tuple[str, float, float]:
    """What a command said, its CPU seconds, and its peak memory in GiB."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[:4]} ended with {process.returncode}")
    return said, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def captured(folder: Path, text: Path, out: Path, window: int) -> tuple[int, float, float]:
    """Windows, CPU seconds and peak memory of one capture."""
    command = [sys.executable, "-m", "hf_dovetail.cli", "capture", "--target", str(folder), "--data", str(text)]
    said, seconds, peak = run([*command, "--out", str(out), "--window", str(window), "--batch", "1"])
    return int(re.search(r"features of ([\d,]+) windows", said)[1].replace(",", "")), seconds, peak


def measured(dtype: torch.dtype, windows: tuple[int, int], window: int) -> dict[str, Any]:
    """One precision."""
    small, _, tokenizer = load_pair(dtype)
    stream = token_stream(tokenizer, humaneval_prompts())
    with tempfile.TemporaryDirectory() as place:
        folder, found = Path(place), []
        wide = widen(small, **WIDENED)
        parameters = sum(p.numel() for p in wide.parameters())
        wide.save_pretrained(folder / "target")
        tokenizer.save_pretrained(folder / "target")
        del wide
        for count in windows:
            text = folder / f"{count}.txt"
            text.write_text(tokenizer.decode(stream[: count * window + window // 2]), encoding="utf-8")
            found.append(captured(folder / "target", text, folder / f"{count}", window))
    (few, few_s, _), (more, more_s, peak) = found
    return {
        "parameters": parameters,
        "windows": [few, more],
        "cpu_s": [round(few_s, 2), round(more_s, 2)],
        "cpu_s_per_1000_tokens": round((more_s - few_s) / (more - few) / window * TOKENS, 2),
        "peak_gib": round(peak, 2),
        "weights_gib": round(parameters * dtype.itemsize / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--windows", type=int, nargs=2, default=(1, 3), help="of the two runs")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--name", default="capture")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.dtypes:
        results[name] = measured(getattr(torch, name), tuple(arguments.windows), arguments.window)
        print(name, results[name], flush=True)
    write(arguments.name, {"widened": WIDENED, "window": arguments.window, "results": results})


if __name__ == "__main__":
    main()
