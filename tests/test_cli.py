"""The command line among other commands."""

import subprocess
import sys


def test_a_reader_that_leaves_ends_it_without_a_word() -> None:
    """As in `hf-dovetail doctor | head -1`."""
    with subprocess.Popen(
        [sys.executable, "-m", "hf_dovetail.cli", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        complaint = process.stderr.read()
    assert process.returncode == 141
    assert complaint == ""
