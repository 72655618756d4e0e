"""Right calls of the public surface, and of what kind each of their arguments is (kinds.py).

A kind that ends in "!" is refused likewise, but its unusual values are not tried: they do not suit, or take long.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from kinds import World
from PIL import Image
from planted import planted_model, unrelated_examples, untrained_model

import mmlens
from mmlens import statistics
from mmlens.attribution.check import compare_with_patching
from mmlens.data.published.catalog import CATALOG
from mmlens.data.published.record import EvidenceData
from mmlens.data.scenes import draw_scene, iterate_scenes, scene_of, scene_vocabulary
from mmlens.experiments import catalog
from mmlens.experiments.experiment import Setup
from mmlens.experiments.looking import question_attention
from mmlens.heads import HeadGrid
from mmlens.hybrid.rule import StreamingRule
from mmlens.hybrid.speed import prefill_speed
from mmlens.metrics.answers import parse_answer
from mmlens.metrics.outcomes import evaluate, reads
from mmlens.runs.prefill_speed import load_scores, time_prefill
from mmlens.scores.lift import fake_region
from mmlens.scores.logits import position_contributions
from mmlens.scores.significance import region_permutation_test
from mmlens.scores.spatial import elbow, spatial_entropy
from mmlens.viz.ablation_curves import plot_ablation_curves, plot_ablation_panels
from mmlens.viz.examples import plot_examples
from mmlens.viz.head_map import plot_head_map
from mmlens.viz.intervals import plot_curves, plot_intervals, plot_trade_off
from mmlens.viz.matrix import plot_matrix
from mmlens.viz.overlay import plot_attention_overlay, plot_overlay_grid
from mmlens.viz.scatter import plot_scatter


@dataclass(frozen=True)
class Call:
    """A function, arguments with which it is right, and the kinds of those that the tables vary."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    kinds: dict[str, str] = field(default_factory=dict)

    def __call__(self, **changed: Any) -> Any:
        return self.function(**{**self.arguments, **changed})


NUMBERS = itertools.count()
SHARED = {"model": "model", "prompts": "prompts", "batch_size": "count", "progress": "flag"}
OF_EVIDENCE = SHARED | {"mapping": "mapping"}
RESAMPLED = {"level": "level", "n_resamples": "count", "seed": "seed"}


def calls(w: World) -> list[Call]:
    """Every function of the public surface that takes something to check."""
    return [
        *_scores(w),
        *_pages(w),
        *_effects(w),
        *_interventions(w),
        *_statistics(w),
        *_heads(w),
        *_published_heads(w),
        *_data(w),
        *_figures(w),
        *_experiments(w),
        *_model(w),
    ]


def _scores(w: World) -> list[Call]:
    given = {"model": w.model, "prompts": w.examples[:2], "progress": False}
    asked = {"model": w.model, "prompt": w.prompt}
    texts = {"model": w.model, "prompts": mmlens.scene_examples("text_recall", 2, seed=0), "progress": False}
    masses = [torch.rand(5, 3) for _ in range(3)]
    everywhere = torch.ones(tuple(w.prompt.shape), dtype=torch.bool)
    scored = {
        mmlens.ram: {},
        mmlens.scores.evidence_attention: {},
        mmlens.scores.key_token_ratio: {},
        mmlens.scores.ram_per_token: {},
        mmlens.scores.ram_lift: {"shape": "choice"},
        mmlens.scores.gaze_score: {"region": "choice"},
        mmlens.scores.null_calibrated_ram: {"null_question": "text", "choices": "flag", "marks": "flag"},
        mmlens.scores.query_focused_score: {"region": "choice"},
        mmlens.scores.visual_head_score: {"max_new_tokens": "count"},
        mmlens.scores.logit_contribution: {"final_norm": "choice"},
        mmlens.scores.ram_significance: {"n_resamples": "count!", "seed": "seed!"},
    }
    # They share their checks with ram: what is unusual is tried there alone.
    untried = {name: f"{kind}!" for name, kind in OF_EVIDENCE.items()}
    special = {
        mmlens.scores.null_calibrated_ram: {"null_question": "?"},
        mmlens.scores.query_focused_score: {"null_question": "?"},
        mmlens.scores.visual_head_score: {"max_new_tokens": 2},
        mmlens.scores.ram_significance: {"n_resamples": 1280},
    }
    return [
        *(
            Call(
                f.__name__,
                f,
                given | special.get(f, {}),
                (OF_EVIDENCE if f is mmlens.ram else untried) | kinds,
            )
            for f, kinds in scored.items()
        ),
        Call(
            "key_token_coverage",
            mmlens.scores.key_token_coverage,
            given | {"heads": [(0, 1)]},
            OF_EVIDENCE | {"heads": "heads"},
        ),
        Call(
            "copy_score",
            mmlens.scores.copy_score,
            texts | {"max_new_tokens": 2},
            SHARED | {"prompts": "prompts!", "max_new_tokens": "count"},
        ),
        Call(
            "localization_score",
            mmlens.scores.localization_score,
            given,
            SHARED | {"n_lowest": "count", "first_layer": "count or none", "above": "number"},
        ),
        Call("vision_mass", mmlens.scores.vision_mass, given, SHARED),
        Call(
            "attention_mass",
            lambda model, inputs, queries, keys: mmlens.attention_mass(model, inputs, queries, keys),
            {
                "model": w.model,
                "inputs": w.prompt,
                "queries": everywhere & w.prompt.last,
                "keys": w.prompt.last,
            },
            {"model": "model", "queries": "mask", "keys": "mask"},
        ),
        Call(
            "position_contributions",
            position_contributions,
            asked | {"weights": torch.ones(tuple(w.prompt.shape))},
            {"model": "model", "prompt": "prompt", "final_norm": "choice"},
        ),
        Call(
            "fake_region",
            fake_region,
            {"token_map": w.prompt.token_map, "evidence": w.prompt.token_map.evidence(w.examples[:2])[0]},
            {"shape": "choice"},
        ),
        Call("half_mass_share", mmlens.scores.half_mass_share, {"scores": w.scores}, {"share": "fraction"}),
        Call(
            "RamSignificance.significant",
            mmlens.scores.ram_significance(
                w.model, w.examples[:2], n_resamples=1280, progress=False
            ).significant,
            {},
            {"q": "level"},
        ),
        Call(
            "region_permutation_test",
            region_permutation_test,
            {"masses": masses, "n_resamples": 99},
            {"n_resamples": "count", "seed": "seed"},
        ),
        Call("spatial_entropy", spatial_entropy, {"maps": np.ones((1, 2, 2))}, {"above": "number"}),
        Call("elbow", elbow, {"values": np.array([0.0, 0.1, 1.0])}, {}),
        Call(
            "question_attention",
            question_attention,
            {"model": w.model, "example": w.examples[0]},
            {"model": "model"},
        ),
        Call(
            "core_heads",
            mmlens.core_heads,
            {
                "model": w.model,
                "selection": w.examples[:2],
                "evaluation": w.examples[2:],
                "counts": [3],
                "modes": ["zero"],
                "n_draws": 1,
                "progress": False,
            },
            {
                "model": "model!",
                "selection": "examples!",
                "evaluation": "examples!",
                "counts": "counts!",
                "modes": "choices!",
                "n_draws": "count!",
                "seed": "seed!",
                "batch_size": "count!",
                "mapping": "mapping!",
                "force_overlap": "flag!",
                "progress": "flag!",
            },
        ),
    ]


