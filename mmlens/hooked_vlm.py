"""HookedVLM: a Hugging Face vision-language model, unchanged, behind TransformerLens' interface.

1. `__init__` finds the family's record and lays hook points over the model's own modules (`_lay_taps`).
2. `forward` and `generate` call the Hugging Face model; hook points fire where their taps stand.
3. `hooks` checks every name when it is entered, and when it is left that every hook has fired.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.config import TransformerLensConfig
from transformers import PreTrainedModel, ProcessorMixin

from mmlens import hook_names, loading
from mmlens.attention import AttentionTap, QueryRows, tap_attention
from mmlens.data.examples import Example
from mmlens.families.catalog import family_of
from mmlens.families.record import Family, Stack
from mmlens.prompt import Prompt, check_left_padding, make_prompt, with_answers
from mmlens.taps import (
    DeepInjectionTap,
    LazyHookPoint,
    ModuleTap,
    Step,
    branch,
    fused_heads,
    head_results,
    heads,
    image_rows,
    normalization,
    residual_mid,
    whole,
)

Inputs = Prompt | Mapping[str, Any]
HookName = str | Callable[[str], bool]
Hook = tuple[HookName, Callable[..., Any]]


Intervention = Callable[["HookedVLM", Prompt], Sequence[Hook]]
"""Anything that turns (model, prompt) into forward hooks; composing is concatenating."""


class UnknownHookError(KeyError):
    """A hook name that does not exist, or a filter that matches nothing."""

    def __str__(self) -> str:
        return str(self.args[0])


class HookNeverFiredError(RuntimeError):
    """The model ran, and a hook set for that run never fired."""


class HookedVLM(HookedRootModule):
    """Any supported vision-language model with hook points on its language side, vision tower and projector.

    The Hugging Face model stays as it is (`hf_model`, same weights, same state_dict); with no hook set, logits
    are bit-equal to it. Inputs are a `Prompt` (see `prompt`) or the Hugging Face model's keyword inputs.

    >>> import mmlens
    >>> from mmlens.data.scenes import scene_examples
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> example = scene_examples("objects", 1, seed=0)[0]
    >>> prompt = model.prompt(example.question, images=example.images)
    >>> logits, cache = model.run_with_cache(prompt, names_filter="blocks.0.attn.hook_z")
    >>> cache["z", 0].shape[2:] == (model.cfg.n_heads, model.cfg.d_head)
    True
    """

    def __init__(self, hf_model: PreTrainedModel, processor: ProcessorMixin | None = None) -> None:
        """Wrap `hf_model` in place.

        Raises UnknownFamilyError where the model's family has no record, and ValueError where the model does
        not have the modules its family's record names.
        """
        super().__init__()
        self.family: Family = family_of(hf_model.config.model_type)
        self.hf_model = hf_model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", None)
        self._n_forwards = 0
        self._input_ids: Tensor | None = None
        self._attention_taps: list[AttentionTap] = []
        self.mod_dict: dict[str, nn.Module] = {}
        self.hook_dict: dict[str, Any] = {}
        self.cfg = _config(hf_model, self.family, _submodule(hf_model, self.family.language.layers))
        self._lay_taps()
        hf_model.register_forward_pre_hook(self._on_forward, with_kwargs=True)

    @classmethod
    def from_pretrained(cls, name_or_path: str, **hf_options: Any) -> HookedVLM:
        """A shipped model ("micro"), a folder, or a hub id, loaded from safetensors and set to eval mode.

        `hf_options` go to transformers (dtype, device_map, attn_implementation, revision, token, ...);
        code from the hub runs only with trust_remote_code=True. Raises `loading.ModelNotFoundError` where
        there is no such folder or shipped name, the hub is out of reach, or the model is gated.
        """
        hf_model, processor = loading.load(name_or_path, **hf_options)
        return cls(hf_model, processor)

    # ------------------------------------------------------------------ inputs

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.hf_model.device

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Every language head as (layer, head)."""
        return [(layer, head) for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    def prompt(self, questions: str | Sequence[str], images: Sequence[Any] = ()) -> Prompt:
        """Model inputs and token map for one question and its images, or for a batch of both.

        Images (PIL images or paths) stand before the question, through the processor's own chat template.
        """
        if self.processor is None:
            raise ValueError("this HookedVLM has no processor; pass one: HookedVLM(hf_model, processor)")
        return make_prompt(self.processor, self.family.layout, questions, images, device=self.device)

    def prompt_examples(self, examples: Sequence[Example]) -> Prompt:
        """A batch of examples as a prompt that also carries their answers and candidates for the metrics."""
        prompt = self.prompt([e.question for e in examples], [list(e.images) for e in examples])
        return with_answers(prompt, self.processor, examples)

    @torch.no_grad()
    def encode_images(self, prompt: Prompt) -> Prompt:
        """The same prompt with the vision tower and projector already run: language-side runs then repeat neither.

        Logits are the same to the bit. Hooks on vision.* and projector.* no longer fire, which is an error where
        one is set. A prompt without images comes back as it is.
        """
        inputs = self._keyword_inputs(prompt, {})
        pixels = [name for name in inputs if name.startswith("pixel_")]
        if not pixels or prompt.image_features is not None:
            return prompt
        taken = inspect.signature(self.hf_model.get_image_features).parameters
        given = {name: value for name, value in inputs.items() if name in taken and name != "input_ids"}
        features = self.hf_model.get_image_features(**given, return_dict=True)
        kept = {name: value for name, value in inputs.items() if name not in pixels}
        return replace(prompt.to(self.device), inputs=kept, image_features=features)

    def to_text(self, token_ids: Tensor) -> list[str]:
        """Decode a batch of token ids, special tokens left out."""
        if self.tokenizer is None:
            raise ValueError(
                "this HookedVLM has no tokenizer; pass a processor: HookedVLM(hf_model, processor)"
            )
        return [text.strip() for text in self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)]

    # ------------------------------------------------------------------ running

    def forward(
        self,
        inputs: Inputs | None = None,
        *,
        return_type: str | None = "logits",
        **hf_inputs: Any,
    ) -> Float[Tensor, "batch pos vocab"] | None:
        """Logits of the Hugging Face model; keyword inputs (logits_to_keep, ...) are passed on to it."""
        if return_type not in ("logits", None):
            raise ValueError(f"return_type is 'logits' or None, not {return_type!r}")
        logits = self.hf_model(**self._keyword_inputs(inputs, hf_inputs)).logits
        return logits if return_type == "logits" else None

    def generate(self, inputs: Inputs | None = None, **options: Any) -> Tensor:
        """Token ids, prompt included, by the Hugging Face model's own `generate`; hooks that are set stay live.

        Under cached decoding, hook_rot_k sees all keys so far and every other hook the new position only.
        Raises PromptError for a batch padded on the right, whose next token would follow the padding.
        """
        keyword_inputs = self._keyword_inputs(inputs, options)
        if keyword_inputs.get("attention_mask") is not None:
            check_left_padding(keyword_inputs["attention_mask"])
        return self.hf_model.generate(**keyword_inputs)

    def answer(self, inputs: Inputs, max_new_tokens: int = 16, **options: Any) -> list[str]:
        """The generated text after each prompt of the batch."""
        keyword_inputs = self._keyword_inputs(inputs, {})
        ids = self.generate(inputs, max_new_tokens=max_new_tokens, **options)
        return self.to_text(ids[:, keyword_inputs["input_ids"].shape[1] :])

    @torch.no_grad()
    def attention_rows(
        self,
        inputs: Inputs,
        queries: Bool[Tensor, "batch pos"],
        consume: Callable[[int, Float[Tensor, "batch head query key"], Bool[Tensor, "batch query"]], None],
    ) -> None:
        """One forward pass that hands `consume` the exact pattern rows at the `queries`, layer by layer.

        `consume(layer, rows, real)`: rows in float32, padded to the batch's largest number of queries; `real`
        says which are queries. No S x S pattern is made. Raises ValueError where a batch row has no query.
        """
        keyword_inputs = self._keyword_inputs(inputs, {})
        shape = tuple(keyword_inputs["input_ids"].shape)
        if tuple(queries.shape) != shape:
            raise ValueError(f"queries has shape {tuple(queries.shape)}, the inputs [batch, pos] = {shape}")
        rows = QueryRows.of(queries.bool().to(self.device))
        try:
            for layer, tap in enumerate(self._attention_taps):
                tap.rows = rows
                tap.consume_rows = lambda pattern, layer=layer: consume(
                    layer, pattern, rows.real.to(pattern.device)
                )
            self.hf_model(**keyword_inputs, logits_to_keep=1, use_cache=False)
        finally:
            for tap in self._attention_taps:
                tap.rows = tap.consume_rows = None

    # ------------------------------------------------------------------ hooks

    def hook_names(self, match: HookName) -> list[str]:
        """The hook points that a name or a filter means; raises UnknownHookError where it means none."""
        if callable(match):
            names = [name for name in self.hook_dict if match(name)]
            if not names:
                raise UnknownHookError(
                    f"the filter matches none of the {len(self.hook_dict)} hook points, such as "
                    f"{', '.join(map(repr, list(self.hook_dict)[:3]))}"
                )
            return names
        if match not in self.hook_dict:
            raise UnknownHookError(hook_names.unknown_name_message("hook point", match, self.hook_dict))
        return [match]

    def add_hook(self, name: HookName, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; raises UnknownHookError where `name` means no hook point."""
        for known in self.hook_names(name):
            super().add_hook(known, *args, **kwargs)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedVLM]:
        """Hooks that live as long as the block, as in TransformerLens.

        Raises UnknownHookError before anything runs where a name means nothing, and HookNeverFiredError at
        the end where the model ran inside the block and a forward hook never fired.
        """
        silent: dict[int, str] = {}

        def watched(hook: Callable[..., Any], key: int) -> Callable[..., Any]:
            def fire(tensor: Tensor, *, hook_: Callable[..., Any] = hook, **kwargs: Any) -> Any:
                silent.pop(key, None)
                return hook_(tensor, **kwargs)

            return fire

        forward = [(self.hook_names(name), hook) for name, hook in fwd_hooks]
        backward = [(self.hook_names(name), hook) for name, hook in bwd_hooks]
        silent |= {key: names[0] for key, (names, _) in enumerate(forward)}
        flat_forward = [(n, watched(hook, key)) for key, (names, hook) in enumerate(forward) for n in names]
        flat_backward = [(n, hook) for names, hook in backward for n in names]
        n_forwards = self._n_forwards
        with super().hooks(flat_forward, flat_backward, reset_hooks_end, clear_contexts):
            yield self
        if silent and self._n_forwards > n_forwards:
            raise HookNeverFiredError(
                f"the model ran, but {len(silent)} of {len(forward)} hooks never fired: "
                f"{', '.join(sorted(set(silent.values()))[:5])}. Hooks on image.*, vision.* and projector.* "
                "fire only where the prompt has an image"
            )

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Logits with the hooks live, as in TransformerLens."""
        if bwd_hooks and reset_hooks_end:
            logging.warning("bwd_hooks are removed at the end of run_with_hooks; use `with model.hooks(...)`")
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **model_kwargs)

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: HookName | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Logits and a TransformerLens ActivationCache of the chosen hook points.

        `names_filter` None means all but hook_result (unless cfg.use_attn_result is set), and only what fires:
        a prompt without images has no image.* activations. A hook point that fires several times in one
        forward (Qwen's vision attention, once per image or window) is stacked on its first axis and padded
        with zeros, scores with -inf.
        """
        names = self._cached_names(names_filter)
        cache: dict[str, Tensor] = {}
        # Another hook may edit in place what was cached; a copy then keeps the cache true.
        copy = any(point.is_live for point in self.hook_dict.values())
        save = partial(_save, cache=cache, device=device, copy=copy, suffix="")
        save_grad = partial(_save, cache=cache, device=device, copy=copy, suffix="_grad")
        self.context_level += 1
        level = self.context_level
        try:
            for name in names:
                point = self.hook_dict[name]
                point.add_hook(save, "fwd", level=level)
                if incl_bwd:
                    point.add_hook(save_grad, "bwd", level=level)
            output = self(*model_args, **model_kwargs)
            if incl_bwd:
                output.backward()
        finally:
            for name in names:
                self.hook_dict[name].remove_hooks("both", level=level)
            self.context_level -= 1
        missing = [name for name in names if name not in cache]
        if missing and names_filter is not None:
            raise HookNeverFiredError(f"asked to cache {missing[:5]}, which never fired in this run")
        return output, ActivationCache(
            _one_row(cache) if remove_batch_dim else cache, self, not remove_batch_dim
        )

    def _cached_names(self, names_filter: HookName | Sequence[str] | None) -> list[str]:
        if names_filter is None:
            costly = () if self.cfg.use_attn_result else hook_names.COSTLY_HOOKS
            return [name for name in self.hook_dict if not name.endswith(costly)]
        if isinstance(names_filter, str) or callable(names_filter):
            return self.hook_names(names_filter)
        return [known for name in names_filter for known in self.hook_names(name)]

    # ------------------------------------------------------------------ plumbing

    def _keyword_inputs(self, inputs: Inputs | None, more: Mapping[str, Any]) -> dict[str, Any]:
        if inputs is None:
            return dict(more)
        if isinstance(inputs, Prompt):
            features = (
                {}
                if inputs.image_features is None
                else {"mm_encoder_outputs": {"image": inputs.image_features}}
            )
            return {**inputs.to(self.device).inputs, **features, **more}
        if isinstance(inputs, Mapping):
            return {**inputs, **more}
        raise TypeError(
            f"inputs are a Prompt (model.prompt(question, images)) or the model's keyword inputs, "
            f"not {type(inputs).__name__}"
        )

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._n_forwards += 1
        self._input_ids = kwargs.get("input_ids", args[0] if args else None)

    def _image_mask(self, x: Tensor) -> Tensor | None:
        if self._input_ids is None:
            raise ValueError("image.* hooks need input_ids: the model was run on inputs_embeds alone")
        mask = self._input_ids == getattr(self.hf_model.config, self.family.image_token)
        return mask.to(x.device) if bool(mask.any()) else None

    def _point(self, name: str) -> LazyHookPoint:
        point = LazyHookPoint()
        point.name = name
        self.hook_dict[name] = self.mod_dict[name] = point
        return point

    def _lay_taps(self) -> None:
        family, model = self.family, self.hf_model
        text_layers = _submodule(model, family.language.layers)
        vision_layers = _submodule(model, family.vision.layers)[: _n_vision_layers(model, family)]
        embed = [
            whole(self._point("hook_embed")),
            image_rows(self._point("image.hook_embed"), self._image_mask),
        ]
        for index, layer in enumerate(text_layers):
            self._lay_block(
                f"blocks.{index}.", layer, family.language, embed if index == 0 else [], language=True
            )
        _final_norm_tap(self._point, "ln_final", _submodule(model, family.language.final_norm))
        embed = [whole(self._point("vision.hook_embed"))]
        for index, layer in enumerate(vision_layers):
            self._lay_block(
                f"vision.blocks.{index}.", layer, family.vision, embed if index == 0 else [], language=False
            )
        if family.vision.final_norm is not None:
            norm = _submodule(model, family.vision.final_norm)
            if not isinstance(norm, nn.Identity):
                _final_norm_tap(self._point, "vision.ln_post", norm)
        projector = _submodule(model, family.projector)
        ModuleTap(projector, "input", [whole(self._point("projector.hook_in"))])
        ModuleTap(projector, "output", [whole(self._point("projector.hook_out"))])
        if family.deep_injection is not None:
            deep = family.deep_injection
            mergers = _submodule(model, deep.mergers)
            for index, merger in enumerate(mergers):
                ModuleTap(merger, "output", [whole(self._point(f"vision.deepstack.{index}.hook_out"))])
            points = [
                (text_layers[i], self._point(f"blocks.{i}.hook_deepstack")) for i in range(len(mergers))
            ]
            DeepInjectionTap(_submodule(model, deep.owner), deep.method, points)

    def _lay_block(
        self, prefix: str, layer: nn.Module, stack: Stack, embed: list[Step], *, language: bool
    ) -> None:
        def at(name: str) -> LazyHookPoint:
            return self._point(prefix + name)

        attention = _submodule(layer, stack.attention)
        d_head = attention.head_dim

        def seen(name: str, of_heads: bool = False) -> list[Step]:
            """The tensor, and on the language side its rows at image positions."""
            steps = [heads(at(f"attn.{name}"), d_head) if of_heads else whole(at(name))]
            if language:
                steps.append(image_rows(at(f"image.{name}"), self._image_mask, d_head if of_heads else None))
            return steps

        norms = {
            f"{ln}.{hook}": at(f"{ln}.{hook}")
            for ln in ("ln1", "ln2")
            for hook in ("hook_scale", "hook_normalized")
        }
        norm1, norm2 = _submodule(layer, stack.norm1), _submodule(layer, stack.norm2)
        out_proj, mlp = _submodule(attention, stack.out_proj), _submodule(layer, stack.mlp)
        mid_at_norm, mid_at_output = residual_mid(seen("hook_resid_mid"))

        ModuleTap(layer, "input", [*embed, *seen("hook_resid_pre")])
        ModuleTap(norm1, "input", [branch(at("hook_attn_in"))])
        ModuleTap(norm1, "output", [normalization(norms["ln1.hook_scale"], norms["ln1.hook_normalized"])])
        qkv = [at(f"attn.{name}") for name in ("hook_q", "hook_k", "hook_v")]
        if len(stack.qkv) == 1:
            ModuleTap(_submodule(attention, stack.qkv[0]), "output", [fused_heads(qkv, d_head)])
        else:
            for point, path in zip(qkv, stack.qkv, strict=True):
                ModuleTap(_submodule(attention, path), "output", [heads(point, d_head)])
        inside = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")
        tap = AttentionTap({name: at(f"attn.{name}") for name in inside})
        tap_attention(attention, tap)
        if language:
            self._attention_taps.append(tap)
        ModuleTap(out_proj, "input", seen("hook_z", of_heads=True))
        ModuleTap(out_proj, "output", [head_results(at("attn.hook_result"), d_head)])
        ModuleTap(attention, "output", seen("hook_attn_out"))
        ModuleTap(norm2, "input", [mid_at_norm, branch(at("hook_mlp_in"))])
        ModuleTap(norm2, "output", [normalization(norms["ln2.hook_scale"], norms["ln2.hook_normalized"])])
        ModuleTap(mlp, "output", seen("hook_mlp_out"))
        ModuleTap(layer, "output", [mid_at_output, *seen("hook_resid_post")])


def _submodule(root: nn.Module, path: str | None) -> Any:
    try:
        return root.get_submodule(path or "")
    except AttributeError as error:
        raise ValueError(
            f"{type(root).__name__} has no module {path!r}, where its family's record expects one ({error})"
        ) from error


def _final_norm_tap(point: Callable[[str], LazyHookPoint], prefix: str, norm: nn.Module) -> None:
    ModuleTap(
        norm, "output", [normalization(point(f"{prefix}.hook_scale"), point(f"{prefix}.hook_normalized"))]
    )


def _n_vision_layers(model: PreTrainedModel, family: Family) -> int:
    """How many vision layers lie before the features that the projector gets; later ones reach no logit."""
    n_layers = len(_submodule(model, family.vision.layers))
    if family.feature_layer is None:
        return n_layers
    chosen = getattr(model.config, family.feature_layer)
    indices = [chosen] if isinstance(chosen, int) else list(chosen)
    # Hidden state 0 is the tower's input, so there is one more hidden state than layers.
    return max(index if index >= 0 else n_layers + 1 + index for index in indices)


def _config(model: PreTrainedModel, family: Family, layers: nn.ModuleList) -> TransformerLensConfig:
    """What TransformerLens' tools read of a model, for the language side."""
    text = model.config.get_text_config()
    attention = layers[0].get_submodule(family.language.attention)
    n_heads = text.num_attention_heads
    n_kv_heads = getattr(text, "num_key_value_heads", None) or n_heads
    return TransformerLensConfig(
        d_model=text.hidden_size,
        d_head=attention.head_dim,
        n_layers=len(layers),
        n_ctx=text.max_position_embeddings,
        n_heads=n_heads,
        n_key_value_heads=n_kv_heads,
        d_mlp=getattr(text, "intermediate_size", None),
        d_vocab=text.vocab_size,
        device=str(model.device),
        positional_embedding_type="rotary",
    )


def _save(
    tensor: Tensor,
    hook: Any,
    *,
    cache: dict[str, Tensor],
    device: torch.device | str | None,
    copy: bool,
    suffix: str,
) -> None:
    name = hook.name + suffix
    value = tensor.detach().to(device) if device is not None else tensor.detach()
    if copy:
        value = value.clone()
    if name in cache and hook.name.endswith(hook_names.CHUNKED_HOOKS):
        value = _stack_chunks(cache[name], value, float("-inf") if name.endswith("hook_attn_scores") else 0.0)
    cache[name] = value


def _one_row(cache: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of one without its batch axis; packed image rows and the vision side have none."""
    language = {
        name: value for name, value in cache.items() if name.startswith(("blocks.", "hook_", "ln_final."))
    }
    batched = {name: value for name, value in language.items() if not _is_packed(name)}
    sizes = {len(value) for value in batched.values()}
    if sizes - {1}:
        raise ValueError(f"remove_batch_dim needs a batch of one prompt, this one has {max(sizes)}")
    return {name: value[0] if name in batched else value for name, value in cache.items()}


def _is_packed(name: str) -> bool:
    return ".image." in name or name.removesuffix("_grad").endswith("hook_deepstack")


def _stack_chunks(before: Tensor, chunk: Tensor, fill: float) -> Tensor:
    """Append one attention call's activation on the first axis, both padded to the larger size on the others."""
    sizes = [max(pair) for pair in zip(before.shape[1:], chunk.shape[1:], strict=True)]

    def padded(x: Tensor) -> Tensor:
        amounts = [
            n
            for size, have in zip(reversed(sizes), reversed(x.shape[1:]), strict=True)
            for n in (0, size - have)
        ]
        return nn.functional.pad(x, amounts, value=fill)

    return torch.cat([padded(before), padded(chunk)])
