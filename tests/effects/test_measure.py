"""Effects of interventions against the model run by hand, one prompt at a time."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
import torch
from tiny import tiny_images, tiny_model, tiny_processor
from torch import Tensor

from mmlens.data.examples import Example
from mmlens.data.scenes import scene_examples
from mmlens.effects.measure import Effect, effect
from mmlens.effects.sweeps import sweep
from mmlens.interventions.ablation import ablate
from mmlens.interventions.edits import Edit
from mmlens.metrics.answers import exact_match, generated_accuracy, generated_invalid, generating
from mmlens.metrics.outcomes import (
    accuracy,
    answer_log_probability,
    kl_to_clean,
    logit_difference,
    reads,
)
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import HookNeverFiredError
from mmlens.model.prompt import Prompt
from mmlens.statistics import mean_interval, paired_difference_interval, ratio_interval

CANDIDATES = ("red", "blue", "green", "white")


@functools.cache
def model() -> HookedVLM:
    return HookedVLM(tiny_model("qwen3_vl"), tiny_processor("qwen3_vl"))


@functools.cache
def examples() -> list[Example]:
    images = tiny_images(7, seed=5)
    return [
        Example(
            f"What colour is {'the letter ' * (i % 3)}K?", CANDIDATES[i % 4], (image,), candidates=CANDIDATES
        )
        for i, image in enumerate(images)
    ]


def zero_layer(model: HookedVLM, prompt: Prompt) -> list[tuple[str, Callable[..., Any]]]:
    def zero(z: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(z)

    return [("blocks.1.attn.hook_z", zero)]


def nothing(model: HookedVLM, prompt: Prompt) -> list[tuple[str, Callable[..., Any]]]:
    return [("blocks.1.attn.hook_z", lambda z, hook: z)]


def no_hooks(model: HookedVLM, prompt: Prompt) -> list[tuple[str, Callable[..., Any]]]:
    return []


@torch.no_grad()
def by_hand(metric: Callable[[Tensor, Prompt], Tensor], *, zeroed: bool) -> list[float]:
    """One example at a time; the layer is taken out in the Hugging Face model, through its own module."""
    values = []
    o_proj = model().hf_model.model.language_model.layers[1].self_attn.o_proj
    for example in examples():
        prompt = model().prompt_examples([example])
        handle = (
            o_proj.register_forward_pre_hook(lambda m, args: (torch.zeros_like(args[0]),)) if zeroed else None
        )
        try:
            logits = model().hf_model(**prompt.inputs).logits
        finally:
            if handle is not None:
                handle.remove()
        values.append(float(metric(logits, prompt)))
    return values


@pytest.mark.parametrize("metric", [answer_log_probability, logit_difference, accuracy])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_effect_equals_runs_by_hand(metric: Callable[[Tensor, Prompt], Tensor], batch_size: int) -> None:
    result = effect(model(), examples(), zero_layer, metric, batch_size=batch_size)
    np.testing.assert_allclose(result.values, by_hand(metric, zeroed=True), atol=1e-4)
    np.testing.assert_allclose(result.clean, by_hand(metric, zeroed=False), atol=1e-4)
    assert result.mean == pytest.approx(np.mean(by_hand(metric, zeroed=True)), abs=1e-4)
    assert result.metric == metric.__name__


def test_prompts_may_be_one_prompt_several_or_examples() -> None:
    one = effect(model(), model().prompt_examples(examples()), zero_layer, logit_difference)
    batches = [model().prompt_examples(examples()[:4]), model().prompt_examples(examples()[4:])]
    several = effect(model(), batches, zero_layer, logit_difference)
    made = effect(model(), examples(), zero_layer, logit_difference, batch_size=7)
    torch.testing.assert_close(one.values, made.values)
    torch.testing.assert_close(several.values, made.values, atol=1e-4, rtol=1e-4)


def test_several_metrics_share_the_runs() -> None:
    forwards = model().run_state.n_forwards
    both = effect(model(), examples(), zero_layer, [accuracy, logit_difference], batch_size=16)
    assert model().run_state.n_forwards - forwards == 2
    assert list(both) == ["accuracy", "logit_difference"]
    named = effect(model(), examples(), zero_layer, {"mine": logit_difference}, batch_size=16)
    assert torch.equal(named["mine"].values, both["logit_difference"].values)


def test_an_earlier_result_saves_the_clean_run() -> None:
    first = effect(model(), examples(), None, [accuracy, logit_difference])
    assert torch.equal(first["accuracy"].values, first["accuracy"].clean)
    forwards = model().run_state.n_forwards
    again = effect(model(), examples(), zero_layer, [accuracy, logit_difference], clean=first)
    assert model().run_state.n_forwards - forwards == 1
    direct = effect(model(), examples(), zero_layer, [accuracy, logit_difference])
    for name in first:
        assert torch.equal(again[name].values, direct[name].values)
        assert torch.equal(again[name].clean, direct[name].clean)
    single = effect(model(), examples(), zero_layer, accuracy, clean=first["accuracy"])
    assert torch.equal(single.values, direct["accuracy"].values)


def test_intervals_are_those_of_the_statistics_module() -> None:
    result = effect(model(), examples(), zero_layer, logit_difference, level=0.9)
    assert result.interval == mean_interval(result.values, level=0.9)
    assert result.clean_interval == mean_interval(result.clean, level=0.9)
    assert result.difference_interval == paired_difference_interval(result.values, result.clean, level=0.9)
    assert result.difference == pytest.approx(result.mean - result.clean_mean, abs=1e-6)
    assert result.difference in result.difference_interval
    outcomes = Effect(torch.tensor([0.0, 1, 0, 0]), torch.ones(4))
    assert 1.0 in outcomes.clean_interval
    assert outcomes.clean_interval.low < 0.6


def test_table_and_select() -> None:
    result = effect(model(), examples(), zero_layer, logit_difference)
    table = result.table()
    assert list(table.columns) == ["example", "value", "clean", "difference"]
    np.testing.assert_allclose(table["difference"].mean(), result.difference, atol=1e-6)
    assert torch.equal(result.select([0, 2]).values, result.values[[0, 2]])
    assert torch.equal(
        result.select(result.values > result.values.median()).clean,
        result.clean[result.values > result.values.median()],
    )


def test_metrics_of_other_positions_can_have_all_logits() -> None:
    def first_position(logits: Tensor, prompt: Prompt) -> Tensor:
        return logits[:, 0].logsumexp(-1)

    last_only = effect(model(), examples()[:1], None, first_position)
    everything = effect(model(), examples()[:1], None, first_position, logits_to_keep=0)
    assert not torch.equal(last_only.values, everything.values)


@pytest.mark.parametrize(
    ("intervention", "message"), [(nothing, "changed no activation"), (no_hooks, "set no hook")]
)
def test_an_intervention_without_effect_warns(intervention: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        result = effect(model(), examples(), intervention, logit_difference)
    assert torch.equal(result.values, result.clean)
    assert result.difference == 0


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' type checker would refuse a wrong type before mmlens can.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def scalar(logits: Tensor, prompt: Prompt) -> Tensor:
        return logits.mean()

    def not_a_number(logits: Tensor, prompt: Prompt) -> Tensor:
        return torch.full((len(prompt),), torch.nan)

    def run(prompts: Any, metric: Any, **options: Any) -> Any:
        return effect(model(), prompts, zero_layer, metric, **options)

    cases: Sequence[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: run([], accuracy), ValueError, "no prompts given"),
        (lambda: run(["What colour?"], accuracy), TypeError, "got str"),
        (lambda: run([examples()[0], model().prompt("What?")], accuracy), TypeError, "all of one type"),
        (
            lambda: run(examples(), scalar),
            ValueError,
            r"metric scalar gives one number per example, .* not \[\]",
        ),
        (lambda: run(examples(), not_a_number), ValueError, "NaN for example 0"),
        (lambda: run(examples(), [accuracy, accuracy]), ValueError, "same name"),
        (lambda: run(examples(), []), ValueError, "no metric"),
        (lambda: run(examples(), accuracy, batch_size=0), ValueError, "batch_size"),
        (lambda: run(model().prompt("What?"), accuracy), ValueError, "carries no answers"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    clean = effect(model(), examples(), None, accuracy)
    with pytest.raises(ValueError, match="same prompts"):
        run(examples()[:3], accuracy, clean=clean)
    with pytest.raises(ValueError, match=r"no values of \['logit_difference'\], only of \['accuracy'\]"):
        run(examples(), logit_difference, clean=clean)


# ---------------------------------------------------------------------- metrics that read more than logits


@torch.no_grad()
def test_kl_to_the_clean_run_equals_scipy_on_runs_by_hand() -> None:
    result = effect(model(), examples(), zero_layer, kl_to_clean, batch_size=3)
    expected = []
    for example in examples():
        prompt = model().prompt_examples([example])
        clean = model().hf_model(**prompt.inputs).logits[0, -1]
        with zeroed_layer():
            under = model().hf_model(**prompt.inputs).logits[0, -1]
        expected.append(
            scipy.stats.entropy(*(scipy.special.softmax(x.double().numpy()) for x in (clean, under)))
        )
    np.testing.assert_allclose(result.values, expected, rtol=1e-3, atol=1e-9)
    assert result.clean.tolist() == [0] * 7
    assert min(expected) > 1e-6


def test_an_earlier_result_still_leaves_the_clean_logits_to_be_run() -> None:
    both = [logit_difference, kl_to_clean]
    direct = effect(model(), examples(), zero_layer, both)
    first = effect(model(), examples(), None, both)
    forwards = model().run_state.n_forwards
    again = effect(model(), examples(), zero_layer, both, clean=first)
    assert model().run_state.n_forwards - forwards == 2
    for name in direct:
        assert torch.equal(again[name].values, direct[name].values)
    forwards = model().run_state.n_forwards
    effect(model(), examples(), None, both, clean=first)
    assert model().run_state.n_forwards == forwards


@contextmanager
def zeroed_layer() -> Iterator[None]:
    o_proj = model().hf_model.model.language_model.layers[1].self_attn.o_proj
    handle = o_proj.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]),))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def generated(example: Example, n_tokens: int, *, zeroed: bool) -> str:
    """By the plain model, one example at a time."""
    prompt = model().prompt_examples([example])
    with zeroed_layer() if zeroed else nullcontext():
        ids = model().hf_model.generate(**prompt.inputs, max_new_tokens=n_tokens, do_sample=False)
    text = model().tokenizer.decode(ids[0, prompt.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def test_metrics_of_answers_equal_generation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    @reads("answers", max_new_tokens=5)
    def hashed(texts: Sequence[str], prompt: Prompt) -> Tensor:
        seen.append(list(texts))
        return torch.tensor([float(zlib.crc32(text.encode()) % 9973) for text in texts])

    runs = count_generations(monkeypatch)
    result = effect(model(), examples(), zero_layer, hashed, batch_size=4)
    assert runs == [5] * 4
    batches = [examples()[:4], examples()[4:]]
    expected = [
        [generated(e, 5, zeroed=zeroed) for e in batch] for batch in batches for zeroed in (False, True)
    ]
    assert seen == expected
    assert expected[0] != expected[1]
    assert result.clean.tolist() == [zlib.crc32(t.encode()) % 9973 for t in expected[0] + expected[2]]
    assert result.values.tolist() == [zlib.crc32(t.encode()) % 9973 for t in expected[1] + expected[3]]


def count_generations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of new tokens of every generation from here on."""
    runs: list[int] = []
    generate = HookedVLM.generate

    def counted(self: HookedVLM, inputs: Any = None, **options: Any) -> Tensor:
        runs.append(options["max_new_tokens"])
        assert options["do_sample"] is False
        return generate(self, inputs, **options)

    monkeypatch.setattr(HookedVLM, "generate", counted)
    return runs


