"""Published data sets by name: their rows by `datasets`, from the hub, a cache, or a folder with their files."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlens.arguments import flag, instance_of, known_keywords, one_of, path_of, unknown_name_message
from mmlens.data.examples import DataError, Example
from mmlens.data.images import LateImage
from mmlens.data.published.catalog import CATALOG
from mmlens.data.published.files import PublishedFiles, builder_of, first_line, matches
from mmlens.data.published.record import EvidenceData
from mmlens.data.reading import RowError, RowExamples, RowStream, said
from mmlens.data.tables import Row, Rows, rows_of
from mmlens.errors import MissingFileError, MmlensError, UnknownNameError


def load_data(
    name: str,
    split: str | None = None,
    *,
    data_dir: str | Path | None = None,
    revision: str | None = None,
    streaming: bool = False,
    on_error: str = "raise",
    **options: Any,
) -> Any:
    """Examples of a published data set, by a name that `mmlens data` lists.

    Rows come from the Hugging Face hub by `datasets`, or, where that cannot be reached, from a cache, or from
    `data_dir`: a folder with the published files, as `hf download --repo-type dataset ... --local-dir FOLDER` makes it,
    or as the authors publish them. `split` is one of the data set's, its first by default; `revision` a commit, by
    default the one that the list names. `streaming=True` reads rows as they come and writes nothing to the disk.

    `options` are those of one data set, such as `max_pages` of documents, which its notes name.

    Where every row is one example, these are `Examples`, else an `ExampleStream`. Rows and images are read when they
    are used. `on_error="skip"` leaves out rows that cannot be read, as `examples_from` does.

    Raises UnknownNameError for another name, with the nearest; DataError, with the command that fetches the files,
    where the hub cannot be reached, has no such data set or revision, or grants no access to it, and where columns are
    missing; DataError with the row's number for a row that cannot be read.
    """
    data_set = data_set_named(name)
    split = data_set.splits[0] if split is None else one_of("split", split, data_set.splits)
    skips = one_of("on_error", on_error, ("raise", "skip")) == "skip"
    streaming = flag("streaming", streaming)
    revision = data_set.revision if revision is None else instance_of("revision", revision, str, "a text")
    read = inspect.signature(data_set.read).parameters
    known_keywords(f"load_data({name!r})", options, [*_OPTIONS, *list(read)[2:]])
    opened = (
        from_folder(data_set, split, path_of("data_dir", data_dir), streaming)
        if data_dir is not None
        else from_hub(data_set, split, revision, streaming)
    )
    rows = rows_of(opened.table, f"{data_set.name} {split}")
    if rows.columns is not None:
        _check_columns(opened, rows.columns)
    made = RowExamples if rows.n is not None and data_set.one_each else RowStream
    return made(rows, functools.partial(_read, opened, rows, options), skips=skips)


_OPTIONS = ("split", "data_dir", "revision", "streaming", "on_error")


def data_set_named(name: object) -> EvidenceData:
    """The entry of a published data set; UnknownNameError, with the nearest names, for another."""
    instance_of("name", name, str, "the name of a data set; `mmlens data` lists them")
    if name not in CATALOG:
        for entry in CATALOG.values():
            if entry.hub == name:
                raise UnknownNameError(
                    f"{name!r} is the hub id of the data set {entry.name!r}: give that name"
                )
        raise UnknownNameError(
            f"{unknown_name_message('data set', name, CATALOG)}. `mmlens data` lists them; of any other one "
            "examples_from(rows, question=..., images=...) makes examples by the names of its columns"
        )
    return CATALOG[str(name)]


# ------------------------------------------------------------------------------ where the rows are


@dataclass(frozen=True)
class Opened:
    """The rows of a split, as `datasets` gives them, and the files beside them."""

    table: Any
    files: PublishedFiles
    where: str
    own: bool = False
    """Whether the files are the authors' own, whose columns may have other names."""


