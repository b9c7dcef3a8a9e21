"""What the native kernels are compiled for: the best of the instruction sets that this CPU has."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InstructionSet:
    """One way to compile the kernels, and how it wants 8-bit weights.

    Args:
        name: as users know it.
        needs: what the CPU must have, in Linux's names.
        bf16_needs: what products of bf16 numbers need besides.
        flags: for the compiler.
        side_by_side: inputs of 8-bit weights that stand side by side; SIDE_BY_SIDE in the source.
        zero_point: of 8-bit weights; ZERO_POINT in the source.
    """

    name: str
    needs: frozenset[str]
    bf16_needs: frozenset[str]
    flags: tuple[str, ...]
    side_by_side: int
    zero_point: int


_AVX2 = frozenset({"avx2", "fma", "bmi1", "popcnt"})

INSTRUCTION_SETS = (
    InstructionSet(
        "AVX512-VNNI",
        _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"},
        frozenset({"avx512_bf16"}),
        flags=(),
        side_by_side=4,
        zero_point=128,
    ),
    InstructionSet(
        "AVX-VNNI",
        _AVX2 | {"avx_vnni"},
        frozenset(),
        flags=("-DDOVETAIL_AVX2", "-DDOVETAIL_AVX_VNNI"),
        side_by_side=4,
        zero_point=128,
    ),
    InstructionSet(
        "AVX2",
        _AVX2,
        frozenset(),
        flags=("-DDOVETAIL_AVX2",),
        side_by_side=2,
        zero_point=0,
    ),
)
"""The best first."""


def sets_of(flags: Set[str]) -> list[InstructionSet]:
    """The sets of a CPU with these abilities, the best first."""
    return [each for each in INSTRUCTION_SETS if each.needs <= flags]


def cpu_flags() -> set[str]:
    """What the CPU can do, in Linux's names; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