def test_metrics_of_answers_share_their_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = generating(exact_match, max_new_tokens=2), generating(exact_match, max_new_tokens=4)
    runs = count_generations(monkeypatch)
    metrics = {"a": short, "b": short, "c": long, "logits": logit_difference}
    forwards = model().run_state.n_forwards
    result = effect(model(), examples(), zero_layer, metrics)
    assert runs == [2, 4, 2, 4]
    assert torch.equal(result["a"].values, result["b"].values)
    assert model().run_state.n_forwards - forwards >= 2
    del runs[:]
    effect(model(), examples(), zero_layer, metrics, clean=result)
    assert runs == [2, 4]
    logits = effect(model(), examples(), zero_layer, logit_difference)
    assert torch.equal(result["logits"].values, logits.values)
    del runs[:]
    effect(model(), examples(), zero_layer, logit_difference)
    assert runs == []


def test_metrics_of_answers_alone_run_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("logits were run")

    monkeypatch.setattr(HookedVLM, "run_with_hooks", fail)
    result = effect(model(), examples()[:2], zero_layer, generating(exact_match, max_new_tokens=2))
    assert len(result) == 2


def test_on_the_micro_model_answers_are_right_clean_and_wrong_without_attention(micro: HookedVLM) -> None:
    scenes = scene_examples("objects", 8, seed=3)
    metrics = [accuracy, generated_accuracy, generated_invalid]
    result = effect(micro, scenes, ablate(micro.heads), metrics)
    assert result["generated_accuracy"].clean_mean > 0.8
    assert torch.equal(result["generated_accuracy"].clean, result["accuracy"].clean)
    assert result["generated_accuracy"].mean < 0.6
    assert bool((result["generated_accuracy"].values + result["generated_invalid"].values <= 1).all())


