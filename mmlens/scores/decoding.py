"""What heads look at while an answer is decoded: the retrieval head's copy score and the visual (OCR) head's score.

Both count, per generated token, the one key that a head attends to most. The answer is generated greedily by the
model's own `generate`; of every layer's pattern only the row of the newest position is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.arguments import BATCH_SIZE, listed, shown, texts, whole_number
from mmlens.data.examples import Evidence, Example, regions_of
from mmlens.errors import InvalidTypeError, InvalidValueError, StateError
from mmlens.head_scores import HeadScores
from mmlens.model.answering import before_the_end
from mmlens.model.batches import Batches, Prompts
from mmlens.model.choosing import covered_by
from mmlens.model.evaluation import check_same_twice
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt
from mmlens.scores.retrieval import region_tokens
from mmlens.scores.score import HeadScore, known_examples
from mmlens.token_map import BoxMapping, mapping_of

MAX_NEW_TOKENS = 8

Credit = Callable[[int, int], dict[int, float]]
"""(batch row, generated token id) -> what a head earns whose argmax key is that position."""

_Pairs = list[tuple[str, Sequence[Evidence]]]


def copy_score(
    model: HookedVLM,
    prompts: Prompts,
    *,
    needles: Sequence[str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> HeadScores:
    """The retrieval head's copy score: how much of the needle a head copies into the answer.

    Per decoding step, +1 / (tokens of the needle) where the key with most of the head's attention lies in the needle
    AND holds the token that is generated at that step; summed over the steps before the end of the answer.

    Source: arXiv 2404.15574 and its code, which counts only examples that are answered right: pass such. The second
    condition compares tokens, so it has a meaning only for needles of text: an image token holds no token id.
    `needles` are texts in the examples' questions, one each; None takes the answers. Every needle must stand in its
    question exactly once, as whole words. For evidence in images take `visual_head_score`.

    Raises ValueError for no examples, another number of needles, and a needle that its question holds not once.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("text_recall", 2, seed=0)
    >>> copy_score(model, examples, progress=False)
    HeadScores(copy score: 8 layers x 8 heads, 2 examples)
    """
    whole_number("max_new_tokens", max_new_tokens, least=1)
    batches = Batches(model, prompts)
    examples = known_examples(batches)
    own = (
        [example.answer for example in examples]
        if needles is None
        else texts("needles", needles, "a list of texts, one for each example")
    )
    if len(own) != len(examples):
        raise InvalidValueError(f"{len(own)} needles for {len(examples)} examples: one text each")
    spans = [_needle_span(example, needle) for example, needle in zip(examples, own, strict=True)]

    def of_batch(
        model: HookedVLM, prompt: Prompt, spans: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "batch layer head"]:
        positions = [_question_positions(prompt, row, span) for row, span in enumerate(spans)]

        def credit(row: int, token: int) -> dict[int, float]:
            ids = prompt.inputs["input_ids"][row]
            return {at: 1 / len(positions[row]) for at in positions[row] if int(ids[at]) == token}

        return _decoded_credit(model, prompt, max_new_tokens, credit)

    score = HeadScore("copy score", of_batch)
    prompts, of_example = batches.prompts, {"spans": spans}
    return score(model, prompts, batch_size=batch_size, progress=progress, of_example=of_example)


def visual_head_score(
    model: HookedVLM,
    prompts: Prompts,
    *,
    words: Sequence[Sequence[tuple[str, Evidence]]] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """The visual (OCR) head's score: does a head look at the place in the image that shows the word it helps to say.

    Per generated token whose text stands in exactly one of the example's words: +1 / (tokens of that word's region)
    where the key with most of the head's attention lies in the region; summed over the steps before the end.

    Source: arXiv 2506.05344 (SparseMM) and its code: (word, box) pairs of rendered text, decoded tokens matched as
    substrings of words; tokens of white space alone match nothing here. `words` gives every example's pairs. None, our
    reading where an example has evidence and no transcript, is one pair: the answer, at all of the example's evidence.
    The 1 / tokens favours small regions; examples of one size are compared without it.

    Raises ValueError for examples without evidence or another number of `words`; TokenMapError for a region that maps
    to no token.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> visual_head_score(model, mmlens.scene_examples("documents", 2, seed=0), progress=False)
    HeadScores(visual head score: 8 layers x 8 heads, 2 examples)
    """
    whole_number("max_new_tokens", max_new_tokens, least=1)
    mapping_of(mapping)
    of_example: dict[str, list[_Pairs]] = {}
    if words is not None:
        pairs = [_word_pairs(f"words[{at}]", own) for at, own in enumerate(listed("words", words, _WORDS))]
        batches = Batches(model, prompts)
        if len(pairs) != batches.n_examples:
            raise InvalidValueError(f"words for {len(pairs)} examples, but there are {batches.n_examples}")
        prompts, of_example = batches.prompts, {"words": pairs}

    def of_batch(
        model: HookedVLM, prompt: Prompt, words: Sequence[_Pairs] | None = None
    ) -> Float[Tensor, "batch layer head"]:
        if words is None:
            words = [[(example.answer, example.evidence)] for example in known_examples(prompt)]
        regions = [
            [(word, region_tokens(prompt, row, at, mapping).nonzero().flatten().tolist()) for word, at in own]
            for row, own in enumerate(words)
        ]

        def credit(row: int, token: int) -> dict[int, float]:
            said = model.to_text(torch.tensor([[token]]))[0].strip()
            matching = [positions for word, positions in regions[row] if said and said in word]
            return {at: 1 / len(matching[0]) for at in matching[0]} if len(matching) == 1 else {}

        return _decoded_credit(model, prompt, max_new_tokens, credit)

    score = HeadScore("visual head score", of_batch, needs=("evidence",))
    return score(model, prompts, batch_size=batch_size, progress=progress, of_example=of_example)


@torch.no_grad()
def _decoded_credit(
    model: HookedVLM, prompt: Prompt, max_new_tokens: int, credit: Credit
) -> Float[Tensor, "batch layer head"]:
    """The credit of each step's argmax key, summed over the steps of the answer."""
    ids, attended = _decode(model, prompt, max_new_tokens)
    total = model.grid.full(len(prompt), fill=0)
    answering = before_the_end(model.hf_model, ids)
    for row in range(len(ids)):
        for step in range(int(answering[row].sum())):
            for position, earned in credit(row, int(ids[row, step])).items():
                for layer, keys in attended.items():
                    total[row, layer, : keys.shape[2]] += earned * (keys[step, row] == position)
    return total


