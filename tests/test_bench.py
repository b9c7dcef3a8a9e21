"""The bench command on a small widened pair: its rows, its JSON, comparison, plots, and bad input."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hf_dovetail.bench import llamacpp, machine, run, widen
from hf_dovetail.bench.command import add_bench_parser
from hf_dovetail.bench.prompts import prompt_set
from hf_dovetail.bench.report import compare, load, ratios, table, warnings


def bench(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_bench_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["bench", *words])
    arguments.run(arguments)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on the pair, widened to about twice its size."""
    out = tmp_path_factory.mktemp("bench") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widen, "_SIZES", {"1B": (384, 9, 640)})
        patch.setattr(machine, "BUFFER_BYTES", 2**20)
        patch.setenv("HF_HOME", str(out.parent))
        bench(
            *("--dtype", "float32", "--new-tokens", "8", "--repeats", "1", "--cycles", "2", "--prompts-per-set", "1"),
            *("--engines", "eager", "llama.cpp-Q8_0", "--prompts", "medium", "hard", "--out", str(out)),
            *("--rows", "dovetail-fixed", "dovetail-auto", "dovetail-wide-draft-fixed", "assisted-5", "lookup-10"),
        )
    return load(str(out))


def rows_of(result: dict[str, Any], group: str = "medium", engine: str = "eager") -> dict[str, dict]:
    return {r["row"]: r for r in result["rows"] if (r["engine"], r["prompts"]) == (engine, group)}


def test_the_rows_of_a_run(result: dict[str, Any]) -> None:
    rows = rows_of(result)
    left_out = {entry["row"] for entry in result["skipped"]}
    wanted = {"plain", "dovetail-fixed", "dovetail-wide-draft-fixed", "assisted-5", "lookup-10"}
    assert wanted <= set(rows)
    assert "dovetail-auto" in set(rows) | left_out
    assert result["complete"]
    assert all(row["widened"] and row["tokens"] == 8 and len(row["samples_ms_per_token"]) == 2 for row in rows.values())
    assert all(row["identical_to_plain"] == "2 of 2" for row in rows.values())
    assert rows["plain"]["tokens_per_round"] == 1.0 < rows["dovetail-fixed"]["tokens_per_round"]
    assert rows["dovetail-fixed"]["rounds"] == rows["dovetail-wide-draft-fixed"]["rounds"]
    assert rows["assisted-5"]["tokens_per_round"] > 1.5
    assert rows["dovetail-fixed"]["nodes_per_round"] > 7
    assert "nodes_per_round" not in rows["plain"]
    hard = rows_of(result, "hard")
    assert hard["dovetail-fixed"]["identical_to_plain"] == "2 of 2"
    assert hard["dovetail-fixed"]["ms_per_token"] > 0


def test_what_is_measured_stays_when_a_run_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, out = run.prepare_target, tmp_path / "result.json"

    def stopped(target: Any, engine: str) -> Any:
        if engine == "onednn":
            raise KeyboardInterrupt
        return prepare(target, engine=engine)

    monkeypatch.setattr(run, "prepare_target", stopped)
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**20)
    with pytest.raises(KeyboardInterrupt):
        bench(
            *("--widen", "none", "--dtype", "float32", "--new-tokens", "4", "--repeats", "1", "--cycles", "1"),
            *("--prompts-per-set", "1", "--prompts", "medium", "--engines", "eager", "onednn", "--rows", "plain"),
            *("--out", str(out)),
        )
    result = load(str(out))
    assert not result["complete"]
    assert [row["engine"] for row in result["rows"]] == ["eager"]


def test_the_parts_and_the_ceiling(result: dict[str, Any]) -> None:
    eager, target = result["engines"]["eager"], result["models"]["target"]
    assert set(eager["verify_ms"]) == {"1", "2", "4", "8", "16", "17", "24", "32"}
    keys_and_values = 4 * 2 * 9 * 4 * 32 * 300
    assert eager["read_bytes_per_token"] - keys_and_values == pytest.approx(target["bytes"], rel=0.01)
    assert eager["percent_of_ceiling"] > 0
    assert set(result["draft_ms_per_round"]) == {"small", "wide"}
    assert result["record"]["threads"] == torch.get_num_threads()
    assert "widened to 1B" in table(result)


