"""Head scores akin to RAM that read where the question or the last token looks, and RAM's corrected forms.

Arguments and errors that the functions share with `ram` are described there; the docstrings here name what is theirs.
Where a source's code was read, "stated" is what paper or code says and "our reading" what they leave open.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.arguments import BATCH_SIZE, flag, number, one_of, shown, text
from mmlens.data.chats import exchanged
from mmlens.data.examples import Example
from mmlens.errors import InvalidValueError
from mmlens.head_scores import HeadScores
from mmlens.model.batches import Prompts
from mmlens.model.choosing import Positions
from mmlens.model.continuing import as_continued
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import UnknownWordWarning
from mmlens.scores.retrieval import attention_mass, evidence_tokens
from mmlens.scores.rows import Rows, mean_of_rows, of_layers, read_rows
from mmlens.scores.score import HeadScore, known_examples
from mmlens.scores.spans import marks_of_evidence, question_with_images
from mmlens.token_map import NO_PATCH, BoxMapping, mapping_of

NULL_QUESTION = "N/A"
"""The null query of arXiv 2506.09944, and of the text of arXiv 2605.27243."""
FIVE_NULLS = "N/A N/A N/A N/A N/A"
"""The null query of the code of arXiv 2605.27243."""

Region = Literal["evidence", "images"]
"""The evidence itself (boxes), or every token of the images that hold it."""


def null_calibrated_ram(
    model: HookedVLM,
    prompts: Prompts,
    *,
    queries: Positions = "question",
    null_question: str = NULL_QUESTION,
    choices: bool = False,
    marks: bool = False,
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """The multimodal retrieval head's score: RAM minus RAM with `null_question` in the question's place.

    What a head gives the evidence whatever is asked is taken away, so scores lie in -1 to 1. Two forward passes; the
    queries of the null prompt are the null question's own tokens, and its evidence is found in its own token map. A
    tokenizer may not know "N/A", or read it as words that are in the images: look at model.to_str_tokens("N/A") first.

    Source: arXiv 2605.27243, whose text says "N/A". Its code differs from the text, and from our defaults, in three
    ways, each with an option here; `SCORES["null_calibrated_ram"].variant("published")` takes all three:

    - null_question=FIVE_NULLS: the null query is "N/A" five times.
    - choices=True: the queries go on through the images that the question's turn shows after its text, the images to
      choose from, both when asked and under the null. Ours are the question's tokens: an image that is an answer to
      choose asks for nothing. Not for chats that show the evidence after the question.
    - marks=True: the evidence takes in the tokens that mark where an image begins and ends, where the evidence is a
      whole image. Ours is what shows the image: attention to a mark is attention to no place in it.

    Raises ValueError as `ram`, and for `choices` with other queries than the question.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("objects", 2, seed=0)
    >>> null_calibrated_ram(model, examples, null_question="?", progress=False)
    HeadScores(null-calibrated RAM: 8 layers x 8 heads, 2 examples)
    """
    text("null_question", null_question)
    choices, marks = flag("choices", choices), flag("marks", marks)
    if choices and not (isinstance(queries, str) and queries == "question"):
        raise InvalidValueError(
            "choices=True takes the images to choose from for a part of the question, and queries is "
            f"{shown(queries)}; expected 'question'"
        )
    mapping_of(mapping)

    def mass(
        model: HookedVLM, prompt: Prompt, examples: Sequence[Example]
    ) -> Float[Tensor, "batch layer head"]:
        evidence = prompt.token_map.evidence(examples, mapping=mapping)
        if marks:
            evidence = evidence | marks_of_evidence(model, prompt, examples)
        asking = question_with_images(model, prompt) if choices else queries
        return attention_mass(model, prompt, asking, evidence)

    def of_batch(model: HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head"]:
        null = as_continued(_null_prompt(model, prompt, null_question), prompt)
        examples = known_examples(prompt)
        return mass(model, prompt, examples) - mass(model, null, examples)

    score = HeadScore("null-calibrated RAM", of_batch, needs=("evidence",))
    return score(model, prompts, batch_size=batch_size, progress=progress)


def query_focused_score(
    model: HookedVLM,
    prompts: Prompts,
    *,
    queries: Positions = "question",
    null_question: str | None = NULL_QUESTION,
    cut: float | None = 2.0,
    region: Region = "images",
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """The query-focused retrieval head's score (QRHead), with the prompt's images as its documents.

    Attention to every visual token, averaged over the question's tokens, minus the same under `null_question` (None:
    no null); within each document the tokens below mean - `cut` standard deviations (of n - 1; None: no cut) are
    dropped; the rest is summed over the documents that hold evidence.

    Source: arXiv 2506.09944, formula and published code. Our reading: a document is an image (page, frame), learnt
    separators included; its query span also holds the instruction and the template's end, ours the question alone
    (queries=`question_to_end`, the variant "published", goes on to the end of the prompt). Lists of heads that are
    named NQ were ranked otherwise: `document_ndcg`.
    region="evidence" sums over the evidence's tokens only, which makes a difference where one image holds evidence and
    distractors.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("images", 2, seed=0)
    >>> query_focused_score(model, examples, null_question="?", progress=False).values.shape
    torch.Size([8, 8])
    """
    one_of("region", region, get_args(Region))
    if null_question is not None:
        text("null_question", null_question, "a text, or None for no null,")
    cut = None if cut is None else number("cut", cut, least=0)
    mapping_of(mapping)

    def of_batch(model: HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head"]:
        keys = _region_tokens(prompt, region, mapping).cpu()
        documents = documents_of(prompt)
        scores = {}
        for layer, of_layer in calibrated_attention(model, prompt, queries, null_question).items():
            rows = []
            for row, attention in enumerate(of_layer):
                is_image = prompt.token_map.is_image[row].cpu()
                rows.append(_sum_of_documents(attention, documents[row], keys[row][is_image], cut=cut))
            scores[layer] = torch.stack(rows)
        return of_layers(model, scores)

    score = HeadScore("query-focused score", of_batch, needs=("evidence",))
    return score(model, prompts, batch_size=batch_size, progress=progress)


def gaze_score(
    model: HookedVLM,
    prompts: Prompts,
    *,
    region: Region = "evidence",
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """The gaze head's score: the attention of the prompt's last token, summed over the evidence.

    Source: arXiv 2606.14703 and its code: raw mass, not divided by what all images get, on the panel that the prompt
    asks about. Our reading: the evidence is that panel; region="images" takes whole images that hold evidence.
    Heads are turned towards positions by `mmlens.bias_attention`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> scores = gaze_score(model, mmlens.scene_examples("objects", 2, seed=0), progress=False)
    >>> bool(((scores.values >= 0) & (scores.values <= 1.001)).all())
    True
    """
    one_of("region", region, get_args(Region))
    mapping_of(mapping)

    def of_batch(model: HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head"]:
        return attention_mass(model, prompt, prompt.last, _region_tokens(prompt, region, mapping))

    score = HeadScore("gaze score", of_batch, needs=("evidence",))
    return score(model, prompts, batch_size=batch_size, progress=progress)


def ram_per_token(
    model: HookedVLM,
    prompts: Prompts,
    *,
    queries: Positions = "question",
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """RAM / |V*|: the mean attention per evidence token, which no longer grows with the size of the evidence.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> ram_per_token(model, mmlens.scene_examples("frames", 2, seed=0), progress=False)
    HeadScores(RAM per token: 8 layers x 8 heads, 2 examples)
    """
    mapping_of(mapping)

    def of_batch(model: HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head"]:
        evidence = evidence_tokens(prompt, mapping)
        mass = attention_mass(model, prompt, queries, evidence)
        return mass / evidence.sum(-1).cpu()[:, None, None]

    score = HeadScore("RAM per token", of_batch, needs=("evidence",))
    return score(model, prompts, batch_size=batch_size, progress=progress)


# ---------------------------------------------------------------------- plumbing


def _null_prompt(model: HookedVLM, prompt: Prompt, null_question: str) -> Prompt:
    """The null question in the question's place, and the same chat besides."""
    if prompt.messages is None:
        raise InvalidValueError(
            "the prompt does not hold its chats, in which a null question takes the question's place: make it with "
            "model.prompt_examples(examples)"
        )
    chats = [exchanged(messages, question=null_question) for messages in prompt.messages]
    with warnings.catch_warnings():
        # A null question asks for nothing, so its words need not be known.
        warnings.simplefilter("ignore", UnknownWordWarning)
        return model.prompt(chats, **prompt.options)