def _pages(w: World) -> list[Call]:
    documents = mmlens.scene_examples("documents", 2, seed=0)
    given = {"model": w.model, "examples": documents, "progress": False}
    shared = {"model": "model", "batch_size": "count!", "progress": "flag", "mapping": "mapping"} | {
        "examples": "examples!",
        "pages_per_prompt": "count or the default",
        "layouts": "flag",
    }
    found = mmlens.scores.page_scores(**given, heads=[(0, 1)])
    recall = {"examples": documents, "page_scores": found.pages}
    return [
        Call(
            "page_scores",
            mmlens.scores.page_scores,
            given | {"heads": [(0, 1)]},
            shared | {"heads": "heads!", "null_question": "question or none"},
        ),
        Call(
            "page_scores_of_sets",
            mmlens.scores.page_scores_of_sets,
            given | {"head_sets": {"a": [(0, 1)]}},
            shared | {"head_sets": "head sets by name", "other_question": "question or none"},
        ),
        Call("PageScores.__sub__", found.__sub__, {"other": found}, {"other": "other documents"}),
        *(
            Call(name, getattr(mmlens.scores, name), of, {"examples": "examples!", "k": "count"})
            for name, of in {
                "page_recall": recall,
                "layout_recall": {"examples": documents, "layout_scores": found.layouts},
                "chance_page_recall": {"examples": documents},
                "chance_layout_recall": {"examples": documents},
            }.items()
        ),
        Call(
            "scores of page_recall",
            mmlens.scores.page_recall,
            {"examples": documents[:1], "page_scores": [[0.5] * 3]},
            {"page_scores": "scores of one document"},
        ),
        Call(
            "macro_mean",
            mmlens.scores.macro_mean,
            {"recall": [1.0, 0.0, 1.0], "domains": ["a", "b", "a"]},
            {"recall": "recall", "domains": "names"},
        ),
        Call(
            "bm25_scores",
            mmlens.scores.bm25_scores,
            {"question": "What?", "page_texts": ["a", "b"]},
            {"question": "text", "page_texts": "page texts"},
        ),
    ]


