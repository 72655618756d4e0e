"""What was built for one prompt or model is not used for another: each refusal beside a use that is right."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import mmlens
from mmlens.data.examples import Example
from mmlens.interventions.ablation import mean_activations
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Intervention
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_answers import with_answers
from mmlens.model.prompt_making import prompt_from_inputs

OTHER_MODEL = "another model"


@pytest.fixture
def examples() -> list[Example]:
    return mmlens.scene_examples("objects", 3, seed=0)


def same_text_other_images(model: HookedVLM, examples: list[Example]) -> Prompt:
    others = mmlens.scene_examples("objects", len(examples), seed=1)
    return model.prompt([e.question for e in examples], [list(e.images) for e in others])


def changed() -> HookedVLM:
    """The micro model, but for one head that writes otherwise."""
    other = HookedVLM.from_pretrained("micro")
    with torch.no_grad():
        other.hf_model.get_decoder().layers[2].self_attn.o_proj.weight[:, 8:16] *= 1.01
    return other


INTERVENTIONS: dict[str, Callable[[HookedVLM, list[Example], Prompt], Intervention]] = {
    "ablation at positions": lambda model, examples, other: mmlens.ablate([(0, 1)], positions="last"),
    "mean": lambda model, examples, other: mmlens.ablate(
        [(0, 1)], "mean", reference=mean_activations(model, examples)
    ),
    "resample": lambda model, examples, other: mmlens.ablate(
        [(0, 1)], "resample", reference=mmlens.scene_examples("objects", 4, seed=5)
    ),
    "resample in the tower": lambda model, examples, other: mmlens.ablate(
        [("vision", 0, 1)], "resample", reference=mmlens.scene_examples("objects", 4, seed=5)
    ),
    "noise": lambda model, examples, other: mmlens.interventions.noise_images(),
    "patch": lambda model, examples, other: mmlens.patch("blocks.1.hook_resid_pre", other),
    "patch in the tower": lambda model, examples, other: mmlens.patch(
        "vision.blocks.0.hook_resid_pre", other
    ),
    "knockout": lambda model, examples, other: mmlens.knockout("last", "image"),
}


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_an_intervention_runs_on_its_own_images_alone(
    micro: HookedVLM, examples: list[Example], name: str
) -> None:
    """As a prompt, encoded, as keyword inputs and while generating; an equal prompt made again is the same."""
    prompt, other = micro.prompt_examples(examples), same_text_other_images(micro, examples)
    hooks = INTERVENTIONS[name](micro, examples, other)(micro, prompt)
    expected = micro.run_with_hooks(prompt, fwd_hooks=hooks)
    again = micro.prompt_examples(examples)
    for same in (again, prompt.to("cpu")):
        assert torch.equal(micro.run_with_hooks(same, fwd_hooks=hooks), expected)
    assert torch.equal(micro.run_with_hooks(**again.inputs, fwd_hooks=hooks), expected)
    in_tower = "tower" in name
    if not in_tower:
        encoded = micro.encode_images(again)
        assert torch.equal(micro.run_with_hooks(encoded, fwd_hooks=hooks), expected)
    with micro.hooks(fwd_hooks=hooks):
        micro.generate(again, max_new_tokens=2, do_sample=False)
        micro.generate(**again.inputs, max_new_tokens=2, do_sample=False)
    message = "same text with other images .pixel_values differs"
    for run in (other, other.inputs, *([] if in_tower else [micro.encode_images(other)])):
        with pytest.raises(ValueError, match=message):
            micro.run_with_hooks(run, fwd_hooks=hooks)
    with pytest.raises(ValueError, match=message), micro.hooks(fwd_hooks=hooks):
        micro.generate(other, max_new_tokens=1)


def test_beams_and_encoded_sources_are_no_other_prompt(micro: HookedVLM, examples: list[Example]) -> None:
    prompt = micro.prompt_examples(examples[:1])
    hooks = mmlens.ablate([(0, 1)], positions="image")(micro, prompt)
    with micro.hooks(fwd_hooks=hooks):
        micro.generate(prompt, max_new_tokens=2, num_beams=2, do_sample=False)
        micro.generate(**prompt.inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    encoded = micro.encode_images(prompt)
    hooks = mmlens.ablate([(0, 1)], positions="image")(micro, encoded)
    one, two = (micro.run_with_hooks(each, fwd_hooks=hooks) for each in (prompt, encoded))
    assert torch.equal(one, two)
    assert encoded.vision == prompt.vision and encoded.fingerprints == prompt.fingerprints


def test_inputs_that_the_processor_made_are_told_apart_too(micro: HookedVLM, examples: list[Example]) -> None:
    """Prompts of `prompt_from_inputs` too."""
    made = [micro.prompt_examples(examples), same_text_other_images(micro, examples)]
    one, other = (
        prompt_from_inputs(
            micro.processor,
            micro.family.layout,
            each.inputs,
            each.images,
        )
        for each in made
    )
    hooks = mmlens.ablate([(0, 1)], positions="last")(micro, one)
    micro.run_with_hooks(micro.encode_images(one), fwd_hooks=hooks)
    with pytest.raises(ValueError, match="other images"):
        micro.run_with_hooks(micro.encode_images(other), fwd_hooks=hooks)
    assert not set(one.fingerprints) & set(other.fingerprints)


# ---------------------------------------------------------------------- models


def test_means_and_caches_of_another_model_are_taken_by_name_alone(
    micro: HookedVLM, examples: list[Example]
) -> None:
    other, prompt = changed(), micro.prompt_examples(examples)
    means = mean_activations(micro, examples)
    _, cache = micro.run_with_cache(prompt)
    uses: list[Callable[..., Intervention]] = [
        lambda given: mmlens.ablate([(2, 1)], "mean", reference=given["means"]),
        lambda given: mmlens.ablate([(2, 1)], "mean_query", reference=given["means"]),
        lambda given: mmlens.patch("blocks.2.hook_attn_out", given["cache"]),
        lambda given: mmlens.patch("blocks.2.hook_attn_out", lambda model, prompt: given["cache"]),
        lambda given: mmlens.path_patch([(0, 1)], "logits", given["cache"]),
    ]
    own = {"means": means, "cache": cache}
    named = {name: mmlens.interventions.of_another_model(each) for name, each in own.items()}
    plain = {"means": dict(means), "cache": dict(cache.cache_dict)}
    for use in uses:
        with pytest.raises(ValueError, match=OTHER_MODEL):
            use(own)(other, prompt)
        logits = [other.run_with_hooks(prompt, fwd_hooks=use(each)(other, prompt)) for each in (named, plain)]
        assert torch.equal(*logits)
        # The model's own, wrapped or not.
        logits = [micro.run_with_hooks(prompt, fwd_hooks=use(each)(micro, prompt)) for each in (own, named)]
        assert torch.equal(*logits)
    kept = pickle.loads(pickle.dumps(means))
    with pytest.raises(ValueError, match=OTHER_MODEL):
        mmlens.ablate([(2, 1)], "mean", reference=kept)(other, prompt)


def test_the_same_weights_are_one_model(micro: HookedVLM, examples: list[Example]) -> None:
    """Loaded twice, and in half precision."""
    prompt = micro.prompt_examples(examples)
    means = mean_activations(micro, examples)
    _, cache = micro.run_with_cache(prompt, names_filter="hook_embed")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        same = HookedVLM.from_pretrained("micro", dtype=dtype)
        mmlens.ablate([(0, 1)], "mean", reference=means)(same, prompt)
        mmlens.patch("hook_embed", cache)(same, prompt)


def test_weights_that_change_make_a_source_run_again(examples: list[Example]) -> None:
    model = HookedVLM.from_pretrained("micro")
    prompt, source = model.prompt_examples(examples[:1]), model.prompt_examples(examples[1:2])
    means = mean_activations(model, examples)
    restored = mmlens.patch("blocks.7.hook_resid_post", source)
    assert torch.equal(
        model.run_with_hooks(prompt, fwd_hooks=restored(model, prompt), logits_to_keep=1),
        model(source, logits_to_keep=1),
    )
    with torch.no_grad():
        model.hf_model.get_decoder().layers[3].mlp.down_proj.weight *= 0.5
    assert torch.equal(
        model.run_with_hooks(prompt, fwd_hooks=restored(model, prompt), logits_to_keep=1),
        model(source, logits_to_keep=1),
    )
    with pytest.raises(ValueError, match=OTHER_MODEL):
        mmlens.ablate([(0, 1)], "mean", reference=means)(model, prompt)


def test_prompts_and_answers_of_another_processor_are_refused(
    micro: HookedVLM, examples: list[Example]
) -> None:
    other = HookedVLM.from_pretrained("qwen3-vl-s")
    prompt, foreign = micro.prompt_examples(examples), other.prompt_examples(examples)
    for run in (
        lambda: micro(foreign),
        lambda: micro.run_with_cache(foreign),
        lambda: micro.generate(foreign),
        lambda: micro.encode_images(foreign),
        lambda: mmlens.effect(micro, foreign, None, mmlens.accuracy),
    ):
        with pytest.raises(ValueError, match="made by another model's processor"):
            run()
    with pytest.raises(ValueError, match="made by another processor"):
        with_answers(prompt, other.processor, examples)
    metric = mmlens.metrics.logit_difference_of(other, "red", "blue")
    with pytest.raises(ValueError, match="another model's tokenizer"):
        mmlens.effect(micro, prompt, None, metric)
    # A processor loaded again is the same; so is a prompt of one model in another that shares it.
    again = HookedVLM.from_pretrained("micro")
    assert torch.equal(micro(again.prompt_examples(examples)), micro(prompt))
    assert changed()(prompt).shape == micro(prompt).shape
    again.tokenizer.add_tokens(["<extra>"])
    mmlens.effect(micro, again.prompt_examples(examples), None, mmlens.accuracy)


# ---------------------------------------------------------------------- effect(clean=...)


def test_an_earlier_clean_run_is_of_the_same_prompts(micro: HookedVLM, examples: list[Example]) -> None:
    others = mmlens.scene_examples("objects", 3, seed=1)
    intervention = mmlens.ablate([(0, 1)])
    clean = mmlens.effect(micro, examples, None, mmlens.logit_difference)
    expected = mmlens.effect(micro, examples, intervention, mmlens.logit_difference)
    prompt = micro.prompt_examples(examples)
    for same in (
        examples,
        prompt,
        micro.encode_images(prompt),
        [micro.prompt_examples([e]) for e in examples],
    ):
        found = mmlens.effect(micro, same, intervention, mmlens.logit_difference, clean=clean, batch_size=2)
        torch.testing.assert_close(found.values, expected.values, atol=1e-3, rtol=1e-4)
        assert torch.equal(found.clean, clean.clean)
    other_answers = [replace(e, answer=next(c for c in e.candidates if c != e.answer)) for e in examples]
    for name, wrong in {
        "other text": others,
        "another order": examples[::-1],
        "other images": [
            replace(e, images=o.images, evidence=()) for e, o in zip(examples, others, strict=True)
        ],
        "other answers": other_answers,
    }.items():
        with pytest.raises(ValueError, match="is of other prompts: example 0 has another"):
            mmlens.effect(micro, wrong, intervention, mmlens.logit_difference, clean=clean)
            pytest.fail(name)
    for n in (2, 6):
        with pytest.raises(ValueError, match=f"`clean` holds 3 examples, these prompts {n}"):
            mmlens.effect(micro, [*examples, *others][:n], intervention, mmlens.logit_difference, clean=clean)
    with pytest.raises(ValueError, match="clean.*is of another model"):
        mmlens.effect(changed(), examples, intervention, mmlens.logit_difference, clean=clean)
    part = clean.select([2, 0])
    mmlens.effect(micro, [examples[2], examples[0]], intervention, mmlens.logit_difference, clean=part)
    with pytest.raises(ValueError, match="other prompts"):
        mmlens.effect(micro, examples[:2], intervention, mmlens.logit_difference, clean=part)
    # Numbers that came from elsewhere say nothing of their prompts.
    by_hand = mmlens.effects.Effect(clean.values, clean.clean, clean.metric)
    mmlens.effect(micro, examples, intervention, mmlens.logit_difference, clean=by_hand)
