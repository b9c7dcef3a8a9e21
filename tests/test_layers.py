"""The flow has one direction: a module imports only from lower layers (DESIGN section 2)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_dovetail"
LAYERS = (
    (
        "config",
        "tree",
        "register",
        "recipe",
        "packed",
        "grouped",
        "threads",
        "sharing",
        "curves",
        "acceptance",
        "pauses",
        "depths",
        "rows",
        "lookup",
        "draws",
        "fingerprint",
        "devices",
        "eight_bits",
        "placement",
        "anatomy",
        "forwards",
        "names",
    ),
    (
        "accept",
        "worth",
        "experience",
        "cache",
        "attention",
        "dispatch",
        "blocks",
        "levels",
        "costs",
        "formats",
        "loading",
    ),
    ("weights", "recast", "probe", "controller", "stats", "prefill"),
    ("network", "target", "engines"),
    ("modeling", "steps"),
    ("graphs", "host", "learned", "prepare"),
    ("draft",),
    ("drafting",),
    ("decode",),
    ("plugin",),
    ("calibrate", "train", "convert"),
    ("demo",),
    ("bench", "calibrate_command", "doctor", "train_command"),
    ("cli",),
)
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}
LAZY = {"__init__", "register"}  # they name modules of higher layers inside functions or for type checkers only


MODULES = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
MODULES |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def files_of(module: str) -> list[Path]:
    """The files of a module, or of a package within the package."""
    folder = PACKAGE / module
    return sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]


def imports(tree: ast.AST, dots: int = 1) -> set[str]:
    """The package's modules that a module imports, anywhere in it; `dots` lead from it to the package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            path = (node.module or "").removeprefix("hf_dovetail").strip(".")
            if node.level == dots or (node.module or "").split(".")[0] == "hf_dovetail":
                found |= {path.split(".")[0]} if path else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hf_dovetail.")}
    return found & MODULES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_lower_layers_only(module: str) -> None:
    assert module in RANK, f"give {module} a layer in this test and in the documentation"
    for file in files_of(module):
        inside = file.parent != PACKAGE  # a package's files may import each other with one dot
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if module in LAZY:
            tree = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        for other in imports(tree, dots=2 if inside else 1):
            assert RANK[other] < RANK[module], f"{file.name} of {module} imports {other}"


@pytest.mark.parametrize("module", [*sorted(m for m in MODULES if RANK[m] < RANK["modeling"]), "modeling"])
def test_no_import_goes_in_a_circle_through_the_auto_classes(module: str) -> None:
    """Guards the registration: making a configuration's or AutoTokenizer's docstring, transformers imports the Auto
    classes, and so `modeling`; what `modeling` needs must not want the class that is being made.
    """
    allowed = {"PreTrainedConfig"} | ({"AutoConfig", "AutoModelForCausalLM"} if module == "modeling" else set())
    for file in files_of(module):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                found = {a.name for a in node.names if a.name.startswith("Auto") or a.name.endswith("Config")}
                assert found <= allowed, f"{file.name} of {module} imports {found}; import them where they are used"
                assert "models." not in node.module, f"{file.name} of {module} imports from {node.module}"


def test_the_import_finder_sees_imports() -> None:
    """The test above proves something: it finds the imports that are there, of each form."""
    plugin = ast.parse((PACKAGE / "plugin" / "__init__.py").read_text(encoding="utf-8"))
    assert {"decode", "drafting", "modeling", "target"} <= imports(plugin, dots=2)
    assert imports(ast.parse("from . import tree\nimport hf_dovetail.cache\nfrom hf_dovetail.accept import walk")) == {
        "tree",
        "cache",
        "accept",
    }


SCRIPTS = sorted(path for folder in ("benchmarks", "scripts", "examples") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_imports_from_the_package_is_there(script: Path) -> None:
    """Guards those that no test runs: a name that moved would be noticed by their next user."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_dovetail":
            for alias in node.names:
                exec(f"from {node.module} import {alias.name}", {})