def _decode(
    model: HookedVLM, prompt: Prompt, max_new_tokens: int
) -> tuple[Int[Tensor, "batch step"], dict[int, Int[Tensor, "step batch head"]]]:
    """The greedily generated tokens, and for every layer the key that each head attends to most at each step."""
    check_same_twice(model.hf_model)
    length = prompt.shape[1]
    attended: dict[int, list[Tensor]] = {layer: [] for layer in model.attention_layers}

    def keep(pattern: Tensor, hook: Any) -> None:
        attended[hook.layer()].append(pattern[:, :, -1].argmax(-1).cpu())

    stated: Any = keep
    # The rows before the prompt's last position are then never made.
    stated.first_position = length - 1
    hooks = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in attended]
    with model.hooks(fwd_hooks=hooks):
        ids = model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)[:, length:].cpu()
    read = {layer: torch.stack(steps) for layer, steps in attended.items()}
    counts = {len(steps) for steps in read.values()}
    if counts != {ids.shape[1]}:
        raise StateError(f"{ids.shape[1]} tokens were generated, but the patterns were read {counts} times")
    return ids, read


_WORDS = "a list of (word, Evidence) pairs for each example"


def _word_pairs(name: str, value: object) -> _Pairs:
    pairs: _Pairs = []
    for pair in listed(name, value, _WORDS):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InvalidTypeError(
                f"{name} holds {shown(pair)}; expected (word, Evidence): words is {_WORDS}"
            )
        pairs.append((pair[0], regions_of(name, [pair[1]])))
    return pairs


def _needle_span(example: Example, needle: str) -> tuple[int, int]:
    """Where the needle stands in the question: characters (start, stop)."""
    found = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(needle)}(?!\w)", example.question)]
    if not needle.strip() or len(found) != 1:
        raise InvalidValueError(
            f"example {example.id!r}: its question holds the needle {needle!r} {len(found)} times as whole words, "
            f"expected once: {example.question!r}"
        )
    return found[0]


def _question_positions(prompt: Prompt, row: int, span: tuple[int, int]) -> list[int]:
    """Positions of the tokens that cover a span of the question."""
    text, question = prompt.text[row], prompt.questions[row]
    if prompt.offsets is None or text.count(question.strip()) < 1:
        raise InvalidValueError(f"the question {question!r} was not found in the prompt: {text!r}")
    shift = len(question) - len(question.lstrip())
    start, stop = (text.rindex(question.strip()) + at - shift for at in span)
    covered = covered_by(prompt.offsets[row], start, stop)
    return (covered & prompt.token_map.is_question[row]).nonzero().flatten().tolist()