# ---------------------------------------------------------------------- what hooks did


@torch.no_grad()
def test_a_metric_that_edits_its_logits_leaves_the_others_alone() -> None:
    """In an effect, in a sweep, and of the clean logits."""

    def spoils(logits: Tensor, prompt: Prompt) -> Tensor:
        return logits[:, -1].zero_().sum(-1)

    @reads("clean logits")
    def spoils_both(logits: Tensor, prompt: Prompt, clean_logits: Tensor) -> Tensor:
        clean_logits.fill_(7.0)
        return logits[:, -1].fill_(3.0).mean(-1)

    own = {"difference": logit_difference, "divergence": kl_to_clean}
    alone = effect(model(), examples()[:3], zero_layer, own, batch_size=2)
    among = {"spoils": spoils, "spoils both": spoils_both, **own, "spoils again": spoils}
    found = effect(model(), examples()[:3], zero_layer, among, batch_size=2)
    for name in own:
        assert torch.equal(found[name].values, alone[name].values)
        assert torch.equal(found[name].clean, alone[name].clean)
    assert float(found["divergence"].values.min()) > 0
    prompt = model().prompt_examples(examples()[:3])
    heads = {"one": ablate([(1, 0)]), "two": ablate([(2, 1)])}
    tables = [sweep(model(), prompt, heads, metrics, progress=False) for metrics in (own, among)]
    key = ["intervention", "example", "metric"]
    of_own, of_all = (
        table[table["metric"].isin(own)].sort_values(key, ignore_index=True) for table in tables
    )
    pd.testing.assert_frame_equal(of_all[of_own.columns], of_own)


