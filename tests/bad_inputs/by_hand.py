"""Rows that no table gives: swapped and misspelt arguments, things given in another's place, and their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from kinds import World

import mmlens
from mmlens.experiments.experiment import Setup
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import prompt_from_inputs
from mmlens.statistics import mean_interval
from mmlens.viz.head_map import plot_head_map
from mmlens.viz.matrix import plot_matrix

Row = tuple[str, str, Any, Callable[[], Any], str]


def bad_rows(w: World) -> list[Row]:
    """(call, what is wrong, the value, the call itself, a pattern of its message)"""
    zero = mmlens.ablate([(0, 1)])
    _, cache = w.model.run_with_cache(w.prompt, names_filter=["blocks.0.attn.hook_pattern", "hook_embed"])
    means = mmlens.mean_activations(w.model, w.examples[:2], hooks=["blocks.0.attn.hook_z"])
    return [
        (
            "LateImage",
            "a number as its file",
            3,
            lambda: mmlens.data.LateImage(3),
            "expected a path, the bytes of an image file",
        ),
        (
            "LateImage",
            "a row's dict itself",
            {"bytes": b"", "path": None},
            lambda: mmlens.data.LateImage({"bytes": b"", "path": None}),
            "expected a path, the bytes of an image file",
        ),
        (
            "ExampleStream",
            "a list in the place of a function",
            w.examples,
            lambda: mmlens.data.ExampleStream(w.examples),  # type: ignore[arg-type]
            "expected a function that gives an iterator",
        ),
        (
            "Examples",
            "a list in the place of a function",
            w.examples,
            lambda: mmlens.data.Examples(3, w.examples),  # type: ignore[arg-type]
            "expected a function from a number",
        ),
        (
            "Examples",
            "a fraction for their number",
            1.5,
            lambda: mmlens.data.Examples(1.5, w.examples.__getitem__),  # type: ignore[arg-type]
            "whole number",
        ),
        (
            "ram",
            "arguments swapped",
            w.examples,
            lambda: mmlens.ram(w.examples, w.model, progress=False),  # type: ignore[arg-type]
            "expected a HookedVLM",
        ),
        (
            "effect",
            "metric and intervention swapped",
            mmlens.accuracy,
            lambda: mmlens.effect(w.model, w.prompt, mmlens.accuracy, zero),  # type: ignore[call-overload]
            "expected a HookedVLM",
        ),
        (
            "effect",
            "prompts and model swapped",
            w.prompt,
            lambda: mmlens.effect(w.prompt, w.model, zero, mmlens.accuracy),  # type: ignore[call-overload]
            "expected a HookedVLM",
        ),
        (
            "effect",
            "a misspelt metric",
            "acuracy",
            lambda: mmlens.effect(w.model, w.prompt, zero, "acuracy"),  # type: ignore[call-overload]
            "mmlens.metrics.accuracy",
        ),
        (
            "sweep",
            "a list of interventions",
            [zero],
            lambda: mmlens.sweep(w.model, w.prompt, [zero], mmlens.accuracy),  # type: ignore[arg-type]
            r"dict\(enumerate",
        ),
        (
            "an intervention",
            "built for keyword inputs",
            w.prompt.inputs,
            lambda: zero(w.model, w.prompt.inputs),  # type: ignore[arg-type]
            "model.prompt",
        ),
        (
            "an intervention",
            "model and prompt swapped",
            w.prompt,
            lambda: zero(w.prompt, w.model),  # type: ignore[arg-type]
            "expected a HookedVLM",
        ),
        (
            "during",
            "arguments swapped",
            "prompt",
            lambda: mmlens.interventions.during("prompt", zero),  # type: ignore[arg-type]
            "intervention|during|there is no",
        ),
        (
            "by_layer",
            "interventions in a list",
            [zero],
            lambda: mmlens.interventions.by_layer([zero])(w.model, w.prompt),  # type: ignore[arg-type]
            "schedule",
        ),
        (
            "cache",
            "a misspelt short name",
            "patern",
            lambda: cache["patern", 0],
            "patern",
        ),
        ("cache", "a misspelt name", "hook_embd", lambda: cache["hook_embd"], "hook_embed"),
        ("cache", "what was not cached", "blocks.0.attn.hook_z", lambda: cache["z", 0], "hook_z"),
        ("if_any", "no positions", None, lambda: mmlens.interventions.if_any(None), "positions"),  # type: ignore[arg-type]
        (
            "ablate",
            "a misspelt mode",
            "meen",
            lambda: mmlens.ablate([(0, 1)], "meen"),
            "'mean'",
        ),
        (
            "ablate",
            "a mean without its reference",
            None,
            lambda: mmlens.ablate([(0, 1)], "mean"),
            "reference",
        ),
        (
            "ablate",
            "examples as the reference of a mean",
            w.examples,
            lambda: mmlens.ablate([(0, 1)], "mean", reference=w.examples),
            "mean_activations",
        ),
        (
            "ablate",
            "means as the reference of a resample",
            means,
            lambda: mmlens.ablate([(0, 1)], "resample", reference=means),
            "examples",
        ),
        (
            "scene_examples",
            "number and kind swapped",
            4,
            lambda: mmlens.scene_examples(4, "objects", 0),  # type: ignore[arg-type]
            "kind",
        ),
        (
            "Example",
            "a path among the images",
            "page.png",
            lambda: mmlens.Example("What?", "red", images=("page.png",)),  # type: ignore[arg-type]
            "PIL.Image.open|does not exist",
        ),
        (
            "Example",
            "evidence as (image, box)",
            (0, (0, 0, 9, 9)),
            lambda: mmlens.Example(
                "What?",
                "red",
                images=w.examples[0].images,
                evidence=[(0, (0, 0, 9, 9))],  # type: ignore[arg-type]
            ),
            r"Evidence\(0, \(",
        ),
        (
            "model.prompt",
            "a number of images instead of images",
            1,
            lambda: w.model.prompt("What?", images=1),  # type: ignore[arg-type]
            "image",
        ),
        *_bad_chats(w),
        *_bad_metrics_of_whole_answers(w),
        (
            "model.prompt_examples",
            "one example",
            w.examples[0],
            lambda: w.model.prompt_examples(w.examples[0]),  # type: ignore[arg-type]
            r"\[example\]",
        ),
        (
            "HeadScores.top",
            "percent",
            5.0,
            lambda: w.scores.top(5.0),
            "fraction",
        ),
        (
            "plot_head_map",
            "per-example scores",
            w.scores.per_example,
            lambda: plot_head_map(w.scores.per_example),
            r"\[layer, head\]",
        ),
        ("plot_matrix", "names as one text", "ab", lambda: plot_matrix(np.eye(2), "ab"), "list of names"),
        (
            "Setup",
            "one list for both splits",
            w.examples,
            lambda: Setup(w.model, w.examples, w.examples),
            "share|split",
        ),
        (
            "prompt_from_inputs",
            "no input_ids",
            {},
            lambda: prompt_from_inputs(w.model.processor, w.model.family.layout, {}, []),
            "input_ids",
        ),
        (
            "core_heads",
            "too many heads",
            60,
            lambda: mmlens.core_heads(w.model, w.examples[:2], w.examples[2:], counts=[60], progress=False),
            "between 1 and",
        ),
        (
            "CoreHeads.save",
            "a file",
            w.folder / "a_file",
            lambda: mmlens.data.save_examples(w.examples, w.folder / "a_file"),
            "folder",
        ),
    ]


def _bad_chats(w: World) -> list[Row]:
    """Messages that are no chat, or that the chat template cannot say."""
    image, known = {"type": "image"}, w.examples[0].images[0]

    def user(*parts: Any) -> list[Any]:
        return [{"role": "user", "content": list(parts)}]

    text = {"type": "text", "text": "What colour is K"}
    faults: list[tuple[str, Any, str]] = [
        ("an unknown role", [{"role": "usr", "content": "What?"}], "user"),
        ("a message without a role", [{"content": "What?"}], "role"),
        ("an image part without an image", user(image, text), "without an image"),
        ("a part of an unknown type", user({"type": "sound", "sound": 1}, text), "image"),
        ("a URL", user({"type": "image", "url": "https://example.org/a.png"}, text), "URL"),
        ("no message", [[]], "empty"),
        ("no content", user(), "says nothing"),
        ("content that is a number", [{"role": "user", "content": 3}], "text"),
        ("a part that is a number", user(3), "text"),
        ("a text part without a text", user({"type": "text"}), "text"),
        ("an image as a part", user(known, text), "'image'"),
        ("a prefill without a text", [*user(text), {"role": "assistant", "content": [image]}], "image|text"),
        ("a path that there is not", user({"type": "image", "image": "nowhere.png"}, text), "nowhere"),
    ]
    rows: list[Row] = [
        ("model.prompt of a chat", what, chat, lambda chat=chat: w.model.prompt(chat), pattern)
        for what, chat, pattern in faults
    ]
    more = user(image, text)
    return [
        *rows,
        (
            "model.prompt of a chat",
            "an image too many",
            more,
            lambda: w.model.prompt(more, [known] * 2),
            "beside",
        ),
        (
            "model.prompt of a chat",
            "a question that is not there",
            "Who?",
            lambda: w.model.prompt(more, [known], question="Who?"),
            "stands 0 times",
        ),
        (
            "Example of a chat",
            "a chat in the place of a question",
            more,
            lambda: mmlens.Example(more, "red"),  # type: ignore[arg-type]
            "text",
        ),
        (
            "Example of a chat",
            "no chat",
            "What?",
            lambda: mmlens.Example(messages="What?", answer="red"),  # type: ignore[arg-type]
            "chat",
        ),
        ("Video", "a number", 3, lambda: mmlens.data.Video(3), "video"),
        ("Video", "no frames", [], lambda: mmlens.data.Video([]), "frame"),
        ("Video", "a rate below 0", -1, lambda: mmlens.data.Video([known] * 2, fps=-1), "fps"),
    ]


def _bad_metrics_of_whole_answers(w: World) -> list[Row]:
    """Metrics of whole answers on prompts that have not what they read."""
    bare, metrics = w.model.prompt("What colour is K"), mmlens.metrics
    alone = w.model.prompt_examples([mmlens.Example("What colour is K", "red")])
    faults: list[tuple[Any, Prompt, str]] = [
        (metrics.whole_answer_log_probability, bare, "answers"),
        (metrics.mean_token_log_probability, bare, "answers"),
        (metrics.candidate_log_probability_difference, alone, "candidate"),
        (metrics.multiple_choice, alone, "candidate"),
        (metrics.yes_no_bias, w.prompt, "yes"),
        (metrics.says_yes, w.prompt, "yes"),
    ]
    return [
        *(
            (
                metric.__name__,
                "a prompt without what it reads",
                prompt,
                lambda metric=metric, prompt=prompt: mmlens.effect(w.model, prompt, None, metric),
                pattern,
            )
            for metric, prompt, pattern in faults
        ),
        ("choosing", "misspelt", "txt", lambda: metrics.choosing("txt"), "text"),  # type: ignore[arg-type]
    ]


def good_rows(w: World) -> list[tuple[str, str, Callable[[], Any]]]:
    """(call, what is unusual and right, the call itself)"""
    image = w.examples[0].images[0]
    one = mmlens.HeadSet([(0, 1)], grid=(8, 8))
    return [
        ("Evidence", "NumPy numbers", lambda: mmlens.Evidence(np.int64(0), np.array([0, 0, 9.5, 9]))),  # type: ignore[arg-type]
        (
            "Example",
            "lists",
            lambda: mmlens.Example(
                "What?",
                "red",
                images=[image],
                evidence=[mmlens.Evidence(0)],
                candidates=["red", "blue"],  # type: ignore[arg-type]
            ),
        ),
        ("Example", "a NumPy text", lambda: mmlens.Example(np.str_("What?"), np.str_("red"))),
        ("model.prompt", "a tuple of images", lambda: w.model.prompt("What colour is K", images=(image,))),
        (
            "model.prompt",
            "a batch of tuples",
            lambda: w.model.prompt(("What colour is K",), images=([image],)),
        ),
        (
            "model.prompt of a chat",
            "tuples of messages and parts",
            lambda: w.model.prompt(
                ({"role": "user", "content": ({"type": "text", "text": "What colour is K"},)},)
            ),
        ),
        (
            "Example of a chat",
            "a path's image as an array",
            lambda: mmlens.Example(
                messages=[
                    {"role": "user", "content": [{"type": "image", "image": np.asarray(image)}, "Who?"]}
                ],
                answer="red",
            ),
        ),
        ("HeadSet", "an empty one", lambda: mmlens.HeadSet([], grid=(2, 2))),
        ("HeadSet", "sets of sets", lambda: (one | one) & one),
        ("HeadScores", "an array", lambda: mmlens.HeadScores(np.ones((1, 2, 2)) * [[0.0, 1.0], [2.0, 3.0]])),  # type: ignore[arg-type]
        ("HeadScores", "kinds in a list", lambda: mmlens.HeadScores(torch.rand(2, 2, 2), kinds=["a", "b"])),  # type: ignore[arg-type]
        (
            "HeadScores.save",
            "a Path, over an old file",
            lambda: [w.scores.save(Path(w.folder) / "x") for _ in "12"],
        ),
        ("HeadScores.top", "a NumPy share", lambda: w.scores.top(np.float64(0.05))),
        (
            "save_examples",
            "a folder two levels down",
            lambda: mmlens.data.save_examples(w.examples, w.folder / "a" / "b"),
        ),
        (
            "save_examples",
            "a generator",
            lambda: mmlens.data.save_examples((e for e in w.examples), w.folder / "c"),
        ),
        ("mean_interval", "outcomes as bools", lambda: mean_interval([True, False, True])),
        (
            "mean_interval",
            "outcomes as an array of bools",
            lambda: mean_interval(np.array([True, False, True])),
        ),
        (
            "benjamini_hochberg",
            "a grid with NaN",
            lambda: mmlens.statistics.benjamini_hochberg(np.array([[0.1, np.nan]])),
        ),
        ("plot_head_map", "lists", lambda: plot_head_map([[0.1, 0.2], [0.3, 0.4]])),
        ("plot_head_map", "whole numbers", lambda: plot_head_map(torch.tensor([[1, 2], [3, 4]]))),
        ("plot_matrix", "a DataFrame", lambda: plot_matrix(pd.DataFrame([[1.0]]), pd.Index(["a"]), ("b",))),  # type: ignore[arg-type]
        (
            "effect",
            "an intervention of one's own",
            lambda: mmlens.effect(
                w.model,
                w.prompt,
                lambda model, prompt: [("hook_embed", lambda x, hook: x * 2)],
                mmlens.accuracy,
            ),
        ),
        ("effect", "no intervention", lambda: mmlens.effect(w.model, w.prompt, None, mmlens.accuracy)),
        (
            "compare_with_patching",
            "all nodes",
            lambda: mmlens.attribution.compare_with_patching(
                w.model,
                w.prompt,
                w.other,
                mmlens.logit_difference,
                mmlens.attribute(
                    w.model, w.prompt, w.other, mmlens.logit_difference, nodes="blocks.0.hook_mlp_out"
                ),
                n=None,
            ),
        ),
        (
            "seed",
            "the same draw from an int and a NumPy int",
            lambda: _same(one.random(3), one.random(np.int64(3))),
        ),
        ("token_map.evidence", "examples", lambda: w.prompt.token_map.evidence(tuple(w.examples[:2]))),
        (
            "token_map.evidence",
            "lists of Evidence",
            lambda: w.prompt.token_map.evidence([list(example.evidence) for example in w.examples[:2]]),
        ),
        ("to_string", "a NumPy array", lambda: w.model.to_string(np.array([5, 6]))),  # type: ignore[arg-type]
        ("to_str_tokens", "a list of texts", lambda: w.model.to_str_tokens(["What colour", "Which"])),
        ("hook_names", "a filter", lambda: w.model.hook_names(lambda name: name.endswith("hook_z"))),
        ("Setup", "tuples", lambda: Setup(w.model, tuple(w.examples[:2]), tuple(w.examples[2:]))),
    ]


def _same(one: Any, other: Any) -> None:
    assert one == other
