"""One canary for each thing read of the private interface of other packages; a failure names what moved."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from tiny.wrapped import generate, hooked, two_image_prompt
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformer_lens.hook_points import HookPoint
from transformers import LlavaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mmlens
from mmlens import internals

MARKS = {"__code__", "__closure__", "__tensor_flatten__", "get_interface", *internals.CACHE_KEYWORDS[1:]}
"""What is private by use, if not by its name."""
OTHERS = ("accelerate", "torch", "transformer_lens", "transformers")
PACKAGE = Path(mmlens.__file__).parent
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in PACKAGE.rglob("*.py")
}


def names_defined(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_read(tree: ast.AST) -> set[str]:
    """The private names that a module reads of what is not its own object."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr in MARKS or (is_private(node.attr) and not own):
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MARKS:
            found.add(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                found.add(str(name.value))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OTHERS:
            found |= {name.name for name in node.names if is_private(name.name)}
    return found


def test_private_names_are_read_in_one_place() -> None:
    defined = {"_replace", "_exit"}.union(*map(names_defined, SOURCES.values()))
    elsewhere = {
        path: names_read(tree) - defined
        for path, tree in SOURCES.items()
        # Layouts call the arithmetic of processors, which occlusion proves for each.
        if path != "internals.py" and not path.startswith("families/layouts/")
    }
    assert not {path: names for path, names in elsewhere.items() if names}, (
        "read these through mmlens.internals"
    )


def test_fast_moving_modules_of_transformers_are_imported_in_one_place() -> None:
    elsewhere = [
        f"{path}: {node.module}"
        for path, tree in SOURCES.items()
        if path != "internals.py" and not path.startswith("families/layouts/")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.")
    ]
    assert not elsewhere, "import these through mmlens.internals"


def test_a_chat_template_says_which_variables_it_reads() -> None:
    """What tells an option of the template from one of the processor."""
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}{{ bos_token }}{% endif %}"
    )
    assert internals.template_variables(template) == {"messages", "enable_thinking", "bos_token"}
    assert internals.template_variables("") == set()


# ---------------------------------------------------------------------- the key-value cache


def test_the_decoder_is_given_its_cache_under_a_known_keyword(model: mmlens.HookedVLM) -> None:
    seen: list[tuple[list[str], int]] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((sorted(kwargs), internals.cached_length(kwargs)))

    prompt = two_image_prompt(model)
    handle = model.anatomy.decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        generate(model, prompt, 3, [])
    finally:
        handle.remove()
    length = prompt.shape[1]
    assert [known for _, known in seen] == [0, length, length + 1], (
        f"transformers renamed the keyword of the decoder's key-value cache, or counts it anew: of "
        f"{internals.CACHE_KEYWORDS} none tells the positions held; the keywords given are {seen[-1][0]}"
    )


# ---------------------------------------------------------------------- attention


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_module_says_which_attention_it_runs(name: str) -> None:
    model = tiny.tiny_model("llava", attn_implementation=name)
    layer = model.get_decoder().layers[0].self_attn
    assert [internals.attention_implementation(module) for module in (model, layer)] == [name, name], (
        "transformers renamed config._attn_implementation"
    )


def test_attention_layers_are_known_by_their_code(model: mmlens.HookedVLM) -> None:
    parts = next(parts for parts in model.anatomy.language if parts.attention is not None)
    assert parts.attention is not None
    assert internals.asks_for_attention(parts.attention.module), (
        "transformers renamed ALL_ATTENTION_FUNCTIONS, or wrapped forward without functools.wraps"
    )
    assert not internals.asks_for_attention(model.anatomy.decoder)


@torch.no_grad()
def test_attention_layers_ask_for_their_function_at_each_call(model: mmlens.HookedVLM) -> None:
    """Through AttentionInterface.get_interface, with the family's eager function as the default."""
    asked: list[str] = []

    def watched(fast: Any, eager: Any) -> Any:
        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            asked.append(eager.__name__)
            return fast(module, *args, **kwargs)

        return attention

    original = internals.AttentionInterface.get_interface
    internals.wrap_attention(watched)
    try:
        model(two_image_prompt(model))
    finally:
        internals.AttentionInterface.get_interface = original
    assert len(asked) >= len(model.attention_layers), (
        "transformers' attention layers ask for their function in another way than AttentionInterface.get_interface"
    )
    assert all("eager" in name for name in asked), (
        f"get_interface's default is no longer the family's eager function, but {sorted(set(asked))}"
    )


