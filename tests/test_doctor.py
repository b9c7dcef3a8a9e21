"""`hf-dovetail doctor` says what the parts say of themselves, here and on lesser machines."""

import pytest

from hf_dovetail import fingerprint
from hf_dovetail.cli import main
from hf_dovetail.engines import native
from hf_dovetail.threads import chosen_threads


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split("  ", maxsplit=1) for line in lines)


def test_what_there_is_and_what_is_in_the_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {name: text.strip() for name, text in findings(capsys).items()}
    assert f"{chosen_threads()} threads" in found["CPU"]
    assert found["engines, float32"].startswith("onednn")
    if native.why_not() is None:
        assert found["native kernels"].startswith(f"compiled for {native.instruction_set().name}")
        assert "int4" in found["engines, bfloat16"].split(";")[0]
    monkeypatch.setattr(native, "cpu_flags", lambda: {"sse4_2"})
    native._load.cache_clear()
    try:
        lesser = findings(capsys)
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
    text = "\n".join(lesser.values())
    assert "none: this CPU has no AVX2" in text
    assert "not int4: this CPU has no AVX2" in text


@pytest.mark.parametrize(
    ("version", "tested"), [("5.17.0", True), ("5.24.3", True), ("5.9.2", False), ("6.0.0", False)]
)
def test_transformers_that_no_test_has_run_with(
    version: str, tested: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "versions", lambda: {"transformers": version})
    assert (f"not tested with transformers {version}" in findings(capsys)["versions"]) is not tested


def test_this_transformers_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not tested" not in findings(capsys)["versions"]
