"""Published data sets by name: from folders by `datasets` itself, and from a small hub on this machine."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from small_hub import COMMIT, GATED, MISSING, small_hub

import mmlens
from mmlens import Evidence
from mmlens.data.examples import DataError, Example
from mmlens.data.published import loading
from mmlens.data.published.catalog import CATALOG
from mmlens.data.published.files import download_command
from mmlens.data.published.loading import load_data
from mmlens.data.published.record import EvidenceData, Files
from mmlens.errors import InvalidTypeError, InvalidValueError, MmlensError, MmlensWarning

N = 4


def read(row: Mapping[str, Any], files: Files, n_boxes: int = 1) -> Iterator[Example]:
    image = row["image"]
    if isinstance(image, str):
        image = mmlens.data.LateImage(functools.partial(files.path, image), image)
    yield Example(
        row["question"],
        row["answer"],
        images=(image,),
        evidence=(Evidence(0, tuple(row["bbox"])),) * n_boxes,
        id=row["question_id"],
        group=files.split,
    )


ENTRY = EvidenceData(
    name="made-up",
    title="Made up",
    hub="someone/things",
    splits=("val", "test"),
    columns={
        "question_id": "string",
        "question": "string",
        "answer": "string",
        "image": "image",
        "bbox": "list of int",
    },
    read=read,
    evidence="box",
    group="split",
    licence="MIT",
    size="4 rows",
    cite="nobody",
    source="nowhere",
    checked="not",
)


def entry(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> EvidenceData:
    """The entry in the catalog, with these fields."""
    made = EvidenceData(**{**vars(ENTRY), **changed})
    monkeypatch.setitem(CATALOG, made.name, made)
    return made


def rows(n: int = N) -> list[dict[str, Any]]:
    made = []
    for number in range(n):
        file = io.BytesIO()
        Image.new("RGB", (40, 20), (number, 0, 0)).save(file, "PNG")
        made.append(
            {
                "question_id": f"q{number}",
                "question": "What?",
                "answer": "x",
                "image": {"bytes": file.getvalue(), "path": None},
                "bbox": [number, 0, number + 9, 9],
            }
        )
    return made


def write_parquet(path: Path, given: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(given).cast_column("image", datasets.Image())
    table.to_parquet(str(path))


def write_jsonl(folder: Path, name: str, given: list[dict[str, Any]]) -> None:
    """Rows whose images are files beside them."""
    lines = []
    for row in given:
        path = f"images/{row['question_id']}.png"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(row["image"]["bytes"])
        lines.append(json.dumps(row | {"image": path}))
    (folder / name).write_text("\n".join(lines))


def check(examples: Any, split: str = "val") -> None:
    """They are those of `rows()`, twice over."""
    for _ in range(2):
        found = list(examples)
        assert [example.id for example in found] == [f"q{number}" for number in range(N)]
        assert [example.evidence[0].box[0] for example in found] == list(range(N))
        assert [example.images[0].getpixel((0, 0))[0] for example in found] == list(range(N))
        assert {example.group for example in found} == {split}


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_as_the_hub_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    entry(monkeypatch)
    write_parquet(tmp_path / "data" / "val-00000-of-00001.parquet", rows())
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows())
    check(load_data("made-up", data_dir=tmp_path, streaming=streaming))
    check(load_data("made-up", "test", data_dir=str(tmp_path), streaming=streaming), "test")


@pytest.mark.parametrize("with_card", [False, True])
def test_a_folder_with_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_card: bool
) -> None:
    entry(monkeypatch, config="grounding")
    write_parquet(tmp_path / "grounding" / "val-00000-of-00001.parquet", rows())
    write_parquet(tmp_path / "captions" / "val-00000-of-00001.parquet", rows(1))
    if with_card:
        parts = "".join(
            f"- config_name: {name}\n  data_files:\n  - split: val\n    path: {name}/val-*\n"
            for name in ("captions", "grounding")
        )
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    check(load_data("made-up", data_dir=tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("field", ["files", "own_files"])
def test_a_folder_with_the_authors_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, streaming: bool
) -> None:
    entry(monkeypatch, **{field: {"val": "annotations/*.jsonl"}})
    write_jsonl(tmp_path, "rows.jsonl", rows())
    (tmp_path / "annotations").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "annotations" / "val.jsonl")
    check(load_data("made-up", data_dir=tmp_path, streaming=streaming))


def test_examples_have_numbers_where_rows_are_one_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry(monkeypatch, one_each=True)
    write_parquet(tmp_path / "val.parquet", rows())
    examples = load_data("made-up", data_dir=tmp_path)
    assert len(examples) == N
    assert examples[2].id == "q2"
    check(examples)


def test_options_of_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(monkeypatch)
    write_parquet(tmp_path / "val.parquet", rows())
    assert len(next(iter(load_data("made-up", data_dir=tmp_path, n_boxes=3))).evidence) == 3
    with pytest.raises(InvalidTypeError, match="there is no keyword 'n_box'; the nearest: 'n_boxes'"):
        load_data("made-up", data_dir=tmp_path, n_box=3)


def test_rows_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows()
    given[2]["bbox"] = [30, 0, 20, 9]
    given[3]["question_id"] = "q0"
    entry(monkeypatch, read=lambda row, files: read(row, files))
    write_parquet(tmp_path / "val.parquet", given)
    examples = load_data("made-up", data_dir=tmp_path, on_error="skip")
    with pytest.warns(MmlensWarning, match=r"made-up val: 2 row\(s\) were skipped: row 2.*row 3 \(id 'q0'\)"):
        assert [example.id for example in examples] == ["q0", "q1"]
    with pytest.raises(DataError, match=r"made-up val, row 3 \(id 'q0'\): the id is that of row 0"):
        list(load_data("made-up", data_dir=tmp_path))

    def failing(row: Mapping[str, Any], files: Files) -> Iterator[Example]:
        yield Example(row["question"], row["anwser"])

    entry(monkeypatch, read=failing)
    with pytest.raises(
        DataError, match=r"made-up val, row 0 \(id 'q0'\): there is no column 'anwser'.*'answer'"
    ):
        list(load_data("made-up", data_dir=tmp_path))


def test_images_tell_their_row_when_they_do_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows()
    given[1]["image"]["bytes"] = b"no image"
    given[2]["bbox"] = [30, 0, 45, 9]
    entry(monkeypatch)
    write_parquet(tmp_path / "val.parquet", given)
    examples = list(load_data("made-up", data_dir=tmp_path))
    with pytest.raises(MmlensError, match=r"made-up val, row 1 \(id 'q1'\), column 'image' is no image"):
        examples[1].images[0]
    with pytest.raises(DataError, match=r"made-up val, row 2 \(id 'q2'\): .*inside the image of 40 x 20"):
        examples[2].images[0]
    with pytest.warns(
        MmlensWarning, match=r"2 row\(s\) were skipped: row 1 \(id 'q1'\): .*; row 2 \(id 'q2'\): "
    ):
        assert len(list(load_data("made-up", data_dir=tmp_path, on_error="skip"))) == N - 2


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    entry(monkeypatch, revision="0" * 40)
    renamed = [{"box" if key == "bbox" else key: value for key, value in row.items()} for row in rows()]
    write_parquet(tmp_path / "val.parquet", renamed)
    with pytest.raises(
        DataError, match="has no column 'bbox'.*it has 'question_id'.*'box'.*revision 0000.*is the one"
    ):
        list(load_data("made-up", data_dir=tmp_path, streaming=streaming))
    # The authors' own files may call them otherwise.
    entry(
        monkeypatch, own_files={"val": "*.parquet"}, other_names={"bbox": "box"}, read=lambda row, files: ()
    )
    assert list(load_data("made-up", data_dir=tmp_path, streaming=streaming)) == []
    entry(monkeypatch, own_files={"val": "*.parquet"}, other_names={"bbox": "boxes"})
    with pytest.raises(DataError, match="has no column 'boxes'"):
        list(load_data("made-up", data_dir=tmp_path, streaming=streaming))


def test_folders_that_hold_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(monkeypatch)
    command = r"`hf download --repo-type dataset someone/things --local-dir FOLDER`"
    with pytest.raises(MmlensError, match=rf"there is no such folder.*{command}.*--data-dir FOLDER"):
        load_data("made-up", data_dir=tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"cannot be read as its split 'val'.*{command}"):
        load_data("made-up", data_dir=tmp_path)
    write_parquet(tmp_path / "test.parquet", rows())
    with pytest.raises(DataError, match=rf"cannot be read as its split 'val'.*{command}"):
        load_data("made-up", data_dir=tmp_path)
    (tmp_path / "val.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="cannot be read as its split 'val'"):
        load_data("made-up", data_dir=tmp_path)
    entry(monkeypatch, files={"val": "val.jsonl"})
    with pytest.raises(DataError, match=rf"has no file 'val.jsonl', which holds the split 'val'.*{command}"):
        load_data("made-up", data_dir=tmp_path)
    entry(monkeypatch, hub="")
    with pytest.raises(DataError, match="is not on the hub.*data_dir=.*nowhere"):
        load_data("made-up")


def test_names_that_there_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(monkeypatch)
    with pytest.raises(MmlensError, match="there is no data set 'madeup'; the nearest: 'made-up'"):
        load_data("madeup")
    with pytest.raises(InvalidValueError, match="there is no split 'tset'; the nearest: 'test'"):
        load_data("made-up", "tset")


def test_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("b")
    write_parquet(tmp_path / "pages.parquet", rows())
    files = loading.PublishedFiles(ENTRY, "val", tmp_path)
    assert isinstance(files, Files)
    assert files.path("a/b.txt") == tmp_path / "a" / "b.txt"
    assert files.path(str(tmp_path / "a" / "b.txt")) == tmp_path / "a" / "b.txt"
    assert files.first("b.txt", "a/b.txt") == tmp_path / "a" / "b.txt"
    assert files.find("b.txt") == tmp_path / "a" / "b.txt"
    assert files.find("c.txt") is None
    assert files.row_numbers("pages.parquet", "question_id") == {f"q{number}": number for number in range(N)}
    at = files.table("*.parquet").at
    assert at is not None
    assert at(2)["image"].open().getpixel((0, 0)) == (2, 0, 0)
    with pytest.raises(FileNotFoundError, match=r"there is no 'c.txt'.*hf download"):
        files.path("c.txt")
    with pytest.raises(FileNotFoundError, match=r"none of 'b.txt', 'c.txt' in"):
        files.first("b.txt", "c.txt")
    for outside in ("../a", "/etc/passwd", "a/../../b"):
        with pytest.raises(InvalidValueError, match="below the folder"):
            files.path(outside)


def test_the_command_that_fetches() -> None:
    pinned = EvidenceData(**{**vars(ENTRY), "revision": "0" * 40})
    assert download_command(pinned) == (
        f"hf download --repo-type dataset someone/things --revision {'0' * 40} --local-dir FOLDER"
    )


# ------------------------------------------------------------------------------ the hub

PROGRAM = """
import dataclasses, json, sys
import datasets, huggingface_hub
from test_loading import ENTRY
from mmlens.data.published.catalog import CATALOG
from mmlens.data.published.loading import load_data

