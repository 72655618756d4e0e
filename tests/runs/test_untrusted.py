"""A run's folder may come from anybody: what its files say harms nobody who repeats, replaces or reports it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import small_experiment
import torch
from markdown_it import MarkdownIt

import mmlens
from mmlens.cli import main
from mmlens.experiments.experiment import Findings
from mmlens.runs.methods import markdown_text, methods_text
from mmlens.runs.paper import markdown_table, run_all
from mmlens.runs.record import read_record
from mmlens.runs.rerun import rerun
from mmlens.runs.run import Prepared, Request, RunError, prepare, read_findings, run

REQUEST = Request("small", "micro", n_selection=2, n_evaluation=2, batch_size=6)

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[here](javascript:alert(1))",
    "![pixel](http://example.org/p.png)",
    "[here][there]\n\n[there]: http://example.org",
    "a | b\n| --- | --- |\n| c | d |",
    "\n\n# A heading\n\n- item\n\n    code",
    "**bold** `code` _it_ ~~out~~ $x$ \\begin{x} &lt;b&gt;",
)


@pytest.fixture(autouse=True, scope="module")
def _experiments() -> Iterator[None]:
    with small_experiment.registered():
        yield


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(REQUEST)


@pytest.fixture(scope="module")
def folder(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(REQUEST, tmp_path_factory.mktemp("runs") / "run", prepared=prepared, progress=False)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def setting(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


# ---------------------------------------------------------------------- code and threads


def with_own_code(folder: Path, marker: Path) -> Path:
    """A copy of micro whose config names code of its own, which leaves a mark where it is run."""
    shutil.copytree(Path(mmlens.__file__).parent / "shipped/micro", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\nclass Own: pass\n")
    return folder


def test_code_of_a_model_runs_by_the_command_line_alone(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"
    model = with_own_code(tmp_path / "model", marker)
    edit(copied / "run.json", setting("request", "trust_remote_code", value=True))
    edit(copied / "run.json", setting("request", "model", value=str(model)))
    assert main(["rerun", str(copied)]) == 2
    error = capsys.readouterr().err
    assert "--trust-remote-code" in error and str(model) in error and error.count("\n") == 1
    edit(copied / "run.json", setting("request", "trust_remote_code", value="true"))
    assert main(["rerun", str(copied)]) == 2
    edit(copied / "run.json", setting("request", "trust_remote_code", value=False))
    edit(copied / "run.json", setting("request", "attn_implementation", value="owner/kernel"))
    assert main(["rerun", str(copied)]) == 2
    assert "code from the hub" in capsys.readouterr().err
    assert not marker.exists()


def test_a_run_that_trusted_is_repeated_where_the_command_line_trusts(copied: Path, tmp_path: Path) -> None:
    edit(copied / "run.json", setting("request", "trust_remote_code", value=True))
    assert main(["rerun", str(copied), "--trust-remote-code", "--out", str(tmp_path / "again")]) == 0
    assert read_record(tmp_path / "again")["request"]["trust_remote_code"] is True


def test_threads_of_a_record_stay_within_this_machine(copied: Path) -> None:
    for field in ("request", "machine"):
        edit(copied / "run.json", setting(field, "threads", value=10**9))
    found = rerun(copied, progress=False)
    assert found.same and found.changed["threads"][0] == str(10**9)
    assert torch.get_num_threads() < 1000
    assert rerun(copied, threads=1, progress=False).changed["threads"] == (str(10**9), "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("request", "n_selection", value=10**9), "1000000000 examples of each kind .* lists 12 ids"),
        (setting("request", "settings", "n_heads", value=10**9), "--set n_heads=1000000000"),
        (setting("request", "settings", "n_heads", value="2"), "setting n_heads is '2'"),
        (setting("request", "settings", "modes", value="zero"), "setting modes is 'zero'"),
        (setting("request", "batch_size", value=True), "batch_size is True"),
        (setting("request", "batch_size", value=0), "batch_size is 0"),
        (setting("request", "seed", value=-1), "seed is -1"),
        (setting("request", "dtype", value="save"), "no dtype 'save'"),
        (setting("request", "extra", value=1), "asked for with extra"),
        (setting("request", value=[]), r"request is \[\]"),
        (setting("files", value=["."]), "one of files is '.'"),
        (setting("files", value=["/etc/passwd"]), "one of files is '/etc/passwd'"),
        (setting("results", value=["../../other/numbers.json"]), "one of results is"),
        (setting("results", value="numbers.json"), "results is 'numbers.json'"),
        (setting("machine", "threads", value="4"), "machine.threads is '4'"),
        (setting("machine", value=None), "machine is None"),
        (setting("data", "selection", "ids", value=7), "data.selection.ids is 7"),
        (setting("versions", "torch", value=2), "versions.torch is 2"),
        (setting("statement", value=None), "statement is None"),
        (setting("model", value={}), "the field model.name is missing"),
    ],
)  # fmt: skip
def test_a_field_that_harms_or_is_wrong_is_named(
    copied: Path, change: Callable[[Any], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copied / "run.json", change)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert main(["rerun", str(copied)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("mmlens: ") and error.count("\n") == 1, error
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"schema": NaN}', "\xff", '{"a": 1, "a": 1}']
)
def test_what_is_no_record_is_said_to_be_none(copied: Path, text: str) -> None:
    (copied / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=r"run\.json'"):
        read_record(copied)


# ---------------------------------------------------------------------- paths


def test_replacing_a_run_removes_nothing_but_a_run_s_files(
    copied: Path, prepared: Prepared, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("mine")
    (copied / "link").symlink_to(outside)
    (copied / "mine").mkdir()
    (copied / "mine" / "kept.txt").write_text("mine")
    old = copied / "figures" / "old.png"
    old.write_text("a run's")
    listed = [
        ".",
        "",
        "mine",
        "link",
        "link/kept.txt",
        "../outside/kept.txt",
        str(outside / "kept.txt"),
        3,
        None,
    ]
    edit(copied / "run.json", setting("files", value=[*listed, "figures/old.png", "run.json"]))
    run(REQUEST, copied, prepared=prepared, progress=False)
    assert (outside / "kept.txt").read_text() == (copied / "mine/kept.txt").read_text() == "mine"
    assert not old.exists() and read_record(copied)["request"]["model"] == "micro"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("tables", "../numbers", value=""), "no name of one"),
        (setting("per_example", value=["/etc/passwd"]), "no name of one"),
        (setting("figures", 0, "file", value="../../secret"), "a figure's file is '../../secret.svg'"),
        (setting("figures", 0, "file", value=3), "a figure's file is 3"),
        (setting("figures", 0, "width", value=10**9), "width is 1000000000"),
        (setting("statement", value=1), "statement is 1"),
        (setting("tables", value=[]), "does not hold a run's findings"),
    ],
)
def test_findings_that_lead_out_of_the_folder_are_refused(
    copied: Path, change: Callable[[Any], None], message: str
) -> None:
    edit(copied / "findings.json", change)
    with pytest.raises((RunError, TypeError), match=message):
        read_findings(copied)


def test_links_out_of_a_run_are_refused_and_links_to_a_run_are_not(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(copied)
    assert read_findings(tmp_path / "linked").statement == read_findings(copied).statement
    table = copied / "tables/heads.parquet"
    shutil.move(table, tmp_path / "heads.parquet")
    table.symlink_to(tmp_path / "heads.parquet")
    with pytest.raises(RunError, match="a link that leads out of the folder"):
        read_findings(copied)
    table.unlink()
    (copied / "moved.parquet").write_bytes((tmp_path / "heads.parquet").read_bytes())
    table.symlink_to(copied / "moved.parquet")
    assert len(read_findings(copied).tables["heads"][1]) == 64


# ---------------------------------------------------------------------- pages


class Tags(HTMLParser):
    """The tags of a page, and the attributes that could run code or fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(f"{tag} {name}" for name, _ in attributes if name.startswith("on"))]
        self.found += [
            f"{tag} {value}" for name, value in attributes
            if name in ("src", "href") and not (value or "").startswith(("data:image/", "#"))
        ]  # fmt: skip


