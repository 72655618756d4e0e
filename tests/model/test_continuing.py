"""Continued prompts: the same model inputs with an answer after them, held to plain Hugging Face calls."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import family_prompt, hooked, hooked_family, largest_logit, padded_prompt
from torch import Tensor

import mmlens
from mmlens.errors import InvalidValueError, PromptError
from mmlens.model.prompt import Prompt

ALWAYS = (*tiny.REPRESENTATIVES, *tiny.FURTHER_KINDS, "paligemma", "kosmos-2", "idefics")
LENGTHS = (3, 1)


def answer_ids(prompt: Prompt, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Ids of plain text, so that no image begins in an answer."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(40, 200, (n,), generator=generator).tolist() for n in lengths]


COUNTS_PADDING = ("mistral_large4", "minimax_m3_vl")
"""In plain transformers the forward pass of these counts padding as positions, which scale or choose what is attended
to: a row's logits depend on how far it is padded."""
GENERATES_OTHERWISE = ("instructblip", "instructblipvideo")
"""transformers' generate gives a padded row other logits than its forward pass, from the first token on."""


def decoded(hf_model: Any, inputs: dict[str, Any], ids: list[list[int]], **options: Any) -> list[Tensor]:
    """Logits by transformers' own generate, forced to take these ids, at the last position and at each of them."""
    n_prompt = inputs["input_ids"].shape[1]

    def force(row: int, so_far: Tensor) -> list[int]:
        at = len(so_far) - n_prompt
        return [ids[row][at] if at < len(ids[row]) else 3]

    out = hf_model.generate(
        **inputs,
        max_new_tokens=max(map(len, ids)) + 1,
        do_sample=False,
        prefix_allowed_tokens_fn=force,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    logits = torch.stack(out.logits, 1).float()
    return [own[: len(row) + 1] for own, row in zip(logits, ids, strict=True)]


def by_hand(hf_model: Any, inputs: dict[str, Any], ids: list[list[int]]) -> list[Tensor]:
    """The same by plain forward passes over tokens and mask, a row at a time beside itself."""
    found = []
    for row, own in enumerate(ids):
        more = torch.tensor([own] * len(ids))
        longer = {
            "input_ids": torch.cat([inputs["input_ids"], more], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1),
        }
        found.append(hf_model(**{**inputs, **longer}).logits[row, -len(own) - 1 :].float())
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.others_slow(ALWAYS))
def test_logits_are_those_of_the_prompt_and_of_transformers_own_decoding(family: str) -> None:
    model = hooked_family(family)
    prompt = family_prompt(family, model)
    ids = answer_ids(prompt)
    longer = prompt.continued(ids)
    logits, before = model(longer), model(prompt)
    tolerance = 2e-4 * largest_logit(before)
    for row, own in enumerate(ids):
        end = logits.shape[1] - len(own)
        assert longer.token_map.is_answer[row].nonzero().flatten().tolist() == [*range(end, logits.shape[1])]
        assert int(longer.last[row].nonzero()) == end - 1
        if family in COUNTS_PADDING and row:
            continue
        # What stands before the answer does not see it.
        real = int((~prompt.token_map.is_padding[row]).sum())
        torch.testing.assert_close(logits[row, end - real : end], before[row, -real:], atol=tolerance, rtol=0)
    if tiny.TINY[family].generates and family not in GENERATES_OTHERWISE:
        # With a cache transformers gives Kosmos-2's padded rows other positions.
        expected = decoded(model.hf_model, dict(prompt.inputs), ids, use_cache=family != "kosmos-2")
    else:
        expected = by_hand(model.hf_model, dict(prompt.inputs), ids)
    for row, (own, true) in enumerate(zip(ids, expected, strict=True)):
        if not (family in COUNTS_PADDING and row):
            torch.testing.assert_close(logits[row, -len(own) - 1 :].float(), true, atol=tolerance, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "paligemma", "kosmos-2", "internvl"])
