"""Files that a measurement ends in: refused before it, if they could not be written after it."""

from __future__ import annotations

import os
from pathlib import Path


def check_can_write(option: str, path: str) -> None:
    """Try to open a file for writing; what it holds stays as it is.

    Args:
        option: how the name was given, such as `--out`. path: the file.

    Raises:
        ValueError: if it is a folder, in no folder, or not to be written.
    """
    file = Path(path)
    if os.path.isdir(path):
        raise ValueError(f"{option} is {path!r}, a folder; expected the name of a file")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{option} is {path!r}, but there is no folder {file.parent}; make it, or choose another")
    existed = os.path.exists(path)
    try:
        file.open("a").close()
    except OSError as error:
        raise ValueError(f"{option} is {path!r}, which cannot be written ({error.strerror}); choose another") from error
    if not existed:
        file.resolve().unlink()  # of a link, what it points to
