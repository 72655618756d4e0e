"""What the experiments on the paper's figures share: which examples and heads, ablated how, counted how."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mmlens.data.examples import Example
from mmlens.experiments.ablations import ablated, by_example, paired_difference, references, with_evidence
from mmlens.experiments.experiment import Findings, Setup
from mmlens.head_scores import HeadScores, share_of
from mmlens.heads import HeadSet, head_name
from mmlens.model.batches import Batches
from mmlens.scores.retrieval import ram
from mmlens.statistics import interval_of, ratio_interval

PAPER = "arXiv 2606.05843"
POOLED = "pooled"
FIVE_PERCENT = 0.05


def selection_ram(setup: Setup) -> HeadScores:
    """RAM on the examples of the selection split that have evidence."""
    return ram(setup.model, with_evidence(setup.selection), **setup.options)


def kinds_of(scores: HeadScores) -> list[str]:
    """The kinds of the scored examples, sorted."""
    return sorted(set(scores.kinds or ()))


def by_kind(scores: HeadScores) -> dict[str, HeadScores]:
    """The scores of all examples under "pooled", then those of every kind, where there is more than one."""
    kinds = kinds_of(scores)
    return {POOLED: scores} | ({kind: scores.select(kind) for kind in kinds} if len(kinds) > 1 else {})


def all_equal(scores: HeadScores) -> bool:
    """Whether the score is the same for every head, so that it ranks none and `top` refuses it."""
    return bool(np.ptp(scores.values[scores.grid.exists].numpy()) == 0)


def top_unless_tied(scores: HeadScores, fraction: float) -> HeadSet | None:
    """`scores.top(fraction)`, or None where a head outside has the score of one inside: their order would decide.

    >>> import torch
    >>> scores = HeadScores(torch.tensor([[[0.9, 0.0], [0.0, 0.0]]]))
    >>> top_unless_tied(scores, 0.25), top_unless_tied(scores, 0.5)
    (HeadSet(1 of 2 x 2: L0H0), None)
    """
    ordered = scores.values[scores.grid.exists].sort(descending=True).values
    count = share_of(fraction, len(ordered))
    return None if count < len(ordered) and ordered[count - 1] == ordered[count] else scores.top(fraction)


def head_names(heads: HeadSet, most: int = 12) -> str:
    """Heads as text, the first `most` of them.

    >>> head_names(HeadSet([(1, 3), (0, 2)], grid=(2, 4)))
    'L1H3 L0H2'
    """
    shown = " ".join(head_name(head) for head in list(heads)[:most])
    return shown + (f" and {len(heads) - most} more" if len(heads) > most else "")


def matched_controls(heads: HeadSet, n_draws: int, seed: int) -> tuple[list[HeadSet], str]:
    """`n_draws` layer-matched random sets, and what could not be kept in its layer ("" where all could)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn = [heads.matched_random(seed + draw) for draw in range(n_draws)]
    return drawn, str(caught[0].message) if caught else ""


def ablation_outcomes(
    setup: Setup,
    arms: Mapping[str, Sequence[HeadSet]],
    modes: Sequence[str] = ("mean",),
) -> pd.DataFrame:
    """Accuracy (and invalid answers, where there can be such: `Judge.shares`) on the evaluation examples with evidence.

    Every set of every arm is ablated at all positions in every mode. One row per mode, arm, draw (number of the set
    in its arm), example and metric: mode, arm, draw, n_heads, example, id, kind, metric, value, clean. The reference of
    the mean is the selection split. Sets that several arms share are run once.
    """
    examples = with_evidence(setup.evaluation)
    metrics = setup.judge.shares(examples)
    sets = {(arm, draw, len(heads)): heads for arm, drawn in arms.items() for draw, heads in enumerate(drawn)}
    return ablated(setup, examples, sets, references(setup, modes), metrics, names=("arm", "draw", "n_heads"))


def read_null(setup: Setup, question: str) -> list[str]:
    """A warning where the tokenizer does not know the null question."""
    tokenizer = setup.model.tokenizer
    unknown = None if tokenizer is None else tokenizer.unk_token_id
    if tokenizer is None or unknown is None:
        return []
    ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    if unknown not in ids:
        return []
    read = " ".join(tokenizer.convert_ids_to_tokens(ids))
    return [f"the model reads the null question {question!r} as {read}, so it may name what the images show"]


# ---------------------------------------------------------------------- summaries of outcomes


def kind_groups(kinds: Iterable[str], controls: Collection[str] = ()) -> dict[str, list[str]]:
    """Which kinds of examples are summarised together: "pooled" is all but the controls, then every kind alone.

    >>> kind_groups(["objects", "documents", "text"], controls=["text"])
    {'pooled': ['documents', 'objects'], 'documents': ['documents'], 'objects': ['objects'], 'text': ['text']}
    """
    each = {kind: [kind] for kind in sorted(set(kinds))}
    return {POOLED: [kind for kind in each if kind not in controls], **each}


