"""The one loop over what a measurement runs on: a Prompt, a list of Prompt, or a list of Example."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from mmlens.arguments import BATCH_SIZE, flag, listed, shown, whole_number
from mmlens.data.examples import Example, chats_of_examples
from mmlens.errors import InvalidTypeError, held_warnings, warn
from mmlens.families.processors import separate
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.inputs import InputMethods
from mmlens.model.prompt import Prompt

T = TypeVar("T")
Prompts = Prompt | Sequence[Prompt] | Sequence[Example]
"""A Prompt, a list of them, each one batch, or examples, which are made into prompts some at a time."""


class Batches:
    """`prompts` as pairs (indices, Prompt): the numbers of a batch's examples in the order given, and the batch.

    Prompts are batches as they are. Examples are made into prompts `batch_size` at a time, in the order given, or
    those with images of like size together, which keeps the padding short (`by_size`). `answers` says whether
    a prompt of examples carries their answers for metrics, for which the tokenizer has to know them; the examples
    themselves it carries in any case (`Prompt.examples`). `progress` shows a bar of examples, named `label`. While a
    batch is in use, the next one's prompt is made in a thread of its own (`ahead`).

    Arguments are checked when it is made. Raises TypeError for prompts that are neither Prompt nor Example, or both
    together, and ValueError for none at all.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> batches = Batches(model, mmlens.scene_examples("objects", 5, seed=0), batch_size=2)
    >>> len(batches), [(index, len(prompt)) for index, prompt in batches]
    (3, [([0, 1], 2), ([2, 3], 2), ([4], 1)])
    """

    def __init__(
        self,
        model: HookedVLM,
        prompts: Prompts,
        batch_size: int = BATCH_SIZE,
        *,
        progress: bool = False,
        label: str | None = None,
        by_size: bool = False,
        answers: bool = True,
    ) -> None:
        self.model = model_of(model)
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self.progress, self.label, self.answers = flag("progress", progress), label, answers
        self.prompts: Any = _prompts_or_examples(prompts)
        """What was given, as a list."""
        self._prompts = [item for item in self.prompts if isinstance(item, Prompt)]
        self._examples = [item for item in self.prompts if isinstance(item, Example)]
        self.by_size = by_size

    @property
    def n_examples(self) -> int:
        return len(self._examples) or sum(map(len, self._prompts))

    @property
    def examples(self) -> list[Example] | None:
        """The examples in the order given; None where a prompt does not know its own."""
        if any(prompt.examples is None for prompt in self._prompts):
            return None
        return self._examples or [example for prompt in self._prompts for example in prompt.examples or ()]

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._prompts) or -(-len(self._examples) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[list[int], Prompt]]:
        with tqdm(total=self.n_examples, desc=self.label, unit="example", disable=not self.progress) as bar:
            for index, prompt in self._ready() if self._prompts else self._made():
                yield index, prompt
                bar.update(len(index))

    def _ready(self) -> Iterator[tuple[list[int], Prompt]]:
        first = 0
        for prompt in self._prompts:
            yield list(range(first, first + len(prompt))), prompt
            first += len(prompt)

    def _made(self) -> Iterator[tuple[list[int], Prompt]]:
        order = list(range(len(self._examples)))
        if self.by_size:
            order.sort(key=lambda at: sum(image.width * image.height for image in self._examples[at].images))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        maker = _PromptMaker(self.model) if len(batches) > 1 else self.model
        yield from zip(batches, ahead(partial(self._prompt, maker, index) for index in batches), strict=True)

    def _prompt(self, maker: InputMethods, index: list[int]) -> Prompt:
        batch = [self._examples[at] for at in index]
        if self.answers:
            return maker.prompt_examples(batch)
        prompt = maker.prompt(*chats_of_examples(batch))
        return replace(prompt, examples=tuple(batch))


class _PromptMaker(InputMethods):
    """Makes a model's prompts by a processor of its own: the model's may be used in another thread meanwhile."""

    def __init__(self, model: HookedVLM) -> None:
        self.hf_model, self.family, self.visual = model.hf_model, model.family, model.visual
        self.processor = None if model.processor is None else separate(model.processor)
        self.tokenizer = model.tokenizer if self.processor is None else self.processor.tokenizer
        self.prompt_options = model.prompt_options


def ahead(functions: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each function gives, in order; the next one runs in a thread while the last one's result is in use.

    One runs at a time, and no further ahead. What it raises is raised, and what mmlens warns of in it warned of, where
    its result is due. When the iteration ends, early or by an error, no thread is left.

    >>> list(ahead([lambda: 1, lambda: 2]))
    [1, 2]
    """
    functions = iter(functions)
    first = next(functions, None)
    if first is None:
        return
    result, running = first(), None
    try:
        for function in functions:
            running = _Running(function)
            yield result
            result, running = running.result(), None
        yield result
    finally:
        if running is not None:
            running.thread.join()


class _Running(Generic[T]):
    """A function in a thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self.given: list[T] = []
        self.error: BaseException | None = None
        self.warned: list[tuple[str, type[Warning]]] = []
        self.thread = threading.Thread(target=self._run, name="mmlens: the next prompt")
        self.thread.start()

    def _run(self) -> None:
        with held_warnings() as self.warned:
            try:
                self.given.append(self.function())
            except BaseException as error:
                self.error = error

    def result(self) -> T:
        """What the function gives or raises, once it has ended."""
        self.thread.join()
        for message, category in self.warned:
            warn(message, category, stacklevel=4)
        if self.error is not None:
            raise self.error
        return self.given[0]


def _prompts_or_examples(prompts: object) -> list[Prompt | Example]:
    expected = "a Prompt, a list of Prompt or a list of Example, all of one type"
    if isinstance(prompts, Prompt):
        return [prompts]
    if isinstance(prompts, Example):
        raise InvalidTypeError(
            f"prompts is {shown(prompts)}; expected {expected}: one example is written [example]"
        )
    items = listed("prompts", prompts, expected, least=1)
    if not any(all(isinstance(item, kind) for item in items) for kind in (Prompt, Example)):
        raise InvalidTypeError(
            f"prompts are {expected}; got {', '.join(sorted({type(item).__name__ for item in items}))}"
        )
    return items
