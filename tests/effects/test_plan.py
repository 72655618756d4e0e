"""Where each intervention's run starts, what is tried before it is taken, and which runs go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny.wrapped import hooked, padded_prompt
from torch import Tensor

from mmlens.effects.partial import CleanRun, NotExactError
from mmlens.effects.plan import Start, groups_of, reuse_of, start_of
from mmlens.interventions.edits import Edit
from mmlens.model.choosing import Positions
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook
from mmlens.model.prompt import Prompt

LAST = 2


@pytest.fixture(scope="module")
def llava() -> tuple[HookedVLM, Prompt, CleanRun]:
    model = hooked("llava")
    prompt = model.encode_images(padded_prompt(model))
    return model, prompt, CleanRun.of(model, prompt)


def edit(model: HookedVLM, prompt: Prompt, name: str, positions: Positions = None) -> Hook:
    return name, Edit(model, prompt, name, lambda x, here: 2 * x, positions=positions)


def plain(x: Tensor, hook: Any) -> Tensor:
    return 2 * x


def test_a_run_starts_at_the_first_layer_and_position_that_is_touched(
    llava: tuple[HookedVLM, Prompt, CleanRun],
) -> None:
    model, prompt, clean = llava
    length = prompt.shape[1]
    question = int(prompt.token_map.is_question.any(0).int().argmax())
    for hooks, layer, first in (
        ([edit(model, prompt, "blocks.1.attn.hook_z", "last")], 1, length - 1),
        ([edit(model, prompt, "blocks.2.attn.hook_z", "question")], 2, question),
        ([edit(model, prompt, "blocks.1.hook_resid_pre")], 1, 0),
        ([edit(model, prompt, "hook_embed", "last")], 0, length - 1),
        ([edit(model, prompt, "ln_final.hook_normalized", "last")], 3, length - 1),
        (
            [edit(model, prompt, f"blocks.{n}.hook_mlp_out", p) for n, p in ((2, "question"), (1, "last"))],
            1,
            question,
        ),
        ([edit(model, prompt, "blocks.2.hook_mlp_out", "last"), ("blocks.2.attn.hook_q", plain)], 2, 0),
        ([(lambda name: name.startswith("blocks") and name.endswith("hook_q"), plain)], 0, 0),
    ):
        start = start_of(model, clean, hooks)
        assert (start.layer, start.first, start.whole) == (layer, first, "")
        known = all(isinstance(function, Edit) for _, function in hooks)
        assert start.reason == ("" if known else "the positions that a hook function touches are not known")


def test_what_cannot_run_in_part(llava: tuple[HookedVLM, Prompt, CleanRun]) -> None:
    model, prompt, clean = llava
    tower = start_of(
        model,
        clean,
        [edit(model, prompt, "blocks.1.hook_mlp_out"), edit(model, prompt, "vision.blocks.0.attn.hook_z")],
    )
    assert "vision.blocks.0.attn.hook_z" in tower.whole and tower.needs_images
    nothing = start_of(model, clean, [])
    assert nothing.whole and not nothing.needs_images
    everything = CleanRun.of(model, prompt, logits_to_keep=0)
    start = start_of(model, everything, [edit(model, prompt, "blocks.1.hook_mlp_out", "last")])
    assert start.first == 0 and "all positions" in start.reason


@pytest.mark.parametrize(
    ("hook", "is_clean"),
    [
        ("hook_resid_pre", False),
        ("ln1.hook_scale", False),
        ("attn.hook_q", False),
        ("attn.hook_v_input", False),
        ("attn.hook_pattern", False),
        ("image.hook_resid_pre", False),
        ("attn.hook_z", True),
        ("image.hook_attn_out", True),
        ("attn.hook_result", True),
        ("hook_resid_mid", True),
        ("mlp.hook_post", True),
        ("hook_resid_post", True),
    ],
)
def test_attention_of_the_first_layer_is_clean_where_only_what_is_after_it_is_touched(
    llava: tuple[HookedVLM, Prompt, CleanRun], hook: str, is_clean: bool
) -> None:
    model, prompt, clean = llava
    own = edit(model, prompt, f"blocks.1.{hook}")
    assert start_of(model, clean, [own]).attention_is_clean == is_clean
    later = [own, edit(model, prompt, "blocks.2.attn.hook_q")]
    assert start_of(model, clean, later).attention_is_clean == is_clean
    both = [own, edit(model, prompt, "blocks.1.attn.hook_q")]
    assert not start_of(model, clean, both).attention_is_clean


def test_what_the_last_layer_may_leave_out(llava: tuple[HookedVLM, Prompt, CleanRun]) -> None:
    """Not where a function's positions are unknown, or would be left out, or it would fire twice."""
    model, prompt, clean = llava
    for hook, may in (
        (edit(model, prompt, f"blocks.{LAST}.attn.hook_z"), True),
        (edit(model, prompt, f"blocks.{LAST}.hook_mlp_out", "last"), True),
        (edit(model, prompt, f"blocks.{LAST}.hook_mlp_out", "image"), False),
        (edit(model, prompt, f"blocks.{LAST}.attn.hook_k", "question"), False),
        (edit(model, prompt, f"blocks.{LAST}.image.hook_z"), False),
        (edit(model, prompt, f"blocks.{LAST}.image.hook_mlp_out"), False),
        ((f"blocks.{LAST}.attn.hook_z", plain), False),
        ((f"blocks.{LAST - 1}.attn.hook_z", plain), True),
        (edit(model, prompt, "ln_final.hook_normalized", "last"), True),
        (("ln_final.hook_normalized", plain), False),
    ):
        assert start_of(model, clean, [hook]).may_trim == may, hook
    deep = hooked("qwen3_vl")
    prompt = deep.encode_images(padded_prompt(deep))
    clean = CleanRun.of(deep, prompt)
    for layer in (0, 1):
        start = start_of(deep, clean, [edit(deep, prompt, f"blocks.{layer}.hook_deepstack")])
        assert start.may_trim == (layer < LAST - 1)


