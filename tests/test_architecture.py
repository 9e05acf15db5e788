"""The layout: which modules may import which; and the size of files and functions."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dwf_cluster"

LEVELS = (
    {"settings", "determinism"},
    {"models", "data", "store"},
    {"attacks"},
    {"evaluation", "defences"},
    {"experiment", "presets", "training"},
    {"plan", "api"},
    {"cluster"},
    {"pipeline"},
    {"console"},
    {"launch", "status"},
    {"__main__"},
)
"""Folders and modules of the package, the lowest first. A module imports its own level and those below."""

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_TOP_LEVEL_MODULES = 8

SOURCES = sorted(path for folder in ("dwf_cluster", "analysis") for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_name(path): path for path in SOURCES}


def _imports(path: Path, everywhere: bool = True) -> Iterator[str]:
    """Modules of the package and the analysis that a file imports, `if TYPE_CHECKING` left out.

    Args:
        path: of the file.
        everywhere: also inside functions; else only when the file is imported.
    """
    tree = ast.parse(path.read_text())
    for node in _nodes(tree, everywhere):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in ("dwf_cluster", "analysis", "torch", "ray"):
                yield name if name in MODULES or "." not in name else name.rpartition(".")[0]


def _nodes(tree: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_for_types or (not everywhere and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        yield node
        yield from _nodes(node, everywhere)


def _level(module: str) -> int | None:
    """The level of a module; None for the package itself, which imports lazily."""
    parts = module.split(".")
    if len(parts) < 2:
        return None
    return next(number for number, names in enumerate(LEVELS) if parts[1] in names)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(PACKAGE)], ids=_name)
def test_a_module_imports_its_own_level_and_those_below(path: Path) -> None:
    level = _level(_name(path))
    for imported in set(_imports(path)):
        assert not imported.startswith("analysis") or _name(path) == "dwf_cluster.__main__"
        if level is not None and imported.startswith("dwf_cluster."):
            above = _level(imported)
            assert above is None or above <= level, f"{_name(path)} imports {imported}"


def test_computing_modules_never_import_the_experiment() -> None:
    for name, path in MODULES.items():
        if name.split(".")[:2][-1] in ("data", "models", "attacks", "defences", "evaluation", "training", "store"):
            assert "dwf_cluster.experiment" not in set(_imports(path)), name


def test_registries_settings_and_packages_import_no_torch() -> None:
    names = [
        n for n, p in MODULES.items() if n.startswith("dwf_cluster") and p.stem in ("registry", "settings", "__init__")
    ]
    program = f"import sys, importlib; [importlib.import_module(n) for n in {names}]; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"


def test_the_pipeline_and_modules_below_it_never_import_the_console() -> None:
    console = next(number for number, names in enumerate(LEVELS) if "console" in names)
    for name, path in MODULES.items():
        level = _level(name) if name.startswith("dwf_cluster") else None
        if level is not None and level < console:
            assert not any(imported.startswith("dwf_cluster.console") for imported in _imports(path)), name


def test_no_two_modules_import_each_other() -> None:
    """Neither directly nor through others, when they are imported."""
    graph = {name: set(_imports(path, everywhere=False)) & set(MODULES) - {name} for name, path in MODULES.items()}
    finished: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        assert name not in chain, " -> ".join([*chain, name])
        if name not in finished:
            for imported in graph[name]:
                visit(imported, (*chain, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


def test_no_module_is_named_like_an_installed_library() -> None:
    names = {path.stem for path in SOURCES} - {"__init__", "__main__"}
    standard = set(sys.stdlib_module_names)
    libraries = ("ray", "torch", "torchvision", "submitit", "fsspec", "s3fs", "pyarrow", "pandas", "rich", "pydantic")
    assert not names & {*libraries, "slurm", "evaluate"}
    assert not {path.stem for path in PACKAGE.glob("*.py")} & standard - {"__init__"}
    assert all(importlib.util.find_spec(name) for name in libraries)


def test_the_top_level_has_few_modules() -> None:
    modules = [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert len(modules) <= MAX_TOP_LEVEL_MODULES, modules


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_and_functions_are_short_unless_the_docstring_gives_a_reason(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length, reason = (node.end_lineno or 0) - node.lineno + 1, ast.get_docstring(node) or ""
            assert length <= MAX_FUNCTION_LINES or "long because" in reason, f"{node.name} has {length} lines"