def test_encoded_images_go_along(family: str) -> None:
    model = hooked(family)
    prompt = family_prompt(family, model)
    ids = answer_ids(prompt)
    encoded = model.encode_images(prompt)
    assert torch.equal(model(encoded.continued(ids)), model(prompt.continued(ids)))
    assert torch.equal(model(model.encode_images(prompt.continued(ids))), model(prompt.continued(ids)))


@torch.no_grad()
def test_continuing_twice_is_continuing_once(model: mmlens.HookedVLM) -> None:
    prompt = padded_prompt(model)
    twice = prompt.continued([[41, 42], [43]]).continued([[44], [45, 46]])
    once = prompt.continued([[41, 42, 44], [43, 45, 46]])
    assert torch.equal(once.inputs["input_ids"], twice.inputs["input_ids"])
    assert torch.equal(once.inputs["attention_mask"], twice.inputs["attention_mask"])
    assert twice.continuation.prompt is prompt and twice.continuation.ids == once.continuation.ids
    torch.testing.assert_close(model(twice)[:, -4:], model(once)[:, -4:], atol=1e-4, rtol=0)


def test_the_map_shifts_and_knows_nothing_of_the_answer(model: mmlens.HookedVLM) -> None:
    prompt = padded_prompt(model)
    longer = prompt.continued([[41], [42, 43, 44]])
    before, after = prompt.token_map, longer.token_map
    real = (~before.is_padding).sum(1) + torch.tensor([1, 3])
    assert longer.shape[1] == real.max()
    assert after.is_padding.sum(1).tolist() == (real.max() - real).tolist()
    assert longer.last.int().argmax(1).tolist() == [longer.shape[1] - 2, longer.shape[1] - 4]
    for row, n in ((0, 1), (1, 3)):
        end = longer.shape[1] - n
        own = int((~before.is_padding[row]).sum())
        for name in ("image", "row", "col", "tile", "is_image", "is_question"):
            assert torch.equal(getattr(after, name)[row, end - own : end], getattr(before, name)[row, -own:])
            rest = getattr(after, name)[row, end:]
            assert bool((rest == (0 if rest.dtype == torch.bool else -1)).all())
        torch.testing.assert_close(
            after.boxes[row, end - own : end], before.boxes[row, -own:], equal_nan=True
        )
        assert bool(after.boxes[row, end:].isnan().all())
        assert after.where(end, row).kind == "answer" and after.labels(row)[end] is None
    assert after.to_pandas()["is_answer"].sum() == 4
    assert not bool(before.is_answer.any())
    assert longer.questions == prompt.questions and longer.images is prompt.images


def test_what_cannot_be_continued_is_refused(micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt(["What colour is K ?", "What colour is Q ?"])
    with pytest.raises(InvalidValueError, match="1 list.*each of 2"):
        prompt.continued([[7]])
    with pytest.raises(InvalidValueError, match="no token"):
        prompt.continued([[], []])
    right = micro.prompt(["What colour is K ?", "What ?"])
    flipped = {name: value.flip(1) for name, value in right.inputs.items()}
    with pytest.raises(PromptError, match="padded on the right"):
        Prompt(
            flipped, mmlens.token_map.text_only_map(flipped["attention_mask"]), ["a", "b"], [[], []], ["", ""]
        ).continued([[7], [7]])
    positioned = {**prompt.inputs, "position_ids": torch.arange(prompt.shape[1])[None].expand(2, -1)}
    bare = Prompt(positioned, prompt.token_map, ["a", "b"], [[], []], ["", ""])
    with pytest.raises(PromptError, match="position_ids"):
        bare.continued([[7], [7]])
    unknown = Prompt(prompt.inputs, prompt.token_map, ["a", "b"], [[], []], ["", ""])
    with pytest.raises(PromptError, match="pad_id"):
        unknown.continued([[7], [7, 8]])
    assert unknown.continued([[7], [8]]).shape == (2, prompt.shape[1] + 1)


def test_a_row_may_have_no_answer(micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt(["What colour is K ?", "What colour is Q ?"])
    longer = prompt.continued([[], [7]])
    assert longer.token_map.is_answer.sum(1).tolist() == [0, 1]
    assert longer.last.int().argmax(1).tolist() == [prompt.shape[1], prompt.shape[1] - 1]
