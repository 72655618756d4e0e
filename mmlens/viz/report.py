"""Reports as one HTML file each that needs nothing beside it: no network, no folder of images.

`write_page` is the page of all of them, and the functions in `_html` are its parts. `write_report` is the page of
the core-heads experiment: what was found, in numbers with their intervals; then settings, figures, tables.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from mmlens.arguments import file_to_write, instance_of, listed
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.files import write_text_at_once
from mmlens.viz.ablation_curves import ARM_STYLES, METRIC_LABELS, SHARES

Section = tuple[str, str, Sequence[tuple[str, str]]]
"""A heading, HTML, and parts (title, HTML) with headings of their own."""

_SECTIONS = ("model", "settings", "versions", "finding", "clean")
_ARMS = ("clean", "top", "layer_matched", "random", "bottom")

_LARGEST_VECTOR = 500_000
"""Bytes of SVG above which a figure is written as pixels, twice as fine as its dpi."""

_LARGEST_PNG = 700_000
"""Bytes of PNG above which it is a photograph in all but name, and JPEG holds it in a tenth."""

_MARGIN = 0.05
"""Inches of white around a figure."""

_LONG_VALUE = 400
"""Characters above which a value among the settings is folded away."""

_LONG_TABLE = 40
"""Rows above which a table is folded away."""


def write_report(
    path: str | Path,
    summary: Mapping[str, Any],
    figures: Sequence[tuple[str, str, Figure]] = (),
    tables: Sequence[tuple[str, str, pd.DataFrame]] = (),
) -> Path:
    """Write a self-contained report.html and return its path.

    `summary` holds `model` (name, family, n_layers, n_heads, n_parameters), `settings`, `versions`, `finding`
    (statement, holds, rows: the metric by mode and arm) and `clean` (kind -> metric -> value); a value is
    {mean, low, high, n}. `finding` may name its `metric` (default accuracy). Whatever else these or the
    summary hold is printed as it comes. `figures` and `tables` are (title, caption, what) in the order in
    which they shall stand. Everything is escaped. Figures are inlined as SVG, large ones as pixels.

    Raises ValueError where a part of the summary is missing, TypeError where a figure or table is none.

    >>> value = {"mean": .9, "low": .8, "high": .95, "n": 50}
    >>> summary = {
    ...     "model": {"name": "micro"}, "settings": {"seed": 0}, "versions": {"torch": "2.13.0"},
    ...     "clean": {"pooled": {"accuracy": value}},
    ...     "finding": {"statement": "It holds.", "holds": True, "rows": [{"mode": "mean", "clean": value}]},
    ... }
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     "90.0%" in write_report(Path(folder) / "report.html", summary).read_text(encoding="utf-8")
    True
    """
    path = file_to_write("path", path)
    _check(summary, figures, tables)
    sections: list[Section] = [
        ("Setting", _setting(summary), []),
        ("Clean model", _clean(summary["clean"]), []),
        ("Figures", "", [(title, figure_html(title, caption, figure)) for title, caption, figure in figures]),
        ("Tables", "", [(title, table_html(caption, table)) for title, caption, table in tables]),
    ]
    others = {key: value for key, value in summary.items() if key not in _SECTIONS}
    if others:
        sections.append(("Further numbers", pairs_html(others), []))
    sections = [section for section in sections if section[1] or section[2]]

    return write_page(
        path,
        f"Retrieval heads of {summary['model'].get('name', 'an unnamed model')}",
        _describe(summary["model"]),
        _finding(summary["finding"]),
        sections,
    )


def write_page(path: str | Path, title: str, subtitle: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write a page with contents, and return its path; `lead` and what the sections hold is HTML, the rest text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_page(Path(folder) / "page.html", "A & B", "", "", [("Numbers", "<p>1</p>", [])])
    ...     "A &amp; B" in page.read_text(encoding="utf-8")
    True
    """
    contents, bodies = [], []
    for number, (heading, body, parts) in enumerate(sections):
        contents.append(f'<li><a href="#s{number}">{escape(heading)}</a></li>')
        bodies.append(f'<section id="s{number}">\n<h2>{escape(heading)}</h2>\n{body}')
        for inner, (part, html) in enumerate(parts):
            contents.append(f'<li class="inner"><a href="#s{number}-{inner}">{escape(part)}</a></li>')
            bodies.append(f'<section id="s{number}-{inner}">\n<h3>{escape(part)}</h3>\n{html}\n</section>')
        bodies.append("</section>")
    template = importlib.resources.files("mmlens.viz")
    page = Template(template.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        style=template.joinpath("report.css").read_text(encoding="utf-8"),
        finding=lead,
        contents="\n".join(contents),
        sections="\n".join(bodies),
    )
    path = file_to_write("path", path)
    write_text_at_once(path, page)
    return path


