"""Quantised weights: what is read is what the module applies, and methods are those of a plain model of such weights.

The truth is a twin: the same model with plain linear modules, which hold what the package itself gives back for its
quantised weights. Kinds of which only the weight is quantised are equal to it up to rounding, whole runs included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmlens
from mmlens.model.loading import load

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def _torch_dynamic(linear: nn.Linear) -> nn.Module:
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import default_dynamic_qconfig

    linear.qconfig = default_dynamic_qconfig
    return Linear.from_float(linear)


def _torchao(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


def _bitsandbytes(name: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantise(linear: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)
        sizes = (linear.in_features, linear.out_features)
        made = getattr(bnb.nn, name)(*sizes, bias=linear.bias is not None, **options)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    return quantise


def _of_4_bits(module: Any) -> Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


@dataclass
class Kind:
    """A way to quantise a linear module, and what its package says that the weight is then."""

    quantise: Callable[[nn.Linear], nn.Module]
    weight: Callable[[Any], Tensor]
    weight_alone: bool = True
    """Whether the module reads its input as it is, and not rounded to 8 bits too."""
    derives: bool = True


KINDS = {
    "torch dynamic": Kind(
        _torch_dynamic, lambda module: module.weight().dequantize(), weight_alone=False, derives=False
    ),
    "torchao int8": Kind(_torchao, lambda module: module.weight.dequantize()),
    "bitsandbytes 4-bit": Kind(_bitsandbytes("Linear4bit", compute_dtype=torch.float32), _of_4_bits),
    "bitsandbytes 8-bit": Kind(
        _bitsandbytes("Linear8bitLt", has_fp16_weights=False),
        lambda module: module.weight.data.float() * module.weight.SCB[:, None] / 127,
        weight_alone=False,
    ),
}


@dataclass
class Pair:
    """A quantised model, and the plain one of its weights."""

    kind: Kind
    given: mmlens.HookedVLM
    twin: mmlens.HookedVLM


@pytest.fixture(params=KINDS, scope="module")
def pair(request: pytest.FixtureRequest) -> Pair:
    kind = KINDS[request.param]
    hf_model, processor = load("micro")
    hf_model = hf_model.eval()
    plain = copy.deepcopy(hf_model)
    parts = [
        (path, name)
        for path, module in hf_model.get_decoder().named_modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]
    for path, name in parts:
        owner = hf_model.get_decoder().get_submodule(path)
        module = kind.quantise(getattr(owner, name))
        setattr(owner, name, module)
        linear = getattr(plain.get_decoder().get_submodule(path), name)
        with torch.no_grad():
            linear.weight.copy_(kind.weight(module))
    assert len(parts) == 7 * 8
    return Pair(kind, mmlens.HookedVLM(hf_model, processor), mmlens.HookedVLM(plain, processor))


def far(given: Tensor, expected: Tensor) -> float:
    return float((given.float() - expected.float()).norm() / expected.float().norm())


WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")


def test_weights_are_what_the_package_gives_back(pair: Pair, micro: mmlens.HookedVLM) -> None:
    for name in WEIGHTS:
        given, expected = getattr(pair.given, name), getattr(pair.twin, name)
        assert given.shape == expected.shape and given.is_floating_point()
        assert far(given, expected) < 1e-6, name
        # They are quantised indeed, and still the model's.
        assert 1e-4 < far(given, getattr(micro, name)) < 0.2, name
    assert pair.given.hook_dict.keys() == pair.twin.hook_dict.keys()


def test_what_heads_write_is_the_plain_model_s(pair: Pair) -> None:
    prompt = pair.twin.prompt_examples(mmlens.scene_examples("documents", 2, seed=0))
    logits, cache = pair.given.run_with_cache(prompt)
    expected_logits, expected = pair.twin.run_with_cache(prompt)
    # Where the input is rounded too, the runs differ by that; what heads write is still z W_O with the same W_O.
    if pair.kind.weight_alone:
        assert far(logits, expected_logits) < 1e-4
        assert far(cache.stack_head_results(), expected.stack_head_results()) < 1e-4
    for layer in (0, 5):
        made = torch.einsum("bphd,hdm->bphm", cache["z", layer], pair.twin.blocks[layer].attn.W_O)
        name = f"blocks.{layer}.attn.hook_result"
        _, results = pair.given.run_with_cache(prompt, names_filter=name)
        assert far(results[name], made) < 1e-5
        assert far(made.sum(2), cache["attn_out", layer]) < (1e-5 if pair.kind.weight_alone else 0.02)


def test_gradients_are_the_plain_model_s_or_refused(pair: Pair) -> None:
    examples = mmlens.scene_examples("documents", 2, seed=0)
    prompt = pair.twin.prompt_examples(examples)
    blank = mmlens.interventions.blank_region(mmlens.interventions.evidence_of(examples))

    def edges(model: mmlens.HookedVLM) -> Tensor:
        return mmlens.attribution.attribute_edges(
            model, prompt, blank, mmlens.logit_difference
        ).scores.nan_to_num(0)

    def heads(model: mmlens.HookedVLM) -> Tensor:
        found = mmlens.attribute(model, prompt, blank, mmlens.logit_difference, nodes="z")
        return found.heads().per_example

    def cached(model: mmlens.HookedVLM) -> Tensor:
        name = "blocks.1.hook_resid_pre"
        _, cache = model.run_with_cache(prompt, names_filter=name, incl_bwd=lambda logits: logits[0, -1, 7])
        return cache[f"{name}_grad"]

    for measured in (edges, heads, cached):
        if pair.kind.derives:
            assert far(measured(pair.given), measured(pair.twin)) < 1e-3
            continue
        with pytest.raises(mmlens.errors.UnsupportedError, match=r"layers.\d.+dynamic.+no derivative"):
            measured(pair.given)
        # What needs no gradient is served.
        assert pair.given(prompt).isfinite().all()
    assert not any(module._forward_hooks for module in pair.given.hf_model.get_decoder().modules())
