"""The table of a sweep beside `effect` one by one: values, order, notes, warnings, memory, and what it refuses."""

from __future__ import annotations

import io
import itertools
import warnings
from contextlib import redirect_stderr
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from tiny.wrapped import hooked, padded_prompt
from torch import Tensor

import mmlens
from mmlens.effects.partial import CleanRun
from mmlens.effects.sweeps import reuse_table, sweep
from mmlens.interventions.composition import relay
from mmlens.interventions.edits import Edit
from mmlens.metrics.outcomes import reads
from mmlens.model.choosing import Positions
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook, HookNeverFiredError, Intervention, NoChangeWarning
from mmlens.model.prompt import Prompt
from mmlens.token_map import text_only_map


def last_logits(logits: Tensor, prompt: Prompt) -> Tensor:
    return logits[:, -1, 5].float()


def scaled(name: str, positions: Positions = None, factor: float = 1.5) -> Intervention:
    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        return [(name, Edit(model, prompt, name, lambda x, here: factor * x, positions=positions))]

    return intervention


def by_hand(name: Any, function: Any) -> Intervention:
    return lambda model, prompt: [(name, function)]


def check_against_effects(
    model: HookedVLM,
    prompts: Any,
    interventions: dict[Any, Intervention],
    metric: Any = last_logits,
    **options: Any,
) -> pd.DataFrame:
    """Every value and clean value is what `effect` gives, which runs the whole model each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = sweep(model, prompts, interventions, metric, progress=False, **options)
        keep = {name: value for name, value in options.items() if name != "memory"}
        for label, intervention in interventions.items():
            alone = mmlens.effect(model, prompts, intervention, metric, **keep)
            rows = table[[own == label for own in table["intervention"]]]
            assert rows["example"].tolist() == list(range(len(alone)))
            for column, expected in (("value", alone.values), ("clean", alone.clean)):
                got = torch.tensor(rows[column].to_numpy())
                torch.testing.assert_close(
                    got, expected.double(), atol=1e-5, rtol=1e-5, msg=str((label, column))
                )
    return table


@pytest.fixture(scope="module")
def llava() -> tuple[HookedVLM, Prompt]:
    model = hooked("llava")
    return model, padded_prompt(model)


HEADS: dict[Any, Intervention] = {
    (layer, at): scaled(f"blocks.{layer}.attn.hook_z", at)
    for layer in range(3)
    for at in ("last", "question", None)
}

# ---------------------------------------------------------------------- equal to runs one by one


def test_prompts_of_every_kind_in_one_sweep(llava: tuple[HookedVLM, Prompt]) -> None:
    """Batches of one and of two, with images and without, padded and not; examples are numbered through."""
    model, padded = llava
    image = tiny.tiny_images(1, seed=2)
    prompts = [
        model.prompt("What colour is K?", images=image),
        padded,
        model.prompt(["Hi", "What is where, and how?"]),
        model.prompt("Hi"),
        model.prompt("Where is it?", images=image),
    ]
    table = check_against_effects(model, prompts, HEADS)
    assert table["example"].max() == 6 and len(table) == 7 * len(HEADS)
    assert list(dict.fromkeys(table["intervention"])) == list(HEADS)


@pytest.mark.parametrize("keep", [0, 1, 3, 10**6])
def test_metrics_of_several_positions_and_of_the_clean_run(
    llava: tuple[HookedVLM, Prompt], keep: int
) -> None:
    @reads("clean logits")
    def distance(logits: Tensor, prompt: Prompt, clean: Tensor) -> Tensor:
        assert logits.shape == clean.shape
        return (logits - clean).abs().mean((1, 2))

    def total(logits: Tensor, prompt: Prompt) -> Tensor:
        return logits[..., 7].sum(1)

    model, prompt = llava
    few = {label: HEADS[label] for label in list(HEADS)[:4]}
    for metric in (distance, total):
        check_against_effects(model, prompt, few, metric, logits_to_keep=keep)


def test_metrics_of_answers(llava: tuple[HookedVLM, Prompt]) -> None:
    @reads("answers", max_new_tokens=2)
    def letters(texts: list[str], prompt: Prompt) -> Tensor:
        return torch.tensor([float(sum(map(ord, text))) for text in texts])

    model, prompt = llava
    strong = {hook: scaled(f"blocks.1.{hook}", None, -3.0) for hook in ("hook_resid_pre", "hook_mlp_out")}
    table = check_against_effects(model, prompt, strong, letters)
    assert (table["value"] != table["clean"]).any()


@pytest.mark.parametrize(("batch", "length"), [(3, 3), (4, 4), (16, 16)])
def test_as_many_examples_as_positions(batch: int, length: int) -> None:
    model = hooked("qwen3_vl")
    ids = torch.randint(5, 200, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    texts = [""] * batch
    prompt = Prompt(
        {"input_ids": ids, "attention_mask": mask}, text_only_map(mask), texts, [[]] * batch, texts
    )
    interventions = {
        (layer, at): scaled(f"blocks.{layer}.hook_resid_pre", at) for layer in (0, 2) for at in (None, "last")
    }
    check_against_effects(model, prompt, interventions)


def test_hook_points_at_image_positions_of_the_last_layer(llava: tuple[HookedVLM, Prompt]) -> None:
    """The last layer's output there is read by nobody, but the hooks fire and report what they changed."""
    model, prompt = llava
    names = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
    interventions = {
        (name, at): scaled(f"blocks.2.image.hook_{name}", at) for name in names for at in (None, "image")
    }
    interventions["z"] = scaled("blocks.2.attn.hook_z", "image")
    notes = reuse_table(check_against_effects(model, prompt, interventions))
    assert (notes["fired"] == 1).all() and (notes["size"] > 0).all()