def _check(
    summary: Mapping[str, Any],
    figures: Sequence[tuple[str, str, Figure]],
    tables: Sequence[tuple[str, str, pd.DataFrame]],
) -> None:
    instance_of("summary", summary, Mapping, f"a dict with {', '.join(_SECTIONS)}")
    missing = [name for name in _SECTIONS if not isinstance(summary.get(name), Mapping)]
    if missing:
        raise InvalidValueError(
            f"the summary lacks {missing}, each a dict; it has {sorted(map(str, summary))}"
        )
    absent = [name for name in ("statement", "holds", "rows") if name not in summary["finding"]]
    if absent:
        raise InvalidValueError(
            f"the summary's finding lacks {absent}; it has {sorted(map(str, summary['finding']))}"
        )
    for word, kind, given in (("figure", Figure, figures), ("table", pd.DataFrame, tables)):
        for entry in listed(f"{word}s", given, f"a list of (title, caption, {kind.__name__})"):
            instance_of(f"a {word} of the report", entry, (tuple, list), f"(title, caption, {kind.__name__})")
            if len(entry) != 3 or not isinstance(entry[2], kind):
                raise InvalidTypeError(
                    f"a {word} of the report is (title, caption, {kind.__name__}), not "
                    f"({', '.join(type(part).__name__ for part in entry)})"
                )


def _describe(model: Mapping[str, Any]) -> str:
    parts = [str(model["family"])] if "family" in model else []
    if {"n_layers", "n_heads"} <= set(model):
        layers, heads = model["n_layers"], model["n_heads"]
        per_layer = model.get("heads_per_layer")
        parts.append(
            f"{layers} layers of {heads} heads ({layers * heads} heads)"
            if per_layer is None
            else f"{layers} layers, {sum(map(bool, per_layer))} of them with up to {heads} heads "
            f"({sum(per_layer)} heads)"
        )
    if "n_parameters" in model:
        parts.append(f"{model['n_parameters']:,} parameters")
    return ", ".join(parts)


def _finding(finding: Mapping[str, Any]) -> str:
    metric = str(finding.get("metric", "accuracy"))
    holds = bool(finding["holds"])
    rows = finding["rows"]
    verdict = "The finding holds" if holds else "The finding does not hold"
    if not holds and any(row.get("holds") for row in rows):
        verdict = "The finding holds in some modes of ablation only"
    arms = [arm for arm in _ARMS if any(arm in row for row in rows)]
    rest = list(dict.fromkeys(key for row in rows for key in row if key not in (*_ARMS, "mode")))
    heads = ["Ablation", *(_arm_heading(arm) for arm in arms), *(str(key).capitalize() for key in rest)]
    body = [
        [escape(str(row.get("mode", ""))), *(_value(row.get(arm), metric) for arm in arms)]
        + [_value(row.get(key), metric) for key in rest]
        for row in rows
    ]
    name = METRIC_LABELS.get(metric, metric)
    sizes = sorted(
        {int(value["n"]) for row in rows for value in row.values() if _is_value(value) and "n" in value}
    )
    over = f" over {' or '.join(f'{n:,}' for n in sizes)} examples" if sizes else ""
    caption = f'<p class="caption">{escape(name)} with 95% intervals{over}</p>'
    table = caption + grid_html(heads, body) if rows else ""
    others = {
        key: value for key, value in finding.items() if key not in ("statement", "holds", "rows", "metric")
    }
    return (
        f'<div class="finding{" holds" if holds else ""}">\n'
        f'<p class="verdict">{verdict}</p>\n'
        f'<p class="statement">{escape(str(finding["statement"]))}</p>\n{table}{pairs_html(others)}</div>'
    )


