"""What a model runs on: a Prompt, the Hugging Face model's keyword inputs, or token ids of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from mmlens import internals
from mmlens.data.examples import Example, chats_of_examples, examples_of
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.families.record import Family
from mmlens.model import loading
from mmlens.model.fingerprints import processor_fingerprint
from mmlens.model.linear import n_embeddings
from mmlens.model.prompt import Prompt, prompt_of
from mmlens.model.prompt_answers import with_answers
from mmlens.model.prompt_making import make_prompt, prompt_from_inputs
from mmlens.model.run_state import RunState
from mmlens.model.visual import VisualPositions
from mmlens.token_map import TokenMapError

Inputs = Prompt | Mapping[str, Any]

EXPECTED = "a Prompt (model.prompt(question, images)), the model's keyword inputs, or token ids of text"


class InputMethods:
    """`prompt` and its relatives, and what every kind of inputs is as keywords; a part of HookedVLM."""

    hf_model: PreTrainedModel
    family: Family
    processor: Any
    tokenizer: Any
    visual: VisualPositions
    run_state: RunState
    prompt_options: dict[str, Any]
    """Options of every prompt, of the chat template or the processor, beneath those that a prompt is given."""

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return loading.input_device(self.hf_model)

    def prompt(
        self,
        messages: Any,
        images: Iterable[Any] | None = (),
        *,
        question: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Prompt:
        """Model inputs and token map for a question and its images, for a chat, or for a batch: a list of either.

        A chat is a list of messages in transformers' format, {"role": ..., "content": ...} with content a text or a
        list of parts: {"type": "text", "text": ...}, {"type": "image", "image": PIL image, path or array}, or
        {"type": "image"} with its image given in `images`, or {"type": "video", "video": path, array or list of
        frames}, with "fps" the rate of the frames that are given (`mmlens.data.Video`). Where the last message is the
        assistant's it is the beginning of the answer, which the model continues. Of a plain question, images stand
        before it. The processor's own chat template writes all of it, and what it drops, doubles or moves is an error
        or a warning.

        The question of a chat is the text of its last user turn, or `question`, a text in it. `options` are variables
        of the chat template (`tools`, `enable_thinking` ...) and options of the processor (`max_pixels` ...). Images
        are shown upright, as their EXIF data say, and laid over white where they are transparent; what cannot be shown
        without a choice of yours, such as one of several frames, raises PromptError.

        >>> import mmlens
        >>> model = mmlens.HookedVLM.from_pretrained("micro")
        >>> prompt = model.prompt([{"role": "user", "content": "What colour is the letter K ?"}])
        >>> prompt.positions(text="letter K").sum().item()
        2
        """
        return make_prompt(
            *self._prompt_makers("prompts"),
            messages,
            images,
            question=question,
            device=self.device,
            video_layout=self.family.video_layout,
            **{**self.prompt_options, **options},
        )

    def prompt_from_inputs(
        self,
        inputs: Mapping[str, Tensor],
        images: Sequence[Any] | None = (),
        *,
        videos: Sequence[Any] | None = (),
        text: str | Sequence[str] | None = None,
        question: str | Sequence[str | None] | None = None,
        examples: Iterable[Example] | None = None,
    ) -> Prompt:
        """A prompt of inputs that your own call of the processor has given (`mmlens.model.prompt_from_inputs`).

        `examples` are what the call was about, one for each prompt: with their evidence and answers, and with their
        images and questions where these are left out.
        """
        makers = self._prompt_makers("inputs")
        batch = None if examples is None else examples_of(examples)
        if batch is not None:
            images = images or [list(example.images) for example in batch]
            of_each = [list(example.videos) for example in batch]
            videos = videos or (of_each[0] if len(batch) == 1 else of_each)
            question = question or [example.question or None for example in batch]
        made = prompt_from_inputs(
            *makers,
            inputs,
            images,
            videos=videos,
            text=text,
            question=question,
            video_layout=self.family.video_layout,
        )
        if batch is None:
            return made.to(self.device)
        return with_answers(made.to(self.device), self.processor, batch)

    def _prompt_makers(self, what: str) -> tuple[Any, Any]:
        """The processor and the layout of images, which prompts are made by."""
        if self.processor is None:
            raise InvalidValueError(
                "this HookedVLM has no processor; pass one: HookedVLM(hf_model, processor)"
            )
        if self.family.layout is None:
            raise TokenMapError(
                f"{what} of {self.family.model_type!r} have no token map: {self.family.no_layout}. Run the model on "
                "what its processor gives: model(**inputs)"
            )
        return self.processor, self.family.layout

    def prompt_examples(
        self, examples: Iterable[Example], answer_start: str | None = None, **options: Any
    ) -> Prompt:
        """A batch of examples as a prompt that also carries their answers and candidates for the metrics.

        Metrics of the next token look for an answer's first token as it follows the prompt. `answer_start` says what
        stands between the two: None for the space that the model's chat template writes there, if it does
        ("ASSISTANT: yes"), "" or " " to choose; the prompt's repr shows the token. `options` are those of `prompt`.
        Raises PromptError for an answer or candidate that the tokenizer does not know.
        """
        batch = examples_of(examples)
        prompt = self.prompt(*chats_of_examples(batch), **options)
        return with_answers(prompt, self.processor, batch, answer_start)

    @torch.no_grad()
    def encode_images(self, prompt: Prompt) -> Prompt:
        """The same prompt with the vision tower and projector already run: language-side runs then repeat neither.

        Logits are the same to the bit. Hooks on vision.* and projector.* no longer fire, which is an error where
        one is set. A prompt without images comes back as it is, and so does every prompt of a family whose tower
        transformers does not run apart (Mllama, BLIP-2, DeepSeek-VL ...): its runs repeat it. So does one with videos.
        Raises UnsupportedError for a prompt that holds what no token map knows, such as audio.
        """
        inputs = self._keyword_inputs(prompt_of(prompt), {})
        given = None
        if prompt.image_features is None and not any(prompt.token_map.videos):
            given = internals.image_tower_inputs(self.hf_model, self.processor, inputs)
        if given is None:
            return prompt
        encode = partial(self.hf_model.get_image_features, **given, return_dict=True)
        features = self.run_state.at_work_on(prompt, inputs).around(encode)
        # The pixels alone have gone into the features; grids and sizes are read once more beside them.
        kept = {
            name: value
            for name, value in inputs.items()
            if name not in given or not internals.holds_pixels(value)
        }
        return replace(prompt.to(self.device), inputs=kept, image_features=features, encoded=prompt.vision)

    def image_mask(self, inputs: Inputs) -> Bool[Tensor, "batch pos"] | None:
        """Which positions of the inputs are visual; None where the family's text has no visual positions.

        Raises UnsupportedError for inputs that hold what no token map knows, such as audio.
        """
        return self.visual.mask(self._keyword_inputs(inputs, {})) if self.visual.exist else None

    def _keyword_inputs(self, inputs: Inputs | Tensor | None, more: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of any kind as the Hugging Face model's keywords, with `more` of them."""
        if inputs is None:
            if not any(isinstance(value, Tensor) for value in more.values()):
                raise InvalidTypeError(f"no inputs given: expected {EXPECTED}")
            return dict(more)
        if isinstance(inputs, Prompt):
            self.visual.check(inputs.inputs, "its token map")
            self._check_processor(inputs)
            return {
                **inputs.to(self.device).inputs,
                **internals.encoded_images(inputs.image_features),
                **more,
            }
        if isinstance(inputs, Mapping):
            return {**inputs, **more}
        if isinstance(inputs, Tensor):
            return {**self._text_inputs(inputs), **more}
        raise InvalidTypeError(f"inputs are {EXPECTED}, not {type(inputs).__name__}")

    def _text_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Keyword inputs for token ids [batch, pos] of plain text; padding before a row's first token is masked."""
        ids = (ids[None] if ids.ndim == 1 else ids).to(self.device)
        if ids.is_floating_point():
            raise InvalidTypeError(f"token ids are integers, not {ids.dtype}")
        self.visual.check({"input_ids": ids}, "a run on token ids alone")
        n_known = n_embeddings(self.hf_model.get_input_embeddings())
        if int(ids.max()) >= n_known or any(bool((ids == each).any()) for each in self.visual.token_ids):
            raise InvalidValueError(
                "token ids alone bring no image, and these have visual positions: pass the prompt itself "
                "(model.prompt(question, images)), or to an analysis tool its cache"
            )
        pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
        real = torch.ones_like(ids) if pad is None else ((ids != pad).cumsum(1) > 0).long()
        return {"input_ids": ids, "attention_mask": real}

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