def _effects(w: World) -> list[Call]:
    zero = mmlens.ablate([(0, 1)])
    run = {
        "model": "model",
        "prompts": "prompts",
        "metric": "metric",
        "batch_size": "count",
        "logits_to_keep": "count or none",
        "progress": "flag",
    }
    one = w.model.prompt_examples(w.examples[:1])
    another = w.model.prompt_examples(w.examples[1:2])
    patched = {"model": w.model, "prompt": one, "source": another, "metric": mmlens.answer_log_probability}
    attribution = mmlens.attribute(**patched, nodes="mlp")
    attributed = {
        "model": "model",
        "prompt": "prompt",
        "source": "source",
        "metric": "one metric",
        "steps": "count!",
        "method": "choice",
        "logits_to_keep": "count or none",
    }
    effect = mmlens.effect(w.model, w.prompt, None, mmlens.accuracy)
    logits = w.model(w.prompt)
    metrics = (
        mmlens.accuracy,
        mmlens.answer_log_probability,
        mmlens.metrics.answer_rank,
        mmlens.metrics.invalid,
        mmlens.logit_difference,
    )
    of_texts = (
        mmlens.metrics.anls,
        mmlens.metrics.exact_match,
        mmlens.generated_accuracy,
        mmlens.metrics.generated_invalid,
        mmlens.metrics.relaxed_accuracy,
    )
    return [
        Call(
            "effect",
            mmlens.effect,
            {"model": w.model, "prompts": w.examples[:2], "intervention": zero, "metric": mmlens.accuracy},
            run | {"intervention": "intervention or none", "level": "level", "clean": "effect"},
        ),
        Call(
            "sweep",
            mmlens.sweep,
            {
                "model": w.model,
                "prompts": w.examples[:2],
                "interventions": {"zero": zero},
                "metric": mmlens.answer_log_probability,
                "progress": False,
            },
            run
            | {"prompts": "prompts!", "metric": "metric!", "batch_size": "count!"}
            | {"interventions": "interventions", "memory": "positive"},
        ),
        Call("attribute", mmlens.attribute, patched | {"nodes": "mlp"}, attributed | {"by_position": "flag"}),
        Call(
            "attribute_edges",
            mmlens.attribution.attribute_edges,
            patched | {"senders": "mlp", "receivers": "logits"},
            attributed,
        ),
        Call(
            "compare_with_patching",
            compare_with_patching,
            patched | {"attribution": attribution, "n": 2},
            {
                "model": "model",
                "prompt": "prompt",
                "source": "source",
                "metric": "one metric",
                "n": "count or all!",
                "seed": "seed!",
                "logits_to_keep": "count or none",
            },
        ),
        *(
            Call(
                f.__name__,
                f,
                {"logits": logits, "prompt": w.prompt},
                {"logits": "logits", "prompt": "prompt"},
            )
            for f in metrics
        ),
        Call(
            "first_token_agreement",
            mmlens.metrics.first_token_agreement,
            {"model": w.model, "prompts": w.prompt, "max_new_tokens": 2},
            SHARED | {"max_new_tokens": "count"},
        ),
        Call(
            "kl_to_clean",
            mmlens.metrics.kl_to_clean,
            {"logits": logits, "prompt": w.prompt, "clean_logits": logits},
            {"logits": "logits", "clean_logits": "logits", "prompt": "prompt"},
        ),
        *(
            Call(
                f.__name__,
                f,
                {"texts": ["red", "blue"], "prompt": w.prompt},
                {"texts": "answers", "prompt": "prompt"},
            )
            for f in of_texts
        ),
        Call(
            "generating",
            mmlens.metrics.generating,
            {"metric": mmlens.metrics.exact_match, "max_new_tokens": 4},
            {"metric": "one metric", "max_new_tokens": "count"},
        ),
        Call("reads", reads, {"what": "answers"}, {"what": "choice", "max_new_tokens": "count or all"}),
        Call(
            "logit_difference_of",
            mmlens.metrics.logit_difference_of,
            {"model": w.model, "answer": "red", "wrong": "blue"},
            {"model": "model", "answer": "token", "wrong": "tokens"},
        ),
        Call(
            "evaluate",
            lambda prompt: evaluate(mmlens.accuracy, "accuracy", prompt, logits=logits),
            {"prompt": w.prompt},
            {"prompt": "prompt"},
        ),
        Call("Effect.select", effect.select, {"examples": [0]}, {"examples": "indices"}),
        Call("Effect.recovered", effect.recovered, {"target": effect.values + 1}, {"target": "effect"}),
        Call(
            "Effect",
            mmlens.effects.Effect,
            {"values": effect.values, "clean": effect.clean},
            {"values": "per example", "clean": "per example", "level": "level"},
        ),
        Call("reuse_table", mmlens.effects.reuse_table, {"table": _swept(w)}, {"table": "table"}),
        Call("grid", mmlens.effects.grid, {"table": _swept(w)}, {"table": "table", "quantity": "choice"}),
        Call(
            "parse_answer",
            parse_answer,
            {"text": "red", "options": ["red", "blue"]},
            {"text": "text to parse", "options": "options"},
        ),
    ]


def _swept(w: World) -> pd.DataFrame:
    heads = {head: mmlens.ablate([head]) for head in [(0, 1), (1, 1)]}
    return mmlens.sweep(w.model, w.prompt, heads, mmlens.answer_log_probability, progress=False)