class _Calls(TorchFunctionMode):
    """Which of the two functions inside eager attention are called, and on what shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = {internals.EAGER_SOFTMAX: "softmax", internals.EAGER_DROPOUT: "dropout"}
        if func in names and args[0].ndim == 4:
            self.seen.append((names[func], args[0], out))
        return out


@torch.no_grad()
def test_eager_attention_calls_softmax_then_dropout(family: str) -> None:
    model = hooked(family, attn_implementation="eager")
    ids = torch.arange(5, 17)[None]
    with _Calls() as calls:
        model.hf_model(input_ids=ids)
    assert [name for name, _, _ in calls.seen] == ["softmax", "dropout"] * len(model.attention_layers), (
        "transformers' eager attention no longer calls F.softmax on the scores and then F.dropout on the pattern"
    )
    for _, pattern, _ in calls.seen[1::2]:
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))


@pytest.mark.parametrize(
    ("name", "family"), [("softcap", "gemma2"), ("s_aux", "gpt_oss"), ("position_bias", "inkling")]
)
def test_what_is_beyond_the_softmax_is_given_by_keyword(name: str, family: str) -> None:
    assert name in internals.BEYOND_THE_SOFTMAX
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert f"{name}=self." in inspect.getsource(modeling) or f"{name}={name}" in inspect.getsource(
        modeling
    ), f"transformers' attention layers call {name} otherwise"


def test_attention_modules_say_whether_they_are_causal(model: mmlens.HookedVLM) -> None:
    attention = model.anatomy.language[model.attention_layers[0]].attention
    assert attention is not None and isinstance(attention.module.is_causal, bool)
    assert internals.is_causal(attention.module, None) == attention.module.is_causal
    assert not internals.is_causal(attention.module, False)


# ---------------------------------------------------------------------- decoder layers


@torch.no_grad()
def test_a_layer_is_given_the_stream_first_and_gives_it_first(model: mmlens.HookedVLM) -> None:
    streams: list[tuple[Tensor, Tensor]] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        streams.append((internals.stream_in(args, kwargs), internals.stream_out(output)))

    handles = [layer.register_forward_hook(look, with_kwargs=True) for layer in model.anatomy.layers]
    prompt = two_image_prompt(model)
    out = model.hf_model(**prompt.inputs, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert len(streams) == model.cfg.n_layers
    assert torch.equal(streams[0][0], out.hidden_states[0]), (
        "transformers' decoder layers are given the residual stream elsewhere than as their first argument"
    )
    left = [stream for _, stream in streams]
    assert all(map(torch.equal, left[:-1], out.hidden_states[1:-1])), (
        "transformers' decoder layers give the residual stream elsewhere than first"
    )
    # The last entry of the hidden states is the final norm's output.
    assert torch.equal(model.anatomy.final_norm(left[-1]), out.hidden_states[-1])


@torch.no_grad()
def test_stand_ins_are_called_in_the_place_of_layers(model: mmlens.HookedVLM) -> None:
    prompt = two_image_prompt(model)
    plain, called = model(prompt), []

    def call_of(index: int, layer: nn.Module) -> internals.LayerCall:
        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            called.append(index)
            return layer(*args, **kwargs)

        return call

    layers = list(model.anatomy.layers)
    with internals.layers_replaced(model.anatomy.layers, call_of):
        replaced = model(prompt)
    assert called == list(range(len(layers))), (
        "transformers' decoder no longer calls what stands in its list of layers"
    )
    assert torch.equal(replaced, plain)
    assert all(a is b for a, b in zip(model.anatomy.layers, layers, strict=True))


def test_a_replaced_forward_is_put_back() -> None:
    module = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    plain = module(x)
    with internals.forward_replaced(module, lambda x: x + 1):
        assert torch.equal(module(x), x + 1), "torch calls something else than a module's own forward"
    assert torch.equal(module(x), plain) and "forward" not in vars(module)


def test_arguments_and_outputs_are_changed_where_they_stand() -> None:
    one, other = torch.zeros(1), torch.ones(1)
    assert internals.with_stream((one, 2), {"mask": 3}, other) == ((other, 2), {"mask": 3})
    assert internals.with_stream((), {"hidden_states": one, "mask": 3}, other) == (
        (),
        {"hidden_states": other, "mask": 3},
    )

    def change(x: Tensor) -> Tensor:
        return x + 1

    assert internals.with_output((one, "kept"), change) == (other, "kept")
    assert internals.with_output([one, one], change) == [other, other]
    given = internals.with_output(
        BaseModelOutputWithPooling(last_hidden_state=one, pooler_output=one), change
    )
    assert (given.last_hidden_state, given.pooler_output) == (one, other)
    assert internals.with_output(BaseModelOutputWithPooling(last_hidden_state=one), change)[0] == other


# ---------------------------------------------------------------------- modules and tensors


def test_a_modules_parts_are_where_torch_keeps_them() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2), nn.BatchNorm1d(2))
    drop, linear, norm = module
    assert list(internals.children_of(module).values()) == [drop, linear, norm]
    parameters, buffers = internals.own_tensors(norm)
    assert set(parameters) == {"weight", "bias"} and "running_mean" in buffers
    assert isinstance(drop, internals.DROPOUT) and not isinstance(linear, internals.DROPOUT)
    assert isinstance(norm, internals.BATCH_STATISTICS)
    assert getattr(torch.compile(linear, backend="eager"), internals.COMPILED) is linear, (
        "torch.compile keeps its module elsewhere"
    )


def test_a_tensor_counts_its_changes() -> None:
    x = torch.zeros(2)
    before = internals.n_changes(x)
    x.add_(1)
    assert internals.n_changes(x) != before, "torch renamed tensor._version"
    with torch.inference_mode():
        assert internals.n_changes(torch.zeros(2)) is None
    assert internals.tensors_in(x) == [x]


# ---------------------------------------------------------------------- what there is


def test_transformers_names_its_models_and_their_processors() -> None:
    assert internals.IMAGE_TEXT_MODELS["llava"] == "LlavaForConditionalGeneration"
    assert internals.IMAGE_PROCESSORS["qwen2_vl"]["pil"] is not None
    assert {"output_attentions", "position_ids"} & internals.MODEL_KEYWORDS
    assert internals.processor_class_of(LlavaConfig) is internals.processor_class_named("LlavaProcessor")


def test_a_model_is_made_without_loading() -> None:
    source = tiny.tiny_model("llava")
    made = internals.empty_model(source, source.config, "eager")
    assert type(made) is type(source) and internals.attention_implementation(made) == "eager"


# ---------------------------------------------------------------------- function modes


def test_a_mode_that_is_over_leaves_the_others_on_the_stack() -> None:
    first, over, last = _Calls(), _Calls(), _Calls()
    with first:
        over.__enter__()
        with last:
            internals.drop_function_modes(lambda mode: mode is over)
            assert internals._get_current_function_mode_stack() == [first, last]
    assert not internals._get_current_function_mode_stack()


# ---------------------------------------------------------------------- images encoded beforehand


@torch.no_grad()
def test_encoded_images_take_the_place_of_pixels(model: mmlens.HookedVLM) -> None:
    prompt = two_image_prompt(model)
    given = internals.image_tower_inputs(model.hf_model, model.processor, prompt.inputs)
    assert given is not None and [name for name in given if internals.holds_pixels(given[name])]
    features = model.hf_model.get_image_features(**given, return_dict=True)
    rest = {name: value for name, value in prompt.inputs.items() if not internals.holds_pixels(value)}
    logits = model.hf_model(**rest, **internals.encoded_images(features)).logits
    assert torch.equal(logits, model.hf_model(**prompt.inputs).logits), (
        "transformers takes images that are encoded beforehand under another keyword"
    )


# ---------------------------------------------------------------------- accelerate


def test_accelerate_leaves_its_mark_on_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert not internals.moves_weights(model) and internals.execution_device(model) is None
    add_hook_to_module(model[0], ModelHook())
    assert internals.moves_weights(model), "accelerate renamed module._hf_hook"
    assert internals.execution_device(model[0]) is None
    remove_hook_from_module(model[0])
    assert not internals.moves_weights(model)
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert internals.execution_device(model) == torch.device("cpu"), "accelerate renamed execution_device"


# ---------------------------------------------------------------------- hook points


def test_a_hook_points_functions_are_where_torch_keeps_them() -> None:
    point = HookPoint()
    assert not internals.has_functions(point)
    point.add_hook(lambda x, hook: x + 1)
    assert internals.has_functions(point), "torch renamed the dicts of a module's hooks"
    # As an interrupt leaves it: torch calls the function, and the hook point does not know it.
    point.fwd_hooks.clear()
    internals.drop_unlisted(point)
    assert not internals.has_functions(point), "TransformerLens renamed what add_hook registers"
    assert torch.equal(point(torch.zeros(1)), torch.zeros(1))


# ---------------------------------------------------------------------- processors


def test_pixtrals_processor_is_found_without_torchvision() -> None:
    assert internals.pixtral_processor().__name__ == "PixtralProcessor"


def test_a_tokenizer_is_taken_apart_whole() -> None:
    """What it is saved as is all that it is; its padding is its own."""
    tokenizer = tiny.tiny_processor("qwen3_vl").tokenizer
    tokenizer.add_tokens(["<later>"])
    twin = internals.separate_tokenizer(tokenizer)
    moved = "a fast tokenizer is made of other parts now: internals.separate_tokenizer"
    assert twin.backend_tokenizer is not tokenizer.backend_tokenizer, moved
    tokenizer(["What?"], padding=False, truncation=False), twin(["What?"], padding=False, truncation=False)
    assert twin.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str(), moved
    assert twin("a <later> one")["input_ids"] == tokenizer("a <later> one")["input_ids"], moved
    twin(["What?", "Why is it so?"], padding=True)
    assert twin.backend_tokenizer.padding is not None and tokenizer.backend_tokenizer.padding is None, moved
