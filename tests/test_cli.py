"""The `mmlens families` command; `core-heads` is tested with its experiment."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from mmlens.cli import main


def test_families_lists_every_family_and_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 97 + 2
    assert lines[-1].startswith("97 families: ") and "13 refused" in lines[-1]
    assert any(line.split()[:2] == ["qwen3_vl", "supported"] for line in lines)


def test_families_tells_all_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "qwen3_5"]) == 0
    told = capsys.readouterr().out
    assert "status: partly" in told and "blocks.{l}.attn.*: its gated delta net layers" in told
    assert main(["families", "qwen35"]) == 2
    assert "no family 'qwen35'; the nearest: 'qwen3_5'" in capsys.readouterr().err


def test_families_writes_the_table(tmp_path: Path) -> None:
    assert main(["families", "--csv", str(tmp_path / "families.csv")]) == 0
    table = pd.read_csv(tmp_path / "families.csv")
    assert list(table.columns) == ["family", "status", "token_map", "notes"] and len(table) == 97