def _interventions(w: World) -> list[Call]:
    zero = mmlens.ablate([(0, 1)])

    def built(make: Callable[..., Any]) -> Callable[..., Any]:
        """Made, and built for a prompt."""
        return lambda **given: list(make(**given)(w.model, w.prompt))

    def applied(make: Callable[..., Any]) -> Callable[..., Any]:
        return built(make)

    box, other_box = (0, 0, 32, 16), (32, 32, 64, 48)
    interventions = {
        "ablate": zero,
        "knockout": mmlens.knockout("last", "question"),
        "bias_attention": mmlens.bias_attention([(0, 1)], "question", 1.0),
        "scale_heads": mmlens.interventions.scale_heads([(0, 1)], 0.5),
        "patch": mmlens.patch("blocks.0.hook_mlp_out", w.other),
        "path_patch": mmlens.path_patch([(0, 1)], "logits", w.other),
        "noise_images": mmlens.interventions.noise_images(),
        "compose": mmlens.compose(zero),
        "during": mmlens.interventions.during(zero, "prompt"),
        "by_layer": mmlens.interventions.by_layer({0: zero}),
        "relay": mmlens.interventions.relay(
            "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out", lambda source, own: source
        ),
    }
    corruptions = {
        "blank_region": mmlens.interventions.blank_region(box),
        "swap_regions": mmlens.interventions.swap_regions(box, other_box),
        "other_image": mmlens.interventions.other_image(w.examples),
        "other_question": mmlens.interventions.other_question("What colour is Q", equal_layout=False),
        "other_text": mmlens.interventions.other_text("What colour is Q", turn=0, part=1, equal_layout=False),
        "replace_region": mmlens.interventions.replace_region(box, Image.new("RGB", (32, 16))),
    }
    return [
        *(
            Call(
                f"{name}(...)(model, prompt)",
                lambda model, prompt, function=function: function(model, prompt),
                {"model": w.model, "prompt": w.prompt},
                {"model": "model", "prompt": "prompt"},
            )
            for name, function in {**interventions, **corruptions}.items()
        ),
        Call(
            "ablate",
            built(mmlens.ablate),
            {"components": [(0, 1)], "mode": "zero"},
            {"components": "components", "mode": "choice", "positions": "positions", "seed": "seed"},
        ),
        Call(
            "mean_activations",
            mmlens.mean_activations,
            {"model": w.model, "prompts": w.examples[:2]},
            {"model": "model", "prompts": "prompts", "batch_size": "count", "hooks": "hook or all"},
        ),
        Call(
            "knockout",
            built(mmlens.knockout),
            {"queries": "last", "keys": "question"},
            {"queries": "positions", "keys": "positions!", "layers": "layers"},
        ),
        Call(
            "bias_attention",
            built(mmlens.bias_attention),
            {"heads": [(0, 1)], "keys": "question", "delta": 1.0},
            {"heads": "heads", "keys": "positions!", "delta": "per head", "queries": "positions"},
        ),
        Call(
            "scale_heads",
            built(mmlens.interventions.scale_heads),
            {"heads": [(0, 1)], "factor": 0.5},
            {"heads": "heads", "factor": "per head", "positions": "positions"},
        ),
        Call(
            "patch",
            built(mmlens.patch),
            {"hook": "blocks.0.attn.hook_z", "source": w.other},
            {"hook": "hook", "source": "source", "positions": "positions", "heads": "indices of heads"},
        ),
        Call(
            "path_patch",
            built(mmlens.path_patch),
            {"senders": [(0, 1)], "receivers": "logits", "source": w.other},
            {
                "senders": "components",
                "receivers": "receivers",
                "source": "source",
                "positions": "positions",
                "mlps": "choice",
                "downstream": "choice",
            },
        ),
        Call(
            "noise_images",
            built(mmlens.interventions.noise_images),
            {},
            {"std": "positive", "seed": "seed", "deepstack": "flag"},
        ),
        Call(
            "compose of one",
            lambda part: mmlens.compose(part),
            {"part": zero},
            {"part": "intervention"},
        ),
        Call(
            "during",
            mmlens.interventions.during,
            {"intervention": zero, "when": "prompt"},
            {"intervention": "intervention", "when": "choice"},
        ),
        Call(
            "by_layer",
            built(mmlens.interventions.by_layer),
            {"schedule": {0: zero}},
            {"schedule": "schedule"},
        ),
        Call(
            "relay",
            built(mmlens.interventions.relay),
            {
                "read": "blocks.0.hook_mlp_out",
                "write": "blocks.1.hook_mlp_out",
                "function": lambda source, own: source,
            },
            {"read": "hook", "write": "hook", "function": "two-argument function", "positions": "positions"},
        ),
        Call(
            "edit_report",
            mmlens.interventions.edit_report,
            {"hooks": zero(w.model, w.prompt)},
            {"hooks": "hooks"},
        ),
        Call(
            "blank_region",
            applied_corruption(w, mmlens.interventions.blank_region),
            {"where": box},
            {"where": "region", "image": "count or none", "fill": "colour"},
        ),
        Call(
            "swap_regions",
            applied_corruption(w, mmlens.interventions.swap_regions),
            {"one": box, "other": other_box},
            {"one": "region", "other": "region", "image": "count or none"},
        ),
        Call(
            "replace_region",
            applied_corruption(w, mmlens.interventions.replace_region),
            {"where": box, "source": Image.new("RGB", (32, 16))},
            {"where": "region", "source": "image", "image": "count or none"},
        ),
        Call(
            "other_image",
            applied_corruption(w, mmlens.interventions.other_image),
            {"images": w.examples},
            {"images": "images", "resize": "flag", "seed": "seed", "equal_layout": "flag"},
        ),
        Call(
            "other_question",
            applied_corruption(w, mmlens.interventions.other_question),
            {"questions": "What colour is Q", "equal_layout": False},
            {"questions": "questions", "seed": "seed", "equal_layout": "flag"},
        ),
        Call(
            "other_text",
            applied_corruption(w, mmlens.interventions.other_text),
            {"others": "What colour is Q", "turn": 0, "part": 1, "equal_layout": False},
            {"others": "questions", "part": "part", "seed": "seed", "equal_layout": "flag"},
        ),
        Call(
            "evidence_of",
            mmlens.interventions.evidence_of,
            {"examples": w.examples},
            {"examples": "examples"},
        ),
        Call(
            "corrupted_prompt",
            mmlens.interventions.corrupted_prompt,
            {
                "model": w.model,
                "prompt": w.prompt,
                "questions": ["What colour is Q", "What colour is B"],
                "equal_layout": False,
            },
            {"model": "model", "prompt": "prompt", "questions": "two questions", "equal_layout": "flag"},
        ),
        Call(
            "layout_difference",
            mmlens.interventions.layout_difference,
            {"one": w.prompt, "other": w.other},
            {"one": "prompt", "other": "prompt", "boxes": "flag"},
        ),
        Call(
            "same_layout",
            mmlens.interventions.same_layout,
            {"one": w.prompt, "other": w.other},
            {"one": "prompt", "other": "prompt", "boxes": "flag"},
        ),
        Call(
            "Source",
            mmlens.interventions.Source,
            {"prompt": w.prompt, "under": zero},
            {"under": "intervention or none"},
        ),
        Call(
            "patch_layers",
            mmlens.effects.patch_layers,
            {"model": w.model, "source": w.other},
            {"model": "model", "source": "source", "hook": "hook of a layer"},
        ),
        Call(
            "patch_layers_positions",
            mmlens.effects.patch_layers_positions,
            {"model": w.model, "prompt": w.prompt, "source": w.other},
            {
                "model": "model",
                "prompt": "prompt",
                "source": "source",
                "hook": "hook of a layer",
                "positions": "positions",
            },
        ),
        Call(
            "patch_layers_regions",
            mmlens.effects.patch_layers_regions,
            {"model": w.model, "source": w.other, "regions": {"last": "last"}},
            {"model": "model", "source": "source", "hook": "hook of a layer", "regions": "regions by name"},
        ),
        Call(
            "patch_heads",
            mmlens.effects.patch_heads,
            {"model": w.model, "source": w.other},
            {"model": "model", "source": "source", "hook": "hook of a layer"},
        ),
        Call(
            "patch_heads_qkv",
            mmlens.effects.patch_heads_qkv,
            {"model": w.model, "source": w.other},
            {"model": "model", "source": "source", "parts": "choices"},
        ),
    ]


def applied_corruption(w: World, make: Callable[..., Any]) -> Callable[..., Any]:
    """A corruption made, and applied to a prompt."""
    return lambda **given: make(**given)(w.model, w.prompt)


