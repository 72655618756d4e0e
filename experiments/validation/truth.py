"""The proof that the methods find the truth, and nothing where there is none; docs/truth.md has the numbers.

- `findings`: what every causal method names in a model whose heads were planted (`planted`).
- `noise_p_values`: what the tests call significant in random models, of unrelated evidence and answers.
- `optimism`: how good heads of no effect look where they are chosen and judged on the same examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from planted import CORRUPTIONS, Planted, unrelated_examples, untrained_model
from tqdm import tqdm

from mmlens.attribution.nodes import attribute
from mmlens.data.examples import Example
from mmlens.effects.grids import patch_heads, patch_heads_qkv
from mmlens.effects.measure import effect
from mmlens.effects.sweeps import sweep
from mmlens.head_scores import HeadScores
from mmlens.interventions.ablation import MODES, ablate, mean_activations
from mmlens.interventions.attention_edges import knockout
from mmlens.interventions.paths import path_patch
from mmlens.metrics.outcomes import logit_difference
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Intervention, NoChangeWarning
from mmlens.model.prompt import Prompt
from mmlens.scores.significance import RamSignificance, ram_significance
from mmlens.statistics import paired_permutation_test

# ---------------------------------------------------------------------- what the methods find


NAMED = 0.1
"""A method names what moves the logit difference by at least this share of its clean mean."""


def findings(planted: Planted, *, n: int = 24, seed: int = 0, progress: bool = True) -> pd.DataFrame:
    """What every causal method of the library says of every head (and path) of a planted model.

    One row per method and node or path: method, corruption (what the source differs in, for the methods that patch),
    node (its role, or layer and head), effect, share, named. `effect` is the mean over `n` examples of |change of the
    logit difference|, for attribution of the estimated change; `share` is that over the clean logit difference's
    mean, and `named` says whether it reaches NAMED. k and v are of a group of heads and go by its planted head.

    Ablation (`ablate`) in all six modes; knockout of each head's edges from the question to the evidence, and from the
    last position to the question; activation patching of z, and of q, k and v; attribution of z, q and k by the plain
    gradient and by the QK fix; path patching from the planted heads, three others (early, middle, late) and the image
    to the planted heads' q, k and v and to the logits.
    """
    model = planted.model
    examples, reference = planted.examples(n, seed), planted.examples(n, seed + 1)
    prompt = model.encode_images(model.prompt_examples(examples))
    clean = effect(model, prompt, None, logit_difference).clean_mean
    sources = {
        what: model.encode_images(model.prompt_examples(planted.corrupted(examples, what, seed)))
        for what in CORRUPTIONS
    }
    runs: dict[tuple[str, str], dict[Any, Intervention]] = {}
    means = mean_activations(model, reference)
    references: dict[str, Any] = {"mean": means, "mean_query": means, "resample": reference}
    for mode in MODES:
        chosen = {
            head: ablate([head], mode, reference=references.get(mode), seed=seed) for head in model.heads
        }
        runs[f"ablate {mode}", ""] = chosen
    evidence = prompt.token_map.evidence(examples)
    for queries, keys, label in (("question", evidence, "evidence"), ("last", "question", "question")):
        edges = {head: knockout(queries, keys, heads=[head]) for head in model.heads}
        runs[f"knockout {queries} to {label}", ""] = edges
    for what, source in sources.items():
        runs["patch z", what] = dict(patch_heads(model, source))
        runs["patch q, k, v", what] = dict(patch_heads_qkv(model, source, parts=("q", "k", "v")))
        runs["path", what] = _paths(planted, source)
    frames = []
    for (method, what), interventions in tqdm(runs.items(), desc="planted heads", disable=not progress):
        with warnings.catch_warnings():
            # Much of a planted model changes nothing, which is what is asked here.
            warnings.simplefilter("ignore", NoChangeWarning)
            table = sweep(model, prompt, interventions, logit_difference, progress=False)
        effects = (table["value"] - table["clean"]).abs().groupby(table["intervention"], sort=False).mean()
        frames.append(_found(planted, method, what, effects, clean))
    for what, source in sources.items():
        for way in ("gradient", "qk_fix"):
            attribution = attribute(
                model, prompt, source, logit_difference, nodes=("z", "q", "k"), method=way
            )
            table = attribution.table()
            table = table.assign(part=table["hook"].str[-1], effect=table["score"].abs())
            for parts in ("z", "qk") if way == "gradient" else ("qk",):
                own = table[table["part"].isin(list(parts))]
                effects = own.groupby(["layer", "head", "part"], sort=False)["effect"].mean()
                frames.append(_found(planted, f"attribute {', '.join(parts)} ({way})", what, effects, clean))
    return pd.concat(frames, ignore_index=True)


def _paths(planted: Planted, source: Prompt) -> dict[Any, Intervention]:
    model, known = planted.model, set(planted.roles.values())
    unplanted = [head for head in model.heads if head not in known]
    others = [unplanted[0], unplanted[len(unplanted) // 2], unplanted[-1]]
    senders: list[Any] = ["image", *planted.roles.values(), *others]
    receivers: list[Any] = ["logits"]
    for role, head in planted.roles.items():
        # The reader's keys and values are those of matching.
        receivers += [(*head, kind) for kind in ("q" if role == "reader" else "qkv")]
    return {
        (sender, receiver): path_patch([sender], [receiver], source)
        for sender in senders
        for receiver in receivers
        if sender == "image" or receiver == "logits" or sender[0] < receiver[0]
    }


def _found(planted: Planted, method: str, corruption: str, effects: pd.Series, clean: float) -> pd.DataFrame:
    values = effects.to_numpy(dtype=np.float64)
    return pd.DataFrame(
        {
            "method": method,
            "corruption": corruption,
            "node": [_label(planted, node) for node in effects.index],
            "effect": values,
            "share": values / clean,
            "named": values >= NAMED * clean,
        }
    )


def _name(planted: Planted, layer: int, head: int, kind: str = "z") -> str:
    """A head's role, or its place; with its part, where that is q, k or v. For k and v `head` is a KV head."""
    cfg = planted.model.cfg
    size = cfg.n_heads // (cfg.n_key_value_heads or cfg.n_heads) if kind in "kv" else 1
    roles = {(at, own // size): role for role, (at, own) in reversed(planted.roles.items())}
    place = f"L{layer}KV{head}" if kind in "kv" else f"L{layer}H{head}"
    return roles.get((layer, head), place) + ("" if kind == "z" else f" {kind}")


def _label(planted: Planted, node: Any) -> str:
    """Of a head, (layer, head, part), or the two ends of a path, whose k and v go by their query head."""
    if isinstance(node, str):
        return node
    if not isinstance(node[0], tuple | str):
        return _name(planted, *node)
    sender, receiver = node
    if isinstance(receiver, tuple) and receiver[2] in "kv":
        cfg = planted.model.cfg
        size = cfg.n_heads // (cfg.n_key_value_heads or cfg.n_heads)
        receiver = (receiver[0], receiver[1] // size, receiver[2])
    return f"{_label(planted, sender)} -> {_label(planted, receiver)}"


# ---------------------------------------------------------------------- where there is nothing


def noise_p_values(
    family: str, seed: int, *, n: int = 10, n_layers: int = 2
) -> dict[str, Float[np.ndarray, " head"]]:
    """P-values of every head of a random model, whose null hypotheses hold exactly: {"RAM", "ablation"}.

    The model's weights and `n` examples, whose evidence and answers are drawn without a look at anything
    (`unrelated_examples`), are those of the seed. "RAM" is `ram_significance`; "ablation" the paired permutation test
    of what mean ablation of the head does to the logit difference.

    >>> {name: p.shape for name, p in noise_p_values("llava", seed=0).items()}
    {'RAM': (8,), 'ablation': (8,)}
    """
    model = untrained_model(family, seed=seed, n_layers=n_layers)
    examples = unrelated_examples(family, n, seed)
    attention = _ram_of(model, examples, seed)
    effects = _ablation_effects(model, examples)
    zero = np.zeros(n)
    tested = [
        paired_permutation_test(effects.per_example[:, layer, head], zero) for layer, head in model.heads
    ]
    return {"RAM": attention.p_values[attention.ram.grid.exists.numpy()], "ablation": np.array(tested)}


def optimism(family: str, seed: int, *, n: int = 20, n_layers: int = 2, n_chosen: int = 1) -> pd.DataFrame:
    """How the best heads of a model without any look on the examples that chose them, and on others.

    One row per measure: what the `n_chosen` heads of highest score are worth `on_same` examples, and
    `on_others` (n each). Every head's true worth is 0, by the way the examples are drawn: "RAM lift" over all places of
    the evidence, and "logits lost", what mean ablation of the head takes from the logit difference.

    >>> optimism("llava", seed=0, n=4)["measure"].tolist()
    ['RAM lift', 'logits lost']
    """
    model = untrained_model(family, seed=seed, n_layers=n_layers)
    first, second = (unrelated_examples(family, n, 2 * seed + split) for split in (0, 1))
    rows = []
    for measure in ("RAM lift", "logits lost"):
        scores = [
            _ram_of(model, split, seed).lift if measure == "RAM lift" else _lost(model, split)
            for split in (first, second)
        ]
        chosen = list(scores[0].top(n_chosen))
        same, others = (float(np.mean([own.values[head] for head in chosen])) for own in scores)
        rows.append((measure, seed, same, others))
    return pd.DataFrame(rows, columns=["measure", "seed", "on_same", "on_others"])


def _ram_of(model: HookedVLM, examples: Sequence[Example], seed: int) -> RamSignificance:
    return ram_significance(
        model, examples, n_resamples=999, seed=seed, batch_size=len(examples), progress=False
    )


def _lost(model: HookedVLM, examples: Sequence[Example]) -> HeadScores:
    effects = _ablation_effects(model, examples)
    return HeadScores(-effects.per_example, "logits lost", grid=effects.grid)


def _ablation_effects(model: HookedVLM, examples: Sequence[Example]) -> HeadScores:
    """What mean ablation of each head does to the logit difference of each example."""
    means = mean_activations(model, examples)
    heads = {head: ablate([head], "mean", reference=means) for head in model.heads}
    table = sweep(model, examples, heads, logit_difference, batch_size=len(examples), progress=False)
    effects = model.grid.full(len(examples))
    for head, own in table.groupby("intervention"):
        effects[(slice(None), *head)] = torch.tensor((own["value"] - own["clean"]).to_list())
    return HeadScores(effects, "ablation effect", grid=model.grid)
