"""Public functions name their arguments by one vocabulary, which docs/design.md lists."""

from __future__ import annotations

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import mmlens

PAGE = Path(__file__).parents[1] / "docs" / "design.md"
ROOMS = (
    "data", "model", "interventions", "metrics", "scores", "effects", "attribution", "hybrid", "viz", "experiments",
)  # fmt: skip


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of docs/design.md, without its head."""
    section = PAGE.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def public_functions() -> Iterator[tuple[str, inspect.Signature]]:
    """Functions, public methods and constructors of all that the rooms export, but those of results."""
    for room in ROOMS:
        for name, value in vars(import_module(f"mmlens.{room}")).items():
            if name.startswith("_") or not getattr(value, "__module__", "").startswith(f"mmlens.{room}."):
                continue
            if inspect.isfunction(value):
                yield f"{room}.{name}", inspect.signature(value)
            elif inspect.isclass(value) and not dataclasses.is_dataclass(value):
                for own, method in vars(value).items():
                    function = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
                    if inspect.isfunction(function) and (own == "__init__" or not own.startswith("_")):
                        yield f"{room}.{name}.{own}", inspect.signature(function)


def arguments() -> dict[str, dict[str, set[str]]]:
    """{argument: {annotation: the functions that have it so}}, of all public functions."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, signature in public_functions():
        for argument in signature.parameters.values():
            if argument.name not in ("self", "cls"):
                found[argument.name][str(argument.annotation).replace(" | ", " or ")].add(name)
    return found


def test_arguments_of_several_rooms_are_in_the_vocabulary() -> None:
    known, found = {row[0].strip("`") for row in table("Arguments")}, arguments()
    shared = {
        name for name, of in found.items() if len({f.split(".")[0] for f in set.union(*of.values())}) > 1
    }
    assert shared == known, (
        f"not listed: {sorted(shared - known)}; listed, not shared: {sorted(known - shared)}"
    )


def test_an_argument_of_the_vocabulary_has_the_types_that_are_listed() -> None:
    found = arguments()
    for name, types, _meaning in table("Arguments"):
        of = found[name.strip("`")]
        assert {each.strip(" `") for each in types.split(";")} == set(of), (name, dict(of))


def test_words_that_another_one_replaced_are_no_arguments() -> None:
    replaced = {word.strip(" `") for row in table("Words not used") for word in row[0].split(",")}
    assert replaced and not sorted(replaced & set(arguments()))


def test_the_front_door_is_about_thirty_names() -> None:
    names = {name for name in dir(mmlens) if not name.startswith("_")} - {
        "Any",
        "TYPE_CHECKING",
        "annotations",
    }
    names = {name for name in names if not inspect.ismodule(getattr(mmlens, name))}
    assert 25 <= len(names) <= 35, sorted(names)


def test_a_name_that_is_not_at_the_front_door_is_told_where_it_is() -> None:
    with pytest.raises(
        AttributeError, match=r"no attribute 'patch_heads'; it is mmlens\.effects\.patch_heads$"
    ):
        _ = mmlens.patch_heads
    with pytest.raises(AttributeError, match=r"no attribute 'no_such_name'$"):
        _ = mmlens.no_such_name
    assert not hasattr(mmlens, "__path_of_none__")