def test_an_edit_that_depends_on_another_one(llava: tuple[HookedVLM, Prompt]) -> None:
    model, prompt = llava
    interventions: dict[Any, Intervention] = {}
    for at in ("last", "question", None):
        for read, write in (("0.hook_attn_out", "2.hook_resid_pre"), ("1.attn.hook_k", "2.attn.hook_k")):
            made = relay(f"blocks.{read}", f"blocks.{write}", lambda x, source: x - source, positions=at)
            interventions[read, at] = made
    check_against_effects(model, prompt, interventions)


def test_a_filter_of_which_only_some_hook_points_fire(llava: tuple[HookedVLM, Prompt]) -> None:
    """image.hook_z does not fire without an image, which is no error of a filter that has others."""
    model, _ = llava
    every_z = by_hand(
        lambda name: name.startswith("blocks.1.") and name.endswith("hook_z"), lambda x, hook: 2 * x
    )
    check_against_effects(model, model.prompt(["Hi", "Where is it?"]), {"z": every_z})


def test_hooks_that_were_set_before(llava: tuple[HookedVLM, Prompt]) -> None:
    """Permanent hooks see what they would see in a whole run, once, whatever they do to it."""
    model, prompt = llava

    def of_positions(x: Tensor, hook: Any) -> Tensor:
        return x * (1 + 0.1 * torch.arange(x.shape[1])[None, :, None])

    def of_examples(x: Tensor, hook: Any) -> Tensor:
        return x - x.mean(0, keepdim=True) / 2

    for own, function in itertools.product((prompt, model.prompt("Hi there?")), (of_positions, of_examples)):
        try:
            model.add_hook("blocks.1.hook_mlp_out", function)
            table = check_against_effects(model, own, HEADS)
            assert reuse_table(table)["why_not_more"].str.contains("blocks.1.hook_mlp_out").all()
            assert len(model.list_hooks()["blocks.1.hook_mlp_out"]) == 1
        finally:
            model.reset_hooks()


def test_the_tower_runs_for_edits_of_it_where_every_run_is_whole(llava: tuple[HookedVLM, Prompt]) -> None:
    """Not on images that were encoded before, of which its hooks would not fire."""
    model, prompt = llava
    wanted = {"tower": scaled("vision.blocks.0.attn.hook_z"), "late": HEADS[2, "last"]}
    try:
        model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 1.1 * x)
        notes = reuse_table(check_against_effects(model, prompt, wanted)).set_index("intervention")
        assert notes["images"].to_dict() == {"tower": "with every run", "late": "once"}
    finally:
        model.reset_hooks()


def test_a_sweep_leaves_training_mode_and_grad_mode_alone(llava: tuple[HookedVLM, Prompt]) -> None:
    model, prompt = llava
    try:
        model.hf_model.train()
        check_against_effects(model, prompt, {"z": HEADS[1, "last"]})
        assert model.hf_model.training and torch.is_grad_enabled()
    finally:
        model.hf_model.eval()


# ---------------------------------------------------------------------- memory


