"""Every supported family against the plain Hugging Face model: one suite, no test written for a family."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import largest_logit
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from mmlens import hook_names, internals
from mmlens.families.catalog import FAMILIES
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.support import missing_hooks

INSIDE_SOFTMAX = ("hook_attn_scores", "hook_pattern")
TWO_IMAGES, PADDED = (2,), (2, 1)
ALWAYS = (*tiny.REPRESENTATIVES, *tiny.FURTHER_KINDS)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMPLEMENTATIONS = [
    pytest.param(
        family,
        attention,
        dtype,
        id=f"{family}-{attention}-{name}",
        # Elsewhere the implementation that transformers would choose, in one dtype.
        marks=[]
        if family in ALWAYS or (attention == tiny.TINY[family].attention[0] and name == "fp32")
        else [pytest.mark.slow],
    )
    for family in tiny.FAMILIES
    for attention in ("sdpa", "eager")
    for name, dtype in DTYPES.items()
]


@pytest.fixture(params=tiny.others_slow(ALWAYS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
"""For what is quick, or what a user would miss first."""


@functools.lru_cache(maxsize=2)
def _wrapped(family: str) -> HookedVLM:
    return HookedVLM(tiny.tiny_model(family))


@functools.lru_cache(maxsize=4)
def _inputs(family: str, n_images: tuple[int, ...]) -> dict[str, Tensor]:
    return tiny.tiny_inputs(family, n_images)


@pytest.fixture
def model(family: str) -> Iterator[HookedVLM]:
    model = _wrapped(family)
    yield model
    assert not model.list_hooks()


def test_every_record_is_tested() -> None:
    """But for those whose towers or processors come from packages that need torchvision."""
    tested = {tiny.tiny_config(name).model_type for name in tiny.FAMILIES}
    assert tested | {"fast_vlm", "perception_lm", "gemma3n"} == set(FAMILIES) & set(CONFIG_MAPPING)


# ---------------------------------------------------------------------- with no hook: the plain model


@torch.no_grad()
@pytest.mark.parametrize(("family", "attention", "dtype"), IMPLEMENTATIONS)
def test_logits_are_bit_equal_and_the_weights_untouched(
    family: str, attention: str, dtype: torch.dtype
) -> None:
    if attention not in tiny.TINY[family].attention:
        pytest.skip(f"transformers refuses {attention} attention for {family}")
    plain = tiny.tiny_model(family, attn_implementation=attention, dtype=dtype)
    batches = [tiny.cast(_inputs(family, n_images), dtype) for n_images in (TWO_IMAGES, PADDED)]
    expected = [plain(**inputs).logits for inputs in batches]
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    model = HookedVLM(plain)
    for inputs, logits in zip(batches, expected, strict=True):
        assert torch.equal(model(inputs), logits)
        # The process-wide wrapper hands this model its own functions, also while another layer is hooked.
        layer = model.attention_layers[0]
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", lambda z, hook: z)]):
            assert torch.equal(model(**inputs), logits)
    after = model.hf_model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_generate_is_the_plain_model_s_and_hooks_act_on_every_token(family: str) -> None:
    if not tiny.TINY[family].generates:
        pytest.skip("the plain model does not generate from these inputs")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    plain = tiny.tiny_model(family)
    inputs = _inputs(family, PADDED)
    expected = plain.generate(**inputs, **options)
    model = HookedVLM(plain)
    assert torch.equal(model.generate(inputs, **options), expected)
    lengths = []

    def zero(z: Tensor, hook: Any) -> Tensor:
        lengths.append(z.shape[1])
        return torch.zeros_like(z)

    every_z = [
        (lambda name: name.startswith("blocks.") and name.endswith("attn.hook_z"), zero),
    ]
    with model.hooks(fwd_hooks=every_z):
        model.generate(inputs, **options)
    assert lengths[0] > 1 and 1 in lengths
    assert torch.equal(model.generate(inputs, **options), expected)


@torch.no_grad()
def test_encoding_images_once_changes_no_bit(family: str) -> None:
    if tiny.TINY[family].processor is None or tiny.record_of(family).layout is None:
        pytest.skip("no prompt can be made here")
    plain = tiny.tiny_model(family, attn_implementation=tiny.TINY[family].attention[0])
    model = HookedVLM(plain, tiny.tiny_processor(family))
    n_images = tiny.TINY[family].most_images or 2
    images = tiny.tiny_images(n_images, seed=1, sizes=tiny.TINY[family].sizes or None)
    prompt = model.prompt("What colour is K?", images=images)
    encoded = model.encode_images(prompt)
    assert encoded is prompt or not any(value.is_floating_point() for value in encoded.inputs.values())
    assert torch.equal(model(encoded), model(prompt))


# ---------------------------------------------------------------------- every hook point


@every_family
@torch.no_grad()
def test_every_attention_call_is_reached(family: str, model: HookedVLM) -> None:
    """What asks the attention interface for its function during a forward pass is what has hook points."""
    asking: set[nn.Module] = set()
    for module in model.hf_model.modules():
        if internals.asks_for_attention(module):
            module.register_forward_pre_hook(lambda module, args: asking.add(module))
    for n_images in (TWO_IMAGES, PADDED):
        model(_inputs(family, n_images))
    tapped = {module for module, _ in model._wiring.attention}
    for layer in model.anatomy.unread:
        tapped |= set(layer.modules())
    stated = model.family.missing
    unreached = asking - tapped
    assert not unreached or "other attention" in stated, {type(module).__name__ for module in unreached}
    assert len(model.attention_layers) >= 1


@torch.no_grad()
def test_every_hook_point_fires_with_its_documented_shape_and_reads_exactly(
    family: str, model: HookedVLM
) -> None:
    inputs = _inputs(family, PADDED)
    clean = model(inputs)
    logits, cache = model.run_with_cache(inputs, names_filter=lambda name: True)
    # Layers whose softmax is read run the family's eager attention.
    close = 2e-5 * max(2.5, largest_logit(clean))
    torch.testing.assert_close(logits, clean, atol=close, rtol=close)
    fast = [name for name in model.hook_dict if not name.endswith(INSIDE_SOFTMAX)]
    identity = [(name, lambda x, hook: x) for name in fast]
    assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=identity), clean)
    assert set(cache.cache_dict) == set(model.hook_dict)
    for name, sizes in _documented_sizes(model, inputs).items():
        assert list(cache[name].shape) == sizes, name
    # Image rows are the rows at image positions.
    for name in model.hook_dict:
        if ".image." in name and model.family.stream == hook_names.STREAM:
            whole = cache[name.replace("image.hook_z", "attn.hook_z").replace("image.", "")]
            assert torch.equal(whole[model.image_mask(inputs)], cache[name]), name


@torch.no_grad()
def test_every_hook_point_of_every_kind_of_layer_changes_the_logits(family: str, model: HookedVLM) -> None:
    inputs = _inputs(family, TWO_IMAGES)
    clean = model(inputs)
    silent = []
    for name in _of_every_kind_of_layer(model):

        def changed(x: Tensor, hook: Any) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            if hook.name.endswith("hook_pattern"):
                return x.roll(1, -1)
            noise = torch.randn(x.shape, generator=generator).to(x.dtype)
            return x + noise * (1 if hook.name.endswith("scores") else x.std(correction=0) + 1e-3)

        written = model.run_with_hooks(inputs, fwd_hooks=[(name, changed)])
        if not (written - clean).abs().max() > 1e-4:
            silent.append(name)
    inert = tiny.TINY[family].inert
    assert not [name for name in silent if not any(fnmatch(name, pattern) for pattern in inert)]
    assert all(any(fnmatch(name, pattern) for name in silent) for pattern in inert)
    assert torch.equal(model(inputs), clean)


@torch.no_grad()
def test_the_stream_is_the_sum_of_what_is_added_to_it(family: str, model: HookedVLM) -> None:
    """And an edit of hook_resid_mid reaches the stream itself, not the MLP alone."""
    inputs = _inputs(family, PADDED)
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: not name.endswith(INSIDE_SOFTMAX))
    tolerance: dict[str, float] = {"atol": 2e-5, "rtol": 1e-4}
    for prefix, parts in _language_layers(model):
        if model.family.adds:
            total = cache[f"{prefix}hook_resid_pre"]
            for name in ("hook_attn_out", "hook_mlp_out"):
                total = total + cache.cache_dict.get(f"{prefix}{name}", torch.zeros(()))
            torch.testing.assert_close(total, cache[f"{prefix}hook_resid_post"], **tolerance)
        if not parts.has_resid_mid:
            continue
        if model.family.adds:
            mid = cache[f"{prefix}hook_resid_pre"] + cache[f"{prefix}hook_attn_out"]
            torch.testing.assert_close(mid, cache[f"{prefix}hook_resid_mid"], **tolerance)
        # With the MLP silenced, what comes out of the layer is the stream after attention.
        posts = []
        for edit in (lambda x, hook: x, lambda x, hook: x.roll(1, -1)):
            edits = [(f"{prefix}hook_resid_mid", edit), (f"{prefix}hook_mlp_out", lambda x, hook: x * 0)]
            with model.hooks(fwd_hooks=edits):
                _, edited = model.run_with_cache(inputs, names_filter=f"{prefix}hook_resid_post")
            posts.append(edited[f"{prefix}hook_resid_post"])
        assert not torch.allclose(*posts, atol=0.1)
        if model.family.adds:
            torch.testing.assert_close(posts[1], posts[0].roll(1, -1), **tolerance)


@torch.no_grad()
def test_a_head_ablated_at_z_equals_its_columns_of_the_output_projection_set_to_zero(family: str) -> None:
    model, cut = _wrapped(family), HookedVLM(tiny.tiny_model(family))
    inputs = _inputs(family, PADDED)
    layer, head = model.attention_layers[-1], 2
    parts = cut.anatomy.language[layer].attention
    assert parts is not None
    parts.out.weight[:, head * parts.d_value : (head + 1) * parts.d_value] = 0

    def ablated(z: Tensor, hook: Any) -> Tensor:
        z[:, :, head] = 0
        return z

    logits = model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", ablated)])
    torch.testing.assert_close(logits, cut(inputs), atol=1e-5, rtol=1e-5)
    under = model.run_with_hooks(
        inputs,
        fwd_hooks=[
            (f"blocks.{layer}.attn.hook_result", lambda r, hook: r.index_fill(2, torch.tensor(head), 0))
        ],
    )
    torch.testing.assert_close(under, cut(inputs), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_rows_are_the_full_pattern_s(family: str, model: HookedVLM) -> None:
    inputs = _inputs(family, PADDED)
    if model.family.reads_by_cross_attention:
        pytest.skip("cross-attention layers have patterns over image patches")
    _, cache = model.run_with_cache(
        inputs, names_filter=lambda name: name.startswith("blocks.") and name.endswith("hook_pattern")
    )
    queries = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    queries[0, -3:] = queries[1, -5:-3] = True
    seen = []

    def consume(layer: int, rows: Tensor, real: Tensor) -> None:
        for row in range(len(rows)):
            expected = cache["pattern", layer][row][:, queries[row]]
            torch.testing.assert_close(rows[row][:, real[row]], expected.float(), atol=5e-6, rtol=0)
        seen.append(layer)

    model.attention_rows(inputs, queries, consume)
    assert seen == model.attention_layers


def test_gradients_flow_through_patterns(family: str, model: HookedVLM) -> None:
    """From the logits back to the first attention layer of the language side and, through it, of the vision side."""
    inputs = _inputs(family, TWO_IMAGES)
    patterns = [name for name in model.hook_dict if name.endswith("attn.hook_pattern")]
    vision = [name for name in patterns if name.startswith("vision.")][:1]
    names = [next(name for name in patterns if name.startswith("blocks.")), *vision]
    kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(x: Tensor, hook: Any) -> None:
        if not x.requires_grad:
            x.requires_grad_()  # a tower that transformers freezes (Idefics)
        x.retain_grad()
        kept[hook.name].append(x)

    with torch.enable_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        model(inputs)[0].square().mean().backward()
    model.hf_model.zero_grad()
    expected = names if tiny.TINY[family].differentiable else names[:1]
    for name in expected:
        assert any(x.grad is not None and bool(x.grad.any()) for x in kept[name]), name


@torch.no_grad()
def test_an_exception_leaves_no_hook_behind(family: str, model: HookedVLM) -> None:
    inputs = _inputs(family, TWO_IMAGES)
    clean = model(inputs)

    def fails(x: Tensor, hook: Any) -> Tensor:
        raise ArithmeticError("from the hook")

    layer = model.attention_layers[0]
    names = [f"blocks.{layer}.attn.hook_pattern", "blocks.0.hook_resid_post", "hook_embed"]
    for name in [*names, *[name for name in model.hook_dict if name.startswith("vision.")][:1]]:
        with pytest.raises(ArithmeticError, match="from the hook"):
            model.run_with_hooks(inputs, fwd_hooks=[(name, fails)])
    assert not model.list_hooks()
    assert torch.equal(model(inputs), clean)


# ---------------------------------------------------------------------- what the records say is missing


@every_family
def test_missing_hook_points_are_those_the_record_states(family: str, model: HookedVLM) -> None:
    missing = missing_hooks(model)
    stated = [pattern for pattern in model.family.missing if pattern != "other attention"]
    assert {name for name in missing if not any(fnmatch(name, pattern) for pattern in stated)} == set()
    assert {pattern for pattern in stated if not any(fnmatch(name, pattern) for name in missing)} == set()


# ---------------------------------------------------------------------- helpers


def _of_every_kind_of_layer(model: HookedVLM) -> list[str]:
    """All hook points but those of a layer built like one before it (the last language layer counts too)."""
    stacks = {"": model.anatomy.language, **model.anatomy.stacks}
    repeated: list[str] = []
    for prefix, layers in stacks.items():
        kinds = set()
        for index, parts in enumerate(layers):
            own = f"{prefix}blocks.{index}."
            hooks = frozenset(name.removeprefix(own) for name in model.hook_dict if name.startswith(own))
            kind = (type(parts.mixer), type(parts.mlp_out), hooks)
            if kind in kinds and not (prefix == "" and index == len(layers) - 1):
                repeated.append(own)
            kinds.add(kind)
    return [name for name in model.hook_dict if not name.startswith(tuple(repeated))]


def _language_layers(model: HookedVLM) -> list[tuple[str, Any]]:
    return [(f"blocks.{index}.", parts) for index, parts in enumerate(model.anatomy.language)]


def _documented_sizes(model: HookedVLM, inputs: dict[str, Tensor]) -> dict[str, list[int]]:
    """Hook point of a language layer -> the sizes its documentation promises."""
    batch, pos = inputs["input_ids"].shape
    mask = model.image_mask(inputs)
    d_model = model.hf_model.config.get_text_config().hidden_size
    sizes: dict[str, int] = {"batch": batch, "pos": pos, "d_model": d_model, "1": 1}
    sizes |= {"query": pos, "key": pos, "image_token": 0 if mask is None else int(mask.sum())}
    found = {}
    documented = {**hook_names.BLOCK_HOOKS, **hook_names.BLOCK_IMAGE_HOOKS}
    for prefix, parts in _language_layers(model):
        attention = parts.attention
        crosses = "CrossAttention" in type(parts.mixer).__name__
        for hook, text in documented.items():
            name, axes = prefix + hook, text[1 : text.index("]")].split(", ")
            if name not in model.hook_dict or ("resid" in name and model.family.stream != hook_names.STREAM):
                continue
            if crosses and {"key", "kv_head"} & set(axes):
                continue  # its keys are image patches
            if attention is not None:
                projection = attention.projections.get(hook.removeprefix("attn.hook_"))
                width = attention.d_value if hook.endswith("hook_z") else attention.d_head
                sizes["d_head"] = width if projection is None else projection.d_head
                sizes |= {"head": attention.n_heads, "kv_head": attention.n_kv_heads}
            found[name] = [sizes[axis] for axis in axes]
    return found
