"""The examples and the command line, run as a user would run them: in a process of their own, offline."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dovetail.cli import main
from hf_dovetail.demo import pair_path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str, threads: int = 1) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_script_runs(script: str) -> None:
    done = run(str(EXAMPLES / script))
    assert done.returncode == 0, done.stderr
    assert "tokens per round" in done.stdout
    assert float(done.stdout.rsplit(" tokens per round", 1)[0].rsplit(maxsplit=1)[-1]) > 1.5, "nothing was accepted"


def test_notebook_runs() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": EXAMPLES}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "tokens_per_round" in printed
    assert "`- " in printed, "no tree was drawn"


def test_demo_reports_an_identical_answer() -> None:
    done = run("-m", "hf_dovetail.cli", "demo", "--max-new-tokens", "48", "--repeats", "1", threads=2)
    assert done.returncode == 0, done.stderr
    assert "identical output: yes, token for token (48 tokens)" in done.stdout
    for word in ("plain", "dovetail", "tokens per round", "draft", "verify", "on cpu", " *"):
        assert word in done.stdout


def test_demo_of_a_single_token() -> None:
    """Guards the drawing: the prefill's token can be the whole answer, without a round."""
    done = run("-m", "hf_dovetail.cli", "demo", "--max-new-tokens", "1", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "in 0 rounds" in done.stdout


def test_generate_streams_text(tmp_path: Path) -> None:
    paths = ("--target", str(pair_path("target")), "--draft", str(pair_path("draft")))
    done = run("-m", "hf_dovetail.cli", "generate", *paths, "--max-new-tokens", "16", "def add(a, b):\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def add(a, b):")
    assert "16 tokens" in done.stderr


def test_bad_use_ends_with_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "data.jsonl"
    broken.write_text(json.dumps({"text": "x = 1"}) + "\n{broken\n")
    short, pair = tmp_path / "short.txt", str(pair_path("target"))
    short.write_text("x = 1\n")
    bare, cut = tmp_path / "bare", tmp_path / "cut"
    for folder in (bare, cut):
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(pair_path("target") / name, folder)
    os.truncate(cut / "model.safetensors", 5_000)
    cases = [
        (("demo", "--repeats", "0"), "--repeats is 0"),
        (("demo", "--prompt", ""), "the prompt is empty"),
        (("generate", "--target", pair, "--draft", str(tmp_path), "x"), "holds no config.json"),
        (("generate", "--target", str(pair_path("draft")), "--draft", pair, "x"), "is a draft; give the model"),
        (("generate", "--target", "/no/such/folder", "--draft", pair, "x"), "there is no folder /no/such/folder"),
        (("calibrate", "--target", pair, "--draft", "../no/folder"), "--draft: there is no folder ../no/folder"),
        (("bench", "--target", "/no/such/folder", "--draft", pair), "--target: there is no folder /no/such/folder"),
        (("bench", "--target", pair, "--draft", pair, "--assistant", str(short)), "short.txt is a file; expected"),
        (("train", "--target", pair, "--data", str(short), "--out", str(tmp_path)), "at least one window of 256"),
        (("generate", "--target", str(bare), "--draft", str(pair_path("draft")), "x"), "bare holds no tokenizer that"),
        (("generate", "--target", str(cut), "--draft", str(pair_path("draft")), "x"), "the weights in"),
        (("capture", "--target", pair, "--out", str(tmp_path)), "give the training data with --data"),
        (("train", "--target", "/no", "--data", "x", "--out", str(pair_path("draft"))), "holds a finished draft"),
        (("train", "--target", str(pair_path("target")), "--data", str(broken), "--out", str(tmp_path)), "line 2"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    done = run("-m", "hf_dovetail.cli", *cases[-1][0])
    assert done.returncode == 2
    assert cases[-1][1] in done.stderr
    assert "Traceback" not in done.stderr