def summarised(
    outcomes: pd.DataFrame,
    by: Sequence[str],
    groups: Mapping[str, Collection[str]] | None = None,
    *,
    paired: tuple[str, str, str] | None = ("difference", "value", "clean"),
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Means over examples, of each example's mean over draws, with 95% intervals: a row for each group of `by`.

    `outcomes` has a row per example and draw: example, draw, value, clean (what the run without the intervention gave)
    and the columns of `by`. With `groups`, name -> kinds of examples, each group of `by` has a row for every name, said
    in the column `kind`; a name that has no example there has none.

    Columns: mean, low, high; clean; of `paired`, (name, one, other), the mean of the column `one` minus `other`, paired
    by example, as name, name_low, name_high (None: left out); n examples, n_draws, and the lowest and highest mean of a
    single draw, draw_min and draw_max. Wilson's and Newcombe's intervals for 0 and 1, else the bootstrap's.

    >>> outcomes = pd.DataFrame({"arm": "top", "example": [0, 0, 1, 1], "draw": [0, 1, 0, 1], "clean": 1.0})
    >>> outcomes["value"] = [0.0, 0.5, 1.0, 0.5]
    >>> summarised(outcomes, ["arm"])[["arm", "mean", "difference", "n", "n_draws", "draw_max"]].values.tolist()
    [['top', 0.5, -0.5, 2, 2, 0.5]]
    """
    rows = []
    cells = list(outcomes.groupby(list(by), sort=False))
    for key, cell in tqdm(cells, desc="intervals", unit="cell", disable=not progress):
        named = dict(zip(by, key, strict=True))
        if groups is None:
            rows.append(named | _statistics(cell, paired, seed))
            continue
        for kind, members in groups.items():
            part = cell[cell["kind"].isin(list(members))]
            if len(part):
                rows.append(named | {"kind": kind} | _statistics(part, paired, seed))
    return pd.DataFrame(rows)


def _statistics(part: pd.DataFrame, paired: tuple[str, str, str] | None, seed: int) -> dict[str, Any]:
    of_example = part.groupby("example")[["value", "clean"]].agg({"value": "mean", "clean": "first"})
    draws = part.groupby("draw")["value"].mean()
    low, high = interval_of(of_example["value"].to_numpy(), seed)
    found: dict[str, Any] = {"mean": of_example["value"].mean(), "low": low, "high": high}
    found["clean"] = of_example["clean"].mean()
    if paired is not None:
        name, one, other = paired
        mean, down, up = paired_difference(of_example[one], of_example[other], seed)
        found |= {name: mean, f"{name}_low": down, f"{name}_high": up}
    return found | {
        "n": len(of_example),
        "n_draws": len(draws),
        "draw_min": draws.min(),
        "draw_max": draws.max(),
    }


def ablation_table(outcomes: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`summarised` over `ablation_outcomes`: one row per mode, arm, metric and kind ("pooled" is all)."""
    groups = kind_groups(outcomes["kind"])
    # The only kind there is would stand there twice.
    groups = groups if len(groups) > 2 else {POOLED: groups[POOLED]}
    table = summarised(outcomes, ["mode", "arm", "metric"], groups, seed=seed)
    n_heads = outcomes.groupby(["mode", "arm"])["n_heads"].max()
    table["n_heads"] = [int(n_heads[row.mode, row.arm]) for row in table.itertuples()]
    columns = ["mode", "arm", "kind", "metric", "n_heads", "n_draws", "n", "clean", "mean", "low", "high"]
    return table[[*columns, "difference", "difference_low", "difference_high"]]


def arm_difference(
    outcomes: pd.DataFrame,
    one: str,
    other: str,
    *,
    mode: str | None = None,
    metric: str = "accuracy",
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of arm `one` minus arm `other` on the same examples (means over draws), and its 95% interval."""
    chosen = outcomes[outcomes["metric"] == metric]
    if mode is not None:
        chosen = chosen[chosen["mode"] == mode]
    values, others = (by_example(chosen[chosen["arm"] == arm]) for arm in (one, other))
    return paired_difference(values, others, seed)


def token_counts(setup: Setup, examples: Sequence[Example]) -> pd.DataFrame:
    """How many tokens the prompt of each example has: `positions`, `visual`, `evidence` and `key` tokens.

    `key` is the number of key tokens of a head, max(1, floor(.05 L)). In the order of the examples.
    """
    parts = []
    for index, prompt in Batches(setup.model, examples, **setup.options, label="tokens", by_size=True):
        tokens = prompt.token_map
        counts = {
            "positions": (~tokens.is_padding).sum(-1).numpy(),
            "visual": tokens.is_image.sum(-1).numpy(),
            "evidence": tokens.evidence([examples[at] for at in index]).sum(-1).numpy(),
        }
        parts.append(pd.DataFrame(counts, index=index))
    found = pd.concat(parts).sort_index()
    return found.assign(key=(found["positions"] // 20).clip(lower=1))


def selectivity(
    on_evidence: Float[Tensor, " example"],
    on_images: Float[Tensor, " example"],
    evidence_share: Sequence[float] | np.ndarray,
) -> dict[str, float]:
    """Share of the attention to visual tokens that goes to the evidence: mean(RAM) / mean(vision mass), with interval.

    The interval is the bootstrap's of a ratio of means (BCa, examples drawn with both numbers). `chance` is what the
    share would be if in every example the same attention were spread evenly over the visual tokens, of which
    `evidence_share` [example] are evidence.
    """
    low, high = ratio_interval(on_evidence, on_images, n_resamples=2000)
    evidence, images = float(on_evidence.double().mean()), float(on_images.double().mean())
    chance = float(np.average(np.asarray(evidence_share), weights=on_images.double().numpy()))
    found = {
        "ram": evidence,
        "vision_mass": images,
        "selectivity": evidence / images,
        "low": low,
        "high": high,
    }
    return found | {"chance": chance}


def beside_chance(table: pd.DataFrame, series: str) -> pd.DataFrame:
    """Rows of `selectivity` as `plot_intervals` draws them: `mean`, and for every row one more with its chance."""
    measured = table.rename(columns={"selectivity": "mean"}).assign(series=table[series])
    chance = table.assign(
        mean=table["chance"], low=np.nan, high=np.nan, series=table[series] + ", evenly spread"
    )
    return pd.concat([measured, chance], ignore_index=True)


def resampled_means(scores: HeadScores, n_resamples: int, seed: int) -> np.ndarray:
    """Mean scores [resample, head] of the heads that exist, examples drawn with replacement within each kind."""
    rng = np.random.default_rng(seed)
    total = np.zeros((n_resamples, len(scores.grid)))
    for part in [scores.select(kind) for kind in kinds_of(scores)] if scores.kinds else [scores]:
        counts = rng.multinomial(len(part), np.full(len(part), 1 / len(part)), size=n_resamples)
        total += counts @ flat_per_example(part)
    return total / len(scores)


def flat_per_example(scores: HeadScores) -> np.ndarray:
    """[example, head] in float64, the heads that exist in (layer, head) order."""
    return scores.per_example[:, scores.grid.exists].double().numpy()


def plain(value: Any) -> Any:
    """The value as JSON takes it: Python numbers, lists and dicts; a number that is not finite is None.

    A table is the list of its rows.

    >>> plain({"a": np.float64(1.5), "b": (np.int64(2), float("nan"))})
    {'a': 1.5, 'b': [2, None]}
    """
    if isinstance(value, pd.DataFrame):
        value = value.to_dict("records")
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray | HeadSet):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def across_table(
    findings: Mapping[str, Findings], pick: Callable[[Mapping[str, Any]], Mapping[str, Any]] | Sequence[str]
) -> pd.DataFrame:
    """One row per model: its name, and what `pick` takes from the numbers found on it, or those of these names."""
    take = pick if callable(pick) else lambda numbers: {name: numbers[name] for name in pick}
    return pd.DataFrame([{"model": name, **take(found.numbers)} for name, found in findings.items()])


def across_rows(
    findings: Mapping[str, Findings],
    part: str,
    keep: Callable[[Mapping[str, Any], Mapping[str, Any]], bool] = lambda row, numbers: True,
) -> pd.DataFrame:
    """The rows that `numbers[part]` lists, of all models, each after its model's name.

    `keep` says of a row, and the numbers that it is of, whether it is wanted.
    """
    return pd.DataFrame(
        [
            {"model": name, **row}
            for name, found in findings.items()
            for row in found.numbers[part]
            if keep(row, found.numbers)
        ]
    )


def of_models(holds: pd.Series) -> str:
    """In how many models something holds, in words.

    >>> of_models(pd.Series([True, False, True]))
    '2 of 3 models'
    """
    return f"{int(holds.sum())} of {len(holds)} models"


def ranged(value: float, low: float, high: float, *, style: str = ".2f") -> str:
    """A value with its interval.

    >>> ranged(0.5, 0.4, 0.6)
    '0.50 [0.40, 0.60]'
    """
    return f"{value:{style}} [{low:{style}}, {high:{style}}]"
