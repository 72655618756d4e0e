"""Answers of a model: as texts, as positions of the prompt that they continue, and with what was computed for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from mmlens.arguments import whole_number
from mmlens.errors import InvalidTypeError
from mmlens.model.cache import VLMActivationCache
from mmlens.model.hooks import HookName
from mmlens.model.prompt import Prompt, prompt_of

if TYPE_CHECKING:
    from mmlens.model.inputs import Inputs

_ONE_ANSWER = "one answer for each example"


class AnswerMethods:
    """`answer`, `continue_prompt` and `generate_with_cache`; a part of HookedVLM."""

    hf_model: PreTrainedModel
    generate: Any
    run_with_cache: Any
    to_text: Any
    _keyword_inputs: Any

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

    def continue_prompt(self, prompt: Prompt, max_new_tokens: int = 16, **options: Any) -> Prompt:
        """The prompt with the answer that the model generates after it, its tokens as positions: `is_answer`.

        What runs on prompts runs on it: caches, attention rows, interventions, scores with queries="answer". `options`
        are `generate`'s; by default it is the model's own way of generating, do_sample=False is greedy. The token that
        ends an answer, and what follows it, is left out; a row whose answer ends at once has no such position.
        `continuations` gives the texts. Raises InvalidTypeError for options that give more than one answer.

        >>> import mmlens
        >>> model = mmlens.HookedVLM.from_pretrained("micro")
        >>> prompt = model.prompt_examples(mmlens.scene_examples("objects", 2, seed=0))
        >>> longer = model.continue_prompt(prompt, max_new_tokens=4, do_sample=False)
        >>> model.continuations(longer) == model.answer(prompt, max_new_tokens=4, do_sample=False)
        True
        >>> mass = mmlens.attention_mass(model, longer, longer.token_map.is_answer, longer.token_map.is_image)
        """
        length = prompt_of(prompt).shape[1]
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        if options.get("return_dict_in_generate") or options.get("num_return_sequences", 1) != 1:
            raise InvalidTypeError(
                f"a continued prompt has {_ONE_ANSWER}: leave return_dict_in_generate and num_return_sequences out"
            )
        ids = self.generate(prompt, max_new_tokens=max_new_tokens, **options)[:, length:].cpu()
        kept = before_the_end(self.hf_model, ids, options)
        rows = [own[real].tolist() for own, real in zip(ids, kept, strict=True)]
        return prompt.continued(rows) if any(rows) else prompt

    def continuations(self, prompt: Prompt) -> list[str]:
        """The text of each row of a continued prompt after the prompt, special tokens left out."""
        is_answer = prompt_of(prompt).token_map.is_answer
        ids = prompt.inputs["input_ids"].to(is_answer.device)
        return [self.to_text(own[mask][None])[0] for own, mask in zip(ids, is_answer, strict=True)]

    def generate_with_cache(
        self,
        prompt: Prompt,
        max_new_tokens: int = 16,
        *,
        names_filter: HookName | Sequence[str] | None = None,
        **options: Any,
    ) -> tuple[Prompt, VLMActivationCache]:
        """The continued prompt (`continue_prompt`) and the cache of a run over it, prompt and answer.

        The run is a single forward pass over the tokens that were generated: equal, but for rounding, to what was
        computed while they were. `names_filter` is `run_with_cache`'s, `options` are `generate`'s. The positions of the
        answer are `prompt.token_map.is_answer`.

        >>> import mmlens
        >>> model = mmlens.HookedVLM.from_pretrained("micro")
        >>> prompt = model.prompt_examples(mmlens.scene_examples("objects", 1, seed=0))
        >>> longer, cache = model.generate_with_cache(prompt, names_filter="blocks.0.attn.hook_z", do_sample=False)
        >>> cache["z", 0][longer.token_map.is_answer].shape[1:] == (model.cfg.n_heads, model.cfg.d_head)
        True
        """
        longer = self.continue_prompt(prompt, max_new_tokens, **options)
        with torch.no_grad():
            _, cache = self.run_with_cache(longer, names_filter=names_filter)
        return longer, cache


def before_the_end(
    hf_model: PreTrainedModel, ids: Int[Tensor, "batch step"], options: Mapping[str, Any] | None = None
) -> Bool[Tensor, "batch step"]:
    """Which generated tokens stand before the one that ends the answer; `options` are those of `generate`."""
    given = dict(options or {})
    config = given.get("generation_config") or hf_model.generation_config
    stop, padding = (given.get(name, getattr(config, name)) for name in ("eos_token_id", "pad_token_id"))
    before = torch.ones_like(ids, dtype=torch.bool)
    if padding is not None:
        # Rows that end by something else than a token, such as a text, are padded to the longest one.
        before &= (ids != padding).flip(-1).long().cumsum(-1).flip(-1) > 0
    if stop is not None:
        before &= torch.isin(ids, torch.as_tensor(stop).flatten().to(ids)).long().cumsum(-1) == 0
    return before
