"""Path patching against its definition in three plain runs, and on models whose only path was planted by hand."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from tiny.wrapped import QUESTION, hooked
from torch import Tensor

import mmlens
from mmlens.data.scenes import scene_examples
from mmlens.interventions.edits import Edit
from mmlens.interventions.paths import path_patch
from mmlens.model.choosing import positions_mask
from mmlens.model.hooks import NoChangeWarning, UnknownHookError
from mmlens.model.prompt import Prompt

WRITTEN_AT = (
    "hook_z",
    "hook_attn_out",
    "hook_mlp_out",
    "mlp.hook_post",
    "hook_deepstack",
    "image.hook_embed",
)
READ_AT = ("hook_q", "hook_k", "hook_rot_k", "hook_v", "hook_mlp_in", "hook_resid_post")

FAMILIES = (
    "llava",  # grouped queries, as all of them
    "llava_onevision",  # biases of q, k and v
    "qwen3_vl",  # DeepStack, norms of q and k
    "internvl",
    "gemma3",  # norms after attention and MLP, image positions that attend both ways
    "granite_docling",  # residual multiplier, features injected between layers
    "qwen3_vl_moe",  # experts
    "qwen3_5",  # layers without softmax attention, gated heads
)


def pair(model: mmlens.HookedVLM, n_images: Sequence[int] = (2, 1)) -> tuple[Prompt, Prompt]:
    """Two padded batches of equal layout: other images, another letter."""
    sizes = tiny.TINY[model.family.model_type].sizes or None

    def made(question: str, seed: int) -> Prompt:
        images = iter(tiny.tiny_images(sum(n_images), seed=seed, sizes=sizes))
        own = [list(itertools.islice(images, n)) for n in n_images]
        return model.encode_images(model.prompt([question, "Where?"][: len(own)], images=own))

    return made(QUESTION, 1), made(QUESTION.replace("K", "N"), 9)


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, two prompts of equal layout, and all that the definition needs of run 1."""

    model: mmlens.HookedVLM
    prompt: Prompt
    source: Prompt
    clean: dict[str, Tensor]
    other: dict[str, Tensor]
    logits: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: mmlens.HookedVLM, prompt: Prompt, source: Prompt) -> Setting:
        names = [
            name
            for name in model.hook_dict
            if name.startswith(("blocks.", "image.")) and name.endswith((*WRITTEN_AT, *READ_AT))
        ]
        logits, clean = model.run_with_cache(prompt, names_filter=names)
        _, other = model.run_with_cache(source, names_filter=names)
        return cls(model, prompt, source, clean.cache_dict, other.cache_dict, logits)


@functools.cache
def setting(family: str) -> Setting:
    model = hooked(family)
    return Setting.of(model, *pair(model))


