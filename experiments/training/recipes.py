"""Every number of every training run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from architectures import INTERNVL, LLAVA_ONEVISION, QWEN3_VL, Architecture

from mmlens.data.scenes import COMPOSED_KINDS, KINDS, TEXT_KINDS

Rows = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Phase:
    """One part of the language model's training on oracle visual tokens, with an optimiser of its own."""

    steps: int
    rows: Rows
    """Contexts of each kind in a batch."""
    row_length: int = 180
    rate: float = 2e-3
    decay: float = 0.1
    late_decay: float | None = None
    """The weight decay after `late_from`, a share of the phase."""
    late_from: float = 1.0
    early: float = 1.0
    """Weight of the answer asked for within the question."""
    early_until: float = 1.0
    naming: float = 0.0
    """Weight of naming the key's words at the question mark, read after layer `Recipe.name_after`; a third of it for
    naming what the first of two steps finds, read after layer `Recipe.hop_after`."""
    naming_until: float = 1.0
    """A share of the phase, as `early_until` is: after it that loss is left out."""
    frozen_embeddings: bool = False
    """Whether the word embeddings stay as they are, so that a tower regressed onto them stays right."""
    stream: int = 0
    """Which stream of scenes it draws from."""


@dataclass(frozen=True)
class Recipe:
    """One model: its architecture and shape, the kinds it learns, and how long each stage takes."""

    architecture: Architecture
    kinds: tuple[str, ...]
    text_kinds: tuple[str, ...]
    phases: tuple[Phase, ...]
    joint_rows: Rows
    shape: dict[str, int]
    joint_row_length: int = 180
    early_at_key: bool = False
    """Where the early answer is asked for: at the key's last word, or at the question mark."""
    name_after: int = 0
    hop_after: int = 0
    oracle_noise: float = 0.02
    vision_rows: Rows = ()
    """Scenes of each kind in a batch of stage 2; empty: one of each."""
    vision_steps: int = 2500
    vision_rate: float = 2e-3
    settle: tuple[Phase, ...] = ()
    """Further phases of the language model, between stages 2 and 3."""
    joint_steps: int = 200
    joint_rate: float = 5e-4
    joint_decay: float = 2.5
    joint_early: float = 0.0
    """Weight of the early answer in stage 3."""
    seed: int = 0
    threads: int = 1


# ---------------------------------------------------------------------- micro

_ONE_KEY_ROWS = (
    ("objects", 3),
    ("documents", 3),
    ("frames", 3),
    ("images", 3),
    ("text_recall", 3),
    ("text_knowledge", 1),
)

MICRO = Recipe(
    architecture=QWEN3_VL,
    kinds=KINDS,
    text_kinds=TEXT_KINDS,
    phases=(
        Phase(steps=800, rows=_ONE_KEY_ROWS, late_decay=2.5, late_from=0.4, early_until=0.7, stream=0),
        Phase(steps=600, rows=_ONE_KEY_ROWS, decay=3.0, early=0.0, stream=3),
    ),
    joint_rows=_ONE_KEY_ROWS,
    early_at_key=True,
    shape={
        "layers": 8,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 32,
        "width": 128,
        "mlp": 256,
        "vision_layers": 3,
        "vision_width": 96,
        "vision_mlp": 192,
    },
)

# ---------------------------------------------------------------------- the zoo

_FIRST_ROWS = (
    ("composed_objects", 7),
    ("composed_documents", 4),
    ("legends", 3),
    ("text_recall", 1),
    ("text_knowledge", 1),
)
_VISION_ROWS = (
    ("composed_objects", 4),
    ("composed_documents", 2),
    ("composed_frames", 1),
    ("composed_images", 1),
    ("legends", 3),
)
_ALL_ROWS = (
    ("composed_objects", 2),
    ("composed_documents", 2),
    ("composed_frames", 3),
    ("composed_images", 2),
    ("legends", 2),
    ("text_recall", 1),
    ("text_knowledge", 1),
)


def _composed(architecture: Architecture, layers: int, heads: int, width: int, **changes: int) -> Recipe:
    return Recipe(
        architecture=architecture,
        kinds=COMPOSED_KINDS,
        text_kinds=TEXT_KINDS,
        phases=(
            Phase(steps=500, rows=_FIRST_ROWS, row_length=110, naming=1.0, stream=0),
            Phase(
                steps=700,
                rows=_ALL_ROWS,
                row_length=190,
                late_decay=2.0,
                late_from=0.5,
                naming=0.3,
                naming_until=0.5,
                stream=3,
            ),
        ),
        settle=(
            Phase(steps=700, rows=_ALL_ROWS, row_length=190, decay=1.5, frozen_embeddings=True, stream=4),
            Phase(steps=700, rows=_ALL_ROWS, row_length=190, decay=2.5, frozen_embeddings=True, stream=5),
        ),
        joint_rows=_ALL_ROWS,
        joint_row_length=190,
        joint_decay=1.5,
        joint_early=1.0,
        vision_rows=_VISION_ROWS,
        vision_steps=6000,
        name_after=1,
        hop_after=3,
        shape={
            "layers": layers,
            "heads": heads,
            "kv_heads": heads // 2,
            "head_dim": 32,
            "width": width,
            "mlp": 2 * width,
            "vision_layers": 3,
            "vision_width": 96,
            "vision_mlp": 192,
        }
        | changes,
    )


_RELATION_ROWS = (
    ("composed_objects", 3),
    ("composed_documents", 3),
    ("legends", 2),
    ("relations", 8),
    ("text_recall", 1),
    ("text_knowledge", 1),
)


def _with_relations(recipe: Recipe) -> Recipe:
    """The recipe with relations, learnt in a phase of their own, and with its early exits a layer later each."""
    first, second = recipe.phases
    rows = (*_ALL_ROWS, ("relations", 2))
    return replace(
        recipe,
        kinds=(*recipe.kinds, "relations"),
        phases=(
            replace(first, steps=800),
            Phase(steps=1300, rows=_RELATION_ROWS, row_length=110, naming=1.0, stream=3),
            replace(second, rows=rows, stream=6),
        ),
        settle=tuple(replace(phase, rows=rows) for phase in recipe.settle),
        joint_rows=rows,
        vision_rows=(*_VISION_ROWS, ("relations", 2)),
        name_after=2,
        hop_after=4,
    )


RECIPES = {
    "micro": MICRO,
    "qwen3-vl-s": _composed(QWEN3_VL, layers=5, heads=4, width=96),
    "qwen3-vl-m": _composed(QWEN3_VL, layers=6, heads=8, width=128),
    "qwen3-vl-l": _composed(QWEN3_VL, layers=8, heads=10, width=128),
    "llava-onevision": _composed(LLAVA_ONEVISION, layers=6, heads=8, width=128),
    "internvl": _composed(INTERNVL, layers=6, heads=8, width=128),
    "qwen3-vl-relations": _with_relations(_composed(QWEN3_VL, layers=6, heads=8, width=128)),
    "llava-onevision-relations": _with_relations(_composed(LLAVA_ONEVISION, layers=6, heads=8, width=128)),
}