def test_the_report_sums_over_prompts_and_keeps_hooks_on_one_point_apart() -> None:
    def intervention(model: HookedVLM, prompt: Prompt) -> list[Any]:
        shift = float(len(prompt))
        edit = Edit(model, prompt, "blocks.2.attn.hook_z", lambda x, here: x - 2 * shift)
        return [
            ("blocks.1.attn.hook_z", lambda z, hook: z + shift),
            ("blocks.1.attn.hook_z", lambda z, hook: z),
            ("blocks.2.attn.hook_z", edit),
        ]

    result = effect(model(), examples(), intervention, logit_difference, batch_size=3)
    assert list(result.report.columns) == ["hook", "fired", "size"]
    points = ["blocks.1.attn.hook_z", "blocks.1.attn.hook_z", "blocks.2.attn.hook_z"]
    assert result.report["hook"].tolist() == points
    assert result.report["fired"].tolist() == [3, 3, 3]
    assert result.report["size"].tolist() == pytest.approx([3, 0, 6], rel=1e-5)
    assert result.select([0, 1]).report is result.report
    several = effect(model(), examples(), intervention, [accuracy, logit_difference], batch_size=3)
    assert several["accuracy"].report.equals(result.report)
    assert effect(model(), examples(), None, logit_difference).report.empty
    assert Effect(torch.ones(2), torch.ones(2)).report.empty


def test_the_report_counts_generations_too() -> None:
    answers = generating(exact_match, max_new_tokens=3)
    result = effect(model(), examples()[:2], zero_layer, [logit_difference, answers])
    both = effect(model(), examples()[:2], zero_layer, logit_difference).report
    assert int(both["fired"][0]) == 1
    assert 2 <= int(result["logit_difference"].report["fired"][0]) <= 4


@pytest.mark.parametrize("metric", [logit_difference, generating(exact_match, max_new_tokens=2)])
def test_an_edit_of_nothing_warns_without_a_clean_run_too(metric: Any) -> None:
    clean = effect(model(), examples()[:2], None, metric)
    with pytest.warns(UserWarning, match="changed no activation of any prompt"):
        effect(model(), examples()[:2], nothing, metric, clean=clean)


def test_an_edit_that_reaches_no_logit_warns() -> None:
    def first_position_of_the_end(model: HookedVLM, prompt: Prompt) -> list[Any]:
        def add(x: Tensor, hook: Any) -> Tensor:
            x[:, 0] += 1
            return x

        return [("blocks.2.hook_resid_post", add)]

    with pytest.warns(UserWarning, match="changed no logit of any prompt"):
        result = effect(model(), examples()[:1], first_position_of_the_end, logit_difference)
    assert result.report["size"].tolist() == pytest.approx([1.0], rel=1e-5)


