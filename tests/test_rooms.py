"""How the package is laid out: rooms import downwards, classes and functions stay small, no name is taken twice.

What is known to stand in the way is listed here, and may only get shorter: an entry that is no longer needed fails.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import mmlens

PACKAGE = Path(mmlens.__file__).parent
DESIGN = PACKAGE.parent / "docs" / "design.md"

ROOMS = [
    "errors",
    "arguments",
    "files",
    "interrupts",
    "internals",
    "hook_names",
    "heads",
    "head_scores",
    "boxes",
    "token_map",
    "statistics",
    "families",
    "data",
    "model",
    "provenance",
    "interventions",
    "metrics",
    "scores",
    "effects",
    "attribution",
    "hybrid",
    "viz",
    "experiments",
    "runs",
    "cli",
    "shipped",
]
"""Each imports only from those before it."""

UPWARDS: dict[tuple[str, str], str] = {}
"""(module, what it imports): why it may."""

LARGEST_CLASS, LARGEST_FUNCTION = 350, 80
LARGE_CLASSES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
"""Without a comment `# long: why` above them."""

MODULES = {
    ".".join(("mmlens", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """The modules of the package that are imported anywhere in this one, also for annotations alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "mmlens")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            if node.module is not None and node.module.split(".")[0] == "mmlens":
                for name in node.names:
                    whole = f"{node.module}.{name.name}"
                    yield whole if whole in MODULES else node.module


def upwards() -> set[tuple[str, str]]:
    """(module, what it imports) wherever that lies in a later room, or is the front door."""
    found = set()
    for module, path in MODULES.items():
        if module == "mmlens":
            continue
        place = ROOMS.index(module.split(".")[1])
        for other in imported(module, ast.parse(path.read_text())):
            if other == "mmlens" or ROOMS.index(other.split(".")[1]) > place:
                found.add((module, other))
    return found


def test_every_room_is_in_the_list_and_the_design_has_the_same_list() -> None:
    assert {name.split(".")[1] for name in MODULES if name != "mmlens"} == set(ROOMS)
    tree = DESIGN.read_text().split("```\nmmlens/\n")[1].split("```")[0]
    named = [re.match(r"  (\w+/?(?:, \w+/?)*)", line) for line in tree.splitlines()]
    shown = [name.strip("/ ") for match in named if match for name in match[1].split(",")]
    assert shown == ROOMS


def test_rooms_import_downwards_only() -> None:
    found = upwards()
    assert found - set(UPWARDS) == set()
    assert set(UPWARDS) - found == set(), "no longer so: take it out of the list"
    assert all(UPWARDS.values())


def definitions() -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef, int, str]]:
    """(name, definition, lines from its first decorator to its end, of a function without its docstring, the line
    above)."""

    def inside(node: ast.AST, prefix: str, lines: list[str]) -> Iterator[tuple[str, ast.AST, int, str]]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{prefix}.{child.name}"
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                last, text = child.end_lineno or first, child.body[0]
                if not isinstance(child, ast.ClassDef) and ast.get_docstring(child) is not None:
                    last -= (text.end_lineno or 0) - text.lineno + 1
                yield name, child, last - first + 1, lines[first - 2] if first > 1 else ""
            yield from inside(child, name, lines)

    for module, path in MODULES.items():
        text = path.read_text()
        yield from inside(ast.parse(text), module, text.splitlines())  # type: ignore[misc]


def test_no_class_is_large_and_no_function_long_without_a_reason() -> None:
    classes, functions = set(), set()
    for name, node, n_lines, above in definitions():
        if isinstance(node, ast.ClassDef):
            if n_lines > LARGEST_CLASS:
                classes.add(name)
        elif n_lines > LARGEST_FUNCTION and not re.match(r"\s*# long: \w", above):
            functions.add(name)
    assert classes - LARGE_CLASSES == set()
    assert functions - LONG_FUNCTIONS == set()
    assert LARGE_CLASSES - classes == set(), "no longer so: take it out of the list"
    assert LONG_FUNCTIONS - functions == set(), "no longer so: take it out of the list"


PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py"]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_package_exports_a_name_that_one_of_its_modules_has(name: str) -> None:
    """`import mmlens.x.y as m` is the module, and `mmlens.x.y` too, whatever else has been imported."""
    package = importlib.import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    for module in modules:
        importlib.import_module(f"{name}.{module}")
        assert isinstance(getattr(package, module), ModuleType), module
    exported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.ImportFrom) and node.module != name
        for alias in node.names
    }
    assert exported & modules == set()
