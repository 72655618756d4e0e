"""Generated questions over drawn scenes, with the evidence marked: the data of the shipped models.

`one_key_scenes` and `composed_scenes` describe the kinds. Random choices come from `random.Random` seeded by a
string, so that example `i` of a seed is the same whatever else is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from mmlens.arguments import instance_of, one_of, seed_of, texts, whole_number
from mmlens.data import composed_scenes as composed
from mmlens.data import one_key_scenes as one_key
from mmlens.data.examples import Example
from mmlens.data.scene import Kind, Scene
from mmlens.errors import InvalidValueError

_DRAW: dict[Kind, Callable[[random.Random], Scene]] = {
    one_key.OBJECTS: one_key.draw_objects,
    one_key.DOCUMENTS: one_key.draw_documents,
    one_key.FRAMES: one_key.draw_frames,
    one_key.IMAGES: one_key.draw_images,
    one_key.TEXT_RECALL: one_key.draw_text_recall,
    one_key.TEXT_KNOWLEDGE: one_key.draw_text_knowledge,
    composed.OBJECTS: composed.draw_objects,
    composed.DOCUMENTS: composed.draw_documents,
    composed.FRAMES: composed.draw_frames,
    composed.IMAGES: composed.draw_images,
    composed.LEGENDS: composed.draw_legends,
    composed.RELATIONS: composed.draw_relations,
}
_KINDS: dict[str, Kind] = {kind.name: kind for kind in _DRAW}

KINDS = ("objects", "documents", "frames", "images")
COMPOSED_KINDS = (
    "composed_objects",
    "composed_documents",
    "composed_frames",
    "composed_images",
    "legends",
)
TEXT_KINDS = ("text_recall", "text_knowledge")

_LIST_MARKS = ("Words", ":", ",", ".")


def scene_examples(kind: str, n: int, seed: int) -> list[Example]:
    """`n` examples of one kind, one question per freshly drawn scene, determined by `seed`.

    Example i depends on (kind, seed, i) alone. Different seeds give different scenes; the shipped models were
    trained on scenes with seeds from 2**20 on, so smaller seeds are unseen by them.

    Raises ValueError for an unknown kind or a negative `n`.

    >>> example = scene_examples("objects", 1, seed=0)[0]
    >>> len(example.images), len(example.evidence), example.answer in example.candidates
    (1, 1, True)
    """
    questions = _known(kind).questions
    n, seed = whole_number("n", n, least=0), seed_of(seed)
    examples = []
    for index in range(n):
        rng = random.Random(f"{kind}/{seed}/{index}")
        scene = draw_scene(kind, rng)
        key = rng.choice(sorted(scene.facts))
        phrasing = rng.randrange(len(questions))
        examples.append(scene.example(key, phrasing, id=f"{kind}-{seed}-{index}"))
    return examples


def scene_of(example: Example) -> Scene:
    """The scene of an example of `scene_examples`, with everything else that could be asked about it.

    Raises ValueError for an example that does not come from there.

    >>> example = scene_examples("objects", 1, seed=0)[0]
    >>> scene_of(example).facts == example.metadata["facts"]
    True
    """
    kind, _, rest = instance_of("example", example, Example, "an Example of scene_examples").id.partition("-")
    seed, _, index = rest.partition("-")
    if kind not in _KINDS or not (seed.isdigit() and index.isdigit()):
        raise InvalidValueError(
            f"example {example.id!r} is no generated scene: the id of one is KIND-SEED-INDEX, as in 'objects-0-3'"
        )
    return draw_scene(kind, random.Random(f"{kind}/{seed}/{index}"))


def iterate_scenes(kind: str, seed: int) -> Iterator[Scene]:
    """Scenes of one kind without end, for training: scene i is determined by (kind, seed, i)."""
    _known(kind)
    seed = seed_of(seed)
    index = 0
    while True:
        yield draw_scene(kind, random.Random(f"{kind}/{seed}/{index}"))
        index += 1


def draw_scene(kind: str, rng: random.Random) -> Scene:
    """One scene of `kind`, its choices taken from `rng`.

    Raises ValueError for an unknown kind.

    >>> scene = draw_scene("text_knowledge", random.Random(0))
    >>> scene.facts["K"], scene.facts["Z"]
    ('L', 'A')
    """
    return _DRAW[_known(kind)](instance_of("rng", rng, random.Random, "a random.Random: random.Random(seed)"))


def scene_vocabulary(kinds: Sequence[str] = (*KINDS, *TEXT_KINDS)) -> list[str]:
    """Every word and mark that a question or an answer of these kinds may hold, sorted.

    >>> {"colour", "red", "K", "?"} <= set(scene_vocabulary())
    True
    """
    chosen = [_known(kind) for kind in texts("kinds", kinds, "a list of kinds of scene", least=1)]
    text = " ".join(question.format("", "") for kind in chosen for question in kind.questions)
    words = set(text.replace("?", " ? ").split()) | set(_LIST_MARKS)
    drawn = (one_key.KEYS, one_key.CLASSES, one_key.COLOURS, one_key.SHAPES)
    return sorted(words.union(*drawn, *(kind.answers + kind.key_words for kind in chosen)))


def _known(kind: str) -> Kind:
    return _KINDS[one_of("kind", kind, _KINDS)]
