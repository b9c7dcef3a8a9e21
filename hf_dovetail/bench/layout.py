"""What a result must hold to be shown and compared, and what one lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_NUMBER = (int, float)
_EACH, _IF_ANY = "*", "?"
_LAYOUT: dict[str, Any] = {
    "record": {"cpu": object, "threads": int, "torch": str, "transformers": str, "commit": object, "date": object},
    "widened": object,
    "models": {"target": {"name": str, "parameters": _NUMBER, "bytes": _NUMBER, "dtype": str}},
    "settings": {"prompts": {}},
    "ceiling": {"read_gb_s": _NUMBER},
    "engines": {
        _EACH: {
            "one_token_ms": _NUMBER,
            "percent_of_ceiling": _NUMBER,
            f"verify_ms{_IF_ANY}": {_EACH: {"median": _NUMBER}},
        }
    },
    "draft_ms_per_round": {_EACH: {"median": _NUMBER}},
    "rows": [
        {
            "engine": str,
            "row": str,
            "prompts": str,
            "ms_per_token": _NUMBER,
            "decode_ms_per_token": _NUMBER,
            "tokens_per_round": _NUMBER,
            "identical_to_plain": str,
        }
    ],
    "skipped": [{"engine": str, "row": object, "prompts": object, "reason": str}],
}
"""Names and what stands there: a type, a dict of these names (`?`: if any) or of all (`*`), a list of one kind."""


def faults(result: dict[str, Any]) -> list[str]:
    """Where a result lacks something or holds another kind of value, such as `rows[0].engine`."""
    return list(_faults(result, _LAYOUT, ""))


def _faults(value: Any, layout: Any, place: str) -> Iterator[str]:
    if not isinstance(layout, (dict, list)):
        if not isinstance(value, layout):
            yield place
        return
    if not isinstance(value, type(layout)):
        yield place
    elif isinstance(layout, list):
        for number, entry in enumerate(value):
            yield from _faults(entry, layout[0], f"{place}[{number}]")
    elif _EACH in layout:
        for name, entry in value.items():
            yield from _faults(entry, layout[_EACH], f"{place}.{name}")
    else:
        for key, kind in layout.items():
            name = key.removesuffix(_IF_ANY)
            inner = f"{place}.{name}".removeprefix(".")
            if name in value:
                yield from _faults(value[name], kind, inner)
            elif name == key:
                yield inner
