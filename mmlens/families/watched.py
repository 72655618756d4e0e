"""A processor's call, and which characters of its text became which token.

Processors put many tokens in the place of an image's placeholder, and some write more around it. The processor is
watched while it does: what it put where, and which characters of the result its tokenizer made into which token. From
both follow the characters of the text that the caller gave.
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import BatchFeature, ProcessorMixin

Characters = Int[np.ndarray, "token 2"]
"""(start, stop) of the characters of each token in the text that was given; (-1, -1) where it is of none of them."""

NOWHERE = -1


class _Replaced(NamedTuple):
    """Texts before a processor put tokens for images into them, and what it put where."""

    texts: list[str]
    replacements: list[list[dict[str, Any]]]


class _Record:
    def __init__(self) -> None:
        self.replaced: list[_Replaced] = []
        self.tokenized: list[tuple[list[str], Any]] = []


@functools.cache
def _watched_processor(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    def get_text_with_replacements(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        before = list(text)
        made = processor_class.get_text_with_replacements(self, text, *args, **kwargs)
        self.watch_record.replaced.append(_Replaced(before, made[1]))
        return made

    changed = {
        "get_text_with_replacements": get_text_with_replacements,
        "__module__": processor_class.__module__,
    }
    return type(processor_class.__name__, (processor_class,), changed)


@functools.cache
def _watched_tokenizer(tokenizer_class: type) -> type:
    def __call__(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        encoded = tokenizer_class.__call__(self, text, *args, **kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        self.watch_record.tokenized.append((texts, encoded))
        return encoded

    return type(
        tokenizer_class.__name__,
        (tokenizer_class,),
        {"__call__": __call__, "__module__": tokenizer_class.__module__},
    )


def watched(
    processor: ProcessorMixin, text: Sequence[str], **options: Any
) -> tuple[BatchFeature, list[Characters]]:
    """What `processor(text=text, **options)` gives, and for each position of each row its characters of `text`.

    A token that the processor put in an image's place has the characters of the placeholder; padding, and what the
    processor added by itself, has none. Options ask for tensors, and the tokenizer is a fast one.
    """
    record = _Record()
    tokenizer = copy.copy(processor.tokenizer)
    tokenizer_class: Any = type(processor.tokenizer)
    tokenizer.__class__ = _watched_tokenizer(tokenizer_class)
    twin: Any = copy.copy(processor)
    processor_class: Any = type(processor)
    twin.__class__ = _watched_processor(processor_class)
    twin.tokenizer = tokenizer
    twin.watch_record = tokenizer.watch_record = record
    encoded = twin(text=list(text), **options)
    add_special_tokens = options.get("add_special_tokens", True)
    return encoded, [
        _characters(processor, record, encoded, row, given, add_special_tokens)
        for row, given in enumerate(text)
    ]


def _characters(
    processor: ProcessorMixin,
    record: _Record,
    encoded: Mapping[str, Any],
    row: int,
    text: str,
    add_special_tokens: bool,
) -> Characters:
    ids = encoded["input_ids"][row].tolist()
    if len(record.tokenized) == 1 and len(record.replaced) <= 1:
        texts, tokens = record.tokenized[0]
        own = tokens.encodings[row] if tokens.encodings and len(texts) == len(encoded["input_ids"]) else None
        if own is not None and own.ids == ids:
            offsets = np.array(own.offsets, dtype=np.int64).reshape(-1, 2)
            # Where nothing was recorded, the processor wrote the images' tokens in a way of its own.
            before, replacements = texts[row], None
            if record.replaced and len(record.replaced[0].replacements) == len(texts):
                before, replacements = record.replaced[0].texts[row], record.replaced[0].replacements[row]
            found = _through(offsets, texts[row], before, replacements, text)
            if found is not None:
                return found
    return _by_tokens(processor, ids, text, add_special_tokens)


def _through(
    offsets: Int[np.ndarray, "token 2"],
    expanded: str,
    before: str,
    replacements: list[dict[str, Any]] | None,
    text: str,
) -> Characters | None:
    """Characters of the expanded text as those of the text given; None where what was done between is not known."""
    has_any = offsets[:, 1] > offsets[:, 0]
    if expanded == text and not replacements:
        return np.where(has_any[:, None], offsets, NOWHERE)
    where = np.full((len(expanded) + 1, 2), NOWHERE)
    """Of each character of the expanded text: the characters of `text` that it stands for."""
    in_text = _in_text(before, text)
    if in_text is None:
        return None
    # Of each character of `before`, the characters of `text`.
    plain = np.stack([in_text, np.where(in_text >= 0, in_text + 1, NOWHERE)], axis=1)
    last = new_last = 0
    for each in replacements or ():
        (start, stop), (new_start, new_stop) = each["span"], each["new_span"]
        where[new_last:new_start] = plain[last:start]
        known = in_text[start:stop]
        if (known >= 0).all():
            where[new_start:new_stop] = known[0], known[-1] + 1
        last, new_last = stop, new_stop
    if len(expanded) - new_last != len(before) - last:
        return None
    where[new_last : len(expanded)] = plain[last:]
    found = np.stack([where[offsets[:, 0], 0], where[np.maximum(offsets[:, 1] - 1, 0), 1]], axis=1)
    # Of some tokens the processor wrote a part, such as the space before a word.
    for token in np.flatnonzero(has_any & (found < 0).any(1)):
        inside = where[offsets[token, 0] : offsets[token, 1]]
        inside = inside[inside[:, 0] >= 0]
        found[token] = (inside[0, 0], inside[-1, 1]) if len(inside) else NOWHERE
    return np.where(has_any[:, None], found, NOWHERE)


def _in_text(before: str, text: str) -> Int[np.ndarray, " character"] | None:
    """Of each character of a text that the processor laid out, its character of the text given; -1: of none."""
    found = np.full(len(before), NOWHERE)
    start = before.find(text)
    if start >= 0:
        found[start : start + len(text)] = np.arange(len(text))
        return found
    # Images may have been moved to the front, or text written around them: what follows the last is the same.
    matcher = difflib.SequenceMatcher(None, before, text, autojunk=False)
    for block in matcher.get_matching_blocks():
        found[block.a : block.a + block.size] = np.arange(block.b, block.b + block.size)
    is_known = np.array([character.isspace() for character in text], dtype=bool)
    is_known[found[found >= 0]] = True
    return found if is_known.all() else None


def _by_tokens(processor: ProcessorMixin, ids: list[int], text: str, add_special_tokens: bool) -> Characters:
    """Characters of each token where the processor wrote its tokens in a way of its own.

    The text is tokenized with its placeholders, and its tokens are found among the ids, in order: between them stand
    only those of images.
    """
    plain = processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens)
    own, offsets = plain["input_ids"], np.array(plain["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    found: Characters = np.full((len(ids), 2), NOWHERE)
    for block in difflib.SequenceMatcher(None, ids, own, autojunk=False).get_matching_blocks():
        found[block.a : block.a + block.size] = offsets[block.b : block.b + block.size]
    found[found[:, 1] <= found[:, 0]] = NOWHERE
    return found