@pytest.mark.parametrize("disturbed", [0, 2])
def test_a_busy_machine_is_told(disturbed: int, result: dict[str, Any]) -> None:
    made_up = copy.deepcopy(result)
    dovetail = [row for row in made_up["rows"] if "nodes_per_round" in row]
    for row in dovetail:
        row["answers_on_shared_cores"] = disturbed
    told = f"warning: the cores were shared in {2 * len(dovetail)} of Dovetail's answers"
    assert (told in table(made_up)) == (disturbed > 0)
    assert all("answers_on_shared_cores" in row for row in result["rows"] if "nodes_per_round" in row)


def test_ratios_are_those_of_the_rows(result: dict[str, Any]) -> None:
    made_up = copy.deepcopy(result)
    speeds = {"plain": 12.0, "dovetail-fixed": 4.0, "assisted-5": 6.0, "lookup-10": 2.0}
    made_up["rows"] = [
        {**row, "decode_ms_per_token": speeds[row["row"]]}
        for row in result["rows"]
        if row["row"] in speeds and row["engine"] == "eager"
    ]
    found = ratios(made_up)
    assert found["medium eager: dovetail-fixed over plain"] == 3.0
    assert found["medium eager: dovetail-fixed over the best assisted"] == 1.5
    assert found["medium eager: dovetail-fixed over the best lookup"] == 0.5
    assert not [name for name in found if "llama" in name or "random" in name]


def test_comparing_warns_of_other_machines(result: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    assert warnings(result, result) == []
    other = copy.deepcopy(result)
    other["record"]["threads"] = 99
    for row in other["rows"]:
        row["decode_ms_per_token"] /= 2
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (result, other), strict=True):
        path.write_text(json.dumps(content))
    bench("compare", *map(str, paths))
    printed = capsys.readouterr().out
    assert "threads differs: 1 and 99" in printed
    plain = next(line for line in printed.splitlines() if line.startswith("eager          plain"))
    assert plain.split()[-1] == "2.00"
    assert "warning" not in compare(result, result)


def test_bars(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    bench("show", str(path), "--plot", str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_a_gguf_file_of_the_target_says_what_the_target_says(tmp_path: Path) -> None:
    small = tiny.build("llama")
    if llamacpp.why_not(small):
        pytest.skip(llamacpp.why_not(small))
    torch.manual_seed(0)
    target = widen.widen(
        small,
        hidden_size=64,
        num_hidden_layers=4,
        intermediate_size=64,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    ids = tiny.prompt()
    expected = target.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    model = llamacpp.LlamaCpp(llamacpp.write_files(target, tmp_path)["Q8_0"], 64)
    try:
        for _ in range(2):
            for row in llamacpp.ROW_NAMES:
                assert list(model.answer(row, ids, 8).tokens) == expected
    finally:
        model.close()


def test_llama_cpp_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "llama_cpp, gguf" in llamacpp.why_not(tiny.build("llama"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "dovetail-fast"], "--rows: unknown dovetail-fast; expected some of plain"),
        (["--engines", "cuda"], "--engines: unknown cuda; expected some of eager"),
        (["--prompts", "nothing.txt"], "prompts 'nothing.txt'"),
        (["--dtype", "int3"], "--dtype is 'int3'"),
        (["--new-tokens", "1"], "--new-tokens is 1; expected at least 2"),
        (["--cycles", "0"], "--cycles is 0"),
        (["--out", "no/such/folder/x.json"], "there is no folder"),
        (["--target", "somewhere"], "both --target and --draft"),
        (["--widen", "7B"], "--widen is '7B'"),
        (["--plot", "bars.xyz"], "bars.xyz"),
        (["--widen", "none", "--new-tokens", "4000"], "expected at least 1, and at most 1024 together"),
        (["compare", "no.json", "no.json"], "there is no file no.json"),
    ],
)
def test_bad_options(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(*words)


@pytest.mark.parametrize(
    ("content", "message"),
    [("no JSON", "is not JSON"), ("[1]", "not a result"), ('{"kind": "hf-dovetail bench", "format": 99}', "format 99")],
)
def test_files_that_are_no_results(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(str(path))


def test_prompts_from_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "def f"}\n\n{"text": "class A"}\n')
    assert prompt_set(str(path)).prompts == ("def f", "class A")
    path.write_text('{"prompt": "def f"}\n{"other": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        prompt_set(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match="empty prompt, or none"):
        prompt_set(str(path))


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"hf_dovetail\[plot\]"):
        bench("--plot", "bars.png")
