"""The command line among other commands."""

import subprocess
import sys

import pytest

from hf_dovetail import cli


def test_a_reader_that_leaves_ends_it_without_a_word() -> None:
    """As in `hf-dovetail doctor | head -1`."""
    with subprocess.Popen(
        [sys.executable, "-m", "hf_dovetail.cli", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        complaint = process.stderr.read()
    assert process.returncode == 141
    assert complaint == ""


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """Of a data loader, say, while somebody does read."""

    def broken(arguments: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_demo", broken)
    assert cli.main(["demo"]) == 2
    assert capfd.readouterr().err == "hf-dovetail: [Errno 32] Broken pipe\n"
