"""The one loop over what a measurement runs on: a Prompt, a list of Prompt, or a list of Example."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from mmlens.arguments import BATCH_SIZE, flag, listed, shown, whole_number
from mmlens.data.examples import Example, chats_of_examples
from mmlens.data.many import ExampleStream
from mmlens.errors import InvalidTypeError, InvalidValueError, held_warnings, warn
from mmlens.families.processors import separate
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.inputs import InputMethods
from mmlens.model.prompt import Prompt

T = TypeVar("T")
Prompts = Prompt | Sequence[Prompt] | Sequence[Example] | ExampleStream
"""A Prompt, a list of them, each one batch, or examples, which are made into prompts some at a time."""

WINDOW = 16
"""So many batches of a stream are looked at at a time, to put images of like size together."""

BETWEEN_TRIMS = 8
"""Batches after which freed memory is given back; it takes as long as a small batch on a CPU."""


class Batches:
    """`prompts` as pairs (indices, Prompt): the numbers of a batch's examples in the order given, and the batch.

    Prompts are batches as they are. Examples are made into prompts `batch_size` at a time, in the order given, or
    those with images of like size together, which keeps the padding short (`by_size`). `answers` says whether
    a prompt of examples carries their answers for metrics, for which the tokenizer has to know them; the examples
    themselves it carries in any case (`Prompt.examples`). `check(numbers, examples)` is called for examples before a
    prompt is made of them: for all in a list at once, of a stream for some at a time. `progress` shows a bar of
    examples, named `label`. While a batch is in use, the next one's prompt is made in a thread of its own (`ahead`).

    A stream, or `Examples`, is gone through once, and an example held no longer than its batch is in use; `n_examples`
    is None before the end of a stream.

    Arguments are checked when it is made. Raises TypeError for prompts that are neither Prompt nor Example, or both
    together, and ValueError for none at all.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> batches = Batches(model, mmlens.scene_examples("objects", 5, seed=0), batch_size=2)
    >>> batches.n_batches, [(index, len(prompt)) for index, prompt in batches]
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
        check: Callable[[Sequence[int], Sequence[Example]], None] | None = None,
    ) -> None:
        self.model = model_of(model)
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self.progress, self.label, self.answers = flag("progress", progress), label, answers
        self.prompts: Any = prompts if isinstance(prompts, ExampleStream) else _prompts_or_examples(prompts)
        """What was given, as a list; a stream as it is."""
        self.by_size, self._check = by_size, check
        self._prompts = [] if self._is_stream else [own for own in self.prompts if isinstance(own, Prompt)]
        self._kinds: dict[int, str] = {}
        self.n_examples: int | None = self._n_known()
        if check is not None and not self._is_stream and self.examples is not None:
            known = list(self.examples)
            check(range(len(known)), known)

    @property
    def _is_stream(self) -> bool:
        return isinstance(self.prompts, ExampleStream)

    def _n_known(self) -> int | None:
        if self._is_stream:
            return self.prompts.n_known
        return sum(map(len, self._prompts)) if self._prompts else len(self.prompts)

    @property
    def examples(self) -> Iterable[Example] | None:
        """The examples in the order given; None where a prompt does not know its own."""
        if not self._prompts:
            return self.prompts
        if any(prompt.examples is None for prompt in self._prompts):
            return None
        return [example for prompt in self._prompts for example in prompt.examples or ()]

    @property
    def n_batches(self) -> int | None:
        """None before the end of a stream."""
        if self._prompts:
            return len(self._prompts)
        return None if self.n_examples is None else -(-self.n_examples // self.batch_size)

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """The kind of each example, once all were gone through; None where none has one or they are not known."""
        kinds = tuple(self._kinds[at] for at in range(len(self._kinds)))
        return kinds if any(kinds) and len(kinds) == self.n_examples else None

    def __iter__(self) -> Iterator[tuple[list[int], Prompt]]:
        self._kinds.clear()
        n_seen = n_batches = 0
        with tqdm(total=self.n_examples, desc=self.label, unit="example", disable=not self.progress) as bar:
            for index, prompt in self._ready() if self._prompts else self._made():
                if prompt.examples is not None:
                    self._kinds |= {
                        at: example.kind for at, example in zip(index, prompt.examples, strict=True)
                    }
                yield index, prompt
                n_seen += len(index)
                bar.update(len(index))
                n_batches += 1
                if n_batches % BETWEEN_TRIMS == 0:
                    _give_back_freed_memory()
        if not n_seen:
            raise InvalidValueError(f"{self.prompts!r} holds no example: expected at least one")
        self.n_examples = n_seen

    def _ready(self) -> Iterator[tuple[list[int], Prompt]]:
        first = 0
        for prompt in self._prompts:
            yield list(range(first, first + len(prompt))), prompt
            first += len(prompt)

    def _made(self) -> Iterator[tuple[list[int], Prompt]]:
        # One batch alone needs no processor beside the model's.
        maker = self.model if self.n_batches == 1 else _PromptMaker(self.model)
        yield from ahead(partial(self._prompt, maker, index, examples) for index, examples in self._planned())

    def _planned(self) -> Iterator[tuple[list[int], list[Example]]]:
        """What stands in each batch: the numbers of its examples, and these."""
        for first, examples in self._windows():
            numbers = range(first, first + len(examples))
            if self._is_stream and self._check is not None:
                self._check(numbers, examples)
            order = list(range(len(examples)))
            if self.by_size:
                order.sort(key=lambda at: sum(width * height for width, height in examples[at].images.sizes))
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                yield [numbers[at] for at in chosen], [examples[at] for at in chosen]

    def _windows(self) -> Iterator[tuple[int, list[Example]]]:
        """Examples that are ordered together, with the number of the first: all of a list, some of many."""
        if not self._is_stream:
            yield 0, self.prompts
            return
        first, rest = 0, iter(self.prompts)
        while window := list(itertools.islice(rest, WINDOW * self.batch_size)):
            yield first, window
            first += len(window)

    def _prompt(
        self, maker: InputMethods, index: list[int], batch: list[Example]
    ) -> tuple[list[int], Prompt]:
        if self.answers:
            return index, maker.prompt_examples(batch)
        prompt = maker.prompt(*chats_of_examples(batch))
        return index, replace(prompt, examples=tuple(batch))


def _give_back_freed_memory() -> None:
    """Give what was freed back to the system, where the C library is glibc.

    Tensors and images of every size come and go in two threads, and glibc keeps the pages between them: a pass over
    20,000 examples would end with a third more memory than it uses.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def in_order(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """What was found for each batch, [example, ...] beside the numbers of its examples, as one tensor in their order.

    >>> in_order([([2, 0], torch.tensor([5.0, 3.0])), ([1], torch.tensor([4.0]))]).tolist()
    [3.0, 4.0, 5.0]
    """
    order = torch.tensor([at for index, _ in parts for at in index]).argsort()
    return torch.cat([values for _, values in parts])[order]


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
    # In this thread, so that what is done alone needs no other.
    result = first()
    with ThreadPoolExecutor(1, "mmlens: the next prompt") as worker:
        for function in functions:
            due = worker.submit(_done, function)
            yield result
            result = due.result().given()
    yield result


@dataclass(frozen=True)
class _Done(Generic[T]):
    """What a function gave, and what mmlens warned of meanwhile."""

    result: T
    warned: Sequence[tuple[str, type[Warning]]]

    def given(self) -> T:
        for message, category in self.warned:
            warn(message, category, stacklevel=4)
        return self.result


def _done(function: Callable[[], T]) -> _Done[T]:
    with held_warnings() as warned:
        return _Done(function(), warned)


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