def _arm_heading(arm: str) -> str:
    if arm == "clean":
        return "Clean"
    label = ARM_STYLES[arm].label
    return f"Without {label if label.endswith('heads') else f'{label} heads'}"


def _setting(summary: Mapping[str, Any]) -> str:
    columns = [
        f"<div><h3>{name.capitalize()}</h3>{pairs_html(summary[name])}</div>"
        for name in ("model", "settings", "versions")
        if summary[name]
    ]
    return f'<div class="columns">{"".join(columns)}</div>' if columns else ""


def _clean(clean: Mapping[str, Any]) -> str:
    if not clean:
        return ""
    metrics = list(dict.fromkeys(metric for values in clean.values() for metric in values))
    counts = {
        kind: {v["n"] for v in values.values() if _is_value(v) and "n" in v} for kind, values in clean.items()
    }
    rows = []
    for kind, values in clean.items():
        cells = [_value(values.get(metric), metric) for metric in metrics]
        rows.append([escape(str(kind)), *cells, escape(", ".join(map(str, sorted(counts[kind]))))])
    heads = ["Kind", *(METRIC_LABELS.get(metric, str(metric)) for metric in metrics), "Examples"]
    return '<p class="caption">Nothing ablated; 95% intervals.</p>' + grid_html(heads, rows)


def figure_html(title: str, caption: str, figure: Figure) -> str:
    """A figure and its caption, the picture inlined: as SVG, or as pixels where that is large."""
    kind, data, width = _render(figure)
    return _picture(title, caption, kind, data, width)


