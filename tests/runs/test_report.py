"""Pages are one file that needs no other, say what they were given, and let no name become markup."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import small_experiment
from matplotlib.figure import Figure

from mmlens.experiments.experiment import Findings
from mmlens.runs.report import Section, part, write_findings_report, write_page
from mmlens.runs.run import write_findings
from mmlens.viz.head_map import plot_head_map

HOSTILE = '<script>alert("x")</script>&<b>'

RECORD: dict[str, Any] = {
    "model": {"name": "micro", "n_parameters": 2416640},
    "request": {"seed": 12345, "modes": ["mean", "zero"], "limit": None},
    "experiment": {"method": "The method."},
    "versions": {"torch": "2.13.0"},
}


def value(mean: float, width: float = 0.012) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + width, "n": 400}


class Page(HTMLParser):
    """What a browser would load, and the text that it would show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def report_of(folder: Path, record: dict[str, Any] = RECORD, **found: Any) -> Path:
    """The page of a run that found this."""
    findings = Findings(**{"statement": "The top heads carry it.", "numbers": {"n": 1}} | found)
    write_findings(findings, folder)
    return write_findings_report(folder, small_experiment.EXPERIMENT, findings, record)


def figures_of(*titles: str) -> list[tuple[str, str, Figure]]:
    return [(title, f"about {title}", plot_head_map(np.eye(n + 2))) for n, title in enumerate(titles)]


def test_it_says_what_was_found_with_intervals(tmp_path: Path) -> None:
    numbers = {
        "objects": {"accuracy": value(0.9712), "logit_difference": value(7.314, 0.2)},
        "nested": {"a": {"b": 1.5}},
        "spearman": {"objects - frames": 0.8123},
        "top": [[3, 1], [5, 2]],
        "none": None,
        "holds": True,
    }
    page = Page(report_of(tmp_path, numbers=numbers))
    assert not page.open  # every tag is closed
    for said in (
        "The top heads carry it.",
        small_experiment.EXPERIMENT.question,
        "The method.",
        "12345",
        "2,416,640",
        "mean, zero",
        "nested.a.b",
        "2.13.0",
        "objects.accuracy",
        "97.1%",
        "[95.9%, 98.3%]",
        "7.31",
        "[7.11, 7.51]",
        "spearman.objects - frames",
        "0.8123",
        "[3, 1], [5, 2]",
        "yes",
        "\N{EN DASH}",
    ):
        assert said in page.text, said
    assert "limit" not in page.text


def test_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    tables = {"t": ("", pd.DataFrame({"a": [1]}))}
    path = report_of(tmp_path, figures=figures_of("Map"), tables=tables)
    page = Page(path)
    assert page.count("link") == page.count("script") == page.count("iframe") == 0
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:image/")), (tag, name, target[:60])
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)
    # The inlined picture itself names no other file either.
    svg = base64.b64decode(re.search(r"svg\+xml;base64,([^\"]+)", text)[1]).decode()  # type: ignore[index]
    assert all(link.startswith(("#", "data:")) for link in re.findall(r"href=\"([^\"]*)\"", svg))


def test_every_figure_and_table_is_there_and_in_the_contents(tmp_path: Path) -> None:
    titles = ("Figure 0", "Figure 1", "Figure 2")
    long = pd.DataFrame({"head": range(100), "score": np.linspace(0, 1, 100)})
    tables = {"short": ("few rows", pd.DataFrame({"score": [0.123456]})), "long": ("many rows", long)}
    page = Page(report_of(tmp_path, figures=figures_of(*titles), tables=tables))
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == list(titles)
    for title in (*titles, "Short", "Long"):
        assert page.text.count(f"{title} ") == 2 + (title in titles)  # a caption says it too
    assert "0.1235" in page.text and "100 rows" in page.text and page.count("details") == 1
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    targets = [a["href"] for tag, a in page.tags if tag == "a"]
    assert targets and {f"#{anchor}" for anchor in anchors} == set(targets)


def test_a_long_table_can_be_cut(tmp_path: Path) -> None:
    table = pd.DataFrame({"head": [f"L0H{n}" for n in range(100)]})
    sections: list[Section] = [("Table", part("table", "Heads.", table, 30), [])]
    page = Page(write_page(tmp_path / "page.html", "Title", "", "", sections))
    assert "Heads. (The first 30 of 100 rows.)" in page.text and page.count("details") == 0
    assert "L0H29" in page.text and "L0H30" not in page.text


def test_names_never_become_markup(tmp_path: Path) -> None:
    record = RECORD | {
        "model": {"name": HOSTILE},
        "request": {HOSTILE: HOSTILE},
        "versions": {"torch": HOSTILE},
    }
    hostile = pd.DataFrame({HOSTILE: [HOSTILE, "{{ 1 + 1 }}"]})
    numbers = {HOSTILE: {HOSTILE: value(0.5)}, "list": [HOSTILE, [HOSTILE, {HOSTILE: HOSTILE}]]}
    page = Page(
        report_of(
            tmp_path,
            record,
            statement=HOSTILE,
            numbers=numbers,
            tables={"table": (HOSTILE, hostile)},
            figures=[(HOSTILE, HOSTILE, Figure())],
        )
    )
    assert page.count("script") == page.count("b") == 0
    assert page.text.count(HOSTILE) >= 12
    assert "{{ 1 + 1 }}" in page.text


def test_large_figures_become_pixels_and_the_file_stays_small(tmp_path: Path) -> None:
    figure = Figure(figsize=(8, 8))
    noise = np.random.default_rng(0).random((900, 900, 3))
    figure.subplots().imshow(noise)
    path = report_of(tmp_path, figures=[("Noise", "", figure)])
    assert "data:image/webp;" in path.read_text(encoding="utf-8")
    assert path.stat().st_size < 2_000_000


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    one, two = (report_of(tmp_path / name, figures=figures_of("Map")).read_bytes() for name in ("one", "two"))
    assert one == two
