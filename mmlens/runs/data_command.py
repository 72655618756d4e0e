"""What `mmlens data` does: lists published data sets, shows rows with their boxes, converts rows to our own format."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlens.arguments import file_to_write, unknown_name_message, whole_number
from mmlens.data.examples import DataError, Example, load_examples, save_examples
from mmlens.data.many import ExampleStream
from mmlens.data.published.catalog import CATALOG
from mmlens.data.published.files import builder_of, download_command, first_line
from mmlens.data.published.loading import data_set_named, from_folder, from_hub, load_data
from mmlens.data.published.record import EvidenceData
from mmlens.data.rows import examples_from
from mmlens.errors import InvalidTypeError, UnknownNameError

_ACROSS = 100
"""Letters in a line."""

CHECKED = {
    "published rows": "checked against rows that its authors published",
    "card": "checked against its card or public code, not against rows",
    "not": "not checked",
}


def listing() -> str:
    """Every published data set: licence, size, what holds the evidence, and how its reader was checked."""
    blocks = []
    for entry in CATALOG.values():
        where = (
            f"{entry.hub}{f' ({entry.config})' if entry.config else ''}" if entry.hub else "not on the hub"
        )
        lines = [
            f"evidence: {entry.evidence}; split by {entry.group}",
            f"licence: {entry.licence}; size: {entry.size}",
            f"{CHECKED[entry.checked]}; {_pinned(entry)}",
        ]
        blocks.append("\n".join([f"{entry.name}: {entry.title}, {where}", *map(_indented, lines)]))
    return "\n".join(
        [
            *blocks,
            f"\n{len(blocks)} data sets. All about one: mmlens data NAME; its rows: mmlens data NAME --n 5",
        ]
    )


def description(name: str) -> str:
    """All that is known of one data set."""
    entry = data_set_named(name)
    files = "; ".join(f"{split}: {pattern}" for split, pattern in {**entry.own_files, **entry.files}.items())
    lines = {
        "hub": f"{entry.hub or 'not there'}{f', configuration {entry.config}' if entry.config else ''}",
        "revision": _pinned(entry).removeprefix("revision "),
        "splits": f"{', '.join(entry.splits)} (the first by default)",
        "files": files,
        "columns": ", ".join(f"{column} ({type_})" for column, type_ in entry.columns.items()),
        "evidence": entry.evidence,
        "split by": entry.group,
        "licence": entry.licence,
        "size": entry.size,
        "cite": entry.cite,
        "source": entry.source,
        "to fetch": entry.fetch or download_command(entry),
        "reader": CHECKED[entry.checked],
        "same documents or images": ", ".join(entry.overlaps),
        "notes": entry.notes,
    }
    return "\n".join(
        [
            f"{entry.name}: {entry.title}",
            *(_indented(f"{key}: {value}") for key, value in lines.items() if value),
        ]
    )


def _pinned(entry: EvidenceData) -> str:
    if not entry.hub:
        return "given by data_dir alone"
    return (
        f"revision {entry.revision}" if entry.revision else "revision unverified: no public source names one"
    )


def _indented(text: str) -> str:
    return textwrap.fill(
        text, _ACROSS, initial_indent="    ", subsequent_indent="        ", break_long_words=False
    )


def show(
    name: str,
    n: int,
    *,
    split: str | None = None,
    data_dir: Path | None = None,
    revision: str | None = None,
    streaming: bool = False,
    on_error: str = "raise",
    out: Path | None = None,
) -> str:
    """The first `n` examples of a data set, or of a folder in our own format, in words; in `out` with boxes drawn."""
    # A figure takes its time to import, and no other use of the command draws.
    from mmlens.viz.examples import plot_examples

    examples: Any
    if Path(name, "examples.jsonl").is_file():
        examples = load_examples(name)[: whole_number("n", n, least=1)]
    else:
        given: dict[str, Any] = {"data_dir": data_dir, "revision": revision}
        examples = load_data(name, split, **given, streaming=streaming, on_error=on_error)
        examples = list(examples.take(n))
    out = file_to_write("--out", Path(f"{Path(name).name}.png") if out is None else out)
    if not examples:
        raise DataError(f"{name} holds no example")
    plot_examples(examples).savefig(out, dpi=130)
    return "\n".join([*map(_in_words, examples), f"picture: {out}"])


def _in_words(example: Example) -> str:
    places = [
        f"image {each.image}" + (f" at {', '.join(f'{side:g}' for side in each.box)}" if each.box else "")
        if each.image is not None
        else f"video {each.video}, frames {each.frames}"
        for each in example.evidence
    ]
    lines = [
        f"question: {' '.join(example.question.split())}",
        f"answer: {example.answer}{f' (of {len(example.candidates)})' if example.candidates else ''}",
        f"evidence: {'; '.join(places) or 'none'}",
        f"{len(example.images)} image(s); group: {example.group or 'its own'}",
    ]
    return "\n".join([example.id or "no id", *map(_indented, lines)])


COLUMNS = (
    *("question", "answer", "images", "evidence", "box_format", "box_pages", "first_page", "candidates"),
    *("group", "id", "kind", "messages", "metadata", "image_folder"),
)
"""Options that say how rows of any table become examples: arguments of `examples_from`."""


def convert(
    source: str,
    out: Path,
    *,
    n: int | None = None,
    split: str | None = None,
    config: str | None = None,
    data_dir: Path | None = None,
    revision: str | None = None,
    streaming: bool = False,
    on_error: str = "raise",
    **columns: Any,
) -> str:
    """Write the examples of `source` to the folder `out` in our own format, and say how many.

    `source` is the name of a published data set, or rows of which `columns` name the columns: a file (parquet, jsonl,
    json, csv, tsv, arrow), a folder as `datasets` saves or loads one, or a hub id.
    """
    if (out / "examples.jsonl").exists():
        raise DataError(f"{str(out)!r} holds examples already; expected a new folder")
    # One name alone is a column; several candidates are those of all rows.
    named = {
        key: value[0] if isinstance(value, list) and len(value) == 1 and key != "metadata" else value
        for key, value in columns.items()
        if value is not None
    }
    examples = _examples(source, named, split, config, data_dir, revision, streaming, on_error)
    chosen: Any = examples if n is None else examples.take(whole_number("n", n, least=1))
    kept = list(chosen)
    if not kept:
        raise DataError(f"{source} holds no example")
    save_examples(kept, out)
    skipped = getattr(examples, "skipped", ())
    left_out = "".join(f"\n    skipped {each}" for each in skipped)
    return f"{len(kept)} examples in {out}" + (
        f"; {len(skipped)} row(s) skipped:{left_out}" if skipped else ""
    )


def _examples(
    source: str,
    columns: dict[str, Any],
    split: str | None,
    config: str | None,
    data_dir: Path | None,
    revision: str | None,
    streaming: bool,
    on_error: str,
) -> ExampleStream:
    if source in CATALOG:
        if columns or config:
            named = sorted([*columns, *(["config"] if config else [])])
            raise InvalidTypeError(
                f"{source} has a reader of its own, so that {_options(named)} cannot be given; its files in a folder "
                "are rows like any other's: mmlens data convert FOLDER --question ..."
            )
        given: dict[str, Any] = {"data_dir": data_dir, "revision": revision}
        return load_data(source, split, **given, streaming=streaming, on_error=on_error)
    if not Path(source).exists() and source.count("/") != 1:
        raise UnknownNameError(
            f"there is no file or folder {source!r}, and it is no hub id such as 'owner/name'; "
            f"{unknown_name_message('data set', source, CATALOG)}"
        )
    if data_dir is not None:
        raise InvalidTypeError(f"--data-dir is of published data sets, and {source!r} is none")
    if "answer" not in columns or not {"question", "messages"} & columns.keys():
        raise InvalidTypeError(
            f"{source!r} is no published data set, so that its columns have to be named: --question (or --messages) "
            "and --answer, and what else there is: --images, --evidence with --box-format, --candidates, --group, --id"
        )
    table, folder = _table(source, split, config, revision, streaming)
    columns.setdefault("image_folder", folder)
    return examples_from(table, **columns, on_error=on_error, name=source)


def _table(
    source: str, split: str | None, config: str | None, revision: str | None, streaming: bool
) -> tuple[Any, Path | None]:
    """The rows of a file, a folder or a hub id, and the folder that paths in them are relative to."""
    import datasets

    path = Path(source)
    if (path / "examples.jsonl").is_file():
        raise DataError(f"{source!r} is a folder of examples in our own format already")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(source)
        return (_split_of(saved, split, source) if isinstance(saved, dict) else saved), None
    if path.is_file():
        try:
            loaded = datasets.load_dataset(
                builder_of([source]), data_files=source, split="train", streaming=streaming, **_csv(path)
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{source!r} cannot be read as a table ({first_line(error)})") from error
        return loaded, path.parent
    entry = _unknown(source if not path.is_dir() else "", source, split, config)
    opened = (
        from_folder(entry, entry.splits[0], path, streaming)
        if path.is_dir()
        else from_hub(entry, entry.splits[0], revision, streaming)
    )
    return opened.table, path if path.is_dir() else None


def _csv(path: Path) -> dict[str, Any]:
    return {"sep": "\t"} if path.suffix == ".tsv" else {}


def _split_of(saved: Any, split: str | None, source: str) -> Any:
    if split is None and len(saved) == 1:
        return next(iter(saved.values()))
    if split not in saved:
        raise DataError(
            f"{source!r} holds the splits {', '.join(saved)}; choose one by --split, not {split!r}"
        )
    return saved[split]


def _unknown(hub: str, name: str, split: str | None, config: str | None) -> EvidenceData:
    """A data set that is in no list, by which it is loaded as the others are."""
    none: dict[str, str] = {}
    return EvidenceData(
        name=name, title=name, hub=hub, splits=(split or "train",), columns=none, read=lambda row, files: (),
        evidence="", group="", licence="", size="", cite="", source=name, checked="not", config=config,
    )  # fmt: skip


def _options(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
