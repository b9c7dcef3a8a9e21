"""The flow has one direction: a module imports only from lower layers (DESIGN section 2)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hf_dovetail"
LAYERS = (
    ("config", "tree", "register", "recipe"),
    ("accept", "cache", "attention", "engines", "weights"),
    ("modeling", "probe"),
    ("draft", "target"),
    ("decode",),
    ("plugin",),
    ("train",),
    ("demo",),
    ("cli",),
)
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}
LAZY = {"__init__", "register"}  # they name modules of higher layers inside functions or for type checkers only


def imports(tree: ast.AST) -> set[str]:
    """The package's modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            path = (node.module or "").removeprefix("hf_dovetail").strip(".")
            if node.level == 1 or (node.module or "").split(".")[0] == "hf_dovetail":
                found |= {path.split(".")[0]} if path else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hf_dovetail.")}
    return found & {path.stem for path in PACKAGE.glob("*.py")}


@pytest.mark.parametrize(
    "module", sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__"))
)
def test_a_module_imports_from_lower_layers_only(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    assert module in RANK, f"give {module} a layer in this test and in the documentation"
    if module in LAZY:
        tree = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    for other in imports(tree):
        assert RANK[other] < RANK[module], f"{module} imports {other}"


def test_the_import_finder_sees_imports() -> None:
    """The test above proves something: it finds the imports that are there, of each form."""
    plugin = ast.parse((PACKAGE / "plugin.py").read_text(encoding="utf-8"))
    assert {"decode", "draft", "modeling", "target"} <= imports(plugin)
    assert imports(ast.parse("from . import tree\nimport hf_dovetail.cache\nfrom hf_dovetail.accept import walk")) == {
        "tree",
        "cache",
        "accept",
    }
