"""What a head score is: a function of one batch of prompts, what it needs of them, and the one loop that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from mmlens.arguments import BATCH_SIZE, called, one_of, text
from mmlens.data.examples import Example
from mmlens.errors import InvalidValueError
from mmlens.head_scores import HeadScores
from mmlens.model.batches import Batches, Prompts, in_order
from mmlens.model.cross_attention import refuse_cross_attention
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt

Need = Literal["evidence", "images", "answer"]
"""Evidence or images in every example, at positions of the prompt; answers that the tokenizer knows."""

_LACKS = {
    "evidence": "have no evidence (text-only controls have none)",
    "images": "have no image, and the score needs one",
}


@dataclass(frozen=True)
class HeadScore:
    """A score of heads: `of_batch` gives what each head gets for the examples of one batch.

    `of_batch(model, prompt, **options)` gives a tensor [batch, layer, head], NaN where the model has no head; the
    examples are `prompt.examples`. `title` is what HeadScores of it are called, `label` what a table calls it beside
    others (left out: the title), `source` where it comes from, `needs` what is checked of the prompts before any runs.
    A score that compares examples has `of_all(values, **options)` too, which makes the scores [example, layer, head]
    of what the batches gave, whose further axes may then be any.

    Called with a model and prompts it gives HeadScores, in the order given; images of like size share a batch.
    `mmlens.scores.SCORES` holds those that there are: an entry there is all that a new one takes.

    >>> import mmlens
    >>> def last_to_images(model, prompt):
    ...     return mmlens.attention_mass(model, prompt, prompt.last, prompt.token_map.is_image)
    >>> look = HeadScore("look", last_to_images, needs=("images",))
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> look(model, mmlens.scene_examples("objects", 2, seed=0), progress=False)
    HeadScores(look: 8 layers x 8 heads, 2 examples)
    """

    title: str
    of_batch: Callable[..., Tensor]
    label: str = ""
    source: str = ""
    needs: tuple[Need, ...] = ()
    of_all: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        text("title", self.title)
        called(
            "of_batch", self.of_batch, "a function (model, prompt, **options) that gives [batch, layer, head]"
        )
        object.__setattr__(self, "label", self.label or self.title)
        for need in self.needs:
            one_of("need", need, get_args(Need))

    def __call__(
        self,
        model: HookedVLM,
        prompts: Prompts,
        *,
        batch_size: int = BATCH_SIZE,
        progress: bool = True,
        of_example: Mapping[str, Sequence[Any]] | None = None,
        **options: Any,
    ) -> HeadScores:
        """The score of every head on every example; `of_example` are options with a value for each of them."""
        batches = score_batches(model, prompts, self.needs, batch_size, progress, self.title)
        parts: list[tuple[list[int], Tensor]] = []
        for index, prompt in batches:
            own = {name: [values[at] for at in index] for name, values in (of_example or {}).items()}
            parts.append((index, self.of_batch(model, prompt, **options, **own)))
        found = in_order(parts)
        scores = found if self.of_all is None else self.of_all(found, **options)
        return HeadScores(scores, self.title, batches.kinds, model.grid)


def score_batches(
    model: HookedVLM, prompts: Prompts, needs: Sequence[Need], batch_size: int, progress: bool, label: str
) -> Batches:
    """The batches of a score, once all that it takes has been checked; images of like size share one.

    Raises ValueError for examples without evidence or images where these are needed (named), and prompts that do not
    know their examples; CrossAttentionError where the model's images are at no position.
    """
    if _LACKS.keys() & set(needs):
        refuse_cross_attention(model)

    def check(numbers: Sequence[int], examples: Sequence[Example]) -> None:
        for need, what in _LACKS.items():
            lacking = [
                example.id or f"number {at}"
                for at, example in zip(numbers, examples, strict=True)
                if need in needs and not getattr(example, need)
            ]
            if lacking:
                more = " ..." if len(lacking) > 5 else ""
                raise InvalidValueError(
                    f"{len(lacking)} of {len(examples)} examples {what}: {', '.join(lacking[:5])}{more}"
                )

    batches = Batches(
        model,
        prompts,
        batch_size,
        progress=progress,
        label=label,
        by_size=True,
        answers="answer" in needs,
        check=check,
    )
    if "evidence" in needs and batches.examples is None:
        known_examples(batches)
    return batches


def known_examples(of: Batches | Prompt) -> list[Example]:
    """The examples that prompts were made of; ValueError where one does not know its own."""
    if of.examples is None:
        raise InvalidValueError(
            "the prompt does not know its examples, whose evidence, answers or images are read: make it with "
            "model.prompt_examples(examples)"
        )
    return list(of.examples)