@torch.no_grad()
def three_runs(
    case: Setting,
    senders: Sequence[Any],
    receivers: Sequence[Any] | str,
    positions: Any = None,
    mlps: str = "frozen",
    downstream: str = "free",
) -> Tensor:
    """The definition, word by word: every head, mixer and MLP is held by a hook of its own."""
    model, prompt, clean, other = case.model, case.prompt, case.clean, case.other
    mask = positions_mask(prompt, positions)
    mask = ~prompt.token_map.is_padding if mask is None else mask
    image_mask = model.image_mask(prompt)
    held: dict[str, Tensor] = {}

    def hold(name: str, index: int | None = None) -> None:
        """Hold the hook point, or one head or neuron of it, at the source's values at `mask`, clean elsewhere."""
        where = mask if ".image." not in f".{name}" and "deepstack" not in name else mask[image_mask]
        now = held.setdefault(name, clean[name].clone())
        if index is None:
            now[where] = other[name][where]
        else:
            now[:, :, index][where] = other[name][:, :, index][where]

    sending_neurons = set()
    for sender in senders:
        if sender == "image":
            for name in clean:
                if name == "image.hook_embed" or name.endswith("hook_deepstack"):
                    hold(name)
        elif len(sender) == 3:
            hold(f"blocks.{sender[0]}.mlp.hook_post", sender[2])
            sending_neurons.add(sender[0])
        elif isinstance(sender[1], str):
            for branch in ("attn", "mlp") if sender[1] == "layer" else (sender[1],):
                hold(f"blocks.{sender[0]}.hook_{branch}_out")
        else:
            hold(f"blocks.{sender[0]}.attn.hook_z", sender[1])
    for layer in range(model.cfg.n_layers):
        attends = layer in model.attention_layers
        frozen = f"blocks.{layer}." + ("attn.hook_z" if attends else "hook_attn_out")
        held.setdefault(frozen, clean[frozen])
        mlp = f"blocks.{layer}.hook_mlp_out"
        if mlps == "frozen" and layer not in sending_neurons and mlp in model.hook_dict:
            held.setdefault(mlp, clean[mlp])
    hooks = [(name, lambda x, hook, value=value: value.clone()) for name, value in held.items()]
    with model.hooks(fwd_hooks=hooks):
        logits, recorded = model.run_with_cache(prompt, names_filter=list(clean))
    if receivers == "logits":
        return logits

    def one_head(x: Tensor, hook: Any, name: str, head: int, values: Any) -> Tensor:
        x[:, :, head] = values[name][:, :, head]
        return x

    def other_heads(x: Tensor, hook: Any, name: str, heads: set[int]) -> Tensor:
        kept = x[:, :, sorted(heads)].clone()
        x = clean[name].clone()
        x[:, :, sorted(heads)] = kept
        return x

    third: list[Any] = []
    receiving = {
        layer: {r[1] for r in receivers if len(r) == 3 and r[0] == layer}
        for layer in range(model.cfg.n_layers)
    }
    reading_mlps = {r[0] for r in receivers if len(r) == 2}
    if downstream == "frozen":
        for layer, heads in receiving.items():
            if layer not in model.attention_layers:
                name = f"blocks.{layer}.hook_attn_out"
                third.append((name, lambda x, hook, a=name: clean[a].clone()))
                continue
            name = f"blocks.{layer}.attn.hook_z"
            third.append((name, lambda x, hook, a=name, h=heads: other_heads(x, hook, a, h)))
            # Under latent attention a part of the keys shows only once they are rotated.
            keys = "k" if any(r[0] == layer and r[-1] == "k" for r in receivers) else "rot_k"
            for role in ("q", keys, "v"):
                name = f"blocks.{layer}.attn.hook_{role}"
                if heads:
                    third.append((name, lambda x, hook, a=name: clean[a].clone()))
            if mlps == "frozen" and layer not in reading_mlps and f"blocks.{layer}.hook_mlp_out" in clean:
                name = f"blocks.{layer}.hook_mlp_out"
                third.append((name, lambda x, hook, a=name: clean[a].clone()))
    for receiver in receivers:
        if len(receiver) == 2:
            name = f"blocks.{receiver[0]}.hook_mlp_in"
            third.append((name, lambda x, hook, a=name: recorded[a].clone()))
        else:
            name, index = at(model, *receiver)
            third.append((name, lambda x, hook, a=name, i=index: one_head(x, hook, a, i, recorded)))
    return model.run_with_hooks(prompt, fwd_hooks=third)


def at(model: mmlens.HookedVLM, layer: int, head: int, role: str) -> tuple[str, int]:
    """The hook point of a head's q, k or v, and its number there."""
    attention = model.anatomy.language[layer].attention
    assert attention is not None
    group = attention.n_heads // attention.n_kv_heads
    return f"blocks.{layer}.attn.hook_{role}", head if role == "q" else head // group


