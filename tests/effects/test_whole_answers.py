"""Interventions and metrics of whole answers: partial runs, patches, corruptions, and what decoding itself gives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import hooked
from torch import Tensor

import mmlens
from mmlens import Example, HookedVLM
from mmlens.errors import InvalidValueError
from mmlens.metrics import candidate_log_probability_difference, reads, whole_answer_log_probability
from mmlens.model.prompt import Prompt

FAMILIES = ("qwen3_vl", "llava", "gemma3")
CANDIDATES = ("the letter K", "the letter", "seven")
METRICS = [whole_answer_log_probability, candidate_log_probability_difference, mmlens.answer_log_probability]

model_of = functools.cache(hooked)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HookedVLM:
    return model_of(request.param)


def examples(n: int = 2, *, seed: int = 3) -> list[Example]:
    questions = ["What colour is it?", "Where is the red square, and which page?", "Which page?"]
    images = tiny.tiny_images(n, seed=seed, sizes=[(64, 48)])
    return [
        Example(questions[at], CANDIDATES[at % 3], images=(images[at],), candidates=CANDIDATES)
        for at in range(n)
    ]


def interventions(model: HookedVLM) -> dict[str, mmlens.Intervention]:
    other = mmlens.interventions.other_image(tiny.tiny_images(4, seed=9, sizes=[(64, 48)]))
    middle = model.cfg.n_layers - 1
    return {
        "a head at the last position": mmlens.ablate([(1, 2)], positions="last"),
        "a head at the question": mmlens.ablate([(0, 1)], positions="question"),
        "a head everywhere": mmlens.ablate([(1, 0)]),
        "a head at the answer": mmlens.ablate([(2, 3)], positions=mmlens.interventions.if_any("answer")),
        "the image hidden from the end": mmlens.knockout("last", "image"),
        "the image hidden from all": mmlens.knockout(None, "image", layers=[1]),
        "noise on the image": mmlens.interventions.noise_images(seed=1),
        "a stream of another image": mmlens.patch(
            f"blocks.{middle}.hook_resid_pre", other, positions="image"
        ),
        "heads of another image": mmlens.patch("blocks.0.attn.hook_z", other, heads=[0, 1]),
        "a path": mmlens.path_patch([(0, 0)], "logits", other),
        "a direction": lambda model, prompt: [("blocks.1.hook_resid_post", lambda x, hook: x * 1.1)],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_partial_sweeps_are_whole_runs(family: str) -> None:
    model = model_of(family)
    every = interventions(model)
    table = mmlens.sweep(model, examples(3), every, METRICS, batch_size=2, progress=False)
    for label, intervention in every.items():
        whole = mmlens.effect(model, examples(3), intervention, METRICS, batch_size=2)
        for name, found in whole.items():
            own = table[(table["intervention"] == label) & (table["metric"] == name)].sort_values("example")
            torch.testing.assert_close(torch.tensor(own["value"].tolist()), found.values, atol=2e-3, rtol=0)
            torch.testing.assert_close(torch.tensor(own["clean"].tolist()), found.clean, atol=2e-3, rtol=0)
        moved = whole["whole_answer_log_probability"]
        assert bool((moved.values - moved.clean).abs().max() > 1e-4), label
    reuse = mmlens.effects.reuse_table(table)
    assert bool((reuse["position"] > 0).any()) or family == "gemma3"


def forced(
    model: HookedVLM, prompt: Prompt, intervention: mmlens.Intervention, ids: list[list[int]]
) -> Tensor:
    """The answers' log probabilities while transformers decodes, made to take these tokens, under the same hooks."""
    length = prompt.shape[1]

    def force(row: int, so_far: Tensor) -> list[int]:
        at = len(so_far) - length
        return [ids[row][at] if at < len(ids[row]) else 3]

    with model.hooks(fwd_hooks=intervention(model, prompt)), torch.no_grad():
        out = model.generate(
            prompt,
            max_new_tokens=max(map(len, ids)),
            do_sample=False,
            prefix_allowed_tokens_fn=force,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    steps = torch.stack(out.logits, 1).float().log_softmax(-1)
    return torch.stack([steps[row, range(len(own)), own].sum() for row, own in enumerate(ids)])


WHILE_DECODING = {
    "a head everywhere": mmlens.ablate([(1, 0), (0, 3)]),
    "a head at the question": mmlens.ablate([(0, 1)], positions="question"),
    "a head at the last position": mmlens.ablate([(1, 2)], positions="last"),
    "in the prompt alone": mmlens.interventions.during(mmlens.ablate([(1, 0)]), "prompt"),
    "in the answer alone": mmlens.interventions.during(mmlens.ablate([(1, 0)]), "decode"),
    "in both": mmlens.interventions.during(mmlens.ablate([(1, 0)], positions="question"), "both"),
    "the image hidden from all": mmlens.knockout(None, "image"),
    "the image hidden from the end": mmlens.knockout("last", "image"),
    "a bias": mmlens.bias_attention([(1, 1)], "image", 2.0),
    "noise on the image": mmlens.interventions.noise_images(seed=1),
}


@pytest.mark.parametrize("mode", ["mean", "resample"])
@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_ablations_by_other_examples_are_what_decoding_gives(family: str, mode: str) -> None:
    model, data, others = model_of(family), examples(2), examples(3, seed=11)[2:] + examples(2, seed=12)[:1]
    reference: Any = others if mode == "resample" else mmlens.mean_activations(model, others)
    ablation = mmlens.ablate([(1, 0), (0, 2)], mode, reference=reference)
    prompt = model.prompt_examples(data)
    assert prompt.answer_tokens is not None
    expected = forced(model, prompt, ablation, prompt.answer_tokens)
    found = mmlens.effect(model, data, ablation, whole_answer_log_probability)
    torch.testing.assert_close(found.values, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("label", WHILE_DECODING)
@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_it_is_what_decoding_gives_under_the_same_intervention(family: str, label: str) -> None:
    model, intervention = model_of(family), WHILE_DECODING[label]
    data = examples(2)
    prompt = model.prompt_examples(data)
    assert prompt.answer_tokens is not None
    expected = forced(model, prompt, intervention, prompt.answer_tokens)
    found = mmlens.effect(model, data, intervention, whole_answer_log_probability)
    torch.testing.assert_close(found.values, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_is_run_with_the_same_answer_after_it(family: str) -> None:
    model = model_of(family)
    clean, source = (model.prompt_examples(examples(2, seed=seed)) for seed in (3, 4))
    assert clean.answer_tokens is not None
    name = "blocks.1.hook_resid_pre"
    patched = mmlens.effect(model, clean, mmlens.patch(name, source), whole_answer_log_probability)
    longer, longer_source = (each.continued(clean.answer_tokens) for each in (clean, source))
    _, cache = model.run_with_cache(longer_source, names_filter=name)
    with torch.no_grad():
        logits = model.run_with_hooks(longer, fwd_hooks=[(name, lambda x, hook: cache[name])]).log_softmax(-1)
    expected = [
        float(logits[row, -len(own) - 1 : -1].gather(-1, torch.tensor(own)[:, None]).sum())
        for row, own in enumerate(clean.answer_tokens)
    ]
    assert patched.values.tolist() == pytest.approx(expected, abs=1e-3)
    if family == "qwen3_vl":
        # The image enters the stream again between the layers.
        return
    # From the stream on, the run is the source's.
    other = mmlens.effect(model, source, None, whole_answer_log_probability).clean
    torch.testing.assert_close(patched.values, other, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_a_corrupted_continuation_is_the_continued_corruption(family: str) -> None:
    model = model_of(family)
    prompt = model.prompt_examples(examples(2))
    ids = [[41, 42, 43], [44]]
    for corruption in (
        mmlens.interventions.other_image(tiny.tiny_images(4, seed=9, sizes=[(64, 48)])),
        mmlens.interventions.blank_region((0, 0, 32, 24)),
        mmlens.interventions.other_question("Which page holds it?", equal_layout=False),
    ):
        one = corruption(model, prompt.continued(ids))
        other = corruption(model, prompt).continued(ids)
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(value, other.inputs[name]) for name, value in one.inputs.items())
        assert torch.equal(one.token_map.is_answer, other.token_map.is_answer)
        assert one.continuation is not None and one.continuation.ids == ids


def test_a_mask_of_the_prompt_holds_after_it(model: HookedVLM) -> None:
    data = examples(2)
    prompt = model.prompt_examples(data)
    by_mask = mmlens.ablate([(1, 1)], positions=prompt.token_map.is_question)
    by_word = mmlens.ablate([(1, 1)], positions="question")
    one, other = (mmlens.effect(model, prompt, each, METRICS[:2]) for each in (by_mask, by_word))
    for name in one:
        assert torch.equal(one[name].values, other[name].values)


def test_metrics_of_answers_and_of_the_prompt_share_nothing_but_the_call(model: HookedVLM) -> None:
    data, head = examples(3), mmlens.ablate([(1, 1)])
    together = mmlens.effect(
        model, data, head, [*METRICS, mmlens.metrics.kl_to_clean, mmlens.generated_accuracy]
    )
    assert list(together) == [*(each.__name__ for each in METRICS), "kl_to_clean", "generated_accuracy"]
    for metric in METRICS:
        alone = mmlens.effect(model, data, head, metric)
        torch.testing.assert_close(alone.values, together[metric.__name__].values, atol=1e-3, rtol=0)
        again = mmlens.effect(model, data, head, metric, clean=alone)
        assert torch.equal(again.values, alone.values) and torch.equal(again.clean, alone.clean)
    assert int(mmlens.effect(model, data, head, METRICS[:2]).popitem()[1].report["fired"].max()) == 3


def test_a_metric_of_one_s_own_reads_what_it_asks_for(model: HookedVLM) -> None:
    asked: list[Sequence[int]] = []

    def two(model: HookedVLM, prompt: Prompt) -> list[list[list[int]]]:
        return [[[41], [42, 43]]] * len(prompt)

    @reads("answer log probabilities", of=two)
    def last_of_second(log_probs: Any, prompt: Prompt) -> Tensor:
        asked.extend([len(each) for each in own] for own in log_probs)
        return torch.stack([own[1][-1] for own in log_probs])

    prompt = model.prompt_examples(examples(2))
    found = mmlens.effect(model, prompt, None, last_of_second)
    assert asked == [[1, 2], [1, 2]]
    with torch.no_grad():
        logits = model(prompt.continued([[42, 43]] * 2)).log_softmax(-1)
    torch.testing.assert_close(found.clean, logits[:, -2, 43], atol=1e-4, rtol=0)


def test_a_hook_that_is_no_edit_needs_answers_of_equal_length(model: HookedVLM) -> None:
    def double(model: HookedVLM, prompt: Prompt) -> list[Any]:
        return [("blocks.0.hook_resid_post", lambda x, hook: 2 * x)]

    with pytest.raises(InvalidValueError, match="one by one"):
        mmlens.effect(
            model, examples(2), mmlens.interventions.during(double, "prompt"), whole_answer_log_probability
        )
    mmlens.effect(
        model, examples(2)[:1], mmlens.interventions.during(double, "prompt"), whole_answer_log_probability
    )
