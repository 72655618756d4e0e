"""An edit belongs to one prompt."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny.wrapped import QUESTION, generate, hooked, padded_prompt, two_image_prompt
from torch import Tensor

import mmlens
from mmlens.interventions.noise import noise_images
from mmlens.interventions.patching import patch
from mmlens.model.prompt import Prompt


def _others(model: mmlens.HookedVLM, prompt: Prompt) -> list[Prompt]:
    image = prompt.images[0][0]
    return [
        model.prompt("Which colour is the letter K?", images=[image]),
        model.prompt(QUESTION + " Say it.", images=[image]),
        model.prompt("K?", images=[image]),
        model.prompt([QUESTION, "Where?"], images=[[image], [image]]),
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", ("llava", "qwen3_vl"))
def test_run_on_another_prompt_an_edit_at_positions_is_an_error(family: str) -> None:
    model = hooked(family)
    prompt = model.prompt(QUESTION, images=[two_image_prompt(model).images[0][0]])
    hooks = mmlens.ablate([(1, 0)], positions="question")(model, prompt)
    for other in _others(model, prompt):
        with pytest.raises(ValueError, match="intervention built for a prompt of .* is run on another one"):
            model.run_with_hooks(other, fwd_hooks=hooks)
    model.run_with_hooks(prompt, fwd_hooks=hooks)


@torch.no_grad()
@pytest.mark.parametrize("family", ("llava", "qwen3_vl"))
def test_generation_and_beams_are_runs_of_the_same_prompt(family: str) -> None:
    model = hooked(family)
    for prompt in (two_image_prompt(model), padded_prompt(model)):
        hooks = mmlens.ablate([(1, 0)], positions="question")(model, prompt)
        cached, uncached = (generate(model, prompt, 3, hooks, use_cache=use)[0] for use in (True, False))
        assert torch.equal(cached, uncached)
    one = two_image_prompt(model)
    everywhere = mmlens.ablate([(1, 0)], positions="last")(model, one)
    assert generate(model, one, 3, everywhere, num_beams=2)[0].shape[0] == 1


# Rows that beams and several samples repeat. Batches of unequal length, so that a row's copies are not the other's.

ROWS = {
    "zero": lambda other: mmlens.ablate([(1, 0)], positions="question"),
    "knockout": lambda other: mmlens.knockout("question", "image", layers=(0, 1)),
    "knockout of generated queries": lambda other: mmlens.knockout(None, "image", layers=1),
    "bias_attention": lambda other: mmlens.bias_attention([(1, 0)], "image", 3.0),
    "patch": lambda other: patch("blocks.1.hook_resid_post", other, positions="question"),
    "patch of a pattern": lambda other: patch("blocks.1.attn.hook_pattern", other),
    "patch of image rows": lambda other: patch("image.hook_embed", other),
    "noise": lambda other: noise_images(3.0),
    "while decoding": lambda other: mmlens.interventions.during(mmlens.ablate([(1, 0), (2, 1)]), "decode"),
}


def _rows(model: mmlens.HookedVLM, each: int) -> tuple[Prompt, Prompt]:
    """A batch of two prompts, every one `each` times in a row, and one with the two images changed over."""
    first, second = tiny.tiny_images(2, seed=1, sizes=((64, 64),))
    questions = [QUESTION] * each + ["Where?"] * each
    images = [[first]] * each + [[second]] * each
    return model.prompt(questions, images), model.prompt(questions, images[::-1])


@torch.no_grad()
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("family", ("llava", "qwen3_vl"))
def test_several_samples_of_a_batch_are_the_batch_with_its_rows_repeated(family: str, name: str) -> None:
    model = hooked(family)

    def sampled(each: int, samples: int, use_cache: bool, is_edited: bool) -> tuple[Tensor, Tensor]:
        prompt, other = _rows(model, each)
        hooks = ROWS[name](other)(model, prompt) if is_edited else []
        torch.manual_seed(5)
        with model.hooks(fwd_hooks=hooks):
            out = model.hf_model.generate(
                **prompt.inputs,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=True,
                temperature=3.0,
                bad_words_ids=[[getattr(model.hf_model.config, model.anatomy.image_token)]],
                num_return_sequences=samples,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.sequences, torch.stack(out.logits)

    tokens, logits = sampled(1, 2, True, True)
    assert len(tokens) == 4
    for each, samples, use_cache in ((1, 2, False), (2, 1, True)):
        other_tokens, other_logits = sampled(each, samples, use_cache, True)
        assert torch.equal(tokens, other_tokens)
        torch.testing.assert_close(logits, other_logits, atol=1e-4, rtol=1e-4)
    assert (sampled(1, 2, True, False)[1] - logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ("llava", "qwen3_vl"))
def test_beams_of_a_batch_are_those_of_the_plain_model_under_a_raw_hook(family: str) -> None:
    model, plain = hooked(family), tiny.tiny_model(family)
    prompt, _ = _rows(model, 1)
    d_head, at = model.cfg.d_head, prompt.token_map.is_question.repeat_interleave(3, 0)

    def zero(module: object, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = args[0].clone()
        if z.shape[1] > 1:
            z[at, :d_head] = 0
        return (z,)

    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    options |= {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    clean = plain.generate(**prompt.inputs, **options)
    plain.get_decoder().layers[1].self_attn.o_proj.register_forward_pre_hook(zero)
    expected = plain.generate(**prompt.inputs, **options)
    with model.hooks(fwd_hooks=mmlens.ablate([(1, 0)], positions="question")(model, prompt)):
        found = model.hf_model.generate(**prompt.inputs, **options)
    assert found.sequences.shape[0] == 4 and torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)
    assert not torch.equal(expected.sequences_scores, clean.sequences_scores)


@torch.no_grad()
def test_repeated_rows_in_another_order_are_another_prompt() -> None:
    model = hooked("llava")
    prompt, _ = _rows(model, 1)
    hooks = mmlens.ablate([(1, 0)], positions="question")(model, prompt)
    twice = {name: torch.cat([value, value]) for name, value in prompt.inputs.items()}
    with pytest.raises(ValueError, match="is run on another one"):
        model.run_with_hooks(twice, fwd_hooks=hooks)
    row_by_row = {name: value.repeat_interleave(2, 0) for name, value in prompt.inputs.items()}
    found = model.run_with_hooks(row_by_row, fwd_hooks=hooks)
    expected = model.run_with_hooks(prompt, fwd_hooks=hooks).repeat_interleave(2, 0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
