"""Run the truth tests at full size and write docs/truth.md.

    python experiments/validation/report.py [--out out/truth]

Every part leaves a table (csv) in the folder; one that is there already is read, not run again.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from intervals import N_RESAMPLES, coverage
from planted import FAMILIES, planted_model
from tqdm import tqdm
from truth import findings, noise_p_values, optimism

from mmlens.scores.retrieval import evidence_attention
from mmlens.scores.significance import ram_significance
from mmlens.statistics import benjamini_hochberg

LEVEL = 0.05
N_PLANTED, N_SEEDS, N_OPTIMISM, N_COVERAGE = 12, 200, 50, 1000
NOISE_FAMILY = "llava"


# ---------------------------------------------------------------------- parts


def planted_findings(family: str) -> pd.DataFrame:
    return findings(planted_model(family), n=N_PLANTED).assign(family=family)


def ram_of_planted(family: str) -> pd.DataFrame:
    """Attention of every head, and its significance against all places and against the other objects."""
    planted = planted_model(family)
    examples = planted.examples(2 * N_PLANTED, seed=3)
    attention = evidence_attention(planted.model, examples, progress=False)
    tests = {
        "places": ram_significance(planted.model, examples, progress=False),
        "objects": ram_significance(planted.model, examples, regions=planted.other_objects, progress=False),
    }
    roles = {head: role for role, head in planted.roles.items()}
    rows = []
    for layer, head in planted.model.heads:
        row = {
            "family": family,
            "node": roles.get((layer, head), f"L{layer}H{head}"),
            "ram": float(attention.ram.values[layer, head]),
            "vision_mass": float(attention.vision_mass.values[layer, head]),
        }
        rows.append(row | {name: found.adjusted[layer, head] for name, found in tests.items()})
    return pd.DataFrame(rows)


def noise() -> pd.DataFrame:
    rows = []
    for seed in tqdm(range(N_SEEDS), desc="random models"):
        for test, p_values in noise_p_values(NOISE_FAMILY, seed).items():
            rows.append(noise_row(seed, test, p_values))
    return pd.DataFrame(rows)


def noise_row(seed: int, test: str, p_values: np.ndarray) -> dict[str, object]:
    adjusted = benjamini_hochberg(p_values)
    return {
        "seed": seed,
        "test": test,
        "heads": len(p_values),
        "before": int((p_values <= LEVEL).sum()),
        "after": int((adjusted <= LEVEL).sum()),
    }


def leakage() -> pd.DataFrame:
    return pd.concat([optimism(NOISE_FAMILY, seed) for seed in tqdm(range(N_OPTIMISM), desc="leakage")])


def all_of(part: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([part(family) for family in FAMILIES])


PARTS: dict[str, Callable[[], pd.DataFrame]] = {
    "ram": lambda: all_of(ram_of_planted),
    "planted": lambda: all_of(planted_findings),
    "noise": noise,
    "leakage": leakage,
    "coverage": lambda: coverage(N_COVERAGE),
}


# ---------------------------------------------------------------------- the page


def page(tables: dict[str, pd.DataFrame]) -> str:
    text = (Path(__file__).parent / "truth.md.in").read_text(encoding="utf-8")
    filled = {
        "date": f"{datetime.datetime.now(datetime.UTC):%d %B %Y}".lstrip("0"),
        "n_planted": N_PLANTED,
        "n_ram": 2 * N_PLANTED,
        "n_seeds": tables["noise"]["seed"].nunique(),
        "n_optimism": tables["leakage"]["seed"].nunique(),
        "n_coverage": N_COVERAGE,
        "n_resamples": N_RESAMPLES,
        "named": _named(tables["planted"]),
        "ram": _ram(tables["ram"]),
        "noise": _noise(tables["noise"]),
        "leakage": _leakage(tables["leakage"]),
        "coverage": _coverage(tables["coverage"]),
        "outside": _outside(tables["coverage"]),
    }
    for name, value in filled.items():
        text = text.replace("{" + name + "}", str(value))
    return text


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _named(table: pd.DataFrame) -> str:
    """One row per method and corruption: what it names, with the smallest effect of it, and the largest of the rest."""
    rows = []
    for (method, what), both in table.fillna({"corruption": ""}).groupby(
        ["method", "corruption"], sort=False
    ):
        named, others = [], []
        for family in FAMILIES:
            own = both[both["family"] == family]
            yes = own["named"].astype(bool)
            names = sorted(own["node"][yes])
            named.append((names, own["share"][yes].min() if names else None))
            others.append(f"{own['share'][~yes].max():.3f}")
        same = len({tuple(names) for names, _ in named}) == 1
        names = ", ".join(named[0][0]) if same else "; ".join(", ".join(own) for own, _ in named)
        least = ", ".join("-" if share is None else f"{share:.2f}" for _, share in named)
        rows.append([str(method), str(what), names or "none", least, ", ".join(others)])
    return markdown(["method", "source differs in", "names", "least of these", "most of all others"], rows)


def _ram(table: pd.DataFrame) -> str:
    rows = []
    for family, own in table.groupby("family", sort=False):
        is_role = ~own["node"].str.match(r"L\d")
        for _, row in own[is_role].iterrows():
            rows.append([str(family), *_ram_row(row["node"], row)])
        rest = own[~is_role]
        extremes = {name: rest[name].max() for name in ("ram", "vision_mass")}
        lowest = {name: rest[name].min() for name in ("places", "objects")}
        label = f"the most of {len(rest)} others (p: the least)"
        rows.append([str(family), *_ram_row(label, pd.Series(extremes | lowest))])
    header = ["family", "head", "RAM", "attention to the image", "p, all places", "p, other objects"]
    return markdown(header, rows)


def _ram_row(label: str, row: pd.Series) -> list[str]:
    p_values = [f"{row[name]:.2g}" for name in ("places", "objects")]
    return [label, f"{row['ram']:.3f}", f"{row['vision_mass']:.3f}", *p_values]


def _noise(table: pd.DataFrame) -> str:
    rows = []
    for test, own in table.groupby("test", sort=False):
        share = own["before"] / own["heads"]
        error = share.std(ddof=1) / np.sqrt(len(own))
        any_after = (own["after"] > 0).mean()
        any_error = np.sqrt(any_after * (1 - any_after) / len(own))
        rows.append(
            [
                str(test),
                f"{int(own['before'].sum())} of {int(own['heads'].sum())}: {share.mean():.1%} +- {error:.1%}",
                f"{int(own['after'].sum())}: {own['after'].sum() / own['heads'].sum():.2%}",
                f"{int((own['after'] > 0).sum())} of {len(own)}: {any_after:.1%} +- {any_error:.1%}",
            ]
        )
    header = ["test", "heads with p <= .05", "heads after correction", "seeds with any head after correction"]
    return markdown(header, rows)


def _leakage(table: pd.DataFrame) -> str:
    rows = []
    for measure, own in table.groupby("measure", sort=False):
        cells = [f"{own[on].mean():.4f} +- {own[on].sem():.4f}" for on in ("on_same", "on_others")]
        rows.append([str(measure), *cells])
    return markdown(["the best head's", "on the examples that chose it", "on as many others"], rows)


def _coverage(table: pd.DataFrame) -> str:
    wide = table.pivot_table(index=["interval", "distribution"], columns="n", values="coverage", sort=False)
    rows = [
        [*map(str, index), *(f"{value:.1%}" for value in row)]
        for index, row in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return markdown(["interval of", "distribution", *(f"n = {n}" for n in wide.columns)], rows)


def _outside(table: pd.DataFrame) -> str:
    off = table[(table["coverage"] < 0.93) | (table["coverage"] > 0.97)]
    return f"{len(off)} of {len(table)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/truth"), help="where the tables are kept")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tables = {}
    for name, part in PARTS.items():
        path = folder / f"{name}.csv"
        if not path.exists():
            part().to_csv(path, index=False)
        tables[name] = pd.read_csv(path)
    target = Path(__file__).parents[2] / "docs" / "truth.md"
    target.write_text(page(tables), encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