def test_out_of_memory_halves_the_batch(
    llava: tuple[HookedVLM, Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = llava
    partial, sizes = CleanRun.partial, []

    def small(self: CleanRun, layer: int, first: int, hooks: Any, **options: Any) -> Tensor:
        sizes.append(len(hooks))
        if len(hooks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return partial(self, layer, first, hooks, **options)

    monkeypatch.setattr(CleanRun, "partial", small)
    factors = {factor: scaled("blocks.1.attn.hook_z", "last", factor) for factor in (0.0, 0.5, 2.0, 3.0, 4.0)}
    table = check_against_effects(model, prompt, factors)
    assert max(sizes) == 5 and reuse_table(table)["batch"].max() == 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), ValueError("mine"), KeyboardInterrupt()]
)
def test_other_errors_and_a_single_run_out_of_memory_are_raised(
    llava: tuple[HookedVLM, Prompt], error: BaseException
) -> None:
    model, prompt = llava

    def fail(x: Tensor, hook: Any) -> Tensor:
        raise error

    layers, logits = list(model.anatomy.layers), model(prompt)
    with pytest.raises(type(error)):
        sweep(
            model,
            prompt,
            {**HEADS, "bad": by_hand("blocks.2.attn.hook_z", fail)},
            last_logits,
            progress=False,
        )
    assert list(model.anatomy.layers) == layers and not model.list_hooks()
    assert torch.equal(model(prompt), logits)


def test_memory_bounds_the_batch(llava: tuple[HookedVLM, Prompt]) -> None:
    model, prompt = llava
    few = {factor: scaled("blocks.1.attn.hook_z", "last", factor) for factor in (0.0, 0.5, 2.0)}
    batches = [
        reuse_table(check_against_effects(model, prompt, few, memory=m))["batch"].max() for m in (1.0, 1e-6)
    ]
    assert batches == [3, 1]


# ---------------------------------------------------------------------- what it says


def test_notes_say_what_was_reused(llava: tuple[HookedVLM, Prompt]) -> None:
    model, prompt = llava
    wanted = {
        "late": scaled("blocks.2.attn.hook_z", "last"),
        "by hand": by_hand("blocks.1.hook_mlp_out", lambda x, hook: 2 * x),
        "tower": scaled("vision.blocks.0.attn.hook_z"),
    }
    table = sweep(model, prompt, wanted, last_logits, progress=False)
    notes = reuse_table(table).set_index("intervention")
    assert notes["layer"].to_dict() == {"late": 2, "by hand": 1, "tower": 0}
    assert notes["position"].to_dict() == {"late": prompt.shape[1] - 1, "by hand": 0, "tower": 0}
    assert notes.loc["late", "why_not_more"] == ""
    assert "not known" in notes.loc["by hand", "why_not_more"]
    assert "vision.blocks.0.attn.hook_z" in notes.loc["tower", "why_not_more"]
    assert (notes["size"] > 0).all()
    assert len(reuse_table(table.query("value > clean").copy())) == 3
    with pytest.raises(ValueError, match="no 'reuse' in table.attrs"):
        reuse_table(pd.DataFrame(table.to_dict()))


def test_it_warns_of_those_alone_that_changed_nothing_anywhere(llava: tuple[HookedVLM, Prompt]) -> None:
    model, prompt = llava
    wanted = {"one": scaled("blocks.1.attn.hook_z", None, 1.0), **HEADS}
    with pytest.warns(NoChangeWarning, match="1 of 10 interventions .* 'one'") as record:
        table = sweep(model, prompt, wanted, last_logits, progress=False)
    assert len(record) == 1
    same = table[table["intervention"] == "one"]
    assert (same["value"] - same["clean"]).abs().max() < 1e-5
    with pytest.warns(NoChangeWarning, match="'nothing'"):
        sweep(model, prompt, {"nothing": lambda model, prompt: []}, last_logits, progress=False)


def test_a_hook_that_never_fires_is_an_error_in_any_company(llava: tuple[HookedVLM, Prompt]) -> None:
    model, _ = llava
    wanted = {"z": HEADS[1, None], "image": scaled("blocks.1.image.hook_mlp_out"), "more": HEADS[2, None]}
    with pytest.raises(HookNeverFiredError, match=r"blocks\.1\.image\.hook_mlp_out"):
        sweep(model, model.prompt("Hi"), wanted, last_logits, progress=False)


def test_progress_counts_every_run(llava: tuple[HookedVLM, Prompt]) -> None:
    model, prompt = llava
    shown = io.StringIO()
    with redirect_stderr(shown):
        sweep(model, [prompt, prompt], HEADS, last_logits)
    assert "18/18" in shown.getvalue()


def test_bad_input(llava: tuple[HookedVLM, Prompt]) -> None:
    model, prompt = llava
    for arguments, message in (
        ((prompt, {}, last_logits), "at least one intervention"),
        (([], HEADS, last_logits), "no prompts given"),
        ((prompt, HEADS, {}), "no metric given"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(model, *arguments, progress=False)
