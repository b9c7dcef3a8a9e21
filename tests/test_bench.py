"""The bench command on a small widened pair: its rows, its JSON, comparison, plots, and bad input."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_dovetail import DovetailAssistantModel, cli, threads
from hf_dovetail.bench import llamacpp, machine, parts, run, widen
from hf_dovetail.bench.command import add_bench_parser
from hf_dovetail.bench.files import check_can_write
from hf_dovetail.bench.prompts import prompt_set, prompt_sets
from hf_dovetail.bench.report import compare, load, ratios, table, warnings
from hf_dovetail.demo import pair_path

# Configurations without head_dim, most of them without num_key_value_heads: type, values, bytes of one position's cache
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
OTHERS = {
    "qwen2": ("qwen2", _GROUPED, 2 * 2 * 2 * 8 * 4),
    "phi3": ("phi3", _GROUPED, 2 * 2 * 2 * 8 * 4),
    "olmo2": ("olmo2", _GROUPED, 2 * 2 * 2 * 8 * 4),
    "gpt2": ("gpt2", _GPT2, 2 * 2 * 32 * 4),
    "gpt-neox": ("gpt_neox", _SIZES, 2 * 2 * 32 * 4),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, 2 * 2 * 32 * 4),
}


def other_model(name: str, vocab_size: int = tiny.VOCAB) -> PreTrainedModel:
    """A tiny random model of `OTHERS`."""
    model_type, values, _ = OTHERS[name]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **values, **tokens, vocab_size=vocab_size), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Qwen2, a GPT-2 and a Bloom with the shipped tokenizer, and a new draft for each: "qwen2", "qwen2-draft", ..."""
    tokenizer, found = AutoTokenizer.from_pretrained(pair_path("target")), {}
    for name in ("qwen2", "gpt2", "bloom"):
        found[name], found[f"{name}-draft"] = (tmp_path_factory.mktemp(name) / part for part in ("target", "draft"))
        model = other_model(name, len(tokenizer))
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
        DovetailAssistantModel.from_target(model).save_pretrained(found[f"{name}-draft"])
    return found


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


@pytest.mark.parametrize("name", list(OTHERS))
def test_the_parts_of_models_of_other_families(name: str) -> None:
    model = other_model(name)
    assert getattr(model.config, "head_dim", None) is None
    costs = parts.verify_ms(model, tiny.prompt(), 1)
    assert list(costs) == list(parts.ROWS)
    shapes = parts.weight_shapes(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and (p is head or id(p) not in embeddings)]
    weights = sum(matrix.nbytes for matrix in matrices)
    assert parts.read_bytes(model, shapes, 0) == weights
    assert parts.read_bytes(model, shapes, 300) == weights + 300 * OTHERS[name][2]


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bloom"])
def test_a_target_of_another_family(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**20)
    out, pair = tmp_path / "x.json", ("--target", str(folders[name]), "--draft", str(folders[f"{name}-draft"]))
    words = ("--dtype", "float32", "--new-tokens", "4", "--repeats", "1", "--cycles", "1", "--prompts-per-set", "1")
    words += ("--prompts", "easy", "--engines", "eager", "--rows", "dovetail-fixed", "--out", str(out))
    with pytest.raises(ValueError, match=r"widening knows LlamaForCausalLM only.*--widen none"):
        bench(*pair, *words)
    assert not out.exists()
    bench(*pair, *words, "--widen", "none")
    result = load(str(out))
    assert result["complete"]
    assert not result["skipped"]
    assert result["engines"]["eager"]["percent_of_ceiling"] > 0
    assert {row["row"]: row["identical_to_plain"] for row in result["rows"]} == {
        "plain": "1 of 1",
        "dovetail-fixed": "1 of 1",
    }


