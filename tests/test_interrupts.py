"""Ctrl-C at any moment: nothing stays on the model, and its next plain run is what it was."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from interrupting import interrupted, left_behind, n_lines, plain
from tiny.wrapped import hooked, two_image_prompt

import mmlens
from mmlens.interrupts import Temporary, undone


def zero(x: torch.Tensor, hook: object) -> torch.Tensor:
    return x * 0


# Python itself drops what is raised in a __del__, and reports it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NOISE = mmlens.interventions.Source(under=mmlens.interventions.noise_images(0.5, seed=0))

HOOKS = [("blocks.0.attn.hook_z", zero), ("blocks.1.attn.hook_pattern", zero)]


def in_block(model: mmlens.HookedVLM, prompt: mmlens.Prompt) -> None:
    with model.hooks(fwd_hooks=HOOKS):
        model(prompt)


def generated(model: mmlens.HookedVLM, prompt: mmlens.Prompt) -> None:
    with model.hooks(fwd_hooks=HOOKS):
        model.generate(prompt, max_new_tokens=2)


def hybrid(model: mmlens.HookedVLM, prompt: mmlens.Prompt) -> None:
    with mmlens.hybrid_attention(model, [(0, 1)], sink=1, window=8):
        model(prompt)


def swept(model: mmlens.HookedVLM, prompt: mmlens.Prompt) -> None:
    examples = mmlens.scene_examples("documents", 1, seed=0)
    interventions = {str(head): mmlens.ablate([(7, head)]) for head in range(2)}
    mmlens.sweep(model, examples, interventions, mmlens.accuracy, progress=False)


def path_patched(model: mmlens.HookedVLM, prompt: mmlens.Prompt) -> None:
    patch = mmlens.path_patch([(0, 1)], [(1, 2, "q")], NOISE)
    model.run_with_hooks(prompt, fwd_hooks=patch(model, prompt))


def attributed(model: mmlens.HookedVLM, prompt: mmlens.Prompt) -> None:
    mmlens.attribute(model, prompt, NOISE, mmlens.logit_difference, nodes="z")


RUNS: dict[str, Callable[[mmlens.HookedVLM, mmlens.Prompt], object]] = {
    "run_with_hooks": lambda model, prompt: model.run_with_hooks(prompt, fwd_hooks=HOOKS),
    "hooks": in_block,
    "run_with_cache": lambda model, prompt: model.run_with_cache(
        prompt, names_filter=lambda n: "attn.hook" in n
    ),
    "generate": generated,
    "attention_rows": mmlens.scores.vision_mass,
    "hybrid_attention": hybrid,
    "effect": lambda model, prompt: mmlens.effect(
        model, prompt, mmlens.ablate([(0, 1)]), mmlens.accuracy, progress=False
    ),
    "sweep": swept,
    "path_patch": path_patched,
    "mean_activations": lambda model, prompt: mmlens.mean_activations(
        model, mmlens.scene_examples("documents", 2, seed=0), batch_size=1
    ),
    "attribute": attributed,
}


def try_moments(
    model: mmlens.HookedVLM, prompt: mmlens.Prompt, run: Callable[[], object], moments: int
) -> None:
    clean = plain(model.hf_model, prompt.inputs)
    weights = list(model.hf_model.parameters())
    gradients = torch.is_grad_enabled(), [weight.requires_grad for weight in weights]
    run()
    last = n_lines(run)
    drawn = random.Random(0).sample(range(1, last + 1), min(moments, last))
    n_interrupted = 0
    for at in sorted(drawn):
        # The error is kept while the model is looked at, as a notebook keeps the last one.
        error = interrupted(run, at)
        n_interrupted += error is not None
        assert not left_behind(model), error
        assert (torch.is_grad_enabled(), [weight.requires_grad for weight in weights]) == gradients, error
    assert n_interrupted > len(drawn) // 2
    assert torch.equal(plain(model.hf_model, prompt.inputs), clean)


@torch.no_grad()
@pytest.mark.parametrize("name", list(RUNS))
def test_an_interrupt_leaves_nothing_behind(micro: mmlens.HookedVLM, name: str) -> None:
    prompt = micro.prompt_examples(mmlens.scene_examples("documents", 1, seed=0))
    try_moments(micro, prompt, lambda: RUNS[name](micro, prompt), 12)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", list(RUNS))
def test_an_interrupt_at_more_moments(micro: mmlens.HookedVLM, name: str) -> None:
    prompt = micro.prompt_examples(mmlens.scene_examples("documents", 1, seed=0))
    try_moments(micro, prompt, lambda: RUNS[name](micro, prompt), 40)


@torch.no_grad()
def test_an_interrupt_inside_add_hook_is_found_by_reset_hooks() -> None:
    """At every one of its lines."""
    model = hooked("llava")
    prompt = two_image_prompt(model)
    clean = model(prompt)

    def add() -> None:
        model.add_hook("blocks.0.attn.hook_z", zero)

    last = n_lines(add)
    model.reset_hooks()
    for at in range(1, last + 1):
        interrupted(add, at)
        model.reset_hooks()
        assert not left_behind(model)
    assert torch.equal(model(prompt), clean)


def test_what_is_undone_is_undone_at_every_line() -> None:
    state: list[int] = []

    def run() -> None:
        undone(lambda: state.append(1), state.clear)
        Temporary(lambda: state.append(1), state.clear).around(lambda: None)

    for at in range(1, n_lines(run) + 1):
        interrupted(run, at)
        assert not state
