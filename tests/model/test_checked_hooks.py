"""What a hook function may give back: the whole activation, in its shape, dtype and device, without new NaN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from interrupting import left_behind
from tiny.wrapped import hooked, two_image_prompt
from torch import Tensor

import mmlens
from mmlens.errors import InvalidTypeError, InvalidValueError

STREAM, Z, SCORES = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.attn.hook_attn_scores"
IMAGE = "blocks.1.image.hook_resid_pre"
nan = float("nan")


def in_place(x: Tensor, hook: Any) -> None:
    x[:, -1] = nan


def filled(x: Tensor, hook: Any) -> None:
    x[0] = -torch.inf


BAD: dict[str, tuple[str, Callable[..., Any], type[Exception], str]] = {
    "one position": (STREAM, lambda x, hook: x[:, -1:], InvalidValueError, "shape"),
    "one head": (Z, lambda x, hook: x[:, :, :1], InvalidValueError, "shape"),
    "one image row": (IMAGE, lambda x, hook: x[:1], InvalidValueError, "shape"),
    "heads transposed": (Z, lambda x, hook: x.transpose(1, 2), InvalidValueError, "shape"),
    "no batch axis": (STREAM, lambda x, hook: x[0], InvalidValueError, "shape"),
    "another type": (
        STREAM,
        lambda x, hook: x.double(),
        InvalidValueError,
        r"dtype.*result.to\(dtype=x.dtype\)",
    ),
    "another device": (STREAM, lambda x, hook: x.to("meta"), InvalidValueError, "device"),
    "a number": (STREAM, lambda x, hook: 0.0, InvalidTypeError, "float"),
    "two tensors": (STREAM, lambda x, hook: (x, x), InvalidTypeError, "tuple"),
    "NaN": (STREAM, lambda x, hook: x * nan, InvalidValueError, "NaN"),
    "NaN in place": (STREAM, in_place, InvalidValueError, "NaN"),
    "infinity": (Z, lambda x, hook: x * torch.inf, InvalidValueError, "made NaN|infinite values"),
    "overflow": (STREAM, lambda x, hook: x.sign() * 3e38 * 10, InvalidValueError, "infinite values"),
    "minus infinity in place": (IMAGE, filled, InvalidValueError, "infinite values"),
    "no key left": (SCORES, lambda x, hook: x * 0 - torch.inf, InvalidValueError, "finite"),
    "infinite scores": (SCORES, lambda x, hook: x + torch.inf, InvalidValueError, "finite"),
}


@torch.no_grad()
@pytest.mark.parametrize("what", list(BAD))
def test_what_a_hook_may_not_give_is_an_error_that_names_it(what: str) -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    name, function, error, words = BAD[what]
    with pytest.raises(
        error, match=rf"(test_checked_hooks.py:(.|\n)*{name}(.|\n)*{words}|{words}(.|\n)*{name})"
    ):
        model.run_with_hooks(prompt, fwd_hooks=[(name, function)])
    assert not left_behind(model)


@torch.no_grad()
def test_what_a_hook_may_give() -> None:
    """Nothing; an edit in place; the tensor itself, a view or a copy of it; -inf where keys are left."""
    model = hooked("llava")
    prompt = two_image_prompt(model)
    clean = model(prompt)

    def zero_last(x: Tensor, hook: Any) -> None:
        x[:, -1] = 0

    def zeroed(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, -1] = 0
        return x

    def read(x: Tensor, hook: Any) -> None:
        x.sum()

    same: tuple[Callable[..., Any], ...] = (
        read,
        lambda x, hook: x,
        lambda x, hook: x[:],
        lambda x, hook: x.clone(),
    )
    for function in same:
        assert torch.equal(model.run_with_hooks(prompt, fwd_hooks=[(STREAM, function)]), clean)
    under = [model.run_with_hooks(prompt, fwd_hooks=[(STREAM, f)]) for f in (zero_last, zeroed)]
    assert torch.equal(*under) and not torch.equal(under[0], clean)

    def blocked(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[..., 1:, 0] = -torch.inf
        return x

    assert model.run_with_hooks(prompt, fwd_hooks=[(SCORES, blocked)]).isfinite().all()
    with torch.inference_mode():
        torch.testing.assert_close(model.run_with_hooks(prompt, fwd_hooks=[(STREAM, zero_last)]), under[0])
    # Large numbers whose sum overflows are finite, each of them.
    model.run_with_hooks(prompt, fwd_hooks=[(STREAM, lambda x, hook: x * 0 + 1e37)])


@torch.no_grad()
def test_nan_that_was_there_before_is_no_hooks_fault() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    embeddings = model.hf_model.get_input_embeddings()(prompt.inputs["input_ids"])
    embeddings[:, 0] = nan
    given = {"inputs_embeds": embeddings, "attention_mask": prompt.inputs["attention_mask"]}

    def in_place(x: Tensor, hook: Any) -> None:
        x[:, -1] = 0

    for function in (lambda x, hook: 2 * x, in_place):
        model.run_with_hooks(**given, fwd_hooks=[("blocks.0.hook_resid_pre", function)])


@torch.no_grad()
def test_nan_of_a_patch_names_its_edit(micro: mmlens.HookedVLM) -> None:
    """In a run of its own, and stacked with others in a sweep."""
    examples = mmlens.scene_examples("documents", 2, seed=0)
    prompt = micro.prompt_examples(examples)
    _, cache = micro.run_with_cache(prompt, names_filter="blocks.6.hook_resid_post")
    values = {"blocks.6.hook_resid_post": cache["resid_post", 6] * nan}
    patch = mmlens.patch("blocks.6.hook_resid_post", values)
    named = r"Edit\(blocks\.6\.hook_resid_post.*made NaN at blocks\.6\.hook_resid_post"
    with pytest.raises(InvalidValueError, match=named):
        micro.run_with_hooks(prompt, fwd_hooks=patch(micro, prompt))
    both = {"ablated": mmlens.ablate([(6, 0)]), "patched": patch}
    with pytest.raises(InvalidValueError, match=r"NaN at blocks\.6\.hook_resid_post"):
        mmlens.sweep(micro, prompt, both, mmlens.accuracy, progress=False)
    assert not left_behind(micro)
    # The same values without NaN patch the prompt with itself.
    own = mmlens.patch(
        "blocks.6.hook_resid_post", {name: value.nan_to_num() for name, value in values.items()}
    )
    micro.run_with_hooks(prompt, fwd_hooks=own(micro, prompt))


@torch.no_grad()
def test_functions_that_no_hook_point_can_call_are_refused_when_they_are_set() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)

    def other_name(z: Tensor, point: Any) -> Tensor:
        return z

    for function in (lambda z: z, other_name, lambda z, hook, layer: z):
        for refused in (
            lambda function=function: model.run_with_hooks(prompt, fwd_hooks=[(STREAM, function)]),
            lambda function=function: model.add_hook(STREAM, function),
            lambda function=function: model.hook_dict[STREAM].add_hook(function),
        ):
            with pytest.raises(
                InvalidTypeError, match=r"expected a function \(activation, hook\): it takes \(z"
            ):
                refused()
    assert not left_behind(model)
    clean = model(prompt)
    for allowed in (
        lambda z, hook: z,
        lambda z, hook=None: z,
        lambda z, **more: z,
        partial(lambda z, hook, layer: z, layer=1),
    ):
        assert torch.equal(model.run_with_hooks(prompt, fwd_hooks=[(STREAM, allowed)]), clean)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"]
)
def test_a_tuple_is_no_activation(name: str) -> None:
    """A backward hook may give one, as in torch."""
    model = hooked("llava")
    with pytest.raises(InvalidTypeError, match=f"gave tuple at {name}"):
        model.run_with_hooks(two_image_prompt(model), fwd_hooks=[(name, lambda x, hook: (x,))])


def test_backward_hooks_are_held_to_it_too() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    seen: list[Tensor] = []

    def doubled(gradient: Tensor, hook: Any) -> tuple[Tensor]:
        seen.append(gradient)
        return (2 * gradient,)

    with model.hooks(bwd_hooks=[(STREAM, doubled)]):
        model(prompt)[0, -1, 0].backward()
    assert len(seen) == 1
    with model.hooks(bwd_hooks=[(STREAM, lambda gradient, hook: gradient[:, -1:])]):
        loss = model(prompt)[0, -1, 0]
        with pytest.raises(InvalidValueError, match="shape"):
            loss.backward()
