"""What the benchmark scripts share: prompts, the record of machine and versions, and the JSON file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_dovetail

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared"


def humaneval_prompts() -> list[str]:
    """The prompts of HumanEval."""
    return _jsonl(ROOT / "tests" / "data" / "humaneval_prompts.jsonl", "prompt")


def story_prompts() -> list[str]:
    """Story openings for the models under ../shared/models."""
    rows = [
        json.loads(line) for line in (SHARED / "data/prompts/stories.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [row["turns"][0] for row in rows]


def _jsonl(path: Path, key: str) -> list[str]:
    return [json.loads(line)[key] for line in path.read_text(encoding="utf-8").splitlines()]


def _cpu() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    ).stdout.strip()


def record() -> dict[str, Any]:
    """Commit, versions and machine of a measurement."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "hf_dovetail", "benchmarks")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hf_dovetail": hf_dovetail.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": str(accelerator) if accelerator else None,
    }


def write(name: str, result: dict[str, Any]) -> None:
    """Write a result with its record to `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"record": record(), "command": " ".join(sys.argv), **result}, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