def test_a_hook_that_never_fires_is_an_error() -> None:
    def on_image(model: HookedVLM, prompt: Prompt) -> list[Any]:
        return [("image.hook_embed", lambda x, hook: x * 0)]

    text_only = [Example("What colour?", "red", candidates=CANDIDATES)]
    for metric in (logit_difference, exact_match):
        with pytest.raises(HookNeverFiredError, match=r"image.hook_embed"):
            effect(model(), text_only, on_image, metric)


# ---------------------------------------------------------------------- recovered


def test_the_recovered_fraction_by_hand() -> None:
    corrupted = torch.tensor([0.0, 1.0, 2.0, 1.0, 3.0])
    target = torch.tensor([4.0, 3.0, 2.0, 5.0, 6.0])
    values = torch.tensor([1.0, 2.0, 2.5, 3.0, 2.0])
    patched = Effect(values, corrupted, "m")
    clean = Effect(torch.zeros(5), target, "m")
    found = patched.recovered(clean)
    assert found.fraction == pytest.approx((1 + 1 + 0.5 + 2 - 1) / (4 + 2 + 0 + 4 + 3))
    assert found.per_example.tolist() == pytest.approx([0.25, 0.5, np.nan, 0.5, -1 / 3], nan_ok=True)
    assert found.interval == ratio_interval(values - corrupted, target - corrupted)
    assert found.fraction in found.interval
    assert patched.recovered(target).fraction == found.fraction
    # Nothing and all of it.
    with pytest.warns(UserWarning, match="same ratio 1"):
        assert tuple(Effect(target, corrupted).recovered(target).interval) == (1, 1)
    with pytest.warns(UserWarning, match="same ratio 0"):
        assert tuple(Effect(corrupted, corrupted).recovered(target).interval) == (0, 0)
    single = Effect(values[:1], corrupted[:1]).recovered(target[:1])
    assert single.fraction == 0.25
    with pytest.raises(ValueError, match="at least 2"):
        _ = single.interval


def test_denoising_the_model() -> None:
    """Corrupted: other images. Putting back the embeddings of the clean prompts recovers everything."""
    clean_prompt = model().prompt_examples(examples())
    others = tiny_images(7, seed=6)
    corrupted_prompt = model().prompt_examples(
        [
            Example(e.question, e.answer, (image.resize(e.images[0].size),), candidates=e.candidates)
            for e, image in zip(examples(), others, strict=True)
        ]
    )
    _, cache = model().run_with_cache(clean_prompt, names_filter="hook_embed")

    def back(share: float) -> Any:
        def intervention(model: HookedVLM, prompt: Prompt) -> list[Any]:
            return [("hook_embed", lambda x, hook: x + share * (cache["hook_embed"] - x))]

        return intervention

    metric = answer_log_probability
    target = effect(model(), clean_prompt, None, metric)
    # Qwen3-VL's DeepStack features bypass hook_embed, so its clean value comes with theirs.
    _, deep = model().run_with_cache(clean_prompt, names_filter=lambda name: name.endswith("hook_deepstack"))

    def everything(model: HookedVLM, prompt: Prompt) -> list[Any]:
        hooks: list[Any] = [(name, lambda x, hook: deep[hook.name]) for name in deep]
        return [*back(1.0)(model, prompt), *hooks]

    full = effect(model(), corrupted_prompt, everything, metric)
    assert full.recovered(target).fraction == pytest.approx(1, abs=1e-3)
    partly = effect(model(), corrupted_prompt, back(0.5), metric)
    expected = (partly.mean - partly.clean_mean) / (target.mean - partly.clean_mean)
    assert partly.recovered(target).fraction == pytest.approx(expected)
    assert not 0.9 < expected < 1.1


def test_bad_targets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' type checker would refuse a wrong type before mmlens can.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    patched = Effect(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0]), "m")
    cases: Sequence[tuple[Any, str]] = [
        (Effect(torch.ones(3), torch.ones(3), "other"), "metric other, this effect of m"),
        (torch.ones(2), r"same 3 examples, clean; got \[2\]"),
        ([1.0, 2.0, 3.0], "got list"),
        (torch.tensor([2.0, 0.0, 1.0]), "nothing to recover"),
        (torch.tensor([2.0, torch.inf, 1.0]), "finite"),
    ]
    for target, message in cases:
        with pytest.raises(ValueError, match=message):
            patched.recovered(target)