def picture_files(figure: Figure, folder: Path, stem: str) -> float:
    """Write a figure as `stem`.svg and `stem`.png (twice as fine as its dpi), and return its width in inches."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.svg").write_bytes(_vector(figure))
    (folder / f"{stem}.png").write_bytes(
        _saved(figure, "png", dpi=2 * figure.dpi, metadata={"Software": None})
    )
    return _width(figure)


def picture_html(title: str, caption: str, stem: Path, width: float, largest: int) -> str:
    """A picture from the files of `picture_files`, inlined in at most `largest` bytes where that can be.

    As SVG where that fits, else as WebP, ever coarser down to a quarter of the width.
    """
    vector = stem.with_suffix(".svg").read_bytes()
    if 4 * len(vector) <= 3 * largest:  # base64 takes four bytes for three
        return _picture(title, caption, "svg+xml", vector, width)
    with Image.open(stem.with_suffix(".png")) as picture:
        pixels = picture.convert("RGB")
    data = b""
    for scale in (1, 0.7, 0.5, 0.25):
        buffer = io.BytesIO()
        size = (max(1, round(scale * pixels.width)), max(1, round(scale * pixels.height)))
        pixels.resize(size, Image.Resampling.LANCZOS).save(buffer, "webp", quality=80, method=4)
        data = buffer.getvalue()
        if 4 * len(data) <= 3 * largest:
            break
    return _picture(title, caption, "webp", data, width)


def _picture(title: str, caption: str, kind: str, data: bytes, width: float) -> str:
    source = base64.b64encode(data).decode("ascii")
    return (
        f'<figure>\n<img alt="{escape(title)}" width="{round(96 * width)}" src="data:image/{kind};base64,{source}">\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def _render(figure: Figure) -> tuple[str, bytes, float]:
    """The figure as (media type, bytes, width in inches): SVG where that is small, else PNG, else JPEG."""
    kind, data = "svg+xml", _vector(figure)
    if len(data) > _LARGEST_VECTOR:
        kind, data = "png", _saved(figure, "png", dpi=2 * figure.dpi)
    if kind == "png" and len(data) > _LARGEST_PNG:
        kind, data = "jpeg", _saved(figure, "jpeg", dpi=2 * figure.dpi, pil_kwargs={"quality": 85})
    return kind, data, _width(figure)


def _vector(figure: Figure) -> bytes:
    # Without a salt the names inside an SVG, and so the file, would differ from run to run.
    with matplotlib.rc_context({"svg.hashsalt": "mmlens", "svg.fonttype": "path"}):
        return _saved(figure, "svg", metadata={"Date": None, "Creator": None})


def _width(figure: Figure) -> float:
    # Said in inches so that text has one size in all figures, however wide they are.
    return figure.get_tightbbox().width + 2 * _MARGIN


def _saved(figure: Figure, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, bbox_inches="tight", pad_inches=_MARGIN, **options)
    return buffer.getvalue()


def table_html(caption: str, table: pd.DataFrame, *, n_rows: int | None = None) -> str:
    """A table and its caption, folded where it is long; of more than `n_rows` rows only so many."""
    rows = f"{len(table)} row{'' if len(table) == 1 else 's'}"
    if n_rows is not None and len(table) > n_rows:
        table, rows = table.head(n_rows), f"the first {n_rows} of {rows}"
        caption = f"{caption} ({rows[0].upper()}{rows[1:]}.)"
    plain = isinstance(table.index, pd.RangeIndex)
    with pd.option_context("display.max_colwidth", None):
        html = table.to_html(index=not plain, border=0, float_format=_number, na_rep="", escape=True)
    body = f'<div class="scroll{" long" if len(table) > _LONG_TABLE else ""}">{html}</div>'
    if len(table) > _LONG_TABLE:
        body = folded_html(rows, body)
    return f'<p class="caption">{escape(caption)}</p>\n{body}'


def folded_html(summary: str, html: str) -> str:
    """HTML that is shown when its one-line summary is clicked."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{html}\n</details>\n"


def grid_html(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; `heads` are text, the cells HTML."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'
    )


def pairs_html(values: Mapping[Any, Any]) -> str:
    """Names and values as they come, dicts within dicts as names with a dot."""
    if not values:
        return ""
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="value">{_folded(html)}</td></tr>\n'
        for name, html in _flat(values)
    )
    return f"<table><tbody>\n{rows}</tbody></table>\n"


def _folded(html: str) -> str:
    return html if len(html) <= _LONG_VALUE else f"<details><summary>show</summary>{html}</details>"


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if _is_value(value):
            yield name, _value(value, str(key))
        elif isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, _value(value, str(key))


def _is_value(value: object) -> bool:
    return isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value)


def _value(value: Any, metric: str) -> str:
    """HTML of {mean, low, high} with its interval, or of anything else as it is."""
    if value is None:
        return "\N{EN DASH}"
    if _is_value(value):
        mean, low, high = (_amount(value[name], metric) for name in ("mean", "low", "high"))
        return f'{mean} <span class="interval">[{low}, {high}]</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return escape(_number(float(value)))
    if isinstance(value, list | tuple):
        return ", ".join(
            f"[{_value(item, metric)}]" if isinstance(item, list | tuple) else _value(item, metric)
            for item in value
        )
    if isinstance(value, Mapping):
        return "; ".join(f"{escape(str(key))}: {_value(item, str(key))}" for key, item in value.items())
    if isinstance(value, numbers.Integral):
        return (
            f"{int(value):,}"
            if abs(int(value)) >= 10_000 and not re.search("seed", metric)
            else str(int(value))
        )
    return escape(str(value))


def _amount(value: float | None, metric: str) -> str:
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return f"{100 * value:.1f}%" if metric in SHARES else f"{value:.2f}"


def _number(value: Any) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