def _statistics(w: World) -> list[Call]:
    few = {"values": [1.0, 2.0, 4.0], "n_resamples": 99}
    pairs = {"values": [1.0, 2.0, 4.0], "baseline": [0.0, 1.0, 5.0], "n_resamples": 99}
    both = {"values": "values", "baseline": "values"}
    power = {"power": "level!", "alpha": "level!"}
    return [
        Call(
            "bootstrap_interval",
            statistics.bootstrap_interval,
            few,
            RESAMPLED | {"values": "values", "method": "choice"},
        ),
        Call("mean_interval", statistics.mean_interval, few, RESAMPLED | {"values": "values"}),
        Call(
            "proportion_interval",
            statistics.proportion_interval,
            {"values": [0, 1, 1]},
            {"values": "values!", "level": "level"},
        ),
        Call("paired_difference_interval", statistics.paired_difference_interval, pairs, RESAMPLED | both),
        Call(
            "ratio_interval",
            statistics.ratio_interval,
            {"numerator": [1.0, 2.0, 4.0], "denominator": [2.0, 3.0, 9.0], "n_resamples": 99},
            RESAMPLED | {"numerator": "values", "denominator": "values"},
        ),
        Call(
            "paired_permutation_test",
            mmlens.statistics.paired_permutation_test,
            pairs,
            both | {"n_resamples": "count", "seed": "seed", "alternative": "choice"},
        ),
        Call(
            "benjamini_hochberg",
            mmlens.statistics.benjamini_hochberg,
            {"p_values": [0.1, 0.2]},
            {"p_values": "p-values"},
        ),
        Call(
            "minimal_detectable_effect",
            mmlens.statistics.minimal_detectable_effect,
            {"n": 20, "sd": 1.0},
            power | {"n": "count!", "sd": "positive"},
        ),
        Call(
            "minimal_detectable_change",
            mmlens.statistics.minimal_detectable_change,
            {"n": 200, "discordant": 0.2},
            power | {"n": "count!", "discordant": "fraction"},
        ),
        Call("is_binary", statistics.is_binary, {"values": [0, 1]}, {}),
    ]


def _heads(w: World) -> list[Call]:
    heads = mmlens.HeadSet([(0, 1), (2, 3)], grid=(8, 8))
    return [
        Call("HeadGrid", HeadGrid, {"heads_per_layer": (8,) * 8}, {"heads_per_layer": "heads per layer"}),
        Call(
            "HeadSet",
            mmlens.HeadSet,
            {"heads": [(0, 1)], "grid": (8, 8)},
            {"heads": "heads or none of them", "grid": "head grid"},
        ),
        Call("HeadSet.every", mmlens.HeadSet.every, {"grid": (8, 8)}, {"grid": "head grid"}),
        Call("HeadSet.random", heads.random, {"seed": 0}, {"seed": "seed"}),
        Call("HeadSet.matched_random", heads.matched_random, {"seed": 0}, {"seed": "seed"}),
        *(
            Call(
                f"HeadSet {sign}",
                lambda other, sign=sign: getattr(heads, sign)(other),
                {"other": heads},
                {"other": "head set"},
            )
            for sign in ("__or__", "__and__", "__sub__", "__xor__", "__le__", "__lt__")
        ),
        Call(
            "HeadScores",
            mmlens.HeadScores,
            {"per_example": w.scores.per_example},
            {"per_example": "scores", "kinds": "kinds", "grid": "head grid of scores"},
        ),
        *(
            Call(
                f"HeadScores.{name}",
                getattr(w.scores, name),
                {"n_or_fraction": 3},
                {"n_or_fraction": "count or share", "count": "choice"},
            )
            for name in ("top", "bottom", "top_spread", "stability")
        ),
        Call("HeadScores.select", w.scores.select, {"kind": "objects"}, {"kind": "kind"}),
        Call("HeadScores.rank_interval", w.scores.rank_interval, {"n_resamples": 9}, RESAMPLED),
        Call("HeadScores.table", w.scores.table, {"n_resamples": 9}, RESAMPLED),
        Call("HeadScores.spearman", w.scores.spearman, {"other": w.scores}, {"other": "other scores"}),
        Call("HeadScores.save", w.scores.save, {"path": w.folder / "scores.parquet"}, {"path": "new file"}),
        Call("HeadScores.load", mmlens.HeadScores.load, {"path": _saved(w)}, {"path": "file to read"}),
        Call("load_scores", load_scores, {"path": _saved(w)}, {"path": "file to read"}),
    ]


def _published_heads(w: World) -> list[Call]:
    """Files as others publish them, a few heads each."""
    scores = {
        "args": {"model": "some/model"},
        "head_score_list": [["0-0", 0.5], ["0-1", 0.25], ["1-0", 0.75], ["1-1", 0.0]],
    }
    files = {
        "mmrethead.json": json.dumps(scores),
        "retrieval_head.json": json.dumps({"0-0": [0.5, 1.0], "0-1": [0.0, 0.5]}),
        "qrhead.yaml": 'attn_head_set: "1-0,0-1"',
        "gaze.json": json.dumps([[0, 1, 0.5], [1, 0, 0.25]]),
        "full_attention_heads.tsv": "0.5\t1.0\n0.0\t0.25\n",
    }
    folder = w.folder / "published"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    readers: list[tuple[Callable[..., Any], str, bool]] = [
        (mmlens.scores.read_mmrethead, "mmrethead.json", False),
        (mmlens.scores.read_retrieval_head, "retrieval_head.json", False),
        (mmlens.scores.read_sparsemm, "retrieval_head.json", False),
        (mmlens.scores.read_duo_attention, "full_attention_heads.tsv", False),
        (mmlens.scores.read_mmrethead_heads, "mmrethead.json", True),
        (mmlens.scores.read_qrhead, "qrhead.yaml", True),
        (mmlens.scores.read_gaze_heads, "gaze.json", True),
    ]
    gates = mmlens.scores.KeyValueScores(torch.rand(2, 4), "gate")
    images = mmlens.scene_examples("images", 2, seed=0)
    return [
        Call(
            "document_scores",
            mmlens.scores.document_scores,
            {"model": w.model, "prompts": images, "null_question": "?", "progress": False},
            {name: f"{kind}!" for name, kind in SHARED.items()} | {"null_question": "null question"},
        ),
        Call(
            "document_ndcg",
            mmlens.scores.document_ndcg,
            {"documents": [torch.rand(3, 2, 2)], "gold": [[1]]},
            {"documents": "document scores", "gold": "gold", "k": "count"},
        ),
        Call("question_to_end", mmlens.scores.question_to_end, {"prompt": w.prompt}, {"prompt": "prompt"}),
        *(
            Call(
                function.__name__,
                function,
                {"file": folder / name} | ({"grid": (2, 2)} if is_list else {}),
                {"file": "file to read"} | ({"grid": "head grid"} if is_list else {}),
            )
            for function, name, is_list in readers
        ),
        Call(
            "recompute_published",
            mmlens.scores.recompute_published,
            {"folder": folder},
            {"folder": "published"},
        ),
        Call(
            "KeyValueScores", mmlens.scores.KeyValueScores, {"values": torch.rand(2, 4)}, {"values": "gates"}
        ),
        Call("KeyValueScores.of_query_heads", gates.of_query_heads, {"grid": (2, 8)}, {"grid": "head grid"}),
    ]