def _attention_to_images(
    model: HookedVLM, prompt: Prompt, queries: Positions
) -> dict[int, list[Float[Tensor, "head image_token"]]]:
    """Layer -> for each example, the queries' mean attention to every visual token in prompt order."""
    read: dict[int, list[Tensor]] = {}

    def consume(layer: int, rows: Rows, real: Bool[Tensor, "batch query"]) -> None:
        mean = mean_of_rows(rows, real).cpu()
        read[layer] = [mean[row][:, prompt.token_map.is_image[row].cpu()] for row in range(len(mean))]

    read_rows(model, prompt, queries, consume)
    return read


def calibrated_attention(
    model: HookedVLM, prompt: Prompt, queries: Positions, null_question: str | None
) -> dict[int, list[Float[Tensor, "head image_token"]]]:
    """Layer -> for each example, the queries' mean attention to every visual token minus that of the null question."""
    null = None if null_question is None else _null_prompt(model, prompt, null_question)
    asked = _attention_to_images(model, prompt, queries)
    if null is None:
        return asked
    unasked = _attention_to_images(model, as_continued(null, prompt), queries)
    return {
        layer: [one - other for one, other in zip(of_layer, unasked[layer], strict=True)]
        for layer, of_layer in asked.items()
    }


def documents_of(prompt: Prompt) -> list[Int[Tensor, " image_token"]]:
    """Of each visual token of each example, the number of its image, those of videos after all images."""
    token_map, found = prompt.token_map, []
    for image, video, is_image in zip(
        token_map.image.cpu(), token_map.video.cpu(), token_map.is_image.cpu(), strict=True
    ):
        n_images = int(image.max()) + 1
        found.append(torch.where(video == NO_PATCH, image, n_images + video)[is_image])
    return found


