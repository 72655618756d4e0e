"""Who may have hooks on a model: several wrappers, copies, threads; and what is left of them afterwards."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupting import left_behind, plain
from tiny.wrapped import hooked, padded_prompt, two_image_prompt
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

import mmlens
from mmlens.errors import InvalidTypeError, MmlensWarning, StateError
from mmlens.model.hooks import HookNeverFiredError

PATTERN, Z, STREAM = "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"


def zero(x: Tensor, hook: object) -> Tensor:
    return x * 0


def change(model: mmlens.HookedVLM, prompt: Any, name: str) -> float:
    clean = model(prompt)
    return float((model.run_with_hooks(prompt, fwd_hooks=[(name, zero)]) - clean).abs().max())


# ---------------------------------------------------------------------- several wrappers, copies


@torch.no_grad()
@pytest.mark.parametrize("name", [PATTERN, Z, STREAM])
def test_hooks_of_every_wrapper_of_a_model_fire(name: str) -> None:
    first = hooked("llava")
    prompt = two_image_prompt(first)
    alone = change(first, prompt, name)
    second = mmlens.HookedVLM(first.hf_model, first.processor)
    assert alone > 1e-3
    assert (
        change(second, prompt, name) == change(first, prompt, name) == change(second, prompt, name) == alone
    )
    assert name in first.run_with_cache(prompt, names_filter=name)[1]


@torch.no_grad()
def test_hooks_of_two_wrappers_at_a_time_are_refused() -> None:
    first = hooked("llava")
    prompt = two_image_prompt(first)
    second = mmlens.HookedVLM(first.hf_model, first.processor)
    first.add_hook(Z, zero)
    for use in (
        lambda: second(prompt),
        lambda: second.add_hook(PATTERN, zero),
        lambda: second.run_with_cache(prompt),
    ):
        with pytest.raises(StateError, match=rf"{Z}.*reset_hooks\(\) there first"):
            use()
    assert first(prompt).shape[0] == 1
    first.reset_hooks()
    assert change(second, prompt, Z) > 0


@torch.no_grad()
def test_wrapping_again_takes_over_from_hooks_that_are_set() -> None:
    """A notebook cell that wraps the model and adds a hook, run twice, edits once."""
    plain_model = tiny.tiny_model("llava").eval()
    inputs = tiny.tiny_inputs("llava")
    first = mmlens.HookedVLM(plain_model)
    clean = first(inputs)
    first.add_hook(STREAM, lambda x, hook: 2 * x)
    first.add_perma_hook(Z, lambda x, hook: 2 * x)
    with pytest.warns(MmlensWarning, match="are removed"):
        second = mmlens.HookedVLM(plain_model)
    assert torch.equal(second(inputs), clean) and not left_behind(first)
    # A block is not taken over: who opened it counts on its hooks.
    with second.hooks(fwd_hooks=[(Z, zero)]), pytest.raises(StateError, match="block of hooks open"):
        mmlens.HookedVLM(plain_model)
    assert not left_behind(second)


@torch.no_grad()
def test_hooks_of_a_wrapper_that_is_gone_stay_on_its_model() -> None:
    plain_model = tiny.tiny_model("llava").eval()
    inputs = tiny.tiny_inputs("llava")
    clean = plain(plain_model, inputs)

    def edited() -> nn.Module:
        model = mmlens.HookedVLM(plain_model)
        model.add_hook(STREAM, zero)
        return model.hf_model

    edited()
    gc.collect()
    under = plain(plain_model, inputs)
    assert not torch.equal(under, clean)
    with pytest.warns(MmlensWarning):
        mmlens.HookedVLM(plain_model)
    assert torch.equal(plain(plain_model, inputs), clean)


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    clean = model(prompt)
    model.cfg.use_attn_result = True
    twin = copy.deepcopy(model)
    assert twin.cfg.use_attn_result and twin.hf_model is not model.hf_model
    for name in (PATTERN, Z, STREAM):
        assert change(twin, prompt, name) == change(model, prompt, name) > 0
    twin.add_hook(PATTERN, zero)
    assert torch.equal(model(prompt), clean) and not torch.equal(twin(prompt), clean)
    with pytest.raises(StateError, match="hooks are set"):
        copy.deepcopy(twin)


@torch.no_grad()
def test_a_copy_of_the_hugging_face_model_is_plain() -> None:
    model = hooked("llava")
    inputs = two_image_prompt(model).inputs
    clean = model(inputs)
    with model.hooks(fwd_hooks=[(STREAM, zero), (PATTERN, zero)]):
        under = copy.deepcopy(model.hf_model)
        assert not torch.equal(plain(model.hf_model, inputs), clean)
    for twin in (under, copy.deepcopy(model.hf_model)):
        assert torch.equal(plain(twin, inputs), clean)


@torch.no_grad()
def test_saving(tmp_path: Path) -> None:
    # Of LLaVA's tower transformers itself leaves hooks that cannot be pickled.
    model = hooked("qwen2_5_vl")
    inputs = two_image_prompt(model).inputs
    clean = model(inputs)
    _, cache = model.run_with_cache(inputs, names_filter=Z)
    torch.save(model.hf_model, tmp_path / "whole.pt")
    model.hf_model.save_pretrained(tmp_path / "folder")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "folder").eval()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in loaded.modules())
    assert torch.equal(plain(loaded, inputs), clean) and torch.equal(plain(again, inputs), clean)
    for save in (
        lambda: torch.save(model, tmp_path / "no.pt"),
        lambda: pickle.dumps(model),
        lambda: copy.copy(model),
    ):
        with pytest.raises(InvalidTypeError, match="model.hf_model"):
            save()
    with pytest.raises(InvalidTypeError, match="cache.cache_dict"):
        torch.save(cache, tmp_path / "no.pt")
    with model.hooks(fwd_hooks=[(Z, zero)]):
        model.hf_model.save_pretrained(tmp_path / "under hooks")
        with pytest.raises(StateError, match="hooks are set"):
            torch.save(model.hf_model, tmp_path / "no.pt")


# ---------------------------------------------------------------------- memory


def test_a_wrapper_leaves_nothing_on_its_model() -> None:
    plain_model = tiny.tiny_model("llava").eval()
    inputs = tiny.tiny_inputs("llava")
    for _ in range(3):
        model = mmlens.HookedVLM(plain_model)
        assert not left_behind(model)
        with torch.no_grad():
            model.run_with_cache(inputs)
            model.run_with_hooks(inputs, fwd_hooks=[(PATTERN, zero)])
        assert not left_behind(model)
    held = weakref.ref(model)
    del model
    assert held() is None, "a wrapper is freed with its last user, without a garbage collection"


@pytest.mark.parametrize("is_hooked", [False, True])
def test_memory_comes_back(is_hooked: bool) -> None:
    held: list[weakref.ref] = []
    inputs = tiny.tiny_inputs("llava")
    for _ in range(20 if not is_hooked else 3):
        model = mmlens.HookedVLM(tiny.tiny_model("llava").eval())
        with torch.no_grad():
            model.run_with_cache(inputs)
        if is_hooked:
            model.add_hook(PATTERN, zero)
        weight = next(model.hf_model.parameters())
        held += [weakref.ref(model), weakref.ref(model.hf_model), weakref.ref(weight)]
        del model, weight
    gc.collect()
    assert not any(reference() is not None for reference in held)


# ---------------------------------------------------------------------- modules replaced


@torch.no_grad()
def test_a_replaced_module_is_an_error() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    attention = model.anatomy.language[1].attention.module
    before = attention.q_proj

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x)

    attention.q_proj = Adapted(before)
    for run in (
        lambda: model(prompt),
        lambda: model.run_with_hooks(prompt, fwd_hooks=[(Z, zero)]),
        lambda: model.run_with_cache(prompt),
        lambda: model.generate(prompt, max_new_tokens=1),
    ):
        with pytest.raises(StateError, match=r"layers.1.self_attn.q_proj .*Linear.* Adapted .*wrap it again"):
            run()
    assert not left_behind(model)
    attention.q_proj = before
    assert change(model, prompt, Z) > 0


@torch.no_grad()
def test_what_hooks_do_not_stand_on_may_be_replaced() -> None:
    """More tokens (a new embedding), another type, other weights."""
    model = hooked("llava")
    prompt = two_image_prompt(model)
    size = model.hf_model.config.get_text_config().vocab_size
    model.hf_model.resize_token_embeddings(size + 8, mean_resizing=False)
    assert model(prompt).shape[-1] == size + 8
    model.hf_model.load_state_dict(model.hf_model.state_dict())
    model.hf_model.to(torch.float64)
    assert change(model, prompt, Z) > 0


# ---------------------------------------------------------------------- threads


def in_thread(run: Callable[[], object]) -> object:
    """What `run()` gives or raises in a thread of its own."""
    given: list[object] = []

    def guarded() -> None:
        try:
            with torch.no_grad():
                given.append(run())
        except Exception as error:
            given.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    return given[0]


@torch.no_grad()
def test_a_second_thread_is_refused_while_hooks_are_live() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    clean = model(prompt)
    runs: dict[str, Callable[[], object]] = {
        "a plain run": lambda: model(prompt),
        "the bare model": lambda: model.hf_model(**prompt.inputs),
        "a layer alone": lambda: model.hf_model.get_image_features(prompt.inputs["pixel_values"]),
        "its own hooks": lambda: model.run_with_hooks(prompt, fwd_hooks=[(STREAM, zero)]),
    }
    with model.hooks(fwd_hooks=[(Z, zero), ("vision.blocks.0.hook_resid_pre", lambda x, hook: None)]):
        for label, run in runs.items():
            refused = in_thread(run)
            assert isinstance(refused, StateError), label
            for said in ("thread 'MainThread' has hooks set", "would run under them", "reset_hooks()"):
                assert said in str(refused), label
        assert not torch.equal(model(prompt), clean)
    with mmlens.hybrid_attention(model, [(0, 0)], sink=1, window=2):
        assert isinstance(in_thread(runs["the bare model"]), StateError)
    assert torch.equal(in_thread(runs["a plain run"]), clean)  # type: ignore[arg-type]


@torch.no_grad()
def test_threads_that_do_not_meet_are_let_through() -> None:
    model, other = hooked("llava"), hooked("llava")
    prompt = two_image_prompt(model)
    clean = model(prompt)
    hooks = [(STREAM, zero)]
    under = model.run_with_hooks(prompt, fwd_hooks=hooks)
    # Hooks in a thread of their own, another after it; two models at a time; plain runs side by side.
    for _ in range(2):
        assert torch.equal(in_thread(lambda: model.run_with_hooks(prompt, fwd_hooks=hooks)), under)  # type: ignore
    with model.hooks(fwd_hooks=hooks):
        assert torch.equal(in_thread(lambda: other(prompt)), other(prompt))  # type: ignore[arg-type]
        assert torch.equal(model(prompt), under)
    results: list[Tensor] = []

    def keep() -> None:
        with torch.no_grad():
            results.append(model(prompt))

    threads = [threading.Thread(target=keep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(logits, clean) for logits in results)


def test_backward_hooks_and_loaders_are_let_through() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    seen: list[str] = []

    def save(grad: Tensor, hook: Any) -> None:
        seen.append(hook.name)

    # autograd runs a backward pass on threads of its own where there are accelerators; here, one made for it.
    failures: list[BaseException] = []
    with model.hooks(bwd_hooks=[(STREAM, save)]):
        loss = model(prompt)[0, -1, 0]

        def backward() -> None:
            try:
                loss.backward()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        loader = DataLoader([torch.tensor(1.0), torch.tensor(2.0)], num_workers=1)
        assert [float(x) for x in loader] == [1.0, 2.0]
    assert seen == [STREAM] and not failures


@torch.no_grad()
def test_hooks_of_a_thread_that_ended_are_removed_from_any() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    clean = model(prompt)
    in_thread(lambda: model.add_hook(STREAM, zero))
    with pytest.raises(StateError, match="reset_hooks"):
        model(prompt)
    model.reset_hooks()
    assert torch.equal(model(prompt), clean) and not left_behind(model)


# ---------------------------------------------------------------------- gradient checkpointing


def test_gradient_checkpointing_under_hooks_is_refused() -> None:
    model = hooked("llava")
    prompt = two_image_prompt(model)
    hooks = [(STREAM, lambda x, hook: 2 * x)]
    clean = model(prompt).detach()
    under = model.run_with_hooks(prompt, fwd_hooks=hooks).detach()
    # Its name from transformers 5.24 on, and before.
    hf_model: Any = model.hf_model
    getattr(hf_model, "activation_checkpointing_enable", hf_model.gradient_checkpointing_enable)()
    # In evaluation mode transformers computes nothing again.
    torch.testing.assert_close(model.run_with_hooks(prompt, fwd_hooks=hooks).detach(), under)
    model.hf_model.train()
    with pytest.raises(StateError, match=r"gradient checkpointing.*gradient_checkpointing_disable"):
        model.run_with_hooks(prompt, fwd_hooks=hooks)
    assert not left_behind(model)
    # Without hooks, without gradients, with hooks that only read, and once it is off.
    model(prompt)[0, -1, 0].backward()
    with torch.no_grad():
        torch.testing.assert_close(model.run_with_hooks(prompt, fwd_hooks=hooks), under)
    logits, cache = model.run_with_cache(prompt, names_filter=STREAM)
    torch.testing.assert_close(logits.detach(), clean)
    assert cache[STREAM].shape[:2] == prompt.shape
    getattr(hf_model, "activation_checkpointing_disable", hf_model.gradient_checkpointing_disable)()
    torch.testing.assert_close(model.run_with_hooks(prompt, fwd_hooks=hooks).detach(), under)


# ---------------------------------------------------------------------- caches of other runs


def test_gradients_in_a_cache() -> None:
    model = hooked("llava")
    prompt = padded_prompt(model)

    def loss(logits: Tensor) -> Tensor:
        return logits[:, -1, 5].sum()

    seen: dict[str, Tensor] = {}

    def save(grad: Tensor, hook: Any) -> None:
        seen[hook.name] = grad.clone()

    with model.hooks(bwd_hooks=[(STREAM, save), (Z, save)]):
        loss(model(prompt)).backward()
    _, cache = model.run_with_cache(prompt, names_filter=[STREAM, Z], incl_bwd=loss)
    for name, gradient in seen.items():
        assert torch.equal(cache[f"{name}_grad"], gradient) and gradient.abs().sum() > 0
    with pytest.raises(ValueError, match=r"one number.*return_type='loss'"):
        model.run_with_cache(prompt, names_filter=Z, incl_bwd=True)
    with torch.no_grad(), pytest.raises(StateError, match="no_grad"):
        model.run_with_cache(prompt, names_filter=Z, incl_bwd=loss)
    assert not left_behind(model)


def test_gradients_of_the_loss_are_those_of_the_plain_model() -> None:
    """Text alone, so that transformers' own loss of `labels` is the same: autograd without mmlens."""
    model = hooked("llava")
    prompt = model.prompt("What colour is the letter K?")
    loss, cache = model.run_with_cache(prompt, names_filter=[Z, STREAM], incl_bwd=True, return_type="loss")
    gathered = {
        name: value.grad.clone()
        for name, value in model.hf_model.named_parameters()
        if value.grad is not None
    }
    model.hf_model.zero_grad()
    plain = tiny.tiny_model("llava")
    layer, kept = plain.model.language_model.layers[1], {}

    def keep(name: str, value: Tensor) -> None:
        value.retain_grad()
        kept[name] = value

    layer.register_forward_pre_hook(lambda module, args: keep(STREAM, args[0]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: keep(Z, args[0]))
    expected = plain(**prompt.inputs, labels=prompt.inputs["input_ids"]).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, value in kept.items():
        gradient = cache[f"{name}_grad"]
        torch.testing.assert_close(gradient.reshape(value.shape), value.grad, atol=1e-7, rtol=1e-4)
        assert gradient.abs().sum() > 0
    of_plain = {name: value.grad for name, value in plain.named_parameters() if value.grad is not None}
    assert gathered.keys() == of_plain.keys()
    for name, gradient in of_plain.items():
        torch.testing.assert_close(gathered[name], gradient, atol=1e-7, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_run_on_embeddings_caches_what_fires(family: str) -> None:
    model = hooked(family)
    prompt = model.prompt("What colour is the letter K?")
    embeddings = model.hf_model.get_input_embeddings()(prompt.inputs["input_ids"])
    given = {"inputs_embeds": embeddings, "attention_mask": prompt.inputs["attention_mask"]}
    logits, cache = model.run_with_cache(**given)
    expected, known = model.run_with_cache(prompt)
    torch.testing.assert_close(logits, expected)
    assert set(cache) == set(known)
    torch.testing.assert_close(cache["resid_post", -1], known["resid_post", -1])
    with pytest.raises(ValueError, match="input_ids"):
        model.run_with_cache(**given, names_filter="blocks.0.image.hook_z")
    with pytest.raises(HookNeverFiredError):
        model.run_with_cache(prompt, names_filter="blocks.0.image.hook_z")