def from_folder(
    data_set: EvidenceData, split: str, folder: Path, streaming: bool, commit: str | None = None
) -> Opened:
    """Rows of a folder with the published files."""
    files = PublishedFiles(data_set, split, folder, commit)
    if not folder.is_dir():
        raise MissingFileError(
            f"data_dir is {str(folder)!r}, and there is no such folder; expected one with the files of "
            f"{data_set.name}{files.to_fetch()}"
        )
    patterns = [of[split] for of in (data_set.files, data_set.own_files) if split in of]
    loaded = functools.partial(_loaded, files, split=split, streaming=streaming)
    for pattern in patterns:
        found = matches(folder, pattern)
        if found:
            own = pattern == data_set.own_files.get(split)
            table = loaded(builder_of(found), data_files={split: found})
            return Opened(table, files, repr(str(folder)), own)
    if split in data_set.files:
        raise DataError(
            f"{str(folder)!r} has no file {' or '.join(map(repr, patterns))}, which holds the split {split!r} of "
            f"{data_set.name}{files.to_fetch()}"
        )
    config, path = data_set.config, str(folder)
    if config is not None and not (folder / "README.md").is_file() and (folder / config).is_dir():
        # Without the card, the folder of a configuration is all that tells of it.
        path, config = str(folder / config), None
    return Opened(loaded(path, config), files, repr(str(folder)))


_ALSO_CALLED = {"val": ("validation",), "dev": ("validation",)}


def _loaded(files: PublishedFiles, path: str, config: str | None = None, *, split: str, **given: Any) -> Any:
    """What `datasets` reads; DataError, with what to do, where it cannot."""
    import datasets

    # What a file's name tells of a split, datasets calls by a name of its own: of val.parquet it is "validation".
    splits = (split, *(_ALSO_CALLED.get(split, ()) if given.get("data_files") is None else ()))
    try:
        for name in splits[:-1]:
            with contextlib.suppress(ValueError):
                return datasets.load_dataset(path, config, split=name, **given)
        return datasets.load_dataset(path, config, split=splits[-1], **given)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = files.data_set.hub if files.folder is None else repr(str(files.folder))
        raise DataError(
            f"{files.data_set.name}: {where} cannot be read as its split {files.split!r} ({first_line(error)})"
            f"{files.to_fetch()}"
        ) from error


