"""The native kernels: the bits of integer arithmetic, any number of threads, and what happens without a compiler."""

import ctypes
import hashlib
import multiprocessing
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch

from hf_dovetail import prepare_target
from hf_dovetail.curves import MAX_ROWS
from hf_dovetail.engines import compiler, int4, int8, native, onednn
from hf_dovetail.engines.best import best as best_of
from hf_dovetail.engines.exact import exact_attention
from hf_dovetail.engines.instructions import INSTRUCTION_SETS, InstructionSet
from hf_dovetail.engines.quantised import QuantisedKernel
from hf_dovetail.levels import likeliest
from hf_dovetail.packed import PackedWeight

SHAPES = ((3, 5), (33, 70), (100, 172), (512, 192), (1100, 1024), (64, 2112), (64, 8192))
available = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
onednn_adds_exactly = pytest.mark.skipif(not int8._adds_exactly(), reason="oneDNN's 8-bit sums overflow on this CPU")
has_bf16 = pytest.mark.skipif(not native.multiplies_bf16(), reason="no native products of bfloat16 here")
has_compiler = pytest.mark.skipif("no C compiler" in str(native.why_not()), reason="no C compiler")


def quantised(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    return levels, torch.rand(shape[0], generator=generator) / 1000


def kernels_of(model: torch.nn.Module) -> set[type]:
    kernels = [p.kernel for p in model.parameters() if isinstance(p, PackedWeight)]
    return {type(kernel.matrix._packed) for kernel in kernels if not kernel.lossless}


@has_compiler
@pytest.mark.skipif(not native.sets_of(native.cpu_flags()), reason="this CPU cannot run the kernels")
def test_the_kernels_compile_where_they_can_run() -> None:
    """Else the tests of the kernels would be left out, and nobody would notice."""
    assert native.why_not() is None


@available
@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bit_products_are_integer_arithmetic(shape: tuple[int, int]) -> None:
    levels, scales = quantised(shape)
    packed, rows = native.NativeInt8(levels, scales), torch.randn(70, shape[1])
    activations, magnitudes = int8.quantise(rows)
    sums = (activations.long() - 128) @ levels.long().T
    assert torch.equal(packed.product(rows), sums.float() * scales * magnitudes)
    assert torch.equal(packed.levels(), levels)


@available
@has_bf16
@pytest.mark.parametrize("shape", [(64, 32), (70, 96), (101, 32), (512, 192), (1100, 1024), (64, 2112), (64, 8192)])
def test_products_in_bf16_are_right_and_rows_are_alone(shape: tuple[int, int]) -> None:
    """Guards every number of rows, blocks that are not full, biases, several threads, and rows that overflow."""
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    weight, rows, bias = (torch.randn(*size, generator=generator) for size in (shape, (MAX_ROWS, inputs), (outputs,)))
    weight, rows, bias = (weight / inputs**0.5).bfloat16(), rows.bfloat16(), bias.bfloat16()
    kernel = onednn.pack(weight)
    assert isinstance(kernel._native, native.NativeBf16)
    found = kernel._native.product(rows, bias)
    exact = rows.double() @ weight.double().T + bias.double()
    unit = torch.finfo(torch.bfloat16).eps * exact.abs()  # twice what rounding once may cost
    assert bool(((found.double() - exact).abs() <= unit / 2 + 1e-5 * inputs**0.5).all())
    assert not torch.equal(found, kernel._native.product(rows, None))
    rows[-1] = float("nan")
    for count in range(1, MAX_ROWS):
        assert torch.equal(kernel._native.product(rows[:count], bias), found[:count]), f"{count} rows"
        assert torch.equal(kernel.linear(rows[None, -count - 1 : -1], bias)[0], found[-count - 1 : -1]), f"last {count}"
    assert bool(kernel._native.product(rows[-2:], bias)[1].isnan().all())
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(kernel._native.product(rows[:-1], bias), found[:-1])
    finally:
        torch.set_num_threads(before)
    many = rows[:-1].repeat(4, 1)  # in more than one go
    assert torch.equal(kernel._native.product(many, bias), found[:-1].repeat(4, 1))
    apart = rows.repeat(1, 2)[:-1, :inputs]
    assert not apart.is_contiguous()
    assert torch.equal(kernel._native.product(apart, bias), found[:-1])


@available
@onednn_adds_exactly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bit_products_have_onednns_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    levels, scales = quantised(shape)
    ours, theirs = native.NativeInt8(levels, scales), int8.OneDnnInt8(levels, scales)
    rows = torch.randn(200, shape[1]).mul(torch.logspace(-32, 8, 200)[:, None]).to(dtype)
    rows[3] = 0
    found = ours.product(rows)
    assert torch.equal(found, theirs.product(rows))
    assert torch.equal(found[:13], ours.product(rows[:13]))
    assert found.unique().numel() > shape[0]
    assert torch.equal(ours.product(rows.repeat(1, 2)[:, ::2]), theirs.product(rows.repeat(1, 2)[:, ::2]))


@available
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bit_weights_are_read_as_they_were_packed(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = -(-shape[1] // native.GROUP)
    levels = torch.randint(0, 16, (shape[0], groups, native.GROUP), dtype=torch.uint8, generator=generator)
    least = torch.randn(shape[0], groups, generator=generator).bfloat16()
    step = torch.rand(shape[0], groups, generator=generator).bfloat16()
    packed, rows = native.NativeInt4(levels, least, step, shape[1]), torch.randn(40, shape[1])
    weight = (levels * step[..., None].float() + least[..., None].float()).flatten(1)[:, : shape[1]]
    assert torch.equal(packed.dense(), weight)
    activations, magnitudes = int8.quantise(rows)
    expected = ((activations.double() - 128) / 127 * magnitudes.double()) @ weight.double().T
    torch.testing.assert_close(
        packed.product(rows).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


def test_four_bit_ranges_are_clipped_where_it_pays() -> None:
    weight = torch.randn(64, 4 * native.GROUP + 7, generator=torch.Generator().manual_seed(0))
    weight[5], weight[6, : native.GROUP] = 0, 0.75
    weight[7] *= 1e30

    def error(kept: tuple[float, ...]) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(int4, "_KEPT_RANGES", kept)
            levels, least, step = int4.quantise(weight)
        assert (step > 0).all()
        found = (levels * step[..., None].float() + least[..., None].float()).flatten(1)[:, : weight.shape[1]]
        return (found - weight)[:7].square().sum(1)

    searched, whole = error(int4._KEPT_RANGES), error((1.0,))
    assert (searched <= whole).all()
    assert searched.sum() < 0.95 * whole.sum()
    assert searched[5] == 0
    assert whole.sum() < 0.01 * weight[:7].square().sum()
    assert all(
        each.isfinite().all() for each in int4.quantise(torch.full((2, 40), 3e38).mul(torch.randn(40).sign()))[1:]
    )


@available
def test_threads_do_not_change_a_bit_and_do_not_meet() -> None:
    levels, scales = quantised((1100, 1024))
    packed, rows = native.NativeInt8(levels, scales), torch.randn(8, 70, 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = [packed.product(each) for each in rows]
        torch.set_num_threads(3)
        assert all(torch.equal(packed.product(each), one) for each, one in zip(rows, expected, strict=True))
    finally:
        torch.set_num_threads(before)
    found: dict[int, list[torch.Tensor]] = {}

    def work(index: int) -> None:
        found[index] = [packed.product(rows[index]) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(rows))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(each, expected[index]) for index, results in found.items() for each in results)


@available
def test_stored_bytes_are_what_a_product_reads() -> None:
    outputs, inputs = (64, 32), 320
    for matrix, scales in ((int8.Int8Matrix(native.NativeInt8), 4), (int8.Int8Matrix(), 4), (int4.Int4Matrix(), 0)):
        kernels = [QuantisedKernel("weight", torch.randn(each, inputs), matrix) for each in outputs]
        share = 5 / 8 if isinstance(matrix, int4.Int4Matrix) else 1
        assert [each.stored_bytes for each in kernels] == [each * (inputs * share + scales) for each in outputs]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An empty cache, and no library loaded before or kept afterwards."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native._load.cache_clear()
    yield monkeypatch
    native._load.cache_clear()


def _not_there(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("PATH", str(folder))


def _chosen_not_there(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CC", "no-such-compiler -O2")


def _fails(patch: pytest.MonkeyPatch, folder: Path) -> None:
    script = folder / "cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "cannot find crt1.o" >&2\nexit 3\n')
    script.chmod(0o755)
    patch.setenv("CC", str(script))


def _old_cpu(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(native, "cpu_flags", lambda: {"sse4_2", "avx"})


def _nowhere_to_write(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "hf_dovetail").write_text("in the way")
    patch.setattr(tempfile, "tempdir", str(folder / "missing"))


def _results() -> list[torch.Tensor]:
    """Of one kernel of each kind, by the library that is loaded."""
    generator = torch.Generator().manual_seed(0)
    levels, scales = quantised((100, 172))
    rows, weight = torch.randn(13, 172, generator=generator), torch.randn(100, 172, generator=generator)
    query, key, value = (torch.randn(1, n, 19, 80, generator=generator) for n in (4, 2, 2))
    seen = torch.rand(1, 1, 19, 19, generator=generator) > 0.3
    attended = [
        exact_attention(None, *(each.to(dtype) for each in (query, key, value)), seen)[0]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    products = [native.NativeInt8(levels, scales), native.NativeInt4(*int4.quantise(weight), 172)]
    found = [each.product(rows.to(dtype)) for each in products for dtype in (torch.float32, torch.bfloat16)]
    return [*found, *attended, best_of(rows, 5)[0]]


@available
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS, ids=lambda each: each.name)
def test_all_instruction_sets_give_the_same_bits(instructions: InstructionSet, fresh: pytest.MonkeyPatch) -> None:
    """So that a lesser set is tested on a CPU that has a better one."""
    if not instructions.needs <= native.cpu_flags():
        pytest.skip(f"this CPU has no {instructions.name}")
    expected = _results()
    fresh.setattr(native, "cpu_flags", lambda: set(instructions.needs))
    native._load.cache_clear()
    found = _results()
    assert native.instruction_set() is instructions
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(not torch.equal(each[..., :1, :], each[..., 1:2, :]) for each in found)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_not_there, "no C compiler: none of cc, gcc, clang"),
        (_chosen_not_there, "no C compiler: .CC is 'no-such-compiler'"),
        (_old_cpu, "no AVX2 .missing: avx2, bmi1, fma, popcnt"),
        pytest.param(_fails, "failed .*status 3.*crt1", marks=has_compiler),
        pytest.param(_nowhere_to_write, "neither from .*native nor from .*set HF_HOME or TMPDIR", marks=has_compiler),
    ],
)
def test_without_the_kernels_int8_goes_on_and_int4_says_why(
    break_it, message: str, fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, ids = tiny.build("llama"), tiny.prompt(9)
    break_it(fresh, tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare_target(model, engine="int4")
    reason = int8.why_not(model)
    if reason is not None:
        assert re.search(message, reason)
        pytest.skip(reason)
    prepare_target(model, engine="int8")
    assert kernels_of(model) == {int8.OneDnnInt8}
    found = model(ids).logits
    fresh.undo()
    native._load.cache_clear()
    if native.why_not() is None and int8._native_why_not() is None:
        other = prepare_target(tiny.build("llama"), engine="int8")
        assert kernels_of(other) == {native.NativeInt8}
        assert torch.equal(other(ids).logits, found)


@pytest.mark.parametrize("without", ["a compiler", "AVX2"])
def test_a_refusal_of_int8_says_what_each_kernel_lacks(without: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards users of a CPU that has no VNNI against buying one where a compiler would do."""
    model, flags = tiny.build("llama"), native.cpu_flags() - {"amx_int8"}
    fresh.setattr(native, "cpu_flags", lambda: flags)
    (_not_there if without == "a compiler" else _old_cpu)(fresh, tmp_path)
    expected = native.why_not()
    assert expected is not None
    assert ("install gcc or clang" in expected) == (without == "a compiler" and "avx2" in flags)
    fresh.setattr(int8, "_adds_exactly", lambda: False)
    refusal = int8.why_not(model)
    assert refusal.startswith(f"{expected}; without the native kernel: this CPU has no VNNI instructions")
    with pytest.raises(ValueError, match=re.escape(refusal)):
        prepare_target(model, engine="int8")
    fresh.setattr(int8, "_adds_exactly", lambda: True)
    assert int8.why_not(model) is None


@pytest.fixture
def source(fresh: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of a library that is quick to compile, and of several pages."""
    path = tmp_path / "answer.c"
    path.write_text("int parts[1 << 16] = {41, [65535] = 1}; int answer(void) { return parts[0] + parts[65535]; }")
    return path


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Where libraries are kept."""
    return tmp_path / "hf_dovetail" / "native"


def _compile(source: Path, gate: object, results: object) -> None:
    gate.wait()
    results.put(compiler.library((source,), ("-O0", "-shared", "-fPIC")).answer())


def _answers(source: Path, processes: int) -> list[int]:
    """Of processes that ask at the same time and share nothing but the cache; none may crash."""
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=_compile, args=(source, gate, results)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * processes
    return [results.get(timeout=60) for _ in workers]


@has_compiler
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: whole[: len(whole) // 2], id="half"),
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: b"no library" * 999, id="garbage"),
        pytest.param(lambda whole: whole[:9999] + bytes([whole[9999] ^ 1]) + whole[10000:], id="one bit"),
        pytest.param(lambda whole: whole[: -hashlib.sha256().digest_size], id="no digest"),
        pytest.param(lambda whole: compiler._with_digest(b"no library"), id="whole, but cannot be loaded"),
    ],
)
def test_a_damaged_library_is_compiled_again(damage: Callable[[bytes], bytes], source: Path, kept: Path) -> None:
    """Guards against the signal that ends a process which loads half a library."""
    assert _answers(source, 1) == [42]
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    assert _answers(source, 2) == [42] * 2
    assert list(kept.iterdir()) == [path]
    assert path.read_bytes() == whole
    before = path.stat()
    assert _answers(source, 1) == [42]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@available
@has_compiler
def test_without_a_cache_the_kernels_are_of_this_process(fresh: pytest.MonkeyPatch, tmp_path: Path, kept: Path) -> None:
    temporary, warned = tmp_path / "temporary", []
    temporary.mkdir()
    kept.parent.write_text("in the way")
    fresh.setattr(tempfile, "tempdir", str(temporary))
    fresh.setattr(compiler.logger, "warning_once", warned.append)
    assert native.why_not() is None
    (levels, scales), rows = quantised((33, 70)), torch.randn(5, 70)
    activations, magnitudes = int8.quantise(rows)
    sums = (activations.long() - 128) @ levels.long().T
    assert torch.equal(native.NativeInt8(levels, scales).product(rows), sums.float() * scales * magnitudes)
    assert [str(kept) in message and "set HF_HOME" in message for message in warned] == [True]
    assert kept.parent.read_text() == "in the way"
    assert list(temporary.iterdir()) == []


@has_compiler
def test_where_the_cache_may_not_be_loaded_from(source: Path, kept: Path, fresh: pytest.MonkeyPatch) -> None:
    """Guards homes on file systems that are mounted `noexec`."""
    load, refused = ctypes.CDLL, []

    def refuse(path: str) -> ctypes.CDLL:
        if Path(path).parent == kept:
            refused.append(path)
            raise OSError("failed to map segment from shared object")
        return load(path)

    fresh.setattr(compiler.ctypes, "CDLL", refuse)
    fresh.setattr(compiler.logger, "warning_once", lambda message: None)
    for times in (1, 3):  # the second process finds a file, tries it, and compiles one more
        assert compiler.library((source,), ("-O0", "-shared", "-fPIC")).answer() == 42
        assert len(refused) == times
    assert len(list(kept.iterdir())) == 1


@has_compiler
def test_processes_that_compile_at_once_all_get_the_library(source: Path, kept: Path) -> None:
    source.write_text("int answer(void) { return 42; }")
    assert _answers(source, 4) == [42] * 4
    (path,) = kept.iterdir()  # nothing partial is left
    before = path.stat().st_mtime_ns
    compiler.library((source,), ("-O0", "-shared", "-fPIC"))
    assert path.stat().st_mtime_ns == before
    source.write_text("int answer(void) { return 43; }")
    assert compiler.library((source,), ("-O0", "-shared", "-fPIC")).answer() == 43
    assert len(list(kept.iterdir())) == 2
    source.write_text("int answer(void) { return }")
    with pytest.raises(compiler.CompileError, match="expected expression"):
        compiler.library((source,), ("-O0", "-shared", "-fPIC"))


@available
def test_no_second_openmp_library_is_loaded() -> None:
    levels, scales = quantised((1100, 1024))
    native.NativeInt8(levels, scales).product(torch.randn(16, 1024))
    maps = Path(f"/proc/{os.getpid()}/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}) == 1


@available
@pytest.mark.parametrize(
    ("rows", "width", "count"), [(1, 1, 1), (3, 5, 5), (10, 4096, 10), (2, 1000, 7), (9, 32003, 10)]
)
def test_the_likeliest_are_those_of_torch(rows: int, width: int, count: int) -> None:
    logits = 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    logits[:, width // 2] = -torch.inf
    (found, places), (expected, best) = best_of(logits, count), likeliest(logits, count)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(places[expected.isfinite()], best[expected.isfinite()])
    strided = torch.cat((logits, logits), dim=1)[:, :width]
    assert all(map(torch.equal, best_of(strided, count), (found, places)))


@available
def test_the_likeliest_of_ties_and_of_what_overflowed() -> None:
    """Different tokens whatever the numbers are: a tree with one token twice under a parent would be wrong."""
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[1.0, 2, 2, 2, 0], [-inf] * 5, [nan] * 5, [1, nan, 3, 2, 0], [1, inf, 3, inf, 0]])
    found, places = best_of(logits, 3)
    assert places[0].tolist() == [1, 2, 3]
    assert found[0, 0] == found[0, 1] == found[0, 2] == pytest.approx(float(logits[0].log_softmax(0)[1]))
    assert all(len(set(row.tolist())) == 3 and min(row) >= 0 and max(row) < 5 for row in places)
    assert torch.equal(found[1:], torch.full((4, 3), -inf))
    assert torch.equal(likeliest(logits, 3)[0][1:], found[1:])