@torch.no_grad()
def assert_same(case: Setting, senders: Any, receivers: Any, **options: Any) -> None:
    slow = three_runs(case, senders, receivers, **options)
    hooks = path_patch(senders, receivers, case.source, **options)(case.model, case.prompt)
    fast = case.model.run_with_hooks(case.prompt, fwd_hooks=hooks)
    real = ~case.prompt.token_map.is_padding
    carried = (slow - case.logits)[real].abs().max()
    assert carried > 1e-3, "the path carries nothing: the comparison would be empty"
    torch.testing.assert_close(fast[real], slow[real], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- against the definition


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Setting:
    return setting(request.param)


def ends(case: Setting) -> tuple[int, int]:
    """The first and last layer with heads."""
    return case.model.attention_layers[0], case.model.attention_layers[-1]


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_what_a_head_reads_is_what_the_definition_records(case: Setting, role: str) -> None:
    first, last = ends(case)
    assert_same(case, [(first, 1), (first, 2), (first, "mlp"), "image"], [(last, 3, role)])


def test_several_receivers_in_several_layers(case: Setting) -> None:
    """The second layer's receivers read what run 2 recorded, not what the first layer's make of theirs."""
    first, last = ends(case)
    between = [(first + 1, 2, "v")] if first + 1 < last else []
    assert_same(case, [(first, 0), "image"], [(last, 3, "q"), (last, 0, "k"), *between, (last, "mlp")])


def test_frozen_downstream_only_the_receivers_write(case: Setting) -> None:
    first, last = ends(case)
    between = [(first + 1, 2, "v"), (first, "mlp")]
    for mlps in ("frozen", "free"):
        receivers = [(last, 3, "q"), *(between if first + 1 < last else [(last, 0, "k")])]
        assert_same(case, [(first, 0)], receivers, mlps=mlps, downstream="frozen")


def test_free_mlps_carry_the_path(case: Setting) -> None:
    first, last = ends(case)
    senders = [(first, 1), (first, "mlp"), "image"]
    assert_same(case, senders, [(last, 3, "v"), (last, "mlp")], mlps="free")
    assert_same(case, [(first, 2)], "logits", mlps="free", positions="last")


def test_direct_path_to_the_logits_is_run_2_itself(case: Setting) -> None:
    first, last = ends(case)
    assert_same(case, [(first, 1), (last, 0), (last, "mlp"), "image"], "logits")
    assert_same(case, [(first, 1)], "logits", positions="question", downstream="frozen")


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_sender_reaches_only_what_reads_behind_it(family: str) -> None:
    """Head (1, 0) reaches its layer's MLP and not the queries beside it; MLP 1 reaches layer 2 alone."""
    senders = [(0, 1), (1, 0), (1, "mlp")]
    receivers = [(1, 3, "q"), (1, "mlp"), (2, 0, "v")]
    for mlps in ("frozen", "free"):
        assert_same(setting(family), senders, receivers, mlps=mlps)
    assert_same(setting(family), [(0, 1), (1, 0)], [(1, 3, "q"), (2, 0, "v")], downstream="frozen")


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_whole_attention_outputs_and_neurons_send(family: str) -> None:
    case = setting(family)
    assert_same(
        case, [(0, "attn"), (1, "mlp", 7), (1, "mlp", 40)], [(2, 1, "k"), (2, "mlp")], positions="image"
    )
    assert_same(case, [(0, "mlp", 5)], [(1, 0, "q")], mlps="free")
    assert_same(case, [(0, "layer"), (1, 0)], "logits")


@pytest.mark.parametrize(
    "family",
    ["mistral_large4", "exaone4_5", "aya_vision"],
    ids=["latent attention", "no norm before", "parallel"],
)
def test_layers_of_other_kinds(family: str) -> None:
    """Where queries are no projection of the normed stream, run 2 is a real run; where branches are parallel, a head
    does not reach the MLP beside it."""
    case = setting(family)
    assert_same(case, [(0, 1), (0, "mlp")], [(1, 3, "q"), (1, 2, "v")])
    assert_same(case, [(0, 1), "image"], [(1, 0, "v"), (2, 3, "q")])
    assert_same(case, [(0, 1)], [(1, 3, "q")], downstream="frozen")
    assert_same(case, [(0, 1)], [(2, 3, "q")], mlps="free")


@torch.no_grad()
def test_on_a_trained_model(micro: mmlens.HookedVLM) -> None:
    prompt, source = (micro.prompt_examples(scene_examples("objects", 3, seed=seed)) for seed in (0, 1))
    case, real = Setting.of(micro, prompt, source), ~prompt.token_map.is_padding
    for receivers in ([(3, 1, "q")], [(2, 0, "k"), (2, 0, "v")], "logits"):
        senders = [(0, 1), (1, 2)]
        hooks = path_patch(senders, receivers, source, positions="text")(micro, prompt)
        fast = micro.run_with_hooks(prompt, fwd_hooks=hooks)
        slow = three_runs(case, senders, receivers, positions="text")
        torch.testing.assert_close(fast[real], slow[real], atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------------- a model with one path


LOUD, WRITTEN, CARRIED, ANSWER = 0, 60, 61, 62
"""Dimensions of the planted model's stream: a constant that outweighs all else, what the sender writes, what an MLP
makes of it, what the receiver writes."""


@torch.no_grad()
def planted(through_mlp: bool) -> mmlens.HookedVLM:
    """Head (0, 1) reads the embeddings and writes WRITTEN; head (1, 2) reads that by its values, or what MLP 0 makes
    of it, and writes ANSWER; the logits read that. Nothing else writes anything."""
    plain = tiny.tiny_model("llava")
    decoder = plain.get_decoder()
    for layer in decoder.layers:
        layer.input_layernorm.weight.fill_(1)
        layer.post_attention_layernorm.weight.fill_(1)
        for module in (
            layer.self_attn.q_proj,
            layer.self_attn.o_proj,
            layer.mlp.down_proj,
            layer.mlp.gate_proj,
        ):
            module.weight.zero_()
    decoder.norm.weight.fill_(1)
    projection = plain.model.multi_modal_projector.linear_2
    decoder.embed_tokens.weight[:, [LOUD, WRITTEN, CARRIED, ANSWER]] = torch.tensor([300.0, 0, 0, 0])
    projection.weight[[LOUD, WRITTEN, CARRIED, ANSWER]] = 0
    projection.bias[[LOUD, WRITTEN, CARRIED, ANSWER]] = torch.tensor([300.0, 0, 0, 0])
    # After a norm the loud dimension is 8 = sqrt(64) everywhere, and the others are a 37th of what they were.
    sends, reads = decoder.layers[0].self_attn, decoder.layers[1].self_attn
    sends.v_proj.weight[:, LOUD] = 0
    sends.o_proj.weight[WRITTEN, 16:32] = 30
    reads.v_proj.weight.zero_()
    reads.v_proj.weight[16:, CARRIED if through_mlp else WRITTEN] = 1
    reads.o_proj.weight[ANSWER, 32:48] = 30
    mlp = decoder.layers[0].mlp
    if through_mlp:
        mlp.gate_proj.weight[0, LOUD] = 1
        mlp.up_proj.weight.zero_()
        mlp.up_proj.weight[0, WRITTEN] = 1
        mlp.down_proj.weight[CARRIED, 0] = 10
    plain.lm_head.weight.zero_()
    plain.lm_head.weight[3, ANSWER] = 100
    return mmlens.HookedVLM(plain, tiny.tiny_processor("llava"))


SENDERS = [(0, 0), (0, 1), (0, 2), (1, 2), (0, "mlp"), "image"]
RECEIVERS = [
    *itertools.product((0,), (0, 1), "qkv"),
    *itertools.product((1,), (1, 2, 3), "qkv"),
    (0, "mlp"),
    (1, "mlp"),
    "logits",
]


@torch.no_grad()
def found(model: mmlens.HookedVLM, **options: Any) -> set[tuple[Any, Any]]:
    """The (sender, receiver) pairs whose path moves the last logit by more than a hundredth of its size."""
    prompt, source = pair(model, (1,))
    clean = model(prompt)[:, -1, 3]
    assert clean.abs().min() > 0.1
    carrying = set()
    # All at once: the source runs once for the paths that are alive.
    pairs = itertools.product(SENDERS, RECEIVERS)
    paths = {edge: path_patch([edge[0]], [edge[1]], source, **options) for edge in pairs}
    for (sender, receiver), path in paths.items():
        try:
            hooks = path(model, prompt)
        except ValueError as error:
            assert "comes before no receiver" in str(error)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoChangeWarning)
            logits = model.run_with_hooks(prompt, fwd_hooks=hooks, logits_to_keep=1)
        moved = logits[:, -1, 3] - clean
        if (moved / clean).abs().max() > 0.01:
            carrying.add((sender, receiver))
    return carrying


def test_a_planted_path_is_found_and_nothing_else() -> None:
    model = planted(through_mlp=False)
    # A head's values are its group's: heads 0 and 1 share them, heads 2 and 3 do.
    into_sender = {("image", (0, head, "v")) for head in (0, 1)}
    planted_path = {((0, 1), (1, head, "v")) for head in (2, 3)}
    assert found(model) == into_sender | planted_path | {((1, 2), "logits")}
    assert found(model, downstream="frozen") == {((0, 1), (1, 2, "v")), ((1, 2), "logits")}


def test_a_planted_path_through_an_mlp_is_found_with_free_mlps_alone() -> None:
    model = planted(through_mlp=True)
    steps = {((0, 1), (0, "mlp")), *(((0, "mlp"), (1, head, "v")) for head in (2, 3)), ((1, 2), "logits")}
    into_sender = {("image", (0, head, "v")) for head in (0, 1)}
    assert found(model) == steps | into_sender
    through = {((0, 1), (1, head, "v")) for head in (2, 3)}
    assert found(model, mlps="free") == steps | into_sender | through


# ---------------------------------------------------------------------- positions, sources, generation


@torch.no_grad()
def test_only_what_can_change_is_set() -> None:
    """Positions of the edits: where the senders differ; before them a partial run may keep the clean run."""
    case = setting("llava")
    last, image = case.prompt.last, case.prompt.token_map.is_image

    def edits(senders: Any, receivers: Any, **options: Any) -> list[Edit]:
        return [
            edit
            for _, edit in path_patch(senders, receivers, case.source, **options)(case.model, case.prompt)
        ]

    (edit,) = edits([(0, 1)], [(2, 3, "k"), (2, 2, "k")], positions="last")
    assert torch.equal(edit.mask, last) and edit.heads == [1] and edit.generated is False
    assert edit.first_position == last.shape[1] - 1
    (edit,) = edits(["image"], [(1, "mlp")])
    assert torch.equal(edit.mask, image)
    # The prompts are equal before the first image, and so is what heads write there.
    (edit,) = edits([(0, 1)], "logits")
    differs = (case.clean["blocks.0.attn.hook_z"] != case.other["blocks.0.attn.hook_z"])[:, :, 1].any(-1)
    assert torch.equal(edit.mask, differs & ~case.prompt.token_map.is_padding)
    assert edit.first_position > 0
    early, late = edits([(0, 1)], [(1, 2, "v"), (2, 3, "q")], positions="last")
    assert torch.equal(early.mask, last) and torch.equal(late.mask, ~case.prompt.token_map.is_padding)


@torch.no_grad()
def test_the_logits_read_the_path_beside_what_other_receivers_change() -> None:
    """To "logits" beside others the direct path is added."""
    case = setting("qwen3_vl")
    model, prompt = case.model, case.prompt
    senders, name = [(0, 1), (0, 2)], "blocks.2.hook_resid_post"

    def final(receivers: Any) -> Tensor:
        with model.hooks(fwd_hooks=path_patch(senders, receivers, case.source)(model, prompt)):
            return model.run_with_cache(prompt, names_filter=name)[1][name]

    both, one, other = final([(2, 3, "q"), "logits"]), final([(2, 3, "q")]), final("logits")
    torch.testing.assert_close(both - one, other - case.clean[name], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sources_are_run_once_for_all_paths() -> None:
    case = setting("llava")
    model = case.model
    prompt, source = pair(model)
    before = model.run_state.n_forwards
    paths = [path_patch([head], [(2, 3, "q")], source) for head in model.heads if head[0] < 2]
    built = [path(model, prompt) for path in paths]
    assert model.run_state.n_forwards - before == 2
    by_run = model.run_with_hooks(prompt, fwd_hooks=built[5])
    _, cache = model.run_with_cache(source)
    for given in (cache, cache.cache_dict):
        hooks = path_patch([(1, 1)], [(2, 3, "q")], given)(model, prompt)
        torch.testing.assert_close(
            model.run_with_hooks(prompt, fwd_hooks=hooks), by_run, atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("downstream", ["free", "frozen"])
def test_generation_with_and_without_cache_agree(downstream: Any) -> None:
    case = setting("internvl")
    model, options = case.model, {"max_new_tokens": 5, "do_sample": False}
    path = path_patch(
        [(0, 1), (0, "mlp")], [(1, 2, "v"), (2, 3, "q"), (2, "mlp")], case.source, downstream=downstream
    )
    with model.hooks(fwd_hooks=path(model, case.prompt)):
        cached = model.generate(case.prompt, **options)
        assert torch.equal(cached, model.generate(case.prompt, use_cache=False, **options))
    assert not torch.equal(cached, model.generate(case.prompt, **options))


def test_a_source_that_is_the_prompt_itself_changes_nothing() -> None:
    case = setting("llava")
    for mlps in ("frozen", "free"):
        hooks = path_patch([(0, 1)], [(2, 3, "q")], case.prompt, mlps=mlps)(case.model, case.prompt)
        assert all(edit.fired == 0 for _, edit in hooks)
        with pytest.warns(NoChangeWarning):
            case.model.run_with_hooks(case.prompt, fwd_hooks=hooks)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("senders", "receivers", "error", "message"),
    [
        ([(1, 0)], [(1, 2, "q")], ValueError, "L1H0 comes before no receiver"),
        ([(1, "mlp")], [(1, "mlp")], ValueError, "L1 mlp comes before no receiver"),
        ([(0, 0)], [(0, 1, "k"), (2, 1, "k")], ValueError, "L0H1 k comes after no sender"),
        ([(0, 0)], [(2, 4, "q")], IndexError, "head"),
        ([(0, 0)], [(3, 0, "q")], IndexError, "3"),
        ([(0, 7)], "logits", IndexError, "7"),
        ([(0, 0)], [(2, 0, "z")], ValueError, "'z'"),
        ([(0, 0)], [(2, "mpl")], ValueError, "the nearest: 'mlp'"),
        ([(0, 0)], "logit", ValueError, "the nearest: 'logits'"),
        ([(0, 0)], (2, 0, "q"), TypeError, "receiver"),
        ([(0, 0)], [], ValueError, "no receivers"),
        ([(0, 0)], [(2, 0, "q"), (2, 0, "q")], ValueError, "more than once: L2H0 q"),
        ([], "logits", ValueError, "at least one"),
        ([(0, 0), (0, "attn")], "logits", ValueError, "L0H0 is part of another sender"),
        ([("vision", 0, 1)], "logits", ValueError, "enters by 'image'"),
    ],
)
def test_what_cannot_be_is_refused(
    senders: Any, receivers: Any, error: type[Exception], message: str
) -> None:
    case = setting("llava")
    with pytest.raises(error, match=message):
        path_patch(senders, receivers, case.source)(case.model, case.prompt)


def test_unknown_variants_sources_and_positions_are_refused() -> None:
    case = setting("llava")
    with pytest.raises(ValueError, match="the nearest: 'free', 'frozen'"):
        path_patch([(0, 0)], "logits", case.source, mlps="freezed")
    with pytest.raises(TypeError, match="source"):
        path_patch([(0, 0)], "logits", 3)  # type: ignore[arg-type]
    shorter = case.model.prompt("Where?", images=tiny.tiny_images(1))
    with pytest.raises(ValueError, match="laid out differently"):
        path_patch([(0, 0)], "logits", shorter)(case.model, case.prompt)
    with pytest.raises(ValueError, match="choose no image position"):
        path_patch(["image"], "logits", case.source, positions="text")(case.model, case.prompt)
    text = case.model.prompt("Where?")
    with pytest.raises(ValueError, match="no image"):
        path_patch(["image"], "logits", text)(case.model, text)


@pytest.mark.parametrize(
    ("family", "receivers", "options", "error", "message"),
    [
        ("gemma4", "logits", {}, ValueError, "do more than add"),
        ("mistral_large4", [(1, 0, "k")], {}, ValueError, "latent attention"),
        ("mistral_large4", [(3, 0, "v")], {}, ValueError, "of an earlier layer"),
        ("aya_vision", [(2, "mlp")], {}, UnknownHookError, "in parallel"),
        (
            "exaone4_5",
            [(1, 0, "q"), (2, 0, "q")],
            {"downstream": "frozen"},
            UnknownHookError,
            "norms stand after",
        ),
    ],
)
def test_families_that_cannot_are_refused_by_name(
    family: str, receivers: Any, options: Any, error: type[Exception], message: str
) -> None:
    model = hooked(family)
    prompt = model.prompt(QUESTION, images=tiny.tiny_images(1, sizes=tiny.TINY[family].sizes or None))
    with pytest.raises(error, match=message):
        path_patch([(0, 0)], receivers, prompt, **options)(model, prompt)