def from_hub(data_set: EvidenceData, split: str, revision: str | None, streaming: bool) -> Opened:
    """Rows of a repository on the hub, at one commit, or of a cache of it where the hub cannot be reached.

    DataError, with what to do, for what is not there, closed, or out of reach.
    """
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    hub, files = data_set.hub, PublishedFiles(data_set, split, None, revision)
    page = f"https://huggingface.co/datasets/{hub}"
    if not hub:
        raise DataError(
            f"{data_set.name} is not on the hub in a form that datasets reads: give data_dir= (--data-dir) a folder "
            f"with its published files{files.to_fetch()}. {data_set.notes}".rstrip()
        )
    try:
        commit = _commit(hub, revision)
    except errors.GatedRepoError as error:
        raise DataError(
            f"{data_set.name} is gated: the owners of {hub} grant access. Ask for it at {page}, log in by `hf auth "
            f"login`, and load it again, or fetch it{files.to_fetch()}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(
            f"{data_set.name}: {hub} has no revision {revision!r}; {page}/commits/main lists them"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{data_set.name}: there is no data set {hub} on the hub, or it is private and needs `hf auth login`. Of a "
            "copy of its files, data_dir='FOLDER' (--data-dir FOLDER) names the folder"
        ) from error
    except (OSError, httpx.HTTPError) as error:
        return _from_caches(files, streaming, error)
    at_commit = PublishedFiles(data_set, split, None, commit)
    if huggingface_hub.is_offline_mode():
        # The card came from a cache.
        return _from_caches(at_commit, streaming, errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"))
    pattern = data_set.files.get(split)
    table = _loaded(
        at_commit,
        hub,
        data_set.config,
        split=split,
        revision=commit,
        streaming=streaming,
        data_files=None if pattern is None else {split: pattern},
    )
    _check_commit(at_commit, table)
    return Opened(table, at_commit, f"{hub} at revision {commit}")


def _check_commit(files: PublishedFiles, table: Any) -> str:
    """The commit of a table in the cache of `datasets`; where the hub is out of reach it takes what it loaded last."""
    kept = getattr(table, "cache_files", None)
    commit = Path(kept[0]["filename"]).parent.name if kept else ""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return str(files.commit)
    if files.commit not in (None, commit):
        raise DataError(
            f"{files.data_set.name}: the hub cannot be reached, and the cache of datasets holds the revision "
            f"{commit} of {files.data_set.hub}, not {files.commit}; revision={commit!r} takes it"
        )
    return commit


def _commit(hub: str, revision: str | None) -> str:
    """The commit that a revision is of; raises as huggingface_hub does, gated data sets included."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # What datasets asks for first; that answers whether access is granted, too.
        card = huggingface_hub.hf_hub_download(hub, "README.md", repo_type="dataset", revision=revision)
        return Path(card).parent.name
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError:
        return str(huggingface_hub.HfApi().dataset_info(hub, revision=revision).sha)


def _from_caches(files: PublishedFiles, streaming: bool, reason: Exception) -> Opened:
    """Rows of what earlier calls left on this machine: `hf download` a snapshot, `datasets` its tables."""
    import datasets
    import huggingface_hub
    from huggingface_hub import errors

    data_set, split, revision = files.data_set, files.split, files.commit
    with contextlib.suppress(errors.LocalEntryNotFoundError, OSError):
        snapshot = huggingface_hub.snapshot_download(
            data_set.hub, repo_type="dataset", revision=revision, local_files_only=True
        )
        return from_folder(data_set, split, Path(snapshot), streaming, Path(snapshot).name)
    kept = Path(datasets.config.HF_DATASETS_CACHE)
    # Without one, datasets would wait for the hub once more.
    if kept.is_dir() and any(kept.glob(f"{data_set.hub.split('/')[0]}___*")):
        pattern = data_set.files.get(split)
        table = None
        with contextlib.suppress(OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
            table = datasets.load_dataset(
                data_set.hub,
                data_set.config,
                split=split,
                data_files=None if pattern is None else {split: pattern},
            )
        if table is not None:
            commit = _check_commit(files, table)
            return Opened(
                table.to_iterable_dataset() if streaming else table,
                PublishedFiles(data_set, split, None, commit),
                f"{data_set.hub} at revision {commit}",
            )
    why = "HF_HUB_OFFLINE is set" if huggingface_hub.is_offline_mode() else type(reason).__name__
    raise DataError(
        f"{data_set.name}: the hub cannot be reached ({why}), and no cache holds {data_set.hub}"
        f"{files.to_fetch()}"
    ) from reason


# ------------------------------------------------------------------------------ rows


def _check_columns(opened: Opened, columns: Sequence[str]) -> None:
    data_set = opened.files.data_set
    called = data_set.other_names if opened.own else {}
    needed = [called.get(column, column) for column in data_set.columns]
    missing = [column for column in needed if column is not None and column not in columns]
    if missing:
        raise DataError(
            f"{data_set.name}: {opened.where} has no column {', '.join(map(repr, missing))}, which its rows were "
            f"published with; it has {', '.join(map(repr, columns))}. Its columns may have changed: "
            + (
                f"revision {data_set.revision} is the one that this reader was made for"
                if data_set.revision
                else "this reader was made for no certain revision; revision= chooses one"
            )
        )


def _read(opened: Opened, rows: Rows, options: Mapping[str, Any], number: int, row: Row) -> Iterable[Example]:
    """The examples of a row; RowError, with its number and what names it, where it cannot be read."""
    data_set = opened.files.data_set
    if number == 0 and rows.columns is None:
        _check_columns(opened, list(row))
    try:
        found = list(data_set.read(row, opened.files, **options))
        for example in found:
            images: Any = example.images
            for image in images.given:
                if isinstance(image, LateImage):
                    # What is wrong with an image is found when it opens, and is told of its row too.
                    image.name = f"{rows.name}, row {number} (id {example.id!r}), {image.name}"
                    image.check = functools.partial(
                        _check_image, image.check, (rows.name, number, example.id)
                    )
        return found
    except RowError:
        raise
    # Whatever a row holds that the reader does not expect.
    except Exception as error:
        reason = said(error)
        if type(error) is KeyError and error.args and error.args[0] not in row:
            reason = unknown_name_message("column", error.args[0], row)
        raise RowError(rows.name, number, _id_of(data_set, row), reason) from error


def _check_image(check: Any, row: tuple[str, int, str], size: tuple[int, int]) -> None:
    try:
        check(size)
    except MmlensError as error:
        raise RowError(*row, said(error)) from error


def _id_of(data_set: EvidenceData, row: Row) -> str:
    """What names the row, in the column that is most likely to."""
    for column in data_set.columns:
        if column.lower().endswith(("id", "identifier")) and column in row:
            value = row[column]
            if isinstance(value, (str, int)):
                return str(value)
    return ""