def sum_of_document(
    attention: Float[Tensor, "head token"], cut: float | None, keys: Bool[Tensor, " token"] | None = None
) -> Float[Tensor, " head"]:
    """Sum over a document's tokens (`keys` of them), those below mean - `cut` standard deviations left out."""
    if cut is not None and attention.shape[1] > 1:
        low = attention.mean(-1, keepdim=True) - cut * attention.std(-1, keepdim=True)
        attention = attention.masked_fill(attention < low, 0)
    return (attention if keys is None else attention * keys).sum(-1)


def _sum_of_documents(
    attention: Float[Tensor, "head image_token"],
    document: Int[Tensor, " image_token"],
    keys: Bool[Tensor, " image_token"],
    *,
    cut: float | None,
) -> Float[Tensor, " head"]:
    total = attention.new_zeros(len(attention))
    for page in document[keys].unique().tolist():
        inside = document == page
        total += sum_of_document(attention[:, inside], cut, keys[inside])
    return total


def _region_tokens(prompt: Prompt, region: Region, mapping: BoxMapping) -> Bool[Tensor, "batch pos"]:
    if region == "evidence":
        return evidence_tokens(prompt, mapping)
    images = [
        [replace(part, frames=None, box=None) for part in example.evidence]
        for example in known_examples(prompt)
    ]
    return prompt.token_map.evidence(images)
