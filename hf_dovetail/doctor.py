"""The command `hf-dovetail doctor`: what this machine and its packages let Dovetail do, and what is in the way.

Knows what each part says of itself; changes nothing, but that the native kernels are compiled if they were not yet.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_TESTED = (5, 17), (5, 24)
"""The oldest and the newest transformers that the tests have run with."""


def add_doctor_parser(commands: Any) -> None:
    """Add the subcommand to argparse's `commands`."""
    parser = commands.add_parser("doctor", help="say what this machine can do, and what is in the way")
    parser.set_defaults(run=lambda arguments: print(report()))


def report() -> str:
    """The findings, a line each: what, and how it is."""
    import torch

    from .curves import user_cache
    from .fingerprint import cpu_name, versions
    from .threads import chosen_threads

    findings = {
        "versions": ", ".join(map(" ".join, versions().items())) + _untested(versions()["transformers"]),
        "CPU": f"{cpu_name()}, {os.cpu_count()} logical CPUs; targets compute with {chosen_threads()} threads",
        "native kernels": _native(),
        "large pages": _large_pages(),
        **{f"engines, {str(dtype)[6:]}": _engines(dtype) for dtype in (torch.bfloat16, torch.float32)},
        "drafts run on": _accelerator(),
        "kept between runs": f"in {user_cache()} (HF_HOME or XDG_CACHE_HOME decide where)",
    }
    width = max(map(len, findings))
    return "\n".join(f"{name:{width}}  {found}" for name, found in findings.items())


def _untested(version: str) -> str:
    numbers = version.split(".")[:2]
    if not all(map(str.isdecimal, numbers)) or _TESTED[0] <= tuple(map(int, numbers)) <= _TESTED[1]:
        return ""
    oldest, newest = (".".join(map(str, tested)) for tested in _TESTED)
    return f"; not tested with transformers {version}: if an answer fails, install {oldest} to {newest}"


def _native() -> str:
    from .engines import native

    reason = native.why_not()
    if reason is not None:
        return f"none: {reason}"
    products = "bfloat16, 8 and 4 bits" if native.multiplies_bf16() else "8 and 4 bits"
    return f"compiled for {native.instruction_set().name}; products in {products}"


def _large_pages() -> str:
    from .engines import pages

    return pages.why_not() or "yes"


def _engines(dtype: torch.dtype) -> str:
    """The engines that can take a model in this precision, and why the others cannot."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from .engines import why_not_each

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    reasons = why_not_each(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).to(dtype))
    able = ", ".join(name for name, reason in reasons.items() if reason is None)
    unable = "".join(f"; not {name}: {reason}" for name, reason in reasons.items() if reason is not None)
    return (able or "none but the model's own layers") + unable


def _accelerator() -> str:
    from .devices import resolve_device
    from .fingerprint import accelerator_name

    device = resolve_device("auto")
    return "the CPU: torch finds no accelerator" if device.type == "cpu" else f"{device} ({accelerator_name(device)})"
