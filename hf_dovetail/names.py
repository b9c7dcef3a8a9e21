"""What a model is called on the command line: a folder, or a name on the Hub."""

from __future__ import annotations

import os
import sys


def existing(option: str, name: str) -> str:
    """The name, if a model may be there.

    A path that does not exist is refused here, since the Hub would only say that it is no repository's name. Of what
    may be a repository's, stderr says that it is looked for there.

    Args:
        option: how the name was given, such as `--target`.
        name: a folder, or a name on the Hub.

    Raises:
        ValueError: if it is the path of nothing, or of a file.
    """
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise ValueError(f"{option}: {name} is a file; expected a model's folder, or its name on the Hub")
    parts = name.split("/")
    if len(parts) > 2 or not all(parts) or name[0] in ".~" or "\\" in name:
        raise ValueError(f"{option}: there is no folder {name}; expected a model's folder, or its name on the Hub")
    print(f"{option}: there is no folder {name} here; asking the Hub for a model of that name", file=sys.stderr)
    return name