# ---------------------------------------------------------------------- what is tried out


def fresh(family: str = "llava") -> tuple[HookedVLM, CleanRun]:
    model = hooked(family)
    return model, CleanRun.of(model, model.encode_images(padded_prompt(model)))


Fails = Callable[[int, int, int], bool]


def failing(monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    """Partial runs that are not exact where `fails(layer, first, copies)` says so."""
    check = CleanRun.check

    def checked(self: CleanRun, layer: int, first: int, copies: int, tolerance: float) -> None:
        if fails(layer, first, copies):
            raise NotExactError("a reason")
        check(self, layer, first, copies, tolerance)

    monkeypatch.setattr(CleanRun, "check", checked)


@pytest.mark.parametrize(
    ("fails", "kept"),
    [
        (lambda layer, first, copies: False, (True, True, True)),
        (lambda layer, first, copies: copies > 1, (True, True, False)),
        (lambda layer, first, copies: first > 0, (True, False, True)),
        (lambda layer, first, copies: layer > 0, (False, True, True)),
        (lambda layer, first, copies: layer == 1, (False, True, True)),
        (lambda layer, first, copies: layer > 0 or first > 0, (False, False, True)),
    ],
)
def test_what_is_not_exact_is_given_up(
    monkeypatch: pytest.MonkeyPatch, fails: Fails, kept: tuple[bool, bool, bool]
) -> None:
    _, clean = fresh()
    failing(monkeypatch, fails)
    starts = [Start(layer, clean.shape[1] - 1) for layer in range(3)]
    reuse = reuse_of(clean, starts)
    assert (reuse.depth, reuse.position, reuse.batch) == kept
    for start in starts:
        left = reuse.of(start)
        assert left.layer == (start.layer if kept[0] else 0)
        assert left.first == (start.first if kept[1] else 0)
        assert ("a reason" in left.reason) == (kept != (True, True, True))


def test_where_nothing_is_exact_every_run_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, clean = fresh()
    failing(monkeypatch, lambda layer, first, copies: True)
    reuse = reuse_of(clean, [Start(1, 5)])
    assert not reuse.partial
    assert "a reason" in reuse.of(Start(1, 5)).whole


def test_a_layer_that_was_not_tried_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an earlier prompt of the same kind has been, or started nothing in part."""
    _, clean = fresh()
    failing(monkeypatch, lambda layer, first, copies: layer == 1)
    assert reuse_of(clean, [Start(whole="the tower")]).of(Start(whole="the tower")).whole == "the tower"
    assert reuse_of(clean, [Start(2, 3)]).depth
    assert not reuse_of(clean, [Start(1, 3)]).depth


# ---------------------------------------------------------------------- runs that go together


@st.composite
def starts(draw: st.DrawFn) -> list[Start]:
    length = draw(st.sampled_from([1, 8, 300]))
    one = st.builds(
        Start,
        layer=st.integers(0, 2),
        first=st.integers(0, length - 1),
        attention_is_clean=st.booleans(),
        may_trim=st.booleans(),
        whole=st.sampled_from(["", "", "", "tower"]),
    )
    return draw(st.lists(one, max_size=30))


@given(starts(), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_groups_hold_every_intervention_once_and_start_early_enough(
    all_starts: list[Start], most: int
) -> None:
    groups = groups_of(all_starts, lambda first: most)
    members = [member for group in groups for member in group.members]
    assert sorted(members) == list(range(len(all_starts)))
    for group in groups:
        own = [all_starts[member] for member in group.members]
        assert len(own) <= most
        if group.start.whole:
            assert own == [group.start]
            continue
        assert all(start.layer == group.start.layer and not start.whole for start in own)
        assert group.start.first == min(start.first for start in own)
        assert {start.attention_is_clean for start in own} == {group.start.attention_is_clean}
        assert {start.may_trim for start in own} == {group.start.may_trim}


def test_memory_is_asked_for_the_earliest_start() -> None:
    """Runs from late layers are small, and one from the front among them makes them all large."""
    groups = groups_of([Start(1, 90), Start(1, 90), Start(1, 10)], lambda first: 8 if first > 50 else 1)
    assert sorted(group.members for group in groups) == [(0, 1), (2,)]


def test_grouping_does_not_run_much_more_than_is_needed() -> None:
    groups = groups_of([Start(1, 999)] * 20 + [Start(1, 0)], lambda first: 100)
    assert sorted(len(group.members) for group in groups) == [1, 20]


def test_no_run_of_the_real_model_is_given_to_a_family_that_hands_on_keys() -> None:
    """Gemma 4's later layers attend with earlier layers' keys, which a run from a later layer does not make."""
    model = hooked("gemma4")
    prompt = model.encode_images(model.prompt("Hi?", images=tiny.tiny_images(1, seed=1)))
    clean = CleanRun.of(model, prompt)
    start = start_of(model, clean, [edit(model, prompt, "blocks.1.hook_mlp_out", "last")])
    left = reuse_of(clean, [start]).of(start)
    assert left.layer == 0 and (left.whole or left.reason)
    assert torch.is_tensor(clean.logits)
