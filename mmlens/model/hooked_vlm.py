"""HookedVLM: a Hugging Face vision-language model, unchanged, under TransformerLens' interface.

1. `__init__` finds the family's record and lays hook points over the model's own modules (mmlens.model.wiring).
2. `forward` and `generate` call the Hugging Face model; hook points fire where their taps stand.
3. `hooks` checks every name when it is entered, and when it is left that every hook has fired (mmlens.model.hooks).
4. Hooks that fire ask `run_state` for the prompt and the positions that the run under way computes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformers import PreTrainedModel, ProcessorMixin

from mmlens import internals
from mmlens.arguments import called, flag, instance_of, one_of, shown, whole_number
from mmlens.errors import InvalidTypeError, InvalidValueError, StateError
from mmlens.families.anatomy import Anatomy, dissect
from mmlens.families.catalog import family_of
from mmlens.families.record import Family
from mmlens.heads import HeadGrid
from mmlens.interrupts import undone
from mmlens.model import keywords, loading
from mmlens.model.answering import AnswerMethods
from mmlens.model.attention import AttentionTap, QueryRows
from mmlens.model.cache import VLMActivationCache, is_packed
from mmlens.model.choosing import Positions, positions_mask
from mmlens.model.config import config_of
from mmlens.model.evaluation import check_same_twice
from mmlens.model.hooks import HookMethods, HookName, check_fired
from mmlens.model.inputs import InputMethods, Inputs
from mmlens.model.linear import gradients_pass
from mmlens.model.loss import labels_of, next_token_loss
from mmlens.model.prompt import check_left_padding, prompt_of
from mmlens.model.recording import OfOutput, Recording, loss_of
from mmlens.model.run_state import RunState
from mmlens.model.taps import weakly
from mmlens.model.tokens import TokenMethods
from mmlens.model.visual import VisualPositions
from mmlens.model.watch import RunHooks, StandingModules, Watch, check_checkpointing, take_over
from mmlens.model.weights import WeightProperties
from mmlens.model.wiring import Wiring

Output = Float[Tensor, "batch pos vocab"] | Float[Tensor, "..."] | tuple[Tensor, Tensor] | None
"""What a run gives: logits, a loss, both, or nothing, as its return_type says."""
RETURN_TYPES = ("logits", "loss", "both")


class HookedVLM(WeightProperties, TokenMethods, InputMethods, AnswerMethods, HookMethods):
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
        self.prompt_options = {}
        self.watch = Watch(self, hf_model)
        """What is set on the Hugging Face model, and by which thread."""
        self.anatomy: Anatomy = dissect(hf_model, self.family)
        self.visual = VisualPositions(self.family, self.anatomy, hf_model.config)
        self.run_state = RunState(self.visual)
        """The run under way, for hooks that fire in it."""
        self._run_hooks = RunHooks(weakly(self._on_forward), self.run_state.begin_decoder)
        self.cfg = config_of(hf_model, self.anatomy)
        self._wiring = Wiring(
            self.family, self.anatomy, self.watch, self.run_state, marks_images=self.visual.exist
        )
        self.hook_dict: dict[str, Any] = self._wiring.points
        self.mod_dict: dict[str, nn.Module] = {**self.hook_dict}
        self._standing = StandingModules(hf_model, [*self._wiring.modules, self.anatomy.decoder])
        self._checkpointing = internals.may_recompute(hf_model)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Any, *, use_fast: bool = False, **options: Any) -> HookedVLM:
        """A shipped model ("micro"), a folder, or a hub id, loaded from safetensors and set to eval mode.

        `options` go to transformers: to the processor those that its classes state (max_pixels, size, do_resize, ...),
        to the model all others (dtype, device_map, attn_implementation, revision, token, ...). Images are processed by
        PIL, and by torchvision with use_fast. Code from the hub runs only with trust_remote_code=True. Raises as
        `loading.load`: ModelNotFoundError, InvalidTypeError for an option that nothing knows, and others.
        """
        hf_model, processor = loading.load(name_or_path, use_fast=use_fast, **options)
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
        twin.prompt_options = dict(self.prompt_options)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidTypeError(
            "a HookedVLM cannot be pickled or saved: its hooks are tied to the modules of this process. Save the "
            "Hugging Face model (model.hf_model.save_pretrained(folder), or torch.save(model.hf_model, file)) and wrap "
            "it again; of a cache save cache.cache_dict; copy a model by copy.deepcopy(model)"
        )

    @property
    def attention_layers(self) -> list[int]:
        """The language layers that have softmax attention: all of them but in hybrid families."""
        return list(self._wiring.by_layer)

    @property
    def grid(self) -> HeadGrid:
        """Which heads the language model has: how many in each layer, none where it has no softmax attention."""
        attention = [parts.attention for parts in self.anatomy.language]
        return HeadGrid(tuple(own.n_heads if own else 0 for own in attention))

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Every language head as (layer, head)."""
        return list(self.grid.heads)

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
        labels = labels_of(keyword_inputs, self.visual.mask) if gives_loss else None
        keep = None
        if "logits_to_keep" not in keywords.forward_keywords(self.hf_model):
            keep = keyword_inputs.pop("logits_to_keep", None)
        if not self.watch:
            self._check_use()
            self.run_state.n_forwards += 1
        logits = self.run_state.at_work_on(inputs).around(lambda: self.hf_model(**keyword_inputs)).logits
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

        return self.run_state.at_work_on(inputs).around(run)

    @torch.no_grad()
    def attention_rows(
        self,
        inputs: Inputs,
        queries: Positions,
        consume: Callable[[int, Float[Tensor, "batch head query key"], Bool[Tensor, "batch query"]], None],
    ) -> None:
        """One forward pass that hands `consume` the exact pattern rows at the `queries`, layer by layer.

        `consume(layer, rows, real)`: rows in float32, padded to the batch's largest number of queries; `real`
        says which are queries. `queries` are a boolean mask, or, of a prompt, a word ("question", "answer") or a
        function of it. No S x S pattern is made. Raises ValueError where a batch row has no query.
        """
        check_same_twice(self.hf_model)
        called("consume", consume, "a function (layer, rows, real)", n_arguments=3)
        if isinstance(queries, str) or callable(queries):
            queries = positions_mask(prompt_of(inputs, "inputs"), queries, "queries")
        queries = instance_of("queries", queries, Tensor, "a boolean tensor [batch, pos]")
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
            for layer, tap in self._wiring.by_layer.items():
                tap.rows = rows
                tap.consume_rows = lambda pattern, layer=layer: consume(
                    layer, pattern, rows.real.to(pattern.device)
                )
            run_model = partial(self.hf_model, **keyword_inputs, logits_to_keep=1, use_cache=False)
            self.run_state.at_work_on(inputs).around(run_model)

        def undo() -> None:
            for tap in self._wiring.by_layer.values():
                tap.rows = tap.consume_rows = None
            self.watch.discard(held)

        undone(run, undo)

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: HookName | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: OfOutput = False,
        **model_kwargs: Any,
    ) -> tuple[Any, VLMActivationCache]:
        """Logits and a TransformerLens ActivationCache of the chosen hook points.

        `names_filter` None means all but hook_result (unless cfg.use_attn_result is set), and only what fires:
        a prompt without images has no image.* activations, and inputs that hold what no token map knows neither these
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
        if not by_name and (self.visual.held_beside(given) or not self.visual.are_told(given)):
            # They read which positions are images; asked for by name they are refused.
            names = [name for name in names if not is_packed(name)]
        # Another hook may edit in place what was cached.
        recording = Recording(names, gradients=bool(incl_bwd), device=device, copies=bool(self.watch))

        def run() -> Any:
            if not incl_bwd:
                return self(*model_args, **model_kwargs)
            with gradients_pass(self.hf_model):
                output = self(*model_args, **model_kwargs)
            loss_of(output, incl_bwd).backward()
            return output

        output = self.hooks(recording.fwd_hooks, recording.bwd_hooks).around(run)
        # A filter asks for what there is, a name for itself.
        if by_name or (names_filter is not None and not recording.cache):
            check_fired(recording.missing(gradients=bool(incl_bwd) and by_name))
        activations = VLMActivationCache(
            recording.cache,
            self,
            image_mask=self.run_state.image_mask(),
            unmapped=self.run_state.unmapped,
        )
        return output, activations.remove_batch_dim() if remove_batch_dim else activations

    # ------------------------------------------------------------------ plumbing

    def attention_tap(self, layer: int) -> AttentionTap:
        """The attention of a language layer, for whoever stands around its calls."""
        return self._wiring.by_layer[layer]

    def attach(self) -> None:
        """For `watch`: take part in the Hugging Face model's runs."""
        self._run_hooks.attach(self.hf_model, self.anatomy.decoder)
        self._wiring.attach()

    def detach(self) -> None:
        self._run_hooks.detach(self.hf_model, self.anatomy.decoder)
        self._wiring.detach()

    def _check_use(self) -> None:
        """Raise StateError where another wrapper's hooks would act on the run, or a module we hook is gone."""
        self.watch.check_others()
        self._standing.check()

    def _on_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.watch:
            self.watch.check_thread()
            self._check_use()
            hooks = {point.name: point.functions for point in self.watch.points}
            check_checkpointing(self._checkpointing, hooks)
        given = {**({"input_ids": args[0]} if args else {}), **kwargs}
        self.run_state.begin(given)
        keep = kwargs.get("logits_to_keep")
        if not (isinstance(keep, int) and keep and self.anatomy.shares_keys and self.watch):
            return None
        # As a number it would also drop all other positions from the layers that attend with earlier layers' keys.
        ids = given.get("input_ids")
        length = (given["inputs_embeds"] if ids is None else ids).shape[1]
        return args, {**kwargs, "logits_to_keep": torch.arange(length)[-keep:]}


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
