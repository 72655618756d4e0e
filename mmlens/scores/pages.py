"""Pages and layouts of a document ranked for a question by the attention of some heads, without training.

The score of a page is the mean over a set of heads of the attention that the question gives to the page's tokens: the
mean over question tokens of the sum over page tokens, as in RAM. Source: arXiv 2605.27243. Its code sums over the
heads, which gives the same order, takes away what the query "N/A" gives, and shows four pages a prompt, each after its
number; its layouts are pictures cut from the pages, up to 200 a prompt, ours are boxes in the pages.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.arguments import BATCH_SIZE, flag, instance_of, text, whole_number
from mmlens.data.examples import Example, examples_of
from mmlens.data.many import ExampleStream
from mmlens.data.pages import Layout, layouts_of, with_pages
from mmlens.errors import InvalidValueError
from mmlens.heads import Heads, HeadSet, as_head_set
from mmlens.model.batches import Batches
from mmlens.model.choosing import Positions
from mmlens.model.cross_attention import refuse_cross_attention
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import UnknownWordWarning
from mmlens.scores.rows import Rows, mean_of_rows, read_rows
from mmlens.token_map import BoxMapping, mapping_of


@dataclass(frozen=True, eq=False)
class PageScores:
    """A score for each page, and each layout, of each example's document; higher is more to the question.

    `pages[i]` is [page] of example i, `layouts[i]` [layout] in the order of `layouts_of(example)`, empty where it has
    none. `page_recall` and `layout_recall` take them.
    """

    pages: tuple[Float[Tensor, " page"], ...]
    layouts: tuple[Float[Tensor, " layout"], ...]

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.pages)

    def __repr__(self) -> str:
        n_layouts = sum(map(len, self.layouts))
        return f"PageScores({len(self)} examples, {sum(map(len, self.pages))} pages, {n_layouts} layouts)"

    def __sub__(self, other: PageScores) -> PageScores:
        """These scores less others of the same documents, such as those of a null question."""
        instance_of("other", other, PageScores, "PageScores of the same examples")
        if [*map(len, self.pages + self.layouts)] != [*map(len, other.pages + other.layouts)]:
            raise InvalidValueError(f"{self} and {other} are of other documents")
        return PageScores(
            *(
                tuple(one - two for one, two in zip(mine, theirs, strict=True))
                for mine, theirs in ((self.pages, other.pages), (self.layouts, other.layouts))
            )
        )


def page_scores(
    model: HookedVLM,
    examples: Iterable[Example],
    heads: Heads,
    *,
    queries: Positions = "question",
    null_question: str | None = None,
    pages_per_prompt: int | None = None,
    layouts: bool = True,
    mapping: BoxMapping = "merged",
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> PageScores:
    """The attention of `heads` from each question to each page (image), and each layout, of its document.

    Score of a page = mean over heads and query tokens of the attention summed over the page's tokens, separators
    included; of a layout, over the tokens that its box maps to. Between 0 and 1, and not divided by the number of
    tokens. With `null_question` ("N/A" in the source) the same with that question in the question's place is taken
    away, which is what a page gets whatever is asked: a second pass.

    All pages are in one prompt, or so many as `pages_per_prompt` in each, for documents that do not fit: the scores of
    pages of several prompts are compared as they are. `layouts` scores the layouts of the examples' metadata
    (`mmlens.data.pages`); turn it off for models whose tokens have no boxes.

    Raises ValueError for examples without images, CrossAttentionError for a model that reads images by
    cross-attention, TokenMapError for a layout that no token shows, and for heads as `as_head_set`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> examples = mmlens.scene_examples("documents", 2, seed=0)
    >>> scores = page_scores(model, examples, [(3, 1), (4, 2)], progress=False)
    >>> scores, scores.pages[0].shape
    (PageScores(2 examples, 7 pages, 26 layouts), torch.Size([3]))
    """
    named = {"": as_head_set(heads, model_of(model).grid)}
    options: dict[str, Any] = {
        "queries": queries,
        "pages_per_prompt": pages_per_prompt,
        "layouts": layouts,
        "mapping": mapping,
        "batch_size": batch_size,
        "progress": progress,
    }
    if null_question is not None:
        text("null_question", null_question, "a text, or None for no null,")
    asked = page_scores_of_sets(model, examples, named, **options)[""]
    if null_question is None:
        return asked
    return asked - page_scores_of_sets(model, examples, named, other_question=null_question, **options)[""]


def page_scores_of_sets(
    model: HookedVLM,
    examples: Iterable[Example],
    head_sets: Mapping[str, Heads],
    *,
    other_question: str | None = None,
    queries: Positions = "question",
    pages_per_prompt: int | None = None,
    layouts: bool = True,
    mapping: BoxMapping = "merged",
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> dict[str, PageScores]:
    """`page_scores` of several sets of heads, by name, from one pass.

    `other_question` is asked in the place of every question: with "N/A" it gives what calibration takes away.
    """
    model = model_of(model)
    refuse_cross_attention(model)
    instance_of("head_sets", head_sets, Mapping, "a dict of sets of heads by name")
    if not head_sets:
        raise InvalidValueError("head_sets holds no set of heads: expected one at least, {name: heads}")
    sets = {name: as_head_set(heads, model.grid) for name, heads in head_sets.items()}
    if other_question is not None:
        text("other_question", other_question, "a text, or None for each example's own question,")
    if pages_per_prompt is not None:
        whole_number("pages_per_prompt", pages_per_prompt, least=1)
    flag("layouts", layouts)
    mapping_of(mapping)
    examples = examples if isinstance(examples, ExampleStream) else examples_of(examples)
    documents = _Documents(examples, other_question, pages_per_prompt, layouts)
    stream = ExampleStream(documents.prompts, "pages")
    batches = Batches(
        model, stream, batch_size, progress=progress, label="page scores", by_size=True, answers=False
    )
    with warnings.catch_warnings():
        if other_question is not None:
            # A null question asks for nothing, so its words need not be known.
            warnings.simplefilter("ignore", UnknownWordWarning)
        for _, prompt in batches:
            documents.take(prompt, _token_scores(model, prompt, queries, list(sets.values())), mapping)
    return {name: documents.scores(at) for at, name in enumerate(sets)}


# ---------------------------------------------------------------------- plumbing

_WINDOW = "window"


@dataclass(frozen=True)
class _Window:
    """What a prompt shows: pages of the document of an example, and the layouts in them by their numbers."""

    example: int
    pages: range
    layouts: list[tuple[int, Layout]]


class _Documents:
    """The prompts of documents, some pages in each, and the scores that come of them: [set] of a page or a layout."""

    def __init__(
        self, examples: Iterable[Example], question: str | None, per_prompt: int | None, layouts: bool
    ):
        self.examples, self.question = examples, question
        self.per_prompt, self.with_layouts = per_prompt, layouts
        self.pages: list[list[Tensor]] = []
        self.layouts: list[list[Tensor]] = []

    def prompts(self) -> Iterator[Example]:
        """Of every document its windows of pages."""
        self.pages, self.layouts = [], []
        for number, example in enumerate(self.examples):
            n_pages = len(example.images)
            if not n_pages:
                raise InvalidValueError(
                    f"example {example.id or number!r} has no image, and a page is an image"
                )
            layouts = layouts_of(example) if self.with_layouts else []
            self.pages.append([torch.empty(0)] * n_pages)
            self.layouts.append([torch.empty(0)] * len(layouts))
            size = self.per_prompt or n_pages
            for first in range(0, n_pages, size):
                pages = range(first, min(first + size, n_pages))
                own = [(at, layout) for at, layout in enumerate(layouts) if layout.page in pages]
                shown = with_pages(example, pages, self.question)
                yield replace(shown, metadata={_WINDOW: _Window(number, pages, own)})

    def take(self, prompt: Prompt, tokens: Float[Tensor, "batch set pos"], mapping: BoxMapping) -> None:
        """Sum the scores of a prompt's tokens over each page and layout."""
        token_map = prompt.token_map
        for row, example in enumerate(prompt.examples or ()):
            window: _Window = example.metadata[_WINDOW]
            for at, page in enumerate(window.pages):
                here = token_map.image_tokens(at, example=row)[row].cpu()
                self.pages[window.example][page] = tokens[row][:, here].sum(-1)
            for number, layout in window.layouts:
                at = layout.page - window.pages.start
                here = token_map.box(at, layout.box, example=row, mapping=mapping)[row].cpu()
                self.layouts[window.example][number] = tokens[row][:, here].sum(-1)

    def scores(self, at: int) -> PageScores:
        """Those of one set."""
        pages, layouts = (
            tuple(torch.tensor([float(each[at]) for each in own]) for own in of_all)
            for of_all in (self.pages, self.layouts)
        )
        return PageScores(pages, layouts)


def _token_scores(
    model: HookedVLM, prompt: Prompt, queries: Positions, sets: Sequence[HeadSet]
) -> Float[Tensor, "batch set pos"]:
    """Of every position the attention of the queries to it, averaged over them and over the heads of each set."""
    weights = torch.zeros(len(sets), *model.grid.shape)
    for at, heads in enumerate(sets):
        for layer, head in heads:
            weights[at, layer, head] = 1 / len(heads)
    batch, length = prompt.token_map.is_image.shape
    total = torch.zeros(batch, len(sets), length)

    def consume(layer: int, rows: Rows, real: Bool[Tensor, "batch query"]) -> None:
        mean = mean_of_rows(rows, real).float()
        of_layer = weights[:, layer, : mean.shape[1]].to(mean.device)
        total.add_(torch.einsum("sh,bhk->bsk", of_layer, mean).cpu())

    read_rows(model, prompt, queries, consume)
    return total
