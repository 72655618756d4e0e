"""The report is one file that needs no other, says what it was given, and lets no name become markup."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mmlens.viz.head_map import plot_head_map
from mmlens.viz.report import write_report

HOSTILE = '<script>alert("x")</script>&<b>'


def value(mean: float, width: float = 0.012) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + width, "n": 400}


@pytest.fixture
def summary() -> dict[str, Any]:
    arms = {"clean": 0.981, "top": 0.297, "layer_matched": 0.836, "random": 0.881, "bottom": 0.978}
    rows = [{"mode": mode, **{arm: value(mean) for arm, mean in arms.items()}} for mode in ("mean", "zero")]
    return {
        "model": {
            "name": "micro",
            "family": "qwen3_vl",
            "n_layers": 8,
            "n_heads": 8,
            "n_parameters": 2416640,
        },
        "settings": {"seed": 12345, "modes": ["mean", "zero"], "limit": None, "nested": {"a": {"b": 1.5}}},
        "versions": {"torch": "2.13.0"},
        "finding": {"statement": "The top heads carry it.", "holds": True, "rows": rows},
        "clean": {"objects": {"accuracy": value(0.9712), "logit_difference": value(7.314, 0.2)}},
        "spearman": {"objects - frames": 0.8123},
        "heads": {"top": [[3, 1], [5, 2]]},
    }


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


def test_it_says_what_was_found_with_intervals(tmp_path: Path, summary: dict[str, Any]) -> None:
    page = Page(write_report(tmp_path / "report.html", summary))
    assert not page.open  # every tag is closed
    for said in (
        "The finding holds",
        "The top heads carry it.",
        "29.7%",
        "[28.5%, 30.9%]",
        "over 400 examples",
        "8 layers of 8 heads (64 heads), 2,416,640 parameters",
        "12345",
        "mean, zero",
        "nested.a.b",
        "2.13.0",
        "97.1%",
        "7.31",
        "[7.11, 7.51]",
        "spearman.objects - frames",
        "0.8123",
        "[3, 1], [5, 2]",
    ):
        assert said in page.text, said


def test_a_finding_that_fails_is_not_sold(tmp_path: Path, summary: dict[str, Any]) -> None:
    summary["finding"]["holds"] = False
    assert "The finding does not hold" in Page(write_report(tmp_path / "r.html", summary)).text
    summary["finding"]["rows"][0]["holds"] = True
    assert "holds in some modes of ablation only" in Page(write_report(tmp_path / "r.html", summary)).text


def test_nothing_is_loaded_from_outside(tmp_path: Path, summary: dict[str, Any]) -> None:
    figures = [("Map", "caption", plot_head_map(np.eye(4)))]
    path = write_report(tmp_path / "report.html", summary, figures, [("T", "", pd.DataFrame({"a": [1]}))])
    page = Page(path)
    assert page.count("link") == page.count("script") == page.count("iframe") == 0
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:image/")), (tag, name, target[:60])
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    # The inlined picture itself names no other file either.
    svg = base64.b64decode(re.search(r"svg\+xml;base64,([^\"]+)", text)[1]).decode()  # type: ignore[index]
    assert all(link.startswith(("#", "data:")) for link in re.findall(r"href=\"([^\"]*)\"", svg))


def test_every_figure_and_table_is_there_and_in_the_contents(tmp_path: Path, summary: dict[str, Any]) -> None:
    figures = [(f"Figure {n}", f"about {n}", plot_head_map(np.eye(n + 2))) for n in range(3)]
    long = pd.DataFrame({"head": range(100), "score": np.linspace(0, 1, 100)})
    tables = [("Short", "few rows", pd.DataFrame({"score": [0.123456]})), ("Long", "many rows", long)]
    page = Page(write_report(tmp_path / "report.html", summary, figures, tables))
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == ["Figure 0", "Figure 1", "Figure 2"]
    for title in ("Figure 0", "Figure 1", "Figure 2", "Short", "Long"):
        assert page.text.count(title) == 2
    assert "0.1235" in page.text and "100 rows" in page.text and page.count("details") == 1
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    targets = [a["href"] for tag, a in page.tags if tag == "a"]
    assert targets and {f"#{anchor}" for anchor in anchors} == set(targets)


def test_names_never_become_markup(tmp_path: Path, summary: dict[str, Any]) -> None:
    summary["model"]["name"] = summary["finding"]["statement"] = summary["settings"][HOSTILE] = HOSTILE
    summary["finding"]["rows"][0]["mode"] = summary["versions"]["torch"] = HOSTILE
    summary["clean"][HOSTILE] = {HOSTILE: value(0.5)}
    summary[HOSTILE] = [HOSTILE, {HOSTILE: HOSTILE}]
    hostile = pd.DataFrame({HOSTILE: [HOSTILE, "$style"]})
    path = write_report(
        tmp_path / "r.html", summary, [(HOSTILE, HOSTILE, Figure())], [(HOSTILE, HOSTILE, hostile)]
    )
    page = Page(path)
    assert page.count("script") == page.count("b") == 0
    assert page.text.count(HOSTILE) >= 12
    assert "$style" in page.text


def test_large_figures_become_pixels_and_the_file_stays_small(
    tmp_path: Path, summary: dict[str, Any]
) -> None:
    figure = Figure(figsize=(8, 8))
    noise = np.random.default_rng(0).random((900, 900, 3))
    figure.subplots().imshow(noise)
    path = write_report(tmp_path / "report.html", summary, [("Noise", "", figure)])
    assert re.search("data:image/(png|jpeg);", path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 2_000_000


def test_the_same_input_gives_the_same_file(tmp_path: Path, summary: dict[str, Any]) -> None:
    one, two = (
        write_report(tmp_path / name, summary, [("Map", "", plot_head_map(np.eye(3)))]).read_bytes()
        for name in ("one.html", "two.html")
    )
    assert one == two


def test_bad_input_is_refused(tmp_path: Path, summary: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lacks \['clean'\]"):
        write_report(tmp_path / "r.html", {key: part for key, part in summary.items() if key != "clean"})
    del summary["finding"]["rows"]
    with pytest.raises(ValueError, match=r"finding lacks \['rows'\]"):
        write_report(tmp_path / "r.html", summary)
    summary["finding"]["rows"] = []
    with pytest.raises(TypeError, match="Figure"):
        write_report(tmp_path / "r.html", summary, [("a", "b", "c")])  # type: ignore[list-item]
    assert not (tmp_path / "r.html").exists()