def _saved(w: World) -> str:
    path = w.folder / "saved.parquet"
    w.scores.save(path)
    return str(path)


def _data(w: World) -> list[Call]:
    image = w.examples[0].images[0]
    example = {"question": "What?", "answer": "red", "images": (image,)}
    return [
        Call("Evidence", mmlens.Evidence, {"image": 0}, {"image": "image number", "box": "box or none"}),
        Call(
            "Example",
            mmlens.Example,
            example,
            {
                "question": "any text",
                "answer": "any text",
                "images": "example images",
                "evidence": "example evidence",
                "candidates": "candidates",
                "kind": "any text",
                "id": "any text",
                "group": "any text",
                "metadata": "metadata",
            },
        ),
        Call(
            "scene_examples",
            mmlens.scene_examples,
            {"kind": "objects", "n": 2, "seed": 0},
            {"kind": "choice", "n": "count or none", "seed": "seed"},
        ),
        Call("scene_of", scene_of, {"example": w.examples[0]}, {"example": "example"}),
        Call(
            "iterate_scenes",
            lambda kind, seed: next(iterate_scenes(kind, seed)),
            {"kind": "objects", "seed": 0},
            {"kind": "choice", "seed": "seed"},
        ),
        Call(
            "draw_scene",
            draw_scene,
            {"kind": "objects", "rng": __import__("random").Random(0)},
            {"kind": "choice", "rng": "rng"},
        ),
        Call("scene_vocabulary", scene_vocabulary, {"kinds": ["objects"]}, {"kinds": "choices"}),
        Call(
            "examples_from",
            lambda **given: list(mmlens.data.examples_from(**given)),
            {
                "rows": [{"q": "What?", "a": "x", "image": image, "box": [0, 0, 9, 9]}] * 2,
                "question": "q",
                "answer": "a",
                "images": "image",
                "evidence": "box",
                "box_format": "xyxy",
                "id": lambda row: next(NUMBERS),
            },
            {
                "rows": "rows",
                "question": "row column",
                "answer": "row column",
                "images": "row column",
                "evidence": "row column",
                "group": "row column",
                "id": "row column",
                "kind": "row column",
                "candidates": "row column",
                "metadata": "row columns",
                "box_format": "choice",
                "on_error": "choice",
            },
        ),
        Call(
            "load_data",
            lambda **given: mmlens.data.load_data(**given),
            {"name": PUBLISHED.name, "data_dir": _published(w)},
            {
                "name": "name of a data set",
                "split": "choice or none",
                "data_dir": "folder of a data set",
                "streaming": "flag",
                "on_error": "choice",
                "revision": "revision",
            },
        ),
        Call(
            "save_examples",
            mmlens.data.save_examples,
            {"examples": w.examples, "folder": w.folder / "saved"},
            {"examples": "examples", "folder": "new folder"},
        ),
        Call("load_image", mmlens.data.load_image, {"image": w.examples[0].images[0]}, {"image": "image"}),
        Call("load_examples", mmlens.load_examples, {"folder": _folder(w)}, {"folder": "folder to read"}),
        Call(
            "split_examples",
            mmlens.split_examples,
            {"examples": w.examples, "fraction": 0.5, "seed": 0},
            {"examples": "examples!", "fraction": "level", "seed": "seed"},
        ),
        Call("planted_model", planted_model, {"seed": 0}, {"family": "choice", "seed": "seed!"}),
        Call(
            "untrained_model",
            untrained_model,
            {"seed": 0},
            {"family": "choice", "seed": "seed!", "n_layers": "count or all"},
        ),
        Call(
            "unrelated_examples",
            unrelated_examples,
            {"family": "qwen3_vl", "n": 1, "seed": 0},
            {"n": "count or none", "seed": "seed"},
        ),
    ]


PUBLISHED = EvidenceData(
    name="made-up",
    title="Made up",
    hub="",
    splits=("test",),
    columns={"q": "string"},
    read=lambda row, files: [mmlens.Example(row["q"], "x")],
    evidence="none",
    group="none",
    licence="MIT",
    size="1 row",
    cite="nobody",
    source="nowhere",
    checked="not",
)


def _published(w: World) -> str:
    CATALOG[PUBLISHED.name] = PUBLISHED
    folder = w.folder / "published"
    folder.mkdir(exist_ok=True)
    (folder / "test.jsonl").write_text('{"q": "What?"}')
    return str(folder)


def _folder(w: World) -> str:
    return str(mmlens.data.save_examples(w.examples, w.folder / "examples"))


