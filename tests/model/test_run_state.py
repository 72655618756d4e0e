"""What hooks that fire learn of the run under way, against what the run is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.wrapped import hooked, padded_prompt, two_image_prompt
from torch import Tensor

from mmlens.interventions.ablation import ablate
from mmlens.model.run_state import Span

STREAM, PATTERN = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern"


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_span_is_what_the_decoder_is_given(use_cache: bool) -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    spans: list[Span] = []
    lengths: list[int] = []

    def look(x: Tensor, hook: Any) -> None:
        spans.append(model.run_state.span)
        lengths.append(x.shape[1])

    with model.hooks(fwd_hooks=[(STREAM, look)]):
        model.generate(prompt, max_new_tokens=3, do_sample=False, use_cache=use_cache)
    length = prompt.shape[1]
    assert spans == (
        [(0, length), (length, 1), (length + 1, 1)]
        if use_cache
        else [(0, length), (0, length + 1), (0, length + 2)]
    )
    assert lengths == [span.length for span in spans]


@torch.no_grad()
def test_queries_from_the_first_that_an_edit_touches_are_the_span_inside_the_softmax() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    length = prompt.shape[1]
    seen: list[tuple[Span, int]] = []

    def look(x: Tensor, hook: Any) -> None:
        seen.append((model.run_state.span, x.shape[2]))

    stated: Any = look
    stated.first_position = length - 2
    model.run_with_hooks(prompt, fwd_hooks=[(PATTERN, look)])
    assert seen == [(Span(length - 2, 2), 2)]
    assert model.run_state.span == Span(0, length)


@torch.no_grad()
def test_forward_passes_are_counted() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    calls: list[None] = []
    handle = model.hf_model.register_forward_pre_hook(lambda module, args: calls.append(None))
    before = model.run_state.n_forwards
    with model.hooks(fwd_hooks=[(STREAM, lambda x, hook: None)]):
        model(prompt)
        model.hf_model(**prompt.inputs)
    model(prompt)
    handle.remove()
    assert model.run_state.n_forwards - before == len(calls) == 3


@torch.no_grad()
def test_beams_repeat_the_rows_and_their_image_positions() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)
    found: list[tuple[int, int | None]] = []

    def look(x: Tensor, hook: Any) -> None:
        found.append((model.run_state.copies(prompt), model.run_state.n_rows()))
        mask = model.run_state.image_rows_of(x)
        if mask is not None:
            assert torch.equal(mask, prompt.token_map.is_image.repeat_interleave(len(x) // len(prompt), 0))

    with model.hooks(fwd_hooks=[(STREAM, look)]):
        model.generate(prompt, max_new_tokens=2, num_beams=3, do_sample=False)
    assert (3, 3 * len(prompt)) in found and {copies for copies, _ in found} <= {1, 3}


@torch.no_grad()
def test_a_part_of_a_run_is_narrowed_to_its_positions_and_copies() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    model.run_with_hooks(prompt, fwd_hooks=[(STREAM, lambda x, hook: None)])
    first = int(prompt.token_map.is_image[0].int().argmax()) + 1
    model.run_state.narrow(Span(first, prompt.shape[1] - first), 2)
    mask = model.run_state.image_mask()
    assert mask is not None and torch.equal(mask, prompt.token_map.is_image[:, first:].repeat(2, 1))
    assert model.run_state.n_rows() == 2 and model.run_state.copies(prompt) == 1


@torch.no_grad()
def test_another_prompt_is_refused_once_it_runs() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    hooks = ablate([(0, 1)], positions="last")(model, prompt)
    other = model.prompt("Where?")
    with pytest.raises(ValueError, match="is run on another one of"):
        model.run_with_hooks(other, fwd_hooks=hooks)
    assert model.run_state.prompt is None
    model.run_with_hooks(prompt, fwd_hooks=hooks)
