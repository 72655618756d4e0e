"""Examples in two parts: one to choose on, one to judge on, that share nothing."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence

from mmlens.arguments import number as real_number
from mmlens.arguments import seed_of
from mmlens.data.examples import Example, examples_of
from mmlens.data.many import ExampleStream
from mmlens.errors import InvalidValueError


def split_examples(
    examples: Iterable[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]] | tuple[ExampleStream, ExampleStream]:
    """Two disjoint parts, about `fraction` of every kind in the first, groups kept whole.

    An example without a group is one by itself, known by its id, or by its content where it has none: the same example
    twice stays together. Raises ValueError where there is no example, or a kind with fewer than two groups.

    A stream, or `Examples`, is split in one pass and without being held: a hash of the group and the seed says of each
    example alone in which part it is. Both parts are streams then, with about `fraction` in the first, as of tossed
    coins.

    >>> from mmlens.data import scene_examples
    >>> first, second = split_examples(scene_examples("objects", 10, seed=0), 0.3, seed=0)
    >>> len(first), len(second)
    (3, 7)
    """
    fraction = real_number("fraction", fraction, above=0, below=1)
    seed = seed_of(seed)
    if isinstance(examples, ExampleStream):
        return split_by_hash(examples, fraction, seed)
    examples = examples_of(examples)
    rng = random.Random(seed)
    first: list[Example] = []
    second: list[Example] = []
    for kind in sorted({example.kind for example in examples}):
        groups: dict[object, list[Example]] = {}
        for example in examples:
            if example.kind == kind:
                groups.setdefault(group_of(example), []).append(example)
        names = list(groups)
        if len(names) < 2:
            raise InvalidValueError(
                f"{len(examples)} example(s) cannot be split in two: those of kind {kind!r} form "
                f"{len(names)} group, and every kind needs at least two"
            )
        rng.shuffle(names)
        cut = min(max(round(fraction * len(names)), 1), len(names) - 1)
        for position, name in enumerate(names):
            (first if position < cut else second).extend(groups[name])
    return first, second


def shared_groups(first: Iterable[Example], second: Iterable[Example]) -> list[str]:
    """Names of what two splits share: a group, the id of an example without a group, or the question, answer and pixels
    of one that has no id either.

    >>> page = Example("What?", "x", id="a", group="report.pdf")
    >>> shared_groups([page], [Example("Where?", "y", id="b", group="report.pdf")])
    ['report.pdf']
    """
    ours, theirs = ({group_of(example): example for example in split} for split in (first, second))
    return sorted(
        ours[name].group or ours[name].id or f"{ours[name].question!r}"
        for name in ours.keys() & theirs.keys()
    )


def check_no_repeats(split: str, examples: Iterable[Example]) -> None:
    """Raise ValueError where an example stands in the `split` twice: by kind and id, or by content where it has no id.

    >>> check_no_repeats("selection", [Example("What?", "x"), Example("Where?", "y"), Example("What?", "x")])
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: the selection split holds 1 example(s) more than once ('What?'): ...
    """
    named = [(_identity(example), example.id or repr(example.question)) for example in examples]
    counts, names = Counter(key for key, _ in named), dict(named)
    repeated = [names[key] for key, count in counts.items() if count > 1]
    if repeated:
        shown = ", ".join(repeated[:5])
        raise InvalidValueError(
            f"the {split} split holds {len(repeated)} example(s) more than once ({shown}): they would "
            "count as so many independent ones, and intervals come out too narrow"
        )


def group_of(example: Example) -> tuple[object, ...]:
    """What must stay on one side of a split: the example's group, or itself."""
    return ("group", example.group) if example.group else _identity(example)


def _identity(example: Example) -> tuple[object, ...]:
    """What is the same of one example met twice: its id, or its content where it has none."""
    if example.id:
        return ("id", example.kind, example.id)
    pixels = (*example.images.fingerprints, *(video.fingerprint for video in example.videos))
    return ("content", example.kind, example.question, example.answer, pixels, example.said)


def overlap_message(shared: Sequence[str]) -> str:
    """What is wrong with splits that share these groups."""
    return (
        f"selection and evaluation share {len(shared)} example(s) or group(s) ({', '.join(shared[:5])}): heads chosen "
        "and judged on the same data look better than they are. Split them by mmlens.split_examples"
    )


def split_by_hash(examples: ExampleStream, fraction: float, seed: int) -> tuple[ExampleStream, ExampleStream]:
    """Two streams, each example in the one that `is_in_first` says."""
    return (
        examples.where(lambda example: is_in_first(example, fraction, seed)),
        examples.where(lambda example: not is_in_first(example, fraction, seed)),
    )


def is_in_first(example: Example, fraction: float, seed: int) -> bool:
    """Whether an example is in the first of two splits, told from its group and the seed alone.

    It is for about `fraction` of all groups.

    >>> [is_in_first(Example("What?", "x", group="report.pdf"), 0.5, seed) for seed in range(3)]
    [True, True, False]
    """
    digest = hashlib.sha256(repr((seed, group_of(example))).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