def test_verification_is_timed_with_the_threads_of_a_round(
    llama: PreTrainedModel, untrained: DovetailAssistantModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    torch.set_num_threads(3)
    seen: dict[str, set[int]] = {"target": set(), "draft": set()}
    llama.register_forward_hook(lambda *_: seen["target"].add(torch.get_num_threads()))
    parts.verify_ms(llama, tiny.prompt(), 1)
    assert seen["target"] == {2}
    text = tiny.prompt().repeat(1, 4)
    layers = [m for m in untrained.modules() if isinstance(m, torch.nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda *_: seen["draft"].add(torch.get_num_threads()))
    parts.draft_ms(untrained, llama, untrained.tree, text, 1)
    assert seen["draft"] == {2}
    assert torch.get_num_threads() == 3
    assert machine.record()["threads"] == 3 > machine.record()["target_threads"] == 2


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
        (["--prompts", "easy", "medium", "easy"], "prompts 'easy' and 'easy' would both be called 'easy'"),
        (["--out", "."], "--out is '.', a folder"),
        (["--out", f"{'x' * 300}.json"], r"--out is 'x+\.json', which cannot be written \(File name too long\)"),
        (["--widen", "none", "--rows", "dovetail-fixed", "dovetail-wide-draft-auto"], "no dovetail-wide-draft-auto;"),
        (["--widen", "none", "--rows", "assisted-5"], "no assisted-5; expected some of plain, dovetail-fixed"),
        (["--widen", "none", "--engines", "llama.cpp-Q8_0", "--rows", "lookup-8"], "expected some of plain, lookup-10"),
    ],
)
def test_bad_options(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.Run, "results", lambda self: pytest.fail("it measures"))
    with pytest.raises(ValueError, match=message):
        bench(*words)


def test_what_is_there_stays_when_a_file_is_refused_or_not(tmp_path: Path) -> None:
    old, link = tmp_path / "old.json", tmp_path / "link.json"
    old.write_text("mine")
    link.symlink_to(tmp_path / "not yet.json")
    for path in (old, link, tmp_path / "new.json"):
        check_can_write("--out", str(path))
    with pytest.raises(ValueError, match="there is no folder"):
        check_can_write("--out", str(tmp_path / "no" / "x.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"old.json", "link.json"}
    assert old.read_text() == "mine"


def test_a_plot_into_no_folder(result: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    for words in ((), ("show", str(path))):
        with pytest.raises(ValueError, match=r"--plot is '.*bars\.png', but there is no folder"):
            bench(*words, "--plot", str(tmp_path / "no" / "bars.png"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("option", "part"),
    [("--target", "qwen2"), ("--draft", "qwen2-draft"), ("--draft", "qwen2"), ("--assistant", "qwen2")],
)
def test_damaged_weights(option: str, part: str, folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    chosen = {"--target": folders["qwen2"], "--draft": folders["qwen2-draft"], "--assistant": folders["qwen2"]}
    damaged = tmp_path / "damaged"
    weights = shutil.copytree(folders[part], damaged) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = [word for name, folder in {**chosen, option: damaged}.items() for word in (name, str(folder))]
    assert cli.main(["bench", "--widen", "none", "--out", str(tmp_path / "x.json"), *words]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"hf-dovetail: .*{damaged}\S* (are|is) damaged \(.*\); copy or download (them|it) again\n", said
    )
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("no JSON", "is not JSON"), ("[1]", "not a result"), ('{"kind": "hf-dovetail bench", "format": 99}', "format 99")],
)
def test_files_that_are_no_results(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(str(path))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ((), "rows"),
        (("record",), "threads"),
        (("models", "target"), "bytes"),
        (("rows", 1), "decode_ms_per_token"),
        (("engines", "eager"), "one_token_ms"),
        (("engines", "eager", "verify_ms", "16"), "median"),
    ],
)
def test_results_that_lack_something(place: tuple, name: str, result: dict[str, Any], tmp_path: Path) -> None:
    path, damaged = tmp_path / "x.json", copy.deepcopy(result)
    path.write_text(json.dumps(damaged))
    assert load(str(path)) == result
    inner: Any = damaged
    for key in place:
        inner = inner[key]
    for broken in ("of another kind", None):
        inner[name] = broken
        if broken is None:
            del inner[name]
        path.write_text(json.dumps(damaged))
        where = ".".join(map(str, (*place, name))).replace(".1.", "[1].")
        for words in (["show", str(path)], ["compare", str(path), str(path)]):
            with pytest.raises(ValueError, match=f"{path} is damaged: it lacks {re.escape(where)},"):
                bench(*words)


def test_sets_of_prompts_have_names_of_their_own(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one/mine.txt", "two/mine.jsonl", "two/other.txt", "easy.txt")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"prompt": "def f"}\n')
    one, two, other, easy = map(str, paths)
    assert [group.name for group in prompt_sets(["easy", one, other])] == ["easy", "mine", "other"]
    for words in ([one, "medium", two], ["easy", easy], [one, one]):
        first, last = (re.escape(repr(word)) for word in (words[0], words[-1]))
        with pytest.raises(ValueError, match=f"prompts {first} and {last} would both be called"):
            bench("--prompts", *words)


def test_prompts_that_are_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("für".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1\.txt is not UTF-8 text"):
        prompt_set(str(path))
    path.write_bytes("für".encode())
    assert prompt_set(str(path)).prompts == ("für",)


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
