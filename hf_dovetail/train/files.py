"""Files that are there whole or not at all, and folders that know which run they belong to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError


def write_whole(path: Path, write: Callable[[Path], object], what: str, state: PartialState | None = None) -> None:
    """Write a file or a folder under a temporary name, then give it its own; what was there before is replaced.

    Args:
        path: its name when it is whole.
        write: writes it to the name that it is given.
        what: it is, for the error.
        state: if all processes write it together; one of them renames it then.

    Raises:
        OSError: if it cannot be written (a full disk, say); what `path` held before is intact.
    """
    fresh, leads, wait = path.with_name(f"{path.name}.new"), state is None or state.is_main_process, lambda: None
    if state is not None:
        wait = state.wait_for_everyone
    if leads:
        _remove(fresh)
    wait()
    try:
        with naming(path, what):
            write(fresh)
            wait()
            if leads:
                _replace(fresh, path)
    except OSError:
        if leads:
            _remove(fresh)
        raise
    wait()


@contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """An error of writing, whichever library raises it, names what could not be written, and where.

    Raises:
        OSError: with what was wrong, the free space, and what to do.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        free = shutil.disk_usage(path.parent).free / 2**30
        raise OSError(
            f"could not write {what} to {path} ({error}; {free:.1f} GiB are free there); what was finished before is "
            "intact, so free some space and run the same command again"
        ) from error


def _replace(fresh: Path, path: Path) -> None:
    old = path.with_name(f"{path.name}.old")
    if path.is_dir():
        _remove(old)
        path.rename(old)
    fresh.replace(path)
    _remove(old)


def whole(path: Path) -> Path | None:
    """`path` if it is there, or what a kill between the two renamings of `write_whole` left of a folder."""
    old = path.with_name(f"{path.name}.old")
    return path if path.exists() else old if old.exists() else None


def check_facts(facts: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder that belongs to another run.

    Raises:
        ValueError: naming what differs, with both values.
    """
    for name, value in json.loads(json.dumps(facts)).items():
        if found.get(name) != value:
            what, theirs, ours = _differing(name, found.get(name), value)
            raise ValueError(
                f"{folder} belongs to another run: its {what} is {theirs}, this run's is {ours}; choose another "
                "folder, or delete this one"
            )


def _differing(name: str, found: Any, wanted: Any) -> tuple[str, Any, Any]:
    """The first part in which a fact differs: its name, and both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for part in (*wanted, *found):
            if found.get(part) != wanted.get(part):
                return _differing(f"{name}.{part}", found.get(part), wanted.get(part))
    return name, found, wanted


def read_facts(path: Path, needed: Collection[str] = ()) -> dict[str, Any]:
    """What a run wrote about itself.

    Args:
        path: of the file. needed: what it must say.

    Raises:
        OSError: if the file is damaged.
    """
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        missing = [name for name in needed if name not in found]
        if missing:
            raise ValueError(f"it does not say {', '.join(missing)}")
        return found
    except (ValueError, TypeError) as error:
        raise OSError(f"{path} is damaged ({error}); delete {path.parent} and make it again") from error


def remove(path: Path) -> None:
    """Delete what `write_whole` wrote, and what a kill left of it."""
    for name in (path.name, f"{path.name}.new", f"{path.name}.old"):
        _remove(path.with_name(name))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
