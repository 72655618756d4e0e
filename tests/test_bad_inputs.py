"""What users may type wrongly is refused by us, in words that help; what is unusual and right passes.

The tables are in tests/bad_inputs. They run in a program of their own (run.py says why), once for all tests here.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mmlens

FOLDER = Path(__file__).parent / "bad_inputs"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    root = Path(mmlens.__file__).parents[1]
    paths = [str(root), str(FOLDER), str(root / "experiments" / "validation")]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py")],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("datasets")),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _told(rows: Rows) -> str:
    lines = [
        f"{row['name']}: {row['what']}: {row.get('error', 'passed')} at {row.get('where')}: {row.get('message')}"
        for row in rows
    ]
    return "\n".join([f"{len(rows)} row(s)", *lines[:60]])


def test_there_are_rows_for_every_public_name(rows: Rows) -> None:
    assert sum(row["sort"] == "bad" for row in rows) >= 2000
    assert sum(row["sort"] == "good" for row in rows) >= 300
    tried = " ".join(row["name"] for row in rows)
    untried = [
        f"{room.__name__}.{name}"
        for room in (mmlens, *(importlib.import_module(f"mmlens.{name}") for name in ROOMS))
        for name, value in vars(room).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith("mmlens")
        and not (isinstance(value, type) and issubclass(value, (Exception, Warning)))
        and name not in tried
        and name not in MADE_BY_OTHERS
    ]
    assert not untried


ROOMS = (
    *("data", "model", "interventions", "metrics", "scores", "effects"),
    *("attribution", "hybrid", "viz", "experiments", "runs"),
)
MADE_BY_OTHERS = {
    *("Attribution", "CoreHeads", "Edit", "EdgeAttribution", "EvidenceAttention", "MeanActivations"),
    *("PatchingComparison", "Prompt", "TokenMap", "VLMActivationCache", "of_another_model"),
    *("Experiment", "Findings", "shipped_models"),
}
"""What users are given and do not make; a mark that takes anything; records that a run checks; what takes nothing."""


def test_no_bad_input_passes_silently(rows: Rows) -> None:
    accepted = [row for row in rows if row["sort"] == "bad" and "error" not in row]
    assert not accepted, _told(accepted)


def test_no_bad_input_ends_in_a_bare_error_from_inside(rows: Rows) -> None:
    bare = [row for row in rows if row["sort"] == "bad" and "error" in row and not row["ours"]]
    assert not bare, _told(bare)
    outside = [row for row in rows if row["sort"] == "bad" and row.get("ours") and not row["inside"]]
    assert not outside, _told(outside)


def test_refusals_say_what_was_expected(rows: Rows) -> None:
    silent = [
        row
        for row in rows
        if row["sort"] == "bad" and row.get("ours") and not re.search(row["words"], row["message"])
    ]
    assert not silent, _told(silent)
    assert all(len(row["message"]) > 20 for row in rows if row.get("ours"))


def test_what_is_unusual_and_right_passes(rows: Rows) -> None:
    refused = [row for row in rows if row["sort"] == "good" and "error" in row]
    assert not refused, _told(refused)
