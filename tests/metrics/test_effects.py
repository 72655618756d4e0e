"""Effects of interventions against the model run by hand, one prompt at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from tiny import tiny_images, tiny_model, tiny_processor
from torch import Tensor

from mmlens.data.examples import Example
from mmlens.hooked_vlm import HookedVLM
from mmlens.metrics.effects import Effect, effect
from mmlens.metrics.outcomes import accuracy, answer_log_probability, logit_difference
from mmlens.prompt import Prompt
from mmlens.statistics import mean_interval, paired_difference_interval

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
    forwards = model()._n_forwards
    both = effect(model(), examples(), zero_layer, [accuracy, logit_difference], batch_size=16)
    assert model()._n_forwards - forwards == 2
    assert list(both) == ["accuracy", "logit_difference"]
    named = effect(model(), examples(), zero_layer, {"mine": logit_difference}, batch_size=16)
    assert torch.equal(named["mine"].values, both["logit_difference"].values)


def test_an_earlier_result_saves_the_clean_run() -> None:
    first = effect(model(), examples(), None, [accuracy, logit_difference])
    assert torch.equal(first["accuracy"].values, first["accuracy"].clean)
    forwards = model()._n_forwards
    again = effect(model(), examples(), zero_layer, [accuracy, logit_difference], clean=first)
    assert model()._n_forwards - forwards == 1
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
    ("intervention", "message"), [(nothing, "changed no logit"), (no_hooks, "set no hook")]
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