def _figures(w: World) -> list[Call]:
    image = Image.new("RGB", (64, 32), "white")
    boxes, weights = [(0, 0, 32, 32), (32, 0, 64, 32)], [0.1, 0.4]
    means = pd.DataFrame(
        {"head": ["a", "b"], "x": [1, 2], "mean": [0.4, 0.2], "low": [0.3, 0.1], "high": [0.5, 0.3]}
    )
    means["x_low"], means["x_high"], means["sure"] = means["x"] - 0.5, means["x"] + 0.5, [True, False]
    rows = [
        ("mean", arm, count, count / 8, "pooled", "accuracy", 0.5, 0.4, 0.6, 9)
        for arm, count in (("clean", 0), ("top", 1), ("top", 2))
    ]
    columns = ["mode", "arm", "count", "fraction", "kind", "metric", "mean", "low", "high", "n"]
    curves = pd.DataFrame(rows, columns=columns)
    said = {"xlabel": "x", "ylabel": "y"}
    return [
        Call(
            "plot_examples",
            plot_examples,
            {"examples": w.examples[:1]},
            {"examples": "examples", "n_images": "count"},
        ),
        Call(
            "plot_head_map",
            plot_head_map,
            {"scores": w.scores},
            {"scores": "scores to draw", "heads": "marked heads", "ax": "axes"},
        ),
        Call(
            "plot_matrix",
            plot_matrix,
            {"values": [[1.0, 0.5]], "rows": ["a"], "columns": ["b", "c"]},
            {
                "values": "matrix",
                "rows": "names",
                "columns": "names or none",
                "vmax": "positive or none",
                "decimals": "count or none",
            },
        ),
        Call(
            "plot_intervals",
            plot_intervals,
            {"table": means, "row": "head", "xlabel": "x"},
            {"table": "table", "row": "column", "percent": "flag", "lines": "lines"},
        ),
        Call(
            "plot_curves",
            plot_curves,
            {"table": means, "x": "x", "series": "head", **said},
            {
                "table": "table",
                "x": "column",
                "series": "column",
                "percent": "flag",
                "dashed": "dashed",
            },
        ),
        Call(
            "plot_trade_off",
            plot_trade_off,
            {"table": means, "x": "x", "series": "head", **said},
            {"table": "table", "x": "column", "series": "column", "percent": "flag"},
        ),
        Call(
            "plot_scatter",
            plot_scatter,
            {"table": means, "panel": "head", "x": "x", "y": "mean", "marked": "sure", "note": "n", **said},
            {"table": "table", "panel": "column", "x": "column", "y": "column", "marked": "column"},
        ),
        Call(
            "plot_ablation_curves",
            plot_ablation_curves,
            {"table": curves},
            {
                "table": "table",
                "metric": "choice",
                "kind": "choice",
                "mode": "choice",
                "chance": "number or none",
                "ax": "axes",
            },
        ),
        Call(
            "plot_ablation_panels",
            plot_ablation_panels,
            {"table": curves},
            {
                "table": "table",
                "metric": "choice",
                "kinds": "choices",
                "modes": "choices or all",
                "chance": "chances",
            },
        ),
        Call(
            "plot_attention_overlay",
            plot_attention_overlay,
            {"image": image, "boxes": boxes, "weights": weights},
            {
                "image": "PIL image",
                "boxes": "boxes",
                "weights": "weights",
                "vmax": "positive or none",
                "evidence": "boxes of evidence",
                "ax": "axes",
            },
        ),
        Call(
            "plot_overlay_grid",
            plot_overlay_grid,
            {"images": [image], "boxes": [boxes], "weights": [weights]},
            {
                "images": "PIL images",
                "boxes": "boxes of images",
                "weights": "boxes of images",
                "columns": "count or all",
                "vmax": "positive or none",
                "names": "names or none",
            },
        ),
    ]


SETTINGS = {
    "fraction": "fraction",
    "q": "level",
    "keep": "fraction",
    "mode": "choice",
    "modes": "choices",
    "mapping": "mapping",
    "scores": "choices",
    "rankings": "choices",
    "n_draws": "count",
    "n_resamples": "count",
    "n_splits": "count",
    "n_groups": "count",
    "n_heads": "count",
    "sink": "count or none",
    "windows": "counts",
    "counts": "counts",
    "shares": "fractions",
    "fractions": "fractions",
    "ratio_shares": "fractions",
    "coverage_shares": "fractions",
    "n_per_kind": "count or all",
    "n_per_kind_single": "count or all",
    "pages_per_prompt": "count or the default",
    "null_questions": "questions to ask",
    "tags": "tags",
    "fallback_tags": "tags",
    "checkpoints": "folder to read",
}


def _experiments(w: World) -> list[Call]:
    """Their settings; none of them is run."""
    setup = Setup(w.model, w.examples[:2], w.examples[2:], progress=False)
    made = [
        Call(
            f"experiment {name}",
            experiment.run,
            {"setup": setup},
            {"setup": "setup"} | {setting: SETTINGS[setting] + "!" for setting in experiment.settings},
        )
        for name, experiment in catalog.EXPERIMENTS.items()
    ]
    return [
        *made,
        Call(
            "Setup",
            Setup,
            {"model": w.model, "selection": w.examples[:2], "evaluation": w.examples[2:]},
            {
                "model": "model",
                "selection": "split",
                "evaluation": "split",
                "seed": "seed",
                "batch_size": "count",
                "progress": "flag",
            },
        ),
    ]


