"""Training mode: refused where numbers are made and runs would differ; plain runs and training go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import mmlens
from mmlens.errors import StateError
from mmlens.model.evaluation import active_in_training
from mmlens.model.loading import load

EXAMPLES = mmlens.scene_examples("documents", 2, seed=0)
HALVED = mmlens.interventions.scale_heads([(3, 1)], 0.5)


def prompted(model: mmlens.HookedVLM) -> Any:
    return model.prompt_examples(EXAMPLES)


def blank() -> Any:
    return mmlens.interventions.blank_region(mmlens.interventions.evidence_of(EXAMPLES))


MEASURES: dict[str, Callable[[mmlens.HookedVLM], Any]] = {
    "effect": lambda m: mmlens.effect(m, EXAMPLES, HALVED, mmlens.logit_difference),
    "sweep": lambda m: mmlens.sweep(m, EXAMPLES, {"halved": HALVED}, mmlens.logit_difference, progress=False),
    "ram": lambda m: mmlens.ram(m, EXAMPLES, progress=False),
    "attention_mass": lambda m: mmlens.scores.vision_mass(m, prompted(m)),
    "logit_contribution": lambda m: mmlens.scores.logit_contribution(m, EXAMPLES, progress=False),
    "visual_head_score": lambda m: mmlens.scores.visual_head_score(
        m, EXAMPLES, max_new_tokens=1, progress=False
    ),
    "mean_activations": lambda m: mmlens.mean_activations(m, EXAMPLES, hooks=["blocks.0.hook_mlp_out"]),
    "patch source": lambda m: mmlens.patch("blocks.1.hook_resid_pre", blank())(m, prompted(m)),
    "attribute": lambda m: mmlens.attribute(m, prompted(m), blank(), mmlens.logit_difference),
    "attribute_edges": lambda m: mmlens.attribution.attribute_edges(
        m, prompted(m), blank(), mmlens.logit_difference
    ),
}


@pytest.fixture(scope="module")
def dropping() -> mmlens.HookedVLM:
    """In training mode, with dropout of attention: as fine-tuning leaves a model."""
    hf_model, processor = load("micro")
    for module in hf_model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    model = mmlens.HookedVLM(hf_model, processor)
    hf_model.train()
    return model


@pytest.fixture(scope="module")
def still() -> mmlens.HookedVLM:
    """In training mode without any dropout."""
    model = mmlens.HookedVLM.from_pretrained("micro")
    model.train()
    return model


@pytest.mark.parametrize("name", MEASURES)
def test_no_number_is_made_under_dropout(name: str, dropping: mmlens.HookedVLM) -> None:
    with pytest.raises(StateError, match=r"training mode.*attention_dropout 0.1.*call model.eval\(\)"):
        MEASURES[name](dropping)


@pytest.mark.parametrize("name", MEASURES)
def test_training_mode_without_dropout_is_measured(name: str, still: mmlens.HookedVLM) -> None:
    MEASURES[name](still)
    assert still.training


def test_plain_runs_and_training_go_on_under_dropout(dropping: mmlens.HookedVLM) -> None:
    prompt = prompted(dropping)
    torch.manual_seed(0)
    expected = dropping.hf_model(**prompt.inputs).logits
    torch.manual_seed(0)
    assert torch.equal(dropping(prompt), expected)
    hooks = [("blocks.0.hook_mlp_out", lambda x, hook: x * 0.5)]
    loss = dropping.run_with_hooks(prompt, fwd_hooks=hooks, return_type="loss")
    loss.backward()
    assert dropping.embed.weight.grad.abs().sum() > 0
    dropping.hf_model.zero_grad()
    dropping.run_with_cache(prompt, names_filter="hook_embed")


def test_the_mode_goes_both_ways() -> None:
    model = mmlens.HookedVLM(tiny.tiny_model("llava"))
    assert not model.training
    model.hf_model.train()
    assert model.training
    model.eval()
    assert not model.training and not any(module.training for module in model.hf_model.modules())
    assert model.train() is model and model.training and model.hf_model.training
    assert all(module.training for module in model.hf_model.modules())
    assert mmlens.HookedVLM(tiny.tiny_model("llava").train()).training


def test_what_is_active() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_dropout, self.drop_path, self.jitter_noise, self.n_dropped = 0.0, 0.2, 0.01, 3

    parts = nn.ModuleDict(
        {
            "a": nn.Dropout(0.5),
            "b": nn.Dropout(0.0),
            "c": Layer(),
            "d": nn.BatchNorm1d(2),
            "e": nn.Linear(2, 2),
        }
    )
    assert active_in_training(parts) == [
        "a (p 0.5)", "c (drop_path 0.2, jitter_noise 0.01)", "d (statistics of the batch)",
    ]  # fmt: skip
    parts["a"].eval()
    assert len(active_in_training(parts)) == 2
    assert active_in_training(parts.eval()) == []
