"""Pages that need nothing beside them, one HTML file each: that of one run, and what others are made of.

`write_page` writes a page; `part` makes the HTML that its sections hold. The markup is in page.html and parts.html.
"""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from mmlens.arguments import file_to_write, instance_of, number
from mmlens.experiments.experiment import Experiment, Findings
from mmlens.files import path_within, read_json, write_text_at_once
from mmlens.runs.record import RunError
from mmlens.viz.ablation_curves import SHARES
from mmlens.viz.pictures import inlined

Section = tuple[str, str, Sequence[tuple[str, str]]]
"""A heading, HTML as `part` makes it, and parts (title, HTML) with headings of their own."""

LARGEST_PICTURE = 600_000
"""Bytes of a picture in a page, base64 and all."""


@dataclass(frozen=True)
class Picture:
    """A figure among a run's files: `stem`.svg and `stem`.png, `width` inches wide."""

    title: str
    caption: str
    stem: Path
    width: float


def write_page(path: str | Path, title: str, subtitle: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write a page with contents, and return its path. What `part` did not make is text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_page(Path(folder) / "page.html", "A & B", "", "", [("Numbers", part("pairs", {"n": 1}), [])])
    ...     "A &amp; B" in page.read_text(encoding="utf-8")
    True
    """
    path = file_to_write("path", path)
    page = _template("page.html").render(title=title, subtitle=subtitle, lead=lead, sections=sections)
    write_text_at_once(path, page)
    return path


def part(name: str, *values: Any) -> Markup:
    """HTML by one of the macros of parts.html.

    >>> print(part("statement", "1 < 2").splitlines()[1])
    <p class="statement">1 &lt; 2</p>
    """
    html: Markup = getattr(_template("parts.html").module, name)(*values)
    return html


@functools.cache
def _template(name: str) -> Template:
    templates = Environment(
        loader=PackageLoader("mmlens.runs", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"flat": _flat, "html_table": _html_table}
    return templates.get_template(name)


def write_findings_report(
    folder: Path, experiment: Experiment, findings: Findings, record: Mapping[str, Any]
) -> Path:
    """Write a self-contained report.html: what was found, the published numbers, figures, tables, the record.

    Pictures are taken from the folder, to which the findings have been written.
    """
    model = record.get("model")
    name = model["name"] if model else ", ".join(record["models"])
    sections: list[Section] = [
        ("Question", part("question", experiment), []),
        ("Figures", "", figure_parts(folder, LARGEST_PICTURE)),
        ("Tables", "", table_parts(findings)),
        ("Numbers", part("pairs", findings.numbers), []),
        ("What was run", record_part(record), []),
    ]
    shown = [section for section in sections if section[1] or section[2]]
    lead = part("statement", findings.statement)
    return write_page(folder / "report.html", experiment.title, name, lead, shown)


def figure_parts(folder: Path, largest: int) -> list[tuple[str, Markup]]:
    """Title and HTML of every figure of a folder, each in at most `largest` bytes where that can be."""
    return [(picture.title, picture_part(picture, largest)) for picture in pictures_of(folder)]


def picture_part(picture: Picture, largest: int = LARGEST_PICTURE) -> Markup:
    """A picture and its caption."""
    source = inlined(picture.stem, largest)
    return part("picture", picture.title, picture.caption, source, picture.width)


def table_parts(findings: Findings, most: int | None = None) -> list[tuple[str, Markup]]:
    """Heading and HTML of every table, with at most so many rows."""
    return [
        (title_of(name), part("table", caption, table, most))
        for name, (caption, table) in findings.tables.items()
    ]


def record_part(record: Mapping[str, Any]) -> Markup:
    """A run's method, settings, model, data, versions and machine."""
    data = {
        name: {key: inner for key, inner in value.items() if key != "ids"}
        if isinstance(value, Mapping)
        else value
        for name, value in record.get("data", {}).items()
    }
    asked = record.get("request", {})
    columns = {
        "Settings": {name: value for name, value in asked.items() if value not in (None, {}, "")},
        "Model": record.get("model", {}),
        "Data": data,
        "Versions": record["versions"],
        "Machine": record.get("machine", {}),
    }
    return part("record", record.get("experiment", {}).get("method", ""), columns)


def pictures_of(folder: Path) -> list[Picture]:
    """The figures that a folder's findings.json names; RunError where what it says of them is wrong."""
    path = folder / "findings.json"
    words = read_json(path, RunError)
    try:
        return [
            Picture(
                instance_of("title", given["title"], str, "a text"),
                instance_of("caption", given["caption"], str, "a text"),
                _stem(folder, given["file"]),
                number("width", given["width"], above=0, most=1000),
            )
            for given in words["figures"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{str(path)!r} does not hold a run's findings: {error}") from error


def _stem(folder: Path, name: object) -> Path:
    """Where the files of a picture lie, but for their suffix; both inside the folder, symbolic links followed."""
    for suffix in (".svg", ".png"):
        path_within(folder, f"{name}{suffix}" if isinstance(name, str) else name, "a figure's file")
    return folder / str(name)


def title_of(name: str) -> str:
    """A table's name as a heading.

    >>> title_of("head_scores")
    'Head scores'
    """
    words = name.replace("_", " ").replace("-", " ")
    return words[:1].upper() + words[1:]


# ---------------------------------------------------------------------- values


def _html_table(table: pd.DataFrame) -> Markup:
    plain = isinstance(table.index, pd.RangeIndex)
    with pd.option_context("display.max_colwidth", None):
        return Markup(table.to_html(index=not plain, border=0, float_format=_number, na_rep="", escape=True))


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Markup]]:
    """Names and values as HTML, a dict within as names with a dot."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and not _is_interval(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value(value, str(key))


def _is_interval(value: object) -> bool:
    return isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value)


def _value(value: Any, metric: str) -> Markup:
    """HTML of {mean, low, high} with its interval, or of anything else as it is."""
    if _is_interval(value):
        amounts = (_amount(value[name], metric) for name in ("mean", "low", "high"))
        return Markup('{} <span class="interval">[{}, {}]</span>').format(*amounts)
    if isinstance(value, list | tuple):
        items = ((isinstance(item, list | tuple), _value(item, metric)) for item in value)
        return Markup(", ").join(Markup("[{}]").format(text) if nested else text for nested, text in items)
    if isinstance(value, Mapping):
        return Markup("; ").join(
            Markup("{}: {}").format(key, _value(item, str(key))) for key, item in value.items()
        )
    return Markup.escape(_text(value, metric))


def _text(value: Any, metric: str) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return (
            f"{int(value):,}"
            if abs(int(value)) >= 10_000 and not re.search("seed", metric)
            else str(int(value))
        )
    return _number(float(value)) if isinstance(value, numbers.Real) else str(value)


def _amount(value: float | None, metric: str) -> str:
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return f"{100 * value:.1f}%" if metric in SHARES else f"{value:.2f}"


def _number(value: Any) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