def _model(w: World) -> list[Call]:
    token_map = w.prompt.token_map
    _, cache = w.model.run_with_cache(w.prompt)
    rule = StreamingRule(1, 2)

    def hybrid(**given: Any) -> None:
        with mmlens.hybrid_attention(**given):
            w.model(w.prompt)

    def hooked(**given: Any) -> None:
        with w.model.hooks(**given):
            w.model(w.prompt)

    speed = {"model": w.model, "lengths": [8], "sink": 1, "window": 2, "repeats": 1, "progress": False}
    timed = {
        "model": "model",
        "lengths": "counts",
        "sink": "count or none",
        "window": "count!",
        "parts": "choices",
        "repeats": "count!",
        "seed": "seed!",
        "progress": "flag!",
    }
    zero = mmlens.ablate([(0, 1)])(w.model, w.prompt)
    image = w.examples[0].images[0]
    return [
        Call(
            "model.prompt",
            w.model.prompt,
            {"messages": "What colour is K", "images": [image]},
            {"messages": "question", "images": "images of a prompt"},
        ),
        Call(
            "model.prompt_examples",
            w.model.prompt_examples,
            {"examples": w.examples},
            {"examples": "examples"},
        ),
        Call("model.encode_images", w.model.encode_images, {"prompt": w.prompt}, {"prompt": "prompt"}),
        Call("model", w.model, {"inputs": w.prompt}, {"inputs": "inputs", "return_type": "return type"}),
        Call(
            "model.generate",
            w.model.generate,
            {"inputs": w.prompt, "max_new_tokens": 1},
            {"inputs": "inputs"},
        ),
        Call(
            "model.answer",
            w.model.answer,
            {"inputs": w.prompt, "max_new_tokens": 1},
            {"inputs": "inputs", "max_new_tokens": "count"},
        ),
        Call(
            "model.run_with_hooks",
            lambda inputs, fwd_hooks: w.model.run_with_hooks(inputs, fwd_hooks=fwd_hooks),
            {"inputs": w.prompt, "fwd_hooks": zero},
            {"inputs": "inputs", "fwd_hooks": "hooks"},
        ),
        Call("model.hooks", hooked, {"fwd_hooks": zero}, {"fwd_hooks": "hooks"}),
        Call(
            "model.run_with_cache",
            lambda inputs, names_filter: w.model.run_with_cache(inputs, names_filter=names_filter),
            {"inputs": w.prompt, "names_filter": "hook_embed"},
            {"inputs": "inputs", "names_filter": "hook or all"},
        ),
        Call("model.hook_names", w.model.hook_names, {"match": "hook_embed"}, {"match": "hook"}),
        Call(
            "model.add_hook",
            lambda name, hook: (w.model.add_hook(name, hook), w.model.reset_hooks()),
            {"name": "hook_embed", "hook": lambda x, hook: x},
            {"name": "hook", "hook": "function of a hook"},
        ),
        Call(
            "model.attention_rows",
            w.model.attention_rows,
            {"inputs": w.prompt, "queries": w.prompt.last, "consume": lambda layer, rows, real: None},
            {"inputs": "inputs", "queries": "mask", "consume": "function of rows"},
        ),
        Call("model.to_tokens", w.model.to_tokens, {"input": "What"}, {"input": "text to tokenize"}),
        Call("model.to_single_token", w.model.to_single_token, {"string": "red"}, {"string": "one word"}),
        Call("model.to_string", w.model.to_string, {"tokens": [1, 2]}, {"tokens": "token ids"}),
        Call(
            "model.to_single_str_token",
            w.model.to_single_str_token,
            {"int_token": 3},
            {"int_token": "token id"},
        ),
        Call("model.to_str_tokens", w.model.to_str_tokens, {"input": "What"}, {"input": "text or ids"}),
        Call(
            "model.tokens_to_residual_directions",
            w.model.tokens_to_residual_directions,
            {"tokens": "red"},
            {"tokens": "token"},
        ),
        Call(
            "model.to_text",
            w.model.to_text,
            {"token_ids": torch.tensor([[1, 2]])},
            {"token_ids": "batch of ids"},
        ),
        Call(
            "HookedVLM",
            mmlens.HookedVLM,
            {"hf_model": w.model.hf_model, "processor": w.model.processor},
            {"hf_model": "Hugging Face model"},
        ),
        Call(
            "HookedVLM.from_pretrained",
            mmlens.HookedVLM.from_pretrained,
            {"name_or_path": "micro"},
            {"name_or_path": "name of a model"},
        ),
        Call("from_bridge", mmlens.from_bridge, {"bridge": None}, {"bridge": "bridge"}),
        Call(
            "cache.decompose_resid",
            cache.decompose_resid,
            {},
            {"layer": "layer of a cache", "mode": "choice"},
        ),
        Call("cache.stack_head_results", cache.stack_head_results, {}, {"layer": "layer of a cache"}),
        Call("cache.unpacked", cache.unpacked, {"name": "image.hook_embed"}, {"name": "packed name"}),
        Call(
            "TokenMap.box",
            token_map.box,
            {"image": 0, "box": (0, 0, 16, 16)},
            {"image": "index of one", "box": "box", "example": "index of two", "mapping": "mapping"},
        ),
        *(
            Call(
                f"TokenMap.{name}",
                getattr(token_map, name),
                {name.replace("image_tokens", "image"): 0},
                {name.replace("image_tokens", "image"): "index of one", "example": "index of two"},
            )
            for name in ("image_tokens", "page", "frame")
        ),
        Call(
            "TokenMap.evidence",
            token_map.evidence,
            {"evidence": w.examples[:2]},
            {"evidence": "evidence of two", "mapping": "mapping"},
        ),
        Call(
            "TokenMap.where",
            token_map.where,
            {"position": 0},
            {"position": "position", "example": "index of two"},
        ),
        Call("TokenMap.labels", token_map.labels, {}, {"example": "index of two"}),
        Call("TokenMap.to", token_map.to, {"device": "cpu"}, {"device": "device"}),
        Call("Prompt.to", w.prompt.to, {"device": "cpu"}, {"device": "device"}),
        Call(
            "hybrid_attention",
            hybrid,
            {"model": w.model, "dense": [(0, 1)], "sink": 1, "window": 8},
            {
                "model": "model",
                "dense": "heads or none of them",
                "sink": "count or none",
                "window": "count",
                "method": "choice",
            },
        ),
        Call(
            "StreamingRule",
            StreamingRule,
            {"sink": 1, "window": 2},
            {"sink": "count or none", "window": "count"},
        ),
        Call("StreamingRule.share", rule.share, {"n_positions": 4}, {"n_positions": "count"}),
        Call(
            "prefill_speed",
            prefill_speed,
            speed | {"dense": {"one": [(0, 1)]}, "warm_ups": 0},
            timed | {"dense": "head sets by name", "warm_ups": "count or none"},
        ),
        Call(
            "time_prefill",
            time_prefill,
            speed | {"scores": w.scores, "parts": ["attention"]},
            timed | {"fractions": "fractions", "scores": "other scores"},
        ),
    ]
