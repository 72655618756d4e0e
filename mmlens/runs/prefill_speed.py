"""`mmlens prefill-speed`: how much faster a model's prefill is with few heads dense, in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mmlens.arguments import fractions_of, instance_of, path_of
from mmlens.experiments.common import POOLED
from mmlens.experiments.hybrid import CORE, MATCHED
from mmlens.head_scores import HeadScores
from mmlens.heads import HeadSet
from mmlens.hybrid.rule import StreamingRule
from mmlens.hybrid.speed import PARTS, prefill_speed
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.provenance import describe_model, machine, versions
from mmlens.runs.folder import broken_parts, check_folder, written_at_once
from mmlens.runs.record import RunError, read_record
from mmlens.runs.report import Picture, part, picture_part, write_page
from mmlens.runs.run import read_findings
from mmlens.viz.intervals import plot_curves, plot_trade_off
from mmlens.viz.pictures import picture_files

RECORD = "prefill_speed.json"


@dataclass(frozen=True)
class PrefillSpeed:
    """The table of `prefill_speed` over shares of dense heads and lengths, and what was asked."""

    table: pd.DataFrame
    settings: dict[str, Any]
    record: dict[str, Any]
    quality: pd.DataFrame | None = None
    """Accuracies with as many dense heads, as `quality_of` reads them: against these the speed is drawn."""

    def figures(self) -> list[tuple[str, str, Figure]]:
        """Speed-up by length, a curve for each share of dense heads, its limit dashed; and speed against accuracy."""
        figures = [
            (
                f"Speed-up of {part}",
                "Time with all heads dense (SDPA) over time with the others streaming: median of the pairs, band from "
                "the lowest to the highest; dashed: the least times by operations and bytes.",
                self._curves(rows),
            )
            for part, rows in self.table.groupby("part", sort=False)
        ]
        if self.quality is not None:
            figures.append(self._against_quality(self.quality))
        return figures

    def _against_quality(self, quality: pd.DataFrame) -> tuple[str, str, Figure]:
        length, rule = (
            self.table["length"].max(),
            StreamingRule(self.settings["sink"], self.settings["window"]),
        )
        rows = quality[quality["length"] == length]
        shares = ", ".join(
            f"{window} ({rows.loc[rows['window'] == window, 'streaming_share'].iloc[0]:.0%})"
            for window in rows["window"].unique()
        )
        share = rule.share(int(length))
        caption = (
            f"From few dense heads to many, along each line. Across: prefill of {length:,} tokens, with sinks and a "
            f"window in which a streaming head computes {share:.0%} of a dense head's scores; median of the pairs, "
            "from the lowest to the highest. Upright: accuracy with as many dense heads on the held-out examples of "
            f"the run, whose prompts are shorter; its windows, with the same share: {shares}; 95% intervals."
        )
        figure = plot_trade_off(
            rows.sort_values("n_dense").assign(series=rows["arm"] + ", window " + rows["window"].astype(str)),
            x="speedup",
            series="series",
            xlabel=f"speed-up of prefill at {length:,} tokens",
            ylabel="accuracy",
            percent=True,
        )
        return "Speed against accuracy", caption, figure

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
            dashed={f"limit, {heads}": heads for heads in measured["heads"]},
        )

    def save(self, folder: str | Path) -> Path:
        """Write speed.parquet, speed.csv, the figures and report.html; raises RunError as `mmlens run`."""
        folder = Path(folder)
        check_folder(folder, RECORD)
        with written_at_once(folder, RECORD) as (place, record):
            record |= {**self.record, "settings": self.settings}
            self.table.to_parquet(place / "speed.parquet")
            self.table.to_csv(place / "speed.csv", index=False)
            if self.quality is not None:
                self.quality.to_csv(place / "speed_quality.csv", index=False)
            figures = []
            for number, (title, why, figure) in enumerate(self.figures(), start=1):
                stem = f"{number:02d}-speed-up"
                width = picture_files(figure, place / "figures", stem)
                figures.append((title, picture_part(Picture(title, why, place / "figures" / stem, width))))
            write_page(
                place / "report.html",
                f"Hybrid attention on {self.record['model']['name']}",
                "Few heads attend to the whole prompt, the others to sinks and a window.",
                "",
                [
                    ("Setting", part("pairs", {**self.settings, **self.record["machine"]}), []),
                    ("Figures", "", figures),
                    ("Table", part("table", "Means of either side, and ratios of pairs.", self.table), []),
                ],
            )
        return folder


def time_prefill(
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
    quality: str | Path | None = None,
    progress: bool = True,
) -> PrefillSpeed:
    """`prefill_speed` with the heads of the highest scores dense, `fractions` of all, at each of the lengths.

    `quality` is the folder of a run of the experiment `hybrid` on this model: its accuracies are put beside the speeds.

    Raises ValueError for scores of a model of another shape, and as `prefill_speed`; RunError for a `quality` that is
    no such run, is of other weights, or has no number of dense heads in common.
    """
    model_of(model)
    instance_of("scores", scores, HeadScores, "HeadScores: mmlens.ram(model, examples) gives them")
    fractions = fractions_of("fractions", fractions)
    described = describe_model(model, name)
    outcomes = None if quality is None else _accuracies(quality, described)
    sets: dict[str, HeadSet] = {
        f"{fraction:.1%} dense": scores.top(float(fraction)) for fraction in fractions
    }
    if outcomes is not None:
        _check_counts(outcomes, {len(heads) for heads in sets.values()}, parts)
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
        "schema": "mmlens.prefill-speed/1",
        "model": described,
        "machine": machine(model),
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    against = None if outcomes is None else _speed_and_accuracy(table, outcomes)
    return PrefillSpeed(table, settings, record, against)


def _accuracies(folder: str | Path, model: Mapping[str, Any]) -> pd.DataFrame:
    """Of a run of `hybrid`: accuracy with evidence by window, arm and number of dense heads."""
    record = read_record(folder)
    if record["request"]["experiment"] != "hybrid":
        raise RunError(f"{str(folder)!r} is a run of {record['request']['experiment']!r}, not of 'hybrid'")
    if record["model"]["fingerprint"] != model["fingerprint"]:
        raise RunError(
            f"{str(folder)!r} is a run of {record['model']['name']!r} with other weights than {model['name']!r}"
        )
    broken = broken_parts(Path(folder))
    if broken:
        raise RunError(f"the run in {str(folder)!r} is broken ({'; '.join(broken[:3])}): run it again")
    found = read_findings(folder)
    table = found.tables["quality"][1]
    chosen = table[(table["kind"] == POOLED) & (table["metric"] == "accuracy")]
    chosen = chosen[chosen["arm"].isin([CORE, MATCHED])]
    shares = {int(window): share for window, share in found.numbers["share_of_scores"].items()}
    return chosen.assign(streaming_share=chosen["window"].map(shares))


def _check_counts(outcomes: pd.DataFrame, counts: set[int], parts: Sequence[str]) -> None:
    known = sorted(set(outcomes["count"].tolist()))
    if not counts & set(known):
        raise RunError(
            f"the run of 'hybrid' has {known} dense heads, and none of these is timed: {sorted(counts)}"
        )
    if "prefill" not in parts:
        raise RunError(f"speed is put against accuracy by prefill, and only {list(parts)} is timed")


def _speed_and_accuracy(table: pd.DataFrame, outcomes: pd.DataFrame) -> pd.DataFrame:
    """One row per length, window, arm and number of dense heads that both have."""
    speeds = table.loc[table["part"] == "prefill", ["length", "n_dense", "speedup", "lowest", "highest"]]
    speeds = speeds.rename(columns={"lowest": "speedup_low", "highest": "speedup_high"})
    names = ["window", "arm", "count", "dense_share", "streaming_share", "mean", "low", "high"]
    joined = speeds.merge(outcomes[names], left_on="n_dense", right_on="count")
    return joined.drop(columns="count")


def load_scores(path: str | Path) -> HeadScores:
    """Head scores as `HeadScores.save` wrote them; RunError where there is no such file."""
    if not path_of("path", path).is_file():
        raise RunError(
            f"there are no head scores at {str(path)!r}: `mmlens core-heads` writes ram_per_example.parquet"
        )
    return HeadScores.load(path)
