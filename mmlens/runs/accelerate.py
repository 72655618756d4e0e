"""`mmlens accelerate`: how much faster a model's prefill is with few heads dense, in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mmlens.heads import HeadScores, HeadSet
from mmlens.hooked_vlm import HookedVLM
from mmlens.provenance import describe_model, machine, versions
from mmlens.runs.run import RunError, check_folder, written_at_once
from mmlens.sparse.speed import PARTS, prefill_speed
from mmlens.viz.intervals import plot_curves
from mmlens.viz.report import figure_html, pairs_html, picture_files, table_html, write_page

RECORD = "accelerate.json"


@dataclass(frozen=True)
class Acceleration:
    """The table of `prefill_speed` over shares of dense heads and lengths, and what was asked."""

    table: pd.DataFrame
    settings: dict[str, Any]
    record: dict[str, Any]

    def figures(self) -> list[tuple[str, str, Figure]]:
        """Speed-up by length, a curve for each share of dense heads, with its limit dashed."""
        return [
            (
                f"Speed-up of {part}",
                "Time with all heads dense (SDPA) over time with the others streaming: median of the pairs, band from "
                "the lowest to the highest; dashed: the least times by operations and bytes.",
                self._curves(rows),
            )
            for part, rows in self.table.groupby("part", sort=False)
        ]

    def _curves(self, rows: pd.DataFrame) -> Figure:
        measured = rows.assign(mean=rows["speedup"], low=rows["lowest"], high=rows["highest"])
        limit = rows.assign(
            mean=rows["limit"], low=float("nan"), high=float("nan"), heads="limit, " + rows["heads"]
        )
        return plot_curves(
            pd.concat([measured, limit]),
            x="length",
            series="heads",
            xlabel="tokens of the prompt",
            ylabel="speed-up",
            dashed=list(dict.fromkeys(limit["heads"])),
        )

    def save(self, folder: str | Path) -> Path:
        """Write speed.parquet, speed.csv, the figures and report.html; raises RunError as `mmlens run`."""
        folder = Path(folder)
        check_folder(folder, RECORD)
        with written_at_once(folder, RECORD) as (place, record):
            record |= {**self.record, "settings": self.settings}
            self.table.to_parquet(place / "speed.parquet")
            self.table.to_csv(place / "speed.csv", index=False)
            figures = self.figures()
            for number, (_, _, figure) in enumerate(figures, start=1):
                picture_files(figure, place / "figures", f"{number:02d}-speed-up")
            write_page(
                place / "report.html",
                f"Hybrid attention on {self.record['model']['name']}",
                "Few heads attend to the whole prompt, the others to sinks and a window.",
                "",
                [
                    ("Setting", pairs_html({**self.settings, **self.record["machine"]}), []),
                    ("Figures", "", [(title, figure_html(title, why, of)) for title, why, of in figures]),
                    ("Table", table_html("Means of either side, and ratios of pairs.", self.table), []),
                ],
            )
        return folder


def accelerate(
    model: HookedVLM,
    scores: HeadScores,
    lengths: Sequence[int],
    *,
    fractions: Sequence[float] = (0.05,),
    sink: int = 512,
    window: int = 4096,
    parts: Sequence[str] = PARTS,
    repeats: int = 5,
    seed: int = 0,
    name: str = "",
    progress: bool = True,
) -> Acceleration:
    """`prefill_speed` with the heads of the highest scores dense, `fractions` of all, at each of the lengths.

    Raises ValueError for scores of a model of another shape, and as `prefill_speed`.
    """
    sets: dict[str, HeadSet] = {
        f"{fraction:.1%} dense": scores.top(float(fraction)) for fraction in fractions
    }
    table = prefill_speed(
        model,
        sets,
        lengths,
        sink=sink,
        window=window,
        parts=parts,
        repeats=repeats,
        seed=seed,
        progress=progress,
    )
    settings = {
        "scores": scores.name,
        "fractions": list(fractions),
        "lengths": list(lengths),
        "sink": sink,
        "window": window,
        "repeats": repeats,
        "seed": seed,
        "heads": {label: [list(head) for head in heads] for label, heads in sets.items()},
    }
    record = {
        "schema": "mmlens.accelerate/1",
        "model": describe_model(model, name),
        "machine": machine(model),
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Acceleration(table, settings, record)


def load_scores(path: str | Path) -> HeadScores:
    """Head scores as `HeadScores.save` wrote them; RunError where there is no such file."""
    if not Path(path).is_file():
        raise RunError(
            f"there are no head scores at {str(path)!r}: `mmlens core-heads` writes ram_per_example.parquet"
        )
    return HeadScores.load(path)