def tags_of(html: str) -> list[str]:
    parser = Tags()
    parser.feed(html)
    return parser.found


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_in_markdown_shows_as_it_stands(text: str) -> None:
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for page in (
        f"{markdown_text(text)}",
        f"- **{markdown_text(text)}**: found",
        f"Model {markdown_text(text)}.",
    ):
        tags = set(tags_of(markdown.render(page)))
        assert tags <= {"p", "ul", "li", "strong"}, (page, tags)
    shown = re.sub(r"<[^>]*>", "", markdown.render(markdown_text(text)))
    assert shown.strip() == re.sub(r"<[^>]*>", "", f"{_escape(' '.join(text.split()))}")
    page = markdown.render(markdown_table(pd.DataFrame({text: [text], "other": [1]})))
    assert set(tags_of(page)) == {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.count("<td>") == 2 and page.count("<th>") == 2


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


@pytest.mark.parametrize(
    "text", ["L0H4 at -0.5 (12 of 64)", "text_knowledge, a-b", "-.5 [-.6, -.4]", "x = y [1]"]
)
def test_a_plain_text_in_markdown_stays_readable(text: str) -> None:
    assert markdown_text(text) == text


def test_methods_and_reports_of_hostile_names(folder: Path, prepared: Prepared, tmp_path: Path) -> None:
    text = " ".join(HOSTILE)
    record = read_record(folder)
    record["model"]["name"] = record["data"]["source"] = record["experiment"]["method"] = text
    record["data"]["selection"]["n_by_kind"] = {text: 1}
    record["data"]["selection"]["controls"] = [text]
    record["request"]["settings"] = {"modes": [text]}
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(methods_text(record))
    assert set(tags_of(page)) == {"h1", "p", "strong"}
    hostile = replace(
        prepared, model_record={**prepared.model_record, "name": text}, data_record=record["data"]
    )
    out = run(REQUEST, tmp_path / "run", prepared=hostile, progress=False)
    tags = tags_of((out / "report.html").read_text())
    assert "script" not in tags and not any(" " in tag for tag in tags)


def test_questions_statements_and_errors_are_escaped_in_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(HOSTILE)
    table = pd.DataFrame({text: [text]}, index=pd.Index([text], name=text))

    def found(setup: Any) -> Findings:
        return Findings(text, {text: {text: [text]}}, {"t": (text, table)}, {"p": table})

    def fails(setup: Any) -> Findings:
        raise RuntimeError(text)

    monkeypatch.setitem(small_experiment.catalog.EXPERIMENTS, "small", replace(
        small_experiment.EXPERIMENT, run=found, method="Nothing.", across=lambda findings: found(None)
    ))  # fmt: skip
    monkeypatch.setitem(
        small_experiment.catalog.EXPERIMENTS, "broken", replace(small_experiment.BROKEN, run=fails)
    )
    examples = [
        replace(example, kind=example.kind + text, question=text)
        for kind in ("objects", "text_recall")
        for example in mmlens.scene_examples(kind, 2, 3)
    ]
    data = mmlens.data.save_examples(examples, tmp_path / "data")
    model = shutil.copytree(Path(mmlens.__file__).parent / "shipped/micro", tmp_path / "<script>a_b*c*")
    outcomes = run_all(
        ["micro", str(model)], tmp_path / "out", Request("", "", data=str(data)), progress=False
    )
    assert [o.status for o in outcomes] == ["done", "failed"] * 2
    pages = list((tmp_path / "out").rglob("*.html"))
    assert len(pages) == 4
    for page in pages:
        tags = tags_of(page.read_text())
        assert "script" not in tags and not any(" " in tag for tag in tags), page
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    tags = set(tags_of(markdown.render((tmp_path / "out/paper.md").read_text())))
    assert tags == {"h1", "h2", "p", "strong", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
