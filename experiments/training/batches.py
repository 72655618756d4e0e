"""Batches of contexts with several questions each, that cannot see each other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from architectures import Architecture, Visual
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mmlens.data.composed_scenes import DIRECTIONS, RELATIONS
from mmlens.data.scene import Scene
from mmlens.data.scenes import iterate_scenes

TRAIN_SEED = 2**20
"""Training scenes have seeds from here on; `scene_examples` is called with smaller ones elsewhere."""

MOST_WORDS = 3
"""Words of which an oracle visual token may be the sum."""

SIDES = ("left", "up")
"""Sides whose cells stand before a visual token, so that it can know of them."""

BREAK = -2
"""Stands in `Batch.words` for a learnt line break."""


@dataclass
class Batch:
    """Contexts with several questions each.

    `words[row, pos]` holds the word of a text token, or the words of an oracle visual token; -1 where there is
    none. `positions` is [3, row, pos]. Labels are at (rows, columns). `named` has a row (row, column, word) for
    every word of a question's key at the question mark, `hops` one for the word a first step has to find,
    `neighbours[side]` one for the word at that side of a visual token, where a question may ask for it.
    """

    words: Tensor
    visual: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    weights: Tensor
    roles: list[str]
    label_kinds: list[str]
    scenes: list[Scene]
    named: Tensor
    hops: Tensor
    neighbours: dict[str, Tensor]


class Batcher:
    """Turns scenes into batches; every question of a row is drawn with replacement."""

    def __init__(
        self,
        architecture: Architecture,
        tokenizer: PreTrainedTokenizerFast,
        kinds: tuple[str, ...],
        seed: int,
        early_at_key: bool,
    ) -> None:
        self.architecture = architecture
        self.vocab: dict[str, int] = tokenizer.get_vocab()
        self.tokenizer = tokenizer
        self.rng = random.Random(f"questions/{seed}")
        self.streams = {kind: iterate_scenes(kind, TRAIN_SEED + seed) for kind in kinds}
        self.encoded: dict[str, list[int]] = {}
        self.early_at_key = early_at_key
        """Where the early answer is asked for: at the key word, or at the question mark."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, kept."""
        if text not in self.encoded:
            self.encoded[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.encoded[text]

    def words_of(self, scene: Scene, token: Visual) -> list[int]:
        """Token ids of what a visual token shows; the image token for background."""
        if token is None:
            return [BREAK]
        image, row, column = token
        cell = scene.contents[image][row][column]
        return [self.vocab[word] for word in cell] or [self.vocab[self.architecture.image_token]]

    def image_tokens(self, scene: Scene, image: int) -> list[str | Visual]:
        """What stands for one of the scene's images: words, and what its visual tokens show."""
        grid = scene.contents[image]
        return self.architecture.image_tokens(image, (len(grid), len(grid[0])), len(scene.contents) == 1)

    def visual_tokens(self, scene: Scene) -> list[Visual]:
        """What every visual token of the scene shows, in their order."""
        return [
            token
            for image in range(len(scene.contents))
            for token in self.image_tokens(scene, image)
            if not isinstance(token, str)
        ]

    def context(self, scene: Scene) -> tuple[list[list[int]], list[bool], list[tuple[int, int, int]], int]:
        """Words, which are visual, and (t, h, w) positions of what precedes the question; the next position."""
        words = [[self.vocab["<|im_start|>"]], [self.vocab["user"]]]
        visual = [False, False]
        positions = [(0, 0, 0), (1, 1, 1)]
        here = 2
        for image, grid in enumerate(scene.contents):
            inside = False
            for token in self.image_tokens(scene, image):
                is_visual = not isinstance(token, str)
                if self.architecture.grid_positions and inside and not is_visual:
                    here += max(len(grid), len(grid[0]))
                inside = is_visual
                visual.append(is_visual)
                words.append(self.words_of(scene, token) if is_visual else [self.vocab[token]])  # type: ignore
                if self.architecture.grid_positions and is_visual:
                    assert token is not None and not isinstance(token, str)
                    positions.append((here, here + token[1], here + token[2]))
                else:
                    positions.append((here,) * 3)
                    here += 1
        preamble = self.encode(scene.preamble) if scene.preamble else []
        words += [[word] for word in preamble]
        visual += [False] * len(preamble)
        positions += [(here + i,) * 3 for i in range(len(preamble))]
        return words, visual, positions, here + len(preamble)

    def neighbours(self, scene: Scene, visual: Sequence[bool], side: str) -> list[tuple[int, int]]:
        """(position, word) of every visual token that has a cell at `side`, in scenes that ask for directions."""
        if scene.of is not RELATIONS:
            return []
        down, right = DIRECTIONS[side]
        found = []
        places = (at for at, is_visual in enumerate(visual) if is_visual)
        for at, token in zip(places, self.visual_tokens(scene), strict=True):
            if token is not None and token[1] + down >= 0 and token[2] + right >= 0:
                image, row, column = token
                cell = scene.contents[image][row + down][column + right]
                found += [(at, self.vocab[word]) for word in cell]
        return found

    def batch(self, kinds: list[str], row_length: int, early: float = 0.0) -> Batch:
        """One row per entry of `kinds`; `early` is the weight of the answer asked for within the question."""
        vocab = self.vocab
        tail = [vocab["<|im_end|>"], vocab["<|im_start|>"], vocab["assistant"]]
        size = (len(kinds), row_length)
        words = np.full((*size, MOST_WORDS), -1)
        words[..., 0] = vocab["<|endoftext|>"]
        visual = np.zeros(size, dtype=bool)
        positions = np.zeros((3, *size), dtype=np.int64)
        branch = np.full(size, -1)
        targets: list[tuple[int, int, int, float, str, str]] = []
        named: list[tuple[int, int, int]] = []
        hops: list[tuple[int, int, int]] = []
        neighbours: dict[str, list[tuple[int, int, int]]] = {side: [] for side in SIDES}
        scenes = []
        for row, kind in enumerate(kinds):
            scene = next(self.streams[kind])
            scenes.append(scene)
            row_words, row_visual, row_positions, start = self.context(scene)
            end = len(row_words)
            for side, found in neighbours.items():
                found += [(row, at, word) for at, word in self.neighbours(scene, row_visual, side)]
            for at, several in enumerate(row_words):
                words[row, at, : len(several)] = several
            visual[row, :end] = row_visual
            positions[:, row, :end] = np.array(row_positions).T
            branch[row, :end] = 0
            keys = sorted(scene.facts)
            for number in itertools.count(1):
                key = self.rng.choice(keys)
                text = scene.of.question(key, self.rng.randrange(len(scene.of.questions)))
                answer = vocab[scene.facts[key]]
                question = [*self.encode(text), *tail, answer]
                stop = end + len(question)
                if stop > row_length:
                    break
                words[row, end:stop, 0] = question
                positions[:, row, end:stop] = np.arange(start, start + len(question))
                branch[row, end:stop] = number
                key_ids = [vocab[word] for word in key.split()]
                mark = end + len(question) - len(tail) - 2
                if early > 0:
                    at_key = end + max(i for i, word in enumerate(question[:-1]) if word in key_ids)
                    targets.append((row, at_key if self.early_at_key else mark, answer, early, "early", kind))
                named += [(row, mark, word) for word in key_ids]
                if key in scene.hops:
                    hops.append((row, mark, vocab[scene.hops[key]]))
                targets.append((row, stop - 2, answer, 1.0, "answer", kind))
                targets.append((row, stop - 1, vocab["<|im_end|>"], 0.1, "end", kind))
                end = stop
        longest = int((branch >= 0).any(axis=0).sum())
        group = torch.from_numpy(branch[:, :longest])
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        seen = (group[:, None, :] == 0) | (group[:, None, :] == group[:, :, None])
        rows, columns, labels, weights, roles, label_kinds = zip(*targets, strict=True)
        return Batch(
            words=torch.from_numpy(words[:, :longest]),
            visual=torch.from_numpy(visual[:, :longest]),
            positions=torch.from_numpy(positions[..., :longest]),
            mask=(causal & seen)[:, None],
            rows=torch.tensor(rows),
            columns=torch.tensor(columns),
            labels=torch.tensor(labels),
            weights=torch.tensor(weights),
            roles=list(roles),
            label_kinds=list(label_kinds),
            scenes=scenes,
            named=torch.tensor(named).reshape(-1, 3),
            hops=torch.tensor(hops).reshape(-1, 3),
            neighbours={side: torch.tensor(found).reshape(-1, 3) for side, found in neighbours.items()},
        )


def sums_of_words(model: PreTrainedModel, words: Tensor) -> Tensor:
    """Sum of the embeddings of the words of each token; the model's own line break where that is asked for."""
    table: Tensor = model.get_input_embeddings().weight
    total = table[words[..., 0].clamp(min=0)]
    for slot in range(1, MOST_WORDS):
        word = words[..., slot]
        total = total + torch.where((word >= 0)[..., None], table[word.clamp(min=0)], 0.0)
    newline: nn.Parameter | None = getattr(model.model, "image_newline", None)
    if newline is not None:
        total = torch.where((words[..., 0] == BREAK)[..., None], newline, total)
    return total
