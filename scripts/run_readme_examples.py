"""Run every Python block of README.md, in order and in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def main() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    if not blocks:
        raise SystemExit("README.md has no Python example")
    namespace: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks, start=1):
        print(f"README example {number} of {len(blocks)}", flush=True)
        exec(compile(block, f"README.md example {number}", "exec"), namespace)


if __name__ == "__main__":
    main()