huggingface_hub.snapshot_download("someone/fetched", repo_type="dataset")
for given in json.loads(sys.argv[1]):
    # As HF_HUB_OFFLINE=1 sets it.
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = given.pop("offline", False)
    CATALOG["made-up"] = dataclasses.replace(ENTRY, **given.pop("fields", {}))
    try:
        examples = list(load_data("made-up", **given))
        red = [example.images[0].getpixel((0, 0))[0] for example in examples]
        found = {"ids": [example.id for example in examples], "red": red}
    except Exception as error:
        found = {"error": type(error).__name__, "message": str(error)}
    print("FOUND", json.dumps(found))
"""


def asked(hub: str, home: Path, calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `load_data` gives for each call, one after the other, in a process that knows this hub alone."""
    root = Path(mmlens.__file__).parents[1]
    paths = [str(root), str(Path(__file__).parent), str(root / "tests" / "support")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(calls.values()))],
        env={
            **os.environ,
            "HF_ENDPOINT": hub,
            "HF_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return {call: json.loads(line.removeprefix("FOUND ")) for call, line in zip(calls, lines, strict=True)}


RIGHT = {"ids": [f"q{number}" for number in range(N)], "red": list(range(N))}


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of every call, first with a hub and then without."""
    folder = tmp_path_factory.mktemp("hub")
    write_parquet(folder / "someone/things/data/val-00000-of-00001.parquet", rows())
    (folder / "someone/things/README.md").write_text("# Things\n")
    for name in ("lines", "fetched", "other"):
        write_jsonl(folder / "someone" / name, "val.jsonl", rows())
    write_parquet(
        folder / "someone/changed/val.parquet", [row | {"answers": row.pop("answer")} for row in rows()]
    )
    lines = {"hub": "someone/lines", "files": {"val": "val.jsonl"}}
    calls: dict[str, dict[str, Any]] = {
        "the hub": {},
        "streaming": {"streaming": True},
        "files beside the rows": {"fields": lines},
        "a pinned revision": {"fields": {"revision": COMMIT}},
        "gated": {"fields": {"hub": GATED}},
        "missing": {"fields": {"hub": MISSING}},
        "a revision that there is not": {"revision": "f" * 40},
        "other columns": {"fields": {"hub": "someone/changed"}},
        "a split that there is not": {"split": "test"},
        "offline": {"offline": True},
        "offline, streaming": {"offline": True, "streaming": True},
        "offline, pinned": {"offline": True, "fields": {"revision": COMMIT}},
        "offline, another revision": {"offline": True, "revision": "f" * 40},
        "offline, never loaded": {"offline": True, "fields": {"hub": "someone/other"}},
        "offline, fetched by hf download": {"offline": True, "fields": lines | {"hub": "someone/fetched"}},
    }
    with small_hub(folder) as hub:
        return asked(hub, tmp_path_factory.mktemp("home"), calls)


def test_the_command_of_the_messages_fetches_what_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = entry(monkeypatch, hub="someone/lines", files={"val": "val.jsonl"}, revision=COMMIT)
    write_jsonl(tmp_path / "hub/someone/lines", "val.jsonl", rows())
    command = download_command(made).replace("FOLDER", str(tmp_path / "fetched")).split()
    with small_hub(tmp_path / "hub") as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home")}
        hf = Path(sys.executable).parent / command[0]
        subprocess.run([hf, *command[1:]], env=environment, check=True, capture_output=True)
    check(load_data("made-up", data_dir=tmp_path / "fetched"))


@pytest.mark.parametrize(
    "call",
    [
        *("the hub", "streaming", "files beside the rows", "a pinned revision"),
        *("offline", "offline, streaming", "offline, pinned", "offline, fetched by hf download"),
    ],
)
def test_rows_of_a_hub(hub_answers: dict[str, dict[str, Any]], call: str) -> None:
    assert hub_answers[call] == RIGHT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            "gated",
            "made-up is gated: .*https://huggingface.co/datasets/someone/gated.*hf auth login.*hf download",
        ),
        ("missing", "no data set someone/missing on the hub, or it is private.*--data-dir"),
        ("a revision that there is not", "someone/things has no revision 'ffff"),
        (
            "other columns",
            f"someone/changed at revision {COMMIT} has no column 'answer', .*it has .*'answers'",
        ),
        ("a split that there is not", "someone/things cannot be read as its split 'test'.*hf download"),
        ("offline, another revision", f"holds the revision {COMMIT} of someone/things, not ffff"),
        (
            "offline, never loaded",
            "the hub cannot be reached .*no cache holds someone/other: `hf download --repo-type dataset someone/other "
            "--local-dir FOLDER` fetches its files, for data_dir='FOLDER'",
        ),
    ],
)
def test_faults_of_a_hub(hub_answers: dict[str, dict[str, Any]], call: str, message: str) -> None:
    found = hub_answers[call]
    assert found.get("error") == "DataError", found
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found["message"])
