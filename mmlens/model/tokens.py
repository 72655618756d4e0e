"""Text to tokens and back, as TransformerLens' tools ask a model for it; visual positions by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mmlens.arguments import listed, shown, text, whole_number
from mmlens.arguments import texts as _texts
from mmlens.errors import InvalidTypeError, InvalidValueError, OutOfRangeError
from mmlens.model.linear import n_embeddings
from mmlens.model.loading import input_device
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_answers import check_known


class TokenMethods:
    """`to_tokens` and its relatives; a part of HookedVLM.

    >>> import mmlens
    >>> from mmlens.data.scenes import scene_examples
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> example = scene_examples("objects", 1, seed=0)[0]
    >>> labels = model.to_str_tokens(model.prompt(example.question, images=example.images))
    >>> [label for label in labels if label.startswith("<img0")][:2]
    ['<img0 r0c0>', '<img0 r0c1>']
    """

    hf_model: PreTrainedModel
    tokenizer: Any

    def to_tokens(
        self,
        input: str | Sequence[str] | Prompt,
        prepend_bos: bool | None = None,
        padding_side: str = "left",
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of plain text (no chat template), or of a prompt.

        `prepend_bos` None leaves special tokens to the tokenizer, False adds none, True puts its start token in
        front and adds no other. In a prompt's ids every visual position has an id of its own, from the
        size of the embedding upwards: two patches are not the same token, as `duplicate_token_head` would have it.
        The model does not run on such ids (give it the prompt); the plain ones are `prompt.inputs["input_ids"]`.

        Raises ValueError without a tokenizer, and where a start or padding token is needed and there is none.
        """
        if isinstance(input, Prompt):
            ids = input.inputs["input_ids"]
            is_image = input.token_map.is_image.to(ids.device)
            n_known = n_embeddings(self.hf_model.get_input_embeddings())
            return torch.where(is_image, n_known + is_image.cumsum(1) - 1, ids)
        tokenizer = self._tokenizer()
        given = (
            [input]
            if isinstance(input, str)
            else _texts("input", input, "a text, a list of texts or a Prompt", least=1)
        )
        if prepend_bos and tokenizer.bos_token is None:
            raise InvalidValueError("prepend_bos=True, but the tokenizer has no start token")
        if len(given) > 1 and tokenizer.pad_token_id is None:
            raise InvalidValueError("several texts need padding, but the tokenizer has no pad_token")
        encoded = tokenizer(
            [tokenizer.bos_token + one for one in given] if prepend_bos else given,
            add_special_tokens=prepend_bos is None,
            padding=len(given) > 1,
            padding_side=padding_side,
            return_tensors="pt",
        )
        return encoded["input_ids"].to(input_device(self.hf_model))

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token; ValueError where it is several, or not known to the tokenizer."""
        text("string", string)
        ids = self.to_tokens(string, prepend_bos=False)[0].tolist()
        if len(ids) != 1:
            raise InvalidValueError(
                f"{string!r} is {len(ids)} tokens, not one: {self.to_str_tokens(string, prepend_bos=False)}"
            )
        check_known(self._tokenizer(), string, ids)
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        int_token = whole_number("int_token", int_token, least=0, most=len(self._tokenizer()) - 1)
        return self._tokenizer().decode([int_token])

    def to_string(self, tokens: Sequence[int] | Int[Tensor, "*shape"]) -> str | list[str]:
        """The text of token ids [pos], or one text per row of [batch, pos]."""
        ids = self._checked_ids("tokens", tokens)
        if ids.ndim > 2:
            raise InvalidValueError(f"token ids are [pos] or [batch, pos], not {tuple(ids.shape)}")
        return (
            self._tokenizer().decode(ids.reshape(-1)) if ids.ndim < 2 else self._tokenizer().batch_decode(ids)
        )

    def to_str_tokens(
        self,
        input: str | Sequence[str] | Int[Tensor, "*shape"] | np.ndarray | Prompt,
        prepend_bos: bool | None = None,
        *,
        example: int = 0,
    ) -> list[str] | list[list[str]]:
        """Each token as text; of a prompt, the tokens of one example, visual positions as "<img0 r2c3>".

        Raises ValueError for ids of more than one row.
        """
        if isinstance(input, Prompt):
            labels = input.token_map.labels(example)
            texts = self._each(input.inputs["input_ids"][example].tolist())
            return [text if label is None else label for text, label in zip(texts, labels, strict=True)]
        if isinstance(input, (str, Tensor, np.ndarray)):
            ids = (
                self.to_tokens(input, prepend_bos)[0]
                if isinstance(input, str)
                else self._checked_ids("input", input)
            )
            if ids.ndim > 1 and len(ids) > 1:
                raise InvalidValueError(f"to_str_tokens takes one row of token ids, not {tuple(ids.shape)}")
            return self._each(ids.reshape(-1).tolist())
        given = _texts("input", input, "a text, a list of texts, one row of token ids or a Prompt", least=1)
        return [self._each(self.to_tokens(one, prepend_bos)[0].tolist()) for one in given]

    def to_text(self, token_ids: Tensor) -> list[str]:
        """Decode a batch of token ids, special tokens left out."""
        token_ids = self._checked_ids("token_ids", token_ids)
        return [text.strip() for text in self._tokenizer().batch_decode(token_ids, skip_special_tokens=True)]

    def _checked_ids(self, name: str, value: object) -> Tensor:
        """Token ids, each of which the tokenizer has."""
        expected = "token ids, whole numbers"
        given = value if isinstance(value, (Tensor, np.ndarray)) else listed(name, value, expected)
        try:
            ids = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError):
            raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}") from None
        if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
            raise InvalidTypeError(f"{name} is {shown(value)}; expected {expected}")
        # Embeddings are often padded beyond what the tokenizer has.
        n_known = max(len(self._tokenizer()), n_embeddings(self.hf_model.get_input_embeddings()))
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n_known:
            raise OutOfRangeError(f"{name} is {shown(value)}; expected token ids from 0 to {n_known - 1}")
        return ids

    def _each(self, ids: list[int]) -> list[str]:
        return self._tokenizer().batch_decode([[token] for token in ids])

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InvalidValueError(
                "this HookedVLM has no tokenizer; pass a processor: HookedVLM(hf_model, processor)"
            )
        return self.tokenizer
