"""HookedVLM: a Hugging Face vision-language model, unchanged, under TransformerLens' interface.

1. `__init__` finds the family's record and lays hook points over the model's own modules (`_lay_taps`).
2. `forward` and `generate` call the Hugging Face model; hook points fire where their taps stand.
3. `hooks` checks every name when it is entered, and when it is left that every hook has fired.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple
from weakref import proxy

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.config import TransformerLensConfig
from transformers import PreTrainedModel, ProcessorMixin

from mmlens import hook_names, internals
from mmlens.arguments import (
    called,
    flag,
    instance_of,
    listed,
    one_of,
    shown,
    unknown_name_message,
    whole_number,
)
from mmlens.data.examples import Example, examples_of
from mmlens.errors import (
    InvalidTypeError,
    InvalidValueError,
    MmlensWarning,
    StateError,
    UnknownNameError,
    UnsupportedError,
)
from mmlens.families.anatomy import Anatomy, AttentionParts, LayerParts, dissect, scale_of
from mmlens.families.catalog import family_of
from mmlens.families.media import unmapped_message
from mmlens.families.record import Family
from mmlens.heads import HeadGrid
from mmlens.interrupts import OpenBlock, Temporary, undone
from mmlens.model import keywords, loading
from mmlens.model.attention import AttentionTap, QueryRows, tap_attention, untap_attention
from mmlens.model.cache import VLMActivationCache, is_packed
from mmlens.model.checked_hooks import CheckedHook, hook_function
from mmlens.model.evaluation import check_same_twice
from mmlens.model.fingerprints import processor_fingerprint
from mmlens.model.linear import gradients_pass, is_linear, n_embeddings
from mmlens.model.loss import next_token_loss, text_labels
from mmlens.model.prompt import Prompt, check_left_padding, make_prompt, prompt_of, with_answers
from mmlens.model.taps import (
    LazyHookPoint,
    ModuleTap,
    Step,
    between_layers,
    branch,
    forked_input,
    head_results,
    heads,
    image_rows,
    normalization,
    of_features,
    projected_heads,
    residual_mid,
    scaled,
    weakly,
    whole,
)
from mmlens.model.tokens import TokenMethods
from mmlens.model.watch import RunHooks, Watch, check_checkpointing, take_over
from mmlens.model.weights import (
    Block,
    WeightProperties,
    is_norm,
    normalization_of,
)
from mmlens.token_map import TokenMapError

Inputs = Prompt | Mapping[str, Any]
Output = Float[Tensor, "batch pos vocab"] | Float[Tensor, "..."] | tuple[Tensor, Tensor] | None
"""What a run gives: logits, a loss, both, or nothing, as its return_type says."""
RETURN_TYPES = ("logits", "loss", "both")

_INPUTS = "a Prompt (model.prompt(question, images)), the model's keyword inputs, or token ids of text"

HookName = str | Callable[[str], bool]
Hook = tuple[HookName, Callable[..., Any]]


Intervention = Callable[["HookedVLM", Prompt], Sequence[Hook]]
"""Anything that turns (model, prompt) into forward hooks; composing is concatenating."""


class Span(NamedTuple):
    """A run of positions: `first`, and how many."""

    first: int
    length: int


def hooks_in(name: str, value: object) -> list[Hook]:
    """A list of hooks (name or filter, function), gathered once; InvalidTypeError for anything else.

    >>> hooks_in("fwd_hooks", ("hook_embed", print))
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: fwd_hooks holds 'hook_embed' (str); expected a list of (hook name, function) pairs
    """
    expected = "a list of (hook name, function) pairs"
    hooks = listed(name, value, expected)
    # One function often stands at hundreds of hook points, and reading a signature takes time: each is looked at once.
    seen: set[int] = set()
    for hook in hooks:
        is_pair = isinstance(hook, (tuple, list)) and len(hook) == 2
        if not is_pair or not (isinstance(hook[0], str) or callable(hook[0])) or not callable(hook[1]):
            raise InvalidTypeError(f"{name} holds {shown(hook)}; expected {expected}")
        if id(hook[1]) not in seen:
            seen.add(id(hook[1]))
            hook_function(f"the function of {name} at {shown(hook[0])}", hook[1])
    return hooks


def model_of(value: object, name: str = "model") -> HookedVLM:
    """A HookedVLM; InvalidTypeError for anything else, which says how to make one of it.

    >>> model_of("micro")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: model is 'micro' (str); expected a HookedVLM: HookedVLM.from_pretrained('micro')
    """
    if isinstance(value, HookedVLM):
        return value
    hint = ""
    if isinstance(value, (str, os.PathLike)):
        hint = f": HookedVLM.from_pretrained({os.fspath(value)!r})"
    elif isinstance(value, PreTrainedModel):
        hint = ": HookedVLM(hf_model, processor)"
    elif isinstance(value, HookedRootModule):
        hint = ": mmlens.from_bridge(bridge) makes one of a TransformerBridge"
    raise InvalidTypeError(f"{name} is {shown(value)}; expected a HookedVLM{hint}")


class UnknownHookError(UnknownNameError):
    """A hook name that does not exist, or a filter that matches nothing."""


class HookNeverFiredError(StateError):
    """The model ran, and a hook set for that run never fired."""


class NoChangeWarning(MmlensWarning):
    """An intervention fired and changed nothing."""


class HookedVLM(WeightProperties, TokenMethods, HookedRootModule):
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

    def __init__(self, hf_model: PreTrainedModel | Any, processor: ProcessorMixin | Any = None) -> None:
        """Wrap `hf_model` in place. Of a PEFT model, the Hugging Face model inside it, with its adapter.

        Raises InvalidTypeError for what is no Hugging Face model, UnknownFamilyError where the model's family has no
        record, ValueError where the model does not have the modules its family's record names, and UnsupportedError
        for an adapter that is not in the model's modules (prompt tuning).
        """
        super().__init__()
        hf_model = loading.checked_model(hf_model)
        loading.check_processor(processor)
        take_over(hf_model)
        self.family: Family = family_of(hf_model.config.model_type)
        self.hf_model = hf_model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", None)
        self._n_forwards = 0
        self._running: Prompt | None = None
        self._given: Prompt | None = None
        """The prompt that `forward`, `generate` or `encode_images` is at work on, where it was given one."""
        self._pixels: dict[str, weakref.ref[Tensor]] = {}
        self.span = Span(0, 0)
        """Which positions the run under way computes: all of a prompt, or, while decoding, the newest."""
        self._whole_inputs: Mapping[str, Any] = {}
        self._inputs: Mapping[str, Any] = {}
        self._unmapped: str | None = None
        self.watch = Watch(self, hf_model)
        """What is set on the Hugging Face model, and by which thread."""
        self._run_hooks = RunHooks(weakly(self._on_forward), weakly(self._on_decoder))
        self._attention_taps: dict[int, AttentionTap] = {}
        self._tapped_attention: list[tuple[nn.Module, AttentionTap]] = []
        self._taps: list[ModuleTap] = []
        self.mod_dict: dict[str, nn.Module] = {}
        self.hook_dict: dict[str, Any] = {}
        self.anatomy: Anatomy = dissect(hf_model, self.family)
        self._marks_images = bool(self.anatomy.image_token or self.family.image_positions)
        self._batch_first = self.family.stream.startswith("[batch, pos")
        self._shares_keys = any(
            parts.attention is not None and "k" not in parts.attention.projections
            for parts in self.anatomy.language
        )
        self.cfg = _config(hf_model, self.anatomy)
        self._lay_taps(self.anatomy)
        tapped = [tap.module for tap in self._taps] + [module for module, _ in self._tapped_attention]
        self._tapped = _places(hf_model, [*tapped, self.anatomy.decoder])
        self._checkpointing = internals.may_recompute(hf_model)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Any, **hf_options: Any) -> HookedVLM:
        """A shipped model ("micro"), a folder, or a hub id, loaded from safetensors and set to eval mode.

        `hf_options` go to transformers (dtype, device_map, attn_implementation, revision, token, ...);
        code from the hub runs only with trust_remote_code=True. Raises `loading.ModelNotFoundError` where
        there is no such folder or shipped name, the hub is out of reach, or the model is gated.
        """
        hf_model, processor = loading.load(name_or_path, **hf_options)
        return cls(hf_model, processor)

    @property
    def training(self) -> bool:
        """Whether the Hugging Face model is in training mode; `train()` and `eval()` reach it from here too."""
        hf_model = self._modules.get("hf_model") if "_modules" in self.__dict__ else None
        return hf_model is not None and hf_model.training

    @training.setter
    def training(self, mode: bool) -> None:
        """nn.Module sets it on itself and on every child: the Hugging Face model's is the one that counts."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedVLM:
        """A copy of the Hugging Face model, wrapped anew: hooks of the copy act on the copy alone.

        Raises StateError while hooks are set: it is not plain whether the copy should have them.
        """
        if self.watch:
            raise StateError(
                "hooks are set on this model: copy it once they are gone (after the `with` block, or "
                "model.reset_hooks()), and set them on the copy"
            )
        twin = type(self)(copy.deepcopy(self.hf_model, memo), copy.deepcopy(self.processor, memo))
        memo[id(self)] = twin
        twin.cfg = copy.deepcopy(self.cfg, memo)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidTypeError(
            "a HookedVLM cannot be pickled or saved: its hooks are tied to the modules of this process. Save the "
            "Hugging Face model (model.hf_model.save_pretrained(folder), or torch.save(model.hf_model, file)) and wrap "
            "it again; of a cache save cache.cache_dict; copy a model by copy.deepcopy(model)"
        )

    # ------------------------------------------------------------------ inputs

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return loading.input_device(self.hf_model)

    @property
    def attention_layers(self) -> list[int]:
        """The language layers that have softmax attention: all of them but in hybrid families."""
        return list(self._attention_taps)

    @property
    def grid(self) -> HeadGrid:
        """Which heads the language model has: how many in each layer, none where it has no softmax attention."""
        attention = [parts.attention for parts in self.anatomy.language]
        return HeadGrid(tuple(own.n_heads if own else 0 for own in attention))

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Every language head as (layer, head)."""
        return list(self.grid.heads)

    def prompt(self, questions: str | Iterable[str], images: Iterable[Any] | None = ()) -> Prompt:
        """Model inputs and token map for one question and its images, or for a batch of both.

        Images (PIL images or paths) stand before the question, through the processor's own chat template. They are
        shown upright, as their EXIF data say, and laid over white where they are transparent; what cannot be shown
        without a choice of yours, such as one of several frames, raises PromptError.
        """
        if self.processor is None:
            raise InvalidValueError(
                "this HookedVLM has no processor; pass one: HookedVLM(hf_model, processor)"
            )
        if self.family.layout is None:
            raise TokenMapError(
                f"prompts of {self.family.model_type!r} have no token map: {self.family.no_layout}. Run the model on "
                "what its processor gives: model(**inputs)"
            )
        return make_prompt(self.processor, self.family.layout, questions, images, device=self.device)

    def prompt_examples(self, examples: Iterable[Example], answer_start: str | None = None) -> Prompt:
        """A batch of examples as a prompt that also carries their answers and candidates for the metrics.

        Metrics of the next token look for an answer's first token as it follows the prompt. `answer_start` says what
        stands between the two: None for the space that the model's chat template writes there, if it does
        ("ASSISTANT: yes"), "" or " " to choose; the prompt's repr shows the token. Raises PromptError for an answer
        or candidate that the tokenizer does not know.
        """
        batch = examples_of(examples)
        prompt = self.prompt([e.question for e in batch], [list(e.images) for e in batch])
        return with_answers(prompt, self.processor, batch, answer_start)

    @torch.no_grad()
    def encode_images(self, prompt: Prompt) -> Prompt:
        """The same prompt with the vision tower and projector already run: language-side runs then repeat neither.

        Logits are the same to the bit. Hooks on vision.* and projector.* no longer fire, which is an error where
        one is set. A prompt without images comes back as it is, and so does every prompt of a family whose tower
        transformers does not run apart (Mllama, BLIP-2, DeepSeek-VL ...): its runs repeat it. Raises
        UnsupportedError for a prompt that holds video or audio.
        """
        inputs = self._keyword_inputs(prompt_of(prompt), {})
        given = None if prompt.image_features is not None else self._tower_inputs(inputs)
        if given is None:
            return prompt
        encode = partial(self.hf_model.get_image_features, **given, return_dict=True)
        features = self._at_work_on(prompt, inputs).around(encode)
        # The pixels alone have gone into the features; grids and sizes are read once more beside them.
        kept = {
            name: value for name, value in inputs.items() if name not in given or not _holds_pixels(value)
        }
        return replace(prompt.to(self.device), inputs=kept, image_features=features, encoded=prompt.vision)

    def _tower_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """What get_image_features takes of the inputs; None where the tower cannot be run apart from them."""
        encode: Any = getattr(self.hf_model, "get_image_features", None)
        forwards = [
            inspect.signature(module.forward).parameters
            for module in (self.hf_model, getattr(self.hf_model, "model", self.hf_model))
        ]
        if encode is None or not any("mm_encoder_outputs" in taken for taken in forwards):
            return None
        parameters = inspect.signature(encode).parameters.values()
        taken = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
        if len(taken) < len(parameters):
            # What it hands on to the tower: the image processor's other outputs.
            taken |= set(getattr(getattr(self.processor, "image_processor", None), "model_input_names", ()))
        given = {name: value for name, value in inputs.items() if name != "input_ids" and name in taken}
        required = {each.name for each in parameters if each.default is each.empty} - {"args", "kwargs"}
        needed = any(
            _holds_pixels(value)
            and name in forwards[0]
            and forwards[0][name].default is inspect.Parameter.empty
            for name, value in given.items()
        )
        return None if needed or not required or not required <= given.keys() else given

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*shape d_model"]:
        """`residual_directions` of a text that is one token, of a token id, or of ids of any shape.

        One id in any shape gives one direction [d_model], as in TransformerLens.
        """
        if isinstance(tokens, (str, Tensor)):
            ids = torch.as_tensor(self.to_single_token(tokens) if isinstance(tokens, str) else tokens)
        else:
            ids = torch.tensor(whole_number("tokens", tokens, least=0))
        if ids.is_floating_point() or (
            ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.cfg.d_vocab
        ):
            raise InvalidValueError(
                f"tokens is {shown(tokens)}; expected one word, or token ids from 0 to {self.cfg.d_vocab - 1}"
            )
        return self.residual_directions(ids.reshape(()) if ids.numel() == 1 else ids)

    def to_text(self, token_ids: Tensor) -> list[str]:
        """Decode a batch of token ids, special tokens left out."""
        if self.tokenizer is None:
            raise InvalidValueError(
                "this HookedVLM has no tokenizer; pass a processor: HookedVLM(hf_model, processor)"
            )
        token_ids = self._checked_ids("token_ids", token_ids)
        return [text.strip() for text in self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)]

    # ------------------------------------------------------------------ running

    def forward(
        self,
        inputs: Inputs | Tensor | None = None,
        *,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        **hf_inputs: Any,
    ) -> Output:
        """What the Hugging Face model computes; keyword inputs (logits_to_keep, ...) are passed on to it.

        `inputs` may also be token ids of plain text [batch, pos], as TransformerLens' tools pass them.

        `return_type`: "logits" [batch, pos, vocab]; "loss", the mean cross entropy of the next token; "both",
        (logits, loss); None runs and gives nothing. A prediction counts in the loss where it is made at a real
        position and is of a real text token, not of padding or of an image's placeholder; with `labels` those say
        what counts, -100 for nothing. `loss_per_token` gives each prediction's own [batch, pos - 1], 0 where it does
        not count.

        Raises InvalidTypeError for a keyword that the model does not read, with the nearest name; transformers would
        drop it in silence.
        """
        if return_type is not None:
            one_of("return_type", return_type, RETURN_TYPES)
        gives_loss = return_type in ("loss", "both")
        if flag("loss_per_token", loss_per_token) and not gives_loss:
            raise InvalidValueError(
                f"loss_per_token asks for a loss, return_type='loss' or 'both', not {return_type!r}"
            )
        keyword_inputs = self._keyword_inputs(inputs, self._checked(inputs, hf_inputs))
        labels = self._labels(keyword_inputs) if gives_loss else None
        keep = None
        if "logits_to_keep" not in keywords.forward_keywords(self.hf_model):
            keep = keyword_inputs.pop("logits_to_keep", None)
        if not self.watch:
            self._check_use()
            self._n_forwards += 1
        logits = self._at_work_on(inputs).around(lambda: self.hf_model(**keyword_inputs)).logits
        if keep is not None:
            logits = logits[:, keep if isinstance(keep, Tensor) else slice(-keep, None)]
        if return_type is None or labels is None:
            return logits if return_type == "logits" else None
        loss = next_token_loss(logits, labels, per_token=loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _checked(self, inputs: Inputs | Tensor | None, more: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keywords of a run that the model reads. What the processor gives is right, whether read or not."""
        named = {"logits_to_keep", *getattr(self.processor, "model_input_names", ())}
        if isinstance(inputs, Mapping):
            keywords.check_forward(self.hf_model, inputs, named)
        return keywords.check_forward(self.hf_model, more, named)

    def _labels(self, given: Mapping[str, Any]) -> Int[Tensor, "batch pos"]:
        if given.get("labels") is not None:
            return given["labels"]
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or (mask is not None and mask.shape != ids.shape):
            raise InvalidValueError(
                "a loss needs labels, or input_ids with an attention_mask [batch, pos] to take them from"
            )
        return text_labels(ids, None if mask is None else mask.bool(), self.image_mask(given))

    def generate(self, inputs: Inputs | Tensor | None = None, **options: Any) -> Any:
        """Token ids, prompt included, by the Hugging Face model's own `generate`; hooks that are set stay live.

        With return_dict_in_generate=True, transformers' record of them.

        Under cached decoding, hook_rot_k sees all keys so far and every other hook the new position only. Beams and
        several samples repeat each row of the batch, and interventions act on every copy of their row.
        Raises PromptError for a batch padded on the right, whose next token would follow the padding, and
        InvalidTypeError for an option that neither `generate` nor the model knows, with the nearest name.
        """
        keyword_inputs = self._keyword_inputs(inputs, keywords.check_generate(self.hf_model, options))
        if keyword_inputs.get("attention_mask") is not None:
            check_left_padding(keyword_inputs["attention_mask"])
        if not self.watch:
            self._check_use()

        def run() -> Any:
            # Some families generate with their language model alone, past their own forward.
            self._on_forward(self.hf_model, (), keyword_inputs)
            try:
                return self.hf_model.generate(**keyword_inputs)
            except ValueError as error:
                raise keywords.explained(self.hf_model, keyword_inputs, error) from error

        return self._at_work_on(inputs).around(run)

    def answer(self, inputs: Inputs, max_new_tokens: int = 16, **options: Any) -> list[str]:
        """The generated text after each prompt of the batch; `options` are `generate`'s."""
        if options.get("return_dict_in_generate"):
            raise InvalidTypeError(
                "answer gives texts, not return_dict_in_generate's record: call generate for it"
            )
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
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
        check_same_twice(self.hf_model)
        called("consume", consume, "a function (layer, rows, real)", n_arguments=3)
        instance_of("queries", queries, Tensor, "a boolean tensor [batch, pos]")
        keyword_inputs = self._keyword_inputs(inputs, {})
        shape = tuple(keyword_inputs["input_ids"].shape)
        if tuple(queries.shape) != shape:
            raise InvalidValueError(
                f"queries has shape {tuple(queries.shape)}, the inputs [batch, pos] = {shape}"
            )
        if queries.dtype != torch.bool:
            raise InvalidTypeError(f"queries is a boolean tensor [batch, pos], not {queries.dtype}")
        rows, held = QueryRows.of(queries.to(self.device)), object()

        def run() -> None:
            self.watch.add(held)
            for layer, tap in self._attention_taps.items():
                tap.rows = rows
                tap.consume_rows = lambda pattern, layer=layer: consume(
                    layer, pattern, rows.real.to(pattern.device)
                )
            run_model = partial(self.hf_model, **keyword_inputs, logits_to_keep=1, use_cache=False)
            self._at_work_on(inputs).around(run_model)

        def undo() -> None:
            for tap in self._attention_taps.values():
                tap.rows = tap.consume_rows = None
            self.watch.discard(held)

        undone(run, undo)

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
        if not isinstance(match, str):
            raise InvalidTypeError(f"a hook point is {shown(match)}; expected its name, or a filter of names")
        if match not in self.hook_dict:
            raise UnknownHookError(unknown_name_message("hook point", match, self.hook_dict))
        return [match]

    def add_hook(self, name: HookName, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; raises UnknownHookError where `name` means no hook point."""
        for known in self.hook_names(name):
            super().add_hook(known, *args, **kwargs)

    def hooks(
        self,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> HookBlock:
        """Hooks that live as long as the block, as in TransformerLens.

        A hook function gives None, or the whole activation in its shape, dtype and device, without new NaN or
        infinities; scores of -inf block keys.

        Raises UnknownHookError before anything runs where a name means nothing, and HookNeverFiredError at
        the end where the model ran inside the block and a forward hook never fired; StateError where another thread
        or another HookedVLM of the same Hugging Face model has hooks set. Warns (NoChangeWarning) where hooks are an
        intervention's edits, fired, and none of them changed anything.
        """
        fwd_hooks, bwd_hooks = hooks_in("fwd_hooks", fwd_hooks), hooks_in("bwd_hooks", bwd_hooks)
        return HookBlock(self, fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Remove all hooks, as in TransformerLens."""
        undone(lambda: None, lambda: super(HookedVLM, self).reset_hooks(*args, **kwargs))

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Logits with the hooks live, as in TransformerLens. Raises and warns as `hooks`."""
        if bwd_hooks and reset_hooks_end:
            logging.warning("bwd_hooks are removed at the end of run_with_hooks; use `with model.hooks(...)`")
        block = self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)
        output = block.around(lambda: self(*model_args, **model_kwargs))
        block.check()
        return output

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: HookName | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool | Callable[[Any], Tensor] = False,
        **model_kwargs: Any,
    ) -> tuple[Any, VLMActivationCache]:
        """Logits and a TransformerLens ActivationCache of the chosen hook points.

        `names_filter` None means all but hook_result (unless cfg.use_attn_result is set), and only what fires:
        a prompt without images has no image.* activations, and inputs that hold video or audio have neither these
        nor hook_deepstack. A filter function likewise caches what fires of its matches. A hook point that fires
        several times in one forward (Qwen's vision attention, once per image or window) is stacked on its first axis
        and padded with zeros, scores with -inf. With layers on several devices each activation is on its own, unless
        `device` names one for all, as tools that stack them need.

        `incl_bwd` also caches gradients, as "<name>_grad": of the output where it is one number
        (return_type="loss"), or of what a function makes of the output, incl_bwd=lambda logits: logits[0, -1, 7].
        As in TransformerLens the parameters gather gradients too.

        Raises HookNeverFiredError where a hook point asked for by name never fires, or nothing that a filter
        function matches does, and ValueError where remove_batch_dim meets a batch of several prompts, or incl_bwd
        something that is not one number.
        """
        names = self._cached_names(names_filter)
        by_name = names_filter is not None and not callable(names_filter)
        given = self._keyword_inputs(
            model_args[0] if model_args else model_kwargs.get("inputs"), model_kwargs
        )
        if not by_name and (self.anatomy.other_media.held(given) or not self._tells_images(given)):
            # They read which positions are images; asked for by name they are refused.
            names = [name for name in names if not is_packed(name)]
        cache: dict[str, Tensor] = {}
        # Another hook may edit in place what was cached; a copy then keeps the cache true.
        copied = bool(self.watch)
        save, save_grad = (
            partial(_save, cache=cache, device=device, copy=copied, suffix=suffix) for suffix in ("", "_grad")
        )
        if not incl_bwd:
            save.reads_only = True  # type: ignore[attr-defined]
        block = self.hooks(
            [(name, save) for name in names], [(name, save_grad) for name in names if incl_bwd]
        )

        def run() -> Any:
            if not incl_bwd:
                return self(*model_args, **model_kwargs)
            with gradients_pass(self.hf_model):
                output = self(*model_args, **model_kwargs)
            _loss(output, incl_bwd).backward()
            return output

        output = block.around(run)
        wanted = [*names, *(f"{name}_grad" for name in names if incl_bwd and by_name)]
        missing = [name for name in wanted if name not in cache]
        # A filter asks for what there is, a name for itself.
        if missing and (by_name or (names_filter is not None and not cache)):
            raise HookNeverFiredError(f"asked to cache {missing[:5]}, which never fired in this run")
        known = self._tells_images(self._inputs) and self._unmapped is None
        image_mask = self.image_mask(self._inputs) if known else None
        activations = VLMActivationCache(cache, self, image_mask=image_mask, unmapped=self._unmapped)
        return output, activations.remove_batch_dim() if remove_batch_dim else activations

    def _cached_names(self, names_filter: HookName | Sequence[str] | None) -> list[str]:
        if names_filter is None:
            costly = () if self.cfg.use_attn_result else hook_names.COSTLY_HOOKS
            return [name for name in self.hook_dict if not name.endswith(costly)]
        if isinstance(names_filter, str) or callable(names_filter):
            return self.hook_names(names_filter)
        names = listed("names_filter", names_filter, "a hook name, a filter of names, or a list of names")
        return list(dict.fromkeys(known for name in names for known in self.hook_names(name)))

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """As in TransformerLens; hook_q_input and its like are there either way, and cost only while hooked."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    # ------------------------------------------------------------------ plumbing

    def _keyword_inputs(self, inputs: Inputs | Tensor | None, more: Mapping[str, Any]) -> dict[str, Any]:
        if inputs is None:
            if not any(isinstance(value, Tensor) for value in more.values()):
                raise InvalidTypeError(f"no inputs given: expected {_INPUTS}")
            return dict(more)
        if isinstance(inputs, Prompt):
            self._check_mapped(inputs.inputs, "its token map")
            self._check_processor(inputs)
            features = (
                {}
                if inputs.image_features is None
                else {"mm_encoder_outputs": {"image": inputs.image_features}}
            )
            return {**inputs.to(self.device).inputs, **features, **more}
        if isinstance(inputs, Mapping):
            return {**inputs, **more}
        if isinstance(inputs, Tensor):
            return {**self._text_inputs(inputs), **more}
        raise InvalidTypeError(
            f"inputs are a Prompt (model.prompt(question, images)), the model's keyword inputs, or token ids of "
            f"text, not {type(inputs).__name__}"
        )

    def _text_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Keyword inputs for token ids [batch, pos] of plain text; padding before a row's first token is masked."""
        ids = (ids[None] if ids.ndim == 1 else ids).to(self.device)
        image_id = getattr(self.hf_model.config, self.anatomy.image_token or "", None)
        if ids.is_floating_point():
            raise InvalidTypeError(f"token ids are integers, not {ids.dtype}")
        self._check_mapped({"input_ids": ids}, "a run on token ids alone")
        n_known = n_embeddings(self.embed)
        if int(ids.max()) >= n_known or (image_id is not None and bool((ids == image_id).any())):
            raise InvalidValueError(
                "token ids alone bring no image, and these have visual positions: pass the prompt itself "
                "(model.prompt(question, images)), or to an analysis tool its cache"
            )
        pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
        real = torch.ones_like(ids) if pad is None else ((ids != pad).cumsum(1) > 0).long()
        return {"input_ids": ids, "attention_mask": real}

    def _check_use(self) -> None:
        """Raise StateError where another wrapper's hooks would act on the run, or a module we hook is gone."""
        self.watch.check_others()
        for siblings, path, name, module in self._tapped:
            now = siblings.get(name)
            # A partial run puts something in a layer's place for its own time.
            if now is not module and getattr(now, "stands_for", None) is not module:
                raise StateError(
                    f"{path} ({type(module).__name__}) of the Hugging Face model was replaced by a "
                    f"{type(now).__name__} since it was wrapped (an adapter was added, or weights were quantized), so "
                    "hooks on it act on nothing: wrap it again, HookedVLM(hf_model, processor)"
                )

    def attach(self) -> None:
        """For `watch`: take part in the Hugging Face model's runs."""
        self._run_hooks.attach(self.hf_model, self.anatomy.decoder)
        for module, tap in self._tapped_attention:
            tap_attention(module, tap)

    def detach(self) -> None:
        self._run_hooks.detach(self.hf_model, self.anatomy.decoder)
        for module, tap in self._tapped_attention:
            untap_attention(module, tap)

    def _on_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.watch:
            self.watch.check_thread()
            self._check_use()
            hooks = {point.name: point.functions for point in self.watch.points}
            check_checkpointing(self._checkpointing, hooks)
        self._n_forwards += 1
        self._running = None
        # Until the decoder begins, nothing is known of its positions: not those of the run before.
        self.span = Span(0, 0)
        # Image rows are found in the inputs of the run that is under way.
        given = {**({"input_ids": args[0]} if args else {}), **kwargs}
        self._unmapped = self.anatomy.other_media.held(given)
        telling = ("input_ids", self.family.image_positions)
        self._whole_inputs = {name: given[name] for name in telling if given.get(name) is not None}
        self._inputs = self._whole_inputs
        # They are alive as long as the run is.
        self._pixels = {
            name: weakref.ref(value)
            for name, value in given.items()
            if isinstance(value, Tensor) and value.is_floating_point() and name != "inputs_embeds"
        }
        keep = kwargs.get("logits_to_keep")
        if not (isinstance(keep, int) and keep and self._shares_keys and self.watch):
            return None
        # As a number it would also drop all other positions from the layers that attend with earlier layers' keys.
        ids = given.get("input_ids")
        length = (given["inputs_embeds"] if ids is None else ids).shape[1]
        return args, {**kwargs, "logits_to_keep": torch.arange(length)[-keep:]}

    def _on_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        if given is None:
            given = args[0] if args else kwargs.get("input_ids")
        self.span = Span(internals.cached_length(kwargs), 0 if given is None else given.shape[1])
        standing = next(map(len, self._whole_inputs.values()), 0)
        if given is None or not standing or len(given) == standing or len(given) % standing:
            return
        # Families that generate past their own forward leave the prompt's inputs standing; beams repeat their rows.
        self._inputs = self._whole_inputs = {
            name: value.repeat_interleave(len(given) // standing, 0)
            for name, value in self._whole_inputs.items()
        }

    def copies(self, prompt: Prompt) -> int:
        """How often the run under way has each row of the prompt, copy by copy: beams and several samples repeat it."""
        n_running, n_rows = len(self._whole_inputs.get("input_ids", ())), prompt.shape[0]
        return n_running // n_rows if n_running and n_running % n_rows == 0 else 1

    def _at_work_on(self, inputs: Any, encoding: Mapping[str, Any] | None = None) -> Temporary[None]:
        """Hooks that fire inside the block can ask whether the prompt is the one they were built for.

        `encoding`: the inputs, where the tower alone is run, which `_on_forward` does not see.
        """
        before = self._given

        def begin() -> None:
            self._given = inputs if isinstance(inputs, Prompt) else None
            self._running = None
            if encoding is not None:
                self._whole_inputs = self._inputs = {"input_ids": encoding["input_ids"]}

        def end() -> None:
            self._given = before

        return Temporary(begin, end)

    def _check_processor(self, prompt: Prompt) -> None:
        if (
            prompt.processor
            and self.processor is not None
            and prompt.processor != processor_fingerprint(self.processor)
        ):
            raise InvalidValueError(
                "this prompt was made by another model's processor: its tokenizer or the normalization of its images "
                "is not this model's. Make it with this one: model.prompt(...) or model.prompt_examples(examples)"
            )

    def check_running(self, prompt: Prompt) -> None:
        """Raise ValueError where the run under way is of another prompt, in tokens or images; compared once a run."""
        if self._running is prompt:
            return
        ids, own = self._whole_inputs.get("input_ids"), prompt.inputs.get("input_ids")
        goes_on = (
            ids is not None and self.span.first > 0 and ids.shape[1] < self.span.first + self.span.length
        )
        # A run that goes on from a cache is given the rest of the prompt, or what was generated after it. The span may
        # be of its last queries alone.
        first = self.span.first + self.span.length - ids.shape[1] if ids is not None and goes_on else 0
        if ids is not None and own is not None and first < own.shape[1]:
            rows = own[:, first:].repeat_interleave(self.copies(prompt), 0).to(ids)
            # Without a cache, generated tokens follow the prompt. From a cache, a part of the rest may be run.
            known = ids[:, : rows.shape[1]]
            is_same = torch.equal(known, rows[:, : known.shape[1]])
            if not is_same or (known.shape[1] < rows.shape[1] and not goes_on):
                way_out = ". This one is its beginning: run the prompt whole (without prefill_chunk_size)"
                raise InvalidValueError(
                    f"an intervention built for a prompt of [batch, pos] = {list(own.shape)} is run on another one of "
                    f"{list(ids.shape)}{f', after {first} positions in a cache' if first else ''}: interventions are "
                    f"built for each prompt, intervention(model, prompt){way_out if is_same else ''}"
                )
        if ids is not None and own is not None and not goes_on:
            other = self._other_images(prompt)
            if other:
                raise InvalidValueError(
                    f"an intervention built for one prompt is run on one of the same text with other images ({other} "
                    "differs): interventions are built for each prompt, intervention(model, prompt)"
                )
        self._running = prompt

    def _other_images(self, prompt: Prompt) -> str:
        """The first input of the run under way, beside its text, that is not the prompt's; "" where there is none."""
        if self._given is prompt:
            return ""
        if self._given is not None:
            one, other = self._given.vision, prompt.vision
            return next((name for name in one.keys() | other.keys() if one.get(name) != other.get(name)), "")
        for name, held in self._pixels.items():
            value, own = held(), prompt.inputs.get(name)
            # Beams and several samples repeat the rows.
            if value is None or own is value or not isinstance(own, Tensor) or own.shape != value.shape:
                continue
            if not torch.equal(own.to(value), value):
                return name
        return ""

    def narrow_inputs(self, first: int, copies: int) -> None:
        """For a partial run: hooks see the inputs' positions from `first` on, and the batch `copies` times."""
        self._inputs = {
            name: value[:, first:].repeat(copies, 1) for name, value in self._whole_inputs.items()
        }

    def attention_tap(self, layer: int) -> AttentionTap:
        """The attention of a language layer, for whoever stands around its calls."""
        return self._attention_taps[layer]

    def image_mask(self, inputs: Inputs) -> Bool[Tensor, "batch pos"] | None:
        """Which positions of the inputs are visual; None where the family's text has no visual positions.

        Raises UnsupportedError for inputs that hold video or audio.
        """
        if not self._marks_images:
            return None
        given = self._keyword_inputs(inputs, {})
        self._check_mapped(given, "the mask of visual positions")
        if self.family.image_positions:
            return given[self.family.image_positions].bool()
        return given["input_ids"] == getattr(self.hf_model.config, self.anatomy.image_token)

    def _check_mapped(self, inputs: Mapping[str, Any], purpose: str) -> None:
        """Raise UnsupportedError where the inputs hold what no token map knows (video, audio)."""
        held = self.anatomy.other_media.held(inputs)
        if held is not None:
            raise UnsupportedError(unmapped_message(held, purpose))

    def _tells_images(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the inputs of a run say which positions are visual; embeddings alone do not."""
        return inputs.get(self.family.image_positions or "input_ids") is not None

    def _image_mask(self, x: Tensor) -> Tensor | None:
        if self._unmapped is not None:
            raise UnsupportedError(unmapped_message(self._unmapped, "image.* hooks and hook_deepstack"))
        if not self._tells_images(self._inputs):
            raise InvalidValueError("image.* hooks need input_ids: the model was run on inputs_embeds alone")
        mask = self.image_mask(self._inputs)
        if mask is None or not bool(mask.any()):
            return None
        # Families that generate past their own forward leave the prompt's inputs standing.
        return mask.to(x.device) if mask.shape[1] == x.shape[1] else None

    def _n_rows(self) -> int | None:
        ids = self._inputs.get("input_ids")
        return None if ids is None else len(ids)

    def _point(self, name: str) -> LazyHookPoint:
        point = LazyHookPoint(self.watch)
        point.name = name
        self.hook_dict[name] = self.mod_dict[name] = point
        return point

    def _tap(
        self, module: nn.Module, side: Literal["input", "output"], steps: list[Step], packs: bool = False
    ) -> None:
        """`packs`: the module may be given one flat axis of positions."""
        self._taps.append(ModuleTap(module, side, steps, weakly(self._n_rows) if packs else lambda: None))

    def _lay_taps(self, anatomy: Anatomy) -> None:
        embed = [whole(self._point("hook_embed"))]
        if self._marks_images and self._batch_first:
            embed.append(image_rows(self._point("image.hook_embed"), weakly(self._image_mask)))
        first: dict[int, list[Step]] = {0: embed}
        last: dict[int, list[Step]] = {}
        for layer in anatomy.deep_after:
            at_output, at_input = between_layers(
                self._point(f"blocks.{layer}.hook_deepstack"), weakly(self._image_mask)
            )
            last[layer] = [at_output]
            if layer + 1 < len(anatomy.language):
                first[layer + 1] = [at_input]
            elif anatomy.final_norm is not None:
                self._tap(anatomy.final_norm, "input", [at_input])
        for index, parts in enumerate(anatomy.language):
            self._lay_block(
                f"blocks.{index}.", parts, first.get(index, []), last.get(index, []), language=True
            )
        self._lay_norm("ln_final", anatomy.final_norm)
        for prefix, layers in anatomy.stacks.items():
            for index, parts in enumerate(layers):
                embed = [whole(self._point(f"{prefix}hook_embed"))] if index == 0 else []
                self._lay_block(f"{prefix}blocks.{index}.", parts, embed, [], language=False)
        pools = self.family.vision is not None and self.family.vision.norm_pools
        self._lay_norm("vision.ln_post", anatomy.vision_norm, fires=lambda x: not pools or x.ndim > 2)
        if anatomy.projector is not None:
            self._tap(anatomy.projector, "input", [of_features(self._point("projector.hook_in"))])
            self._tap(anatomy.projector, "output", [of_features(self._point("projector.hook_out"))])
        for index, merger in enumerate(anatomy.mergers):
            self._tap(merger, "output", [whole(self._point(f"vision.deepstack.{index}.hook_out"))])

    def _lay_norm(
        self, name: str, norm: nn.Module | None, fires: Callable[[Tensor], bool] = lambda x: True
    ) -> None:
        if norm is not None and is_norm(norm):
            step = normalization(self._point(f"{name}.hook_scale"), self._point(f"{name}.hook_normalized"))
            steps = [Step(step.hook_points, lambda x, *args: step.apply(x, *args) if fires(x) else x)]
            self._tap(norm, "output", steps, packs=name.startswith("blocks."))

    def _lay_block(
        self, prefix: str, parts: LayerParts, first: list[Step], last: list[Step], *, language: bool
    ) -> None:
        def seen(name: str, d_head: int | None = None) -> list[Step]:
            """The tensor, and on the language side its rows at image positions."""
            point = self._point(f"{prefix}attn.{name}" if d_head else prefix + name)
            steps = [heads(point, d_head) if d_head else whole(point)]
            packs = language and self._marks_images and ("resid" not in name or self._batch_first)
            if packs:
                steps.append(
                    image_rows(self._point(f"{prefix}image.{name}"), weakly(self._image_mask), d_head)
                )
            return steps

        def tap(module: nn.Module, side: Literal["input", "output"], steps: list[Step]) -> None:
            self._tap(module, side, steps, packs=language)

        def added(name: str, scale: str | None) -> list[Step]:
            """What a branch adds to the stream: its last module's output, times the layer's factor."""
            steps = seen(name)
            return steps if scale is None else scaled(steps, lambda: scale_of(parts.module, scale))

        tap(parts.module, "input", [*first, *seen("hook_resid_pre")])
        forks = self._forks(f"{prefix}attn.", parts) if language else {}
        if parts.norm1 is not None and parts.mixer is not None:
            attn_in = branch(self._point(f"{prefix}hook_attn_in"))
            tap(parts.norm1, "input", [attn_in, *(at_norm for at_norm, _ in forks.values())])
        self._lay_norm(f"{prefix}ln1", parts.norm1)
        if parts.attention is not None:
            z = seen("hook_z", parts.attention.d_value)
            attention_tap = self._lay_attention(
                f"{prefix}attn.",
                parts.attention,
                z,
                lambda: scale_of(parts.module, parts.attention_scale),
                {role: at_projection for role, (_, at_projection) in forks.items()},
            )
            if language:
                attention_tap.runs = proxy(self)
                self._attention_taps[int(prefix.split(".")[1])] = attention_tap
        self._lay_norm(f"{prefix}ln1_post", parts.post_norm1)
        if parts.attention_output is not None:
            tap(parts.attention_output, "output", added("hook_attn_out", parts.attention_scale))
        if parts.cross_attention is not None:
            z = [heads(self._point(f"{prefix}cross_attn.hook_z"), parts.cross_attention.d_value)]
            self._lay_attention(f"{prefix}cross_attn.", parts.cross_attention, z)
        after = parts.norm2 or parts.mlp_in
        if parts.has_resid_mid and after is not None:
            mid = residual_mid(seen("hook_resid_mid"))
            mlp_in = branch(self._point(f"{prefix}hook_mlp_in"))
            tap(after, "input", [mid, mlp_in])
        self._lay_norm(f"{prefix}ln2", parts.norm2)
        mlp = Block(prefix, parts).mlp
        if language and mlp.is_plain:
            tap(mlp.out, "input", [whole(self._point(f"{prefix}mlp.hook_post"))])
        self._lay_norm(f"{prefix}ln2_post", parts.post_norm2)
        if parts.mlp_output is not None:
            tap(parts.mlp_output, "output", added("hook_mlp_out", parts.mlp_scale))
        tap(parts.module, "output", [*seen("hook_resid_post"), *last])

    def _forks(self, prefix: str, parts: LayerParts) -> dict[str, tuple[Step, Step]]:
        """What each head's queries, keys and values read, where that is the stream after ln1."""
        attention, norm = parts.attention, parts.norm1
        if attention is None or norm is None or not is_norm(norm):
            return {}
        return {
            role: forked_input(self._point(f"{prefix}hook_{role}_input"), projection, norm)
            for role, projection in attention.projections.items()
            if not projection.of_latent and (role == "q" or not attention.reads_image)
        }

    def _lay_attention(
        self,
        prefix: str,
        parts: AttentionParts,
        z: list[Step],
        scale: Callable[[], Tensor | float | None] = lambda: None,
        forks: Mapping[str, Step] = MappingProxyType({}),
    ) -> AttentionTap:
        for name, projection in parts.projections.items():
            step = projected_heads(self._point(f"{prefix}hook_{name}"), projection)
            self._tap(projection.module, "output", [forks[name], step] if name in forks else [step])
        inside = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")
        tap = AttentionTap({name: self._point(prefix + name) for name in inside})
        self._tapped_attention.append((parts.module, tap))
        self._tap(parts.out, "input", z)
        if is_linear(parts.out):
            step = head_results(self._point(f"{prefix}hook_result"), parts.d_value, scale)
            self._tap(parts.out, "output", [step])
        return tap


def _holds_pixels(value: Any) -> bool:
    """Whether an input is an image's content: grids, sizes, masks and positions of patches are whole numbers."""
    of_tensors = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(each, Tensor) and each.is_floating_point() for each in of_tensors)


class HookBlock(OpenBlock[HookedVLM]):
    """Hooks that live as long as a `with` block; see `HookedVLM.hooks`."""

    def __init__(
        self,
        model: HookedVLM,
        fwd_hooks: Sequence[Hook],
        bwd_hooks: Sequence[Hook],
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        prepend: bool = False,
    ) -> None:
        self.model = model
        self._forward = [(model.hook_names(name), CheckedHook(hook)) for name, hook in fwd_hooks]
        self._backward = [
            (model.hook_names(name), CheckedHook(hook, is_backward=True)) for name, hook in bwd_hooks
        ]
        self._resets, self._clears_contexts = reset_hooks_end, clear_contexts
        self._prepends = prepend
        """The hooks act before those already set."""
        self._level = self._n_forwards = 0
        self._held = object()

    def begin(self) -> HookedVLM:
        model = self.model
        self._n_forwards = model._n_forwards
        self._level = model.context_level = model.context_level + 1
        model.watch.add(self._held)
        for direction, hooks in (("fwd", self._forward), ("bwd", self._backward)):
            for names, hook in reversed(hooks) if self._prepends else hooks:
                for name in names:
                    point = model.hook_dict[name]
                    point.add_hook(hook, direction, level=self._level, prepend=self._prepends)
        return model

    def end(self) -> None:
        model = self.model
        hooks = [*self._forward, *self._backward]
        if self._resets:
            own = {hook for _, hook in hooks}
            for name in dict.fromkeys(name for names, _ in hooks for name in names):
                model.hook_dict[name].drop(own)
            if self._clears_contexts:
                model.clear_contexts()
        model.watch.discard(self._held)
        model.context_level = max(self._level - 1, 0)

    @property
    def silent(self) -> list[str]:
        """Where a forward hook has not fired."""
        return sorted({names[0] for names, hook in self._forward if not hook.calls})

    def check(self) -> None:
        """Raise HookNeverFiredError where the model ran and a forward hook never fired; warn where no edit changed
        anything."""
        silent = self.silent
        if silent and self.model._n_forwards > self._n_forwards:
            n_silent = sum(not hook.calls for _, hook in self._forward)
            raise HookNeverFiredError(
                f"the model ran, but {n_silent} of {len(self._forward)} hooks never fired: {', '.join(silent[:5])}. "
                "Hooks on image.*, vision.* and projector.* fire only where the prompt has an image"
            )
        # Edits count their calls and keep the size of what they changed; other functions are not known to edit.
        functions: list[Any] = [hook.function for _, hook in self._forward]
        edits = [hook for hook in functions if getattr(hook, "fired", 0) and hasattr(hook, "size")]
        if edits and not any(hook.size for hook in edits):
            warnings.warn(f"the intervention changed nothing: {edits[:3]}", NoChangeWarning, stacklevel=3)


def _places(
    hf_model: nn.Module, modules: Sequence[nn.Module]
) -> list[tuple[dict[str, Any], str, str, nn.Module]]:
    """Where each of the modules, and all that hold it, stand: (the holder's children, path, name, module)."""
    paths = {module: path for path, module in hf_model.named_modules()}
    holders: dict[str, None] = {}
    for module in modules:
        names = paths[module].split(".") if paths.get(module) else []
        holders |= dict.fromkeys(".".join(names[:n]) for n in range(1, len(names) + 1))
    places = []
    for path in holders:
        parent, _, name = path.rpartition(".")
        siblings: dict[str, Any] = internals.children_of(hf_model.get_submodule(parent))
        places.append((siblings, path, name, siblings[name]))
    return places


def _loss(output: Any, function: bool | Callable[[Any], Tensor]) -> Tensor:
    """The one number whose gradient is asked for."""
    loss = function(output) if callable(function) else output
    if isinstance(loss, tuple) and not callable(function):
        # return_type="both"
        loss = loss[-1]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidValueError(
            f"incl_bwd takes the gradient of one number, and {'its function' if callable(function) else 'the run'} "
            f"gave {given}: pass return_type='loss', or a function of the logits, "
            "incl_bwd=lambda logits: logits[0, -1, 7]"
        )
    if not loss.requires_grad:
        raise StateError(
            "incl_bwd needs gradients, and this run has none: leave torch.no_grad(), and let the parameters have them "
            "(hf_model.requires_grad_(True))"
        )
    return loss


def _config(model: PreTrainedModel, anatomy: Anatomy) -> TransformerLensConfig:
    """What TransformerLens' tools read of a model, for the language side."""
    text = model.config.get_text_config()
    # Layers of some families differ in their number of heads.
    attention = max(
        (layer.attention for layer in anatomy.language if layer.attention is not None),
        key=lambda parts: parts.n_heads,
    )
    normalization_type, final_rms = normalization_of(anatomy)
    return TransformerLensConfig(
        d_model=text.hidden_size,
        d_head=attention.d_value,
        n_layers=len(anatomy.language),
        n_ctx=getattr(text, "max_position_embeddings", None) or 2048,
        n_heads=attention.n_heads,
        n_key_value_heads=attention.n_kv_heads,
        d_mlp=getattr(text, "intermediate_size", None),
        d_vocab=text.vocab_size,
        act_fn=getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None),
        device=str(loading.input_device(model)),
        dtype=model.dtype,
        positional_embedding_type="rotary",
        normalization_type=normalization_type,
        final_rms=final_rms,
        gated_mlp=Block("", anatomy.language[0]).mlp.is_gated,
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
    if name in cache:
        value = _stack_chunks(cache[name], value, float("-inf") if name.endswith("hook_attn_scores") else 0.0)
    cache[name] = value


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
