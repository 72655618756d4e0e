"""The page of one run of an experiment, and its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mmlens.arguments import instance_of, number
from mmlens.experiments.experiment import Experiment, Findings
from mmlens.files import path_within, read_json
from mmlens.runs.record import RunError
from mmlens.viz.report import Section, pairs_html, picture_html, table_html, write_page

LARGEST_PICTURE = 600_000
"""Bytes of a picture in a page, base64 and all."""


@dataclass(frozen=True)
class Picture:
    """A figure among a run's files: `stem`.svg and `stem`.png, `width` inches wide."""

    title: str
    caption: str
    stem: Path
    width: float


def write_findings_report(
    folder: Path, experiment: Experiment, findings: Findings, record: Mapping[str, Any]
) -> Path:
    """Write a self-contained report.html: what was found, the published numbers, figures, tables, the record.

    Pictures are taken from the folder, to which the findings have been written.
    """
    model = record.get("model")
    name = model["name"] if model else ", ".join(record["models"])
    sections: list[Section] = [("Question", question_html(experiment), [])]
    parts = pictures_html(folder, LARGEST_PICTURE)
    if parts:
        sections.append(("Figures", "", parts))
    if findings.tables:
        parts = [
            (title_of(table), table_html(caption, frame))
            for table, (caption, frame) in findings.tables.items()
        ]
        sections.append(("Tables", "", parts))
    sections.append(("Numbers", pairs_html(findings.numbers), []))
    sections.append(("What was run", record_html(record), []))
    return write_page(
        folder / "report.html", experiment.title, name, statement_html(findings.statement), sections
    )


def pictures_html(folder: Path, largest: int) -> list[tuple[str, str]]:
    """Title and HTML of every figure of a folder, each in at most `largest` bytes where that can be."""
    return [
        (picture.title, picture_html(picture.title, picture.caption, picture.stem, picture.width, largest))
        for picture in pictures_of(folder)
    ]


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


def statement_html(statement: str) -> str:
    """What was found, in its box."""
    return f'<div class="finding open">\n<p class="statement">{escape(statement)}</p>\n</div>'


def question_html(experiment: Experiment) -> str:
    """What an experiment asks, where it is from, and the numbers that its source gives."""
    html = (
        f"<p>{escape(experiment.question)}</p>\n<p class='caption'>Source: {escape(experiment.source)}.</p>"
    )
    if experiment.published is not None:
        html += f"\n<h3>Published</h3>\n{table_html('Numbers that the source gives.', experiment.published)}"
    return html


def record_html(record: Mapping[str, Any]) -> str:
    """A run's method, settings, model, data, versions and machine."""
    method = f"<p>{escape(record['experiment']['method'])}</p>" if "experiment" in record else ""
    columns = {
        "Settings": {
            name: value for name, value in record.get("request", {}).items() if value not in (None, {}, "")
        },
        "Model": record.get("model", {}),
        "Data": _without_ids(record.get("data", {})),
        "Versions": record["versions"],
        "Machine": record.get("machine", {}),
    }
    shown = "".join(
        f"<div><h3>{name}</h3>{pairs_html(values)}</div>" for name, values in columns.items() if values
    )
    return f'{method}<div class="columns">{shown}</div>'


def _without_ids(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: inner for key, inner in value.items() if key != "ids"}
        if isinstance(value, Mapping)
        else value
        for name, value in data.items()
    }
