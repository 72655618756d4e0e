"""Head scores as others published them: one reader for each format, into HeadScores, a HeadSet or KeyValueScores.

All of them number layers and heads from 0, as mmlens does. What a file's numbers are is the source's own business: the
docstrings say which of our scores they are akin to. `mmlens.scores.recomputed` holds them to what the papers state.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.arguments import instance_of, path_of, shown
from mmlens.errors import InvalidValueError, MissingFileError, MmlensError
from mmlens.files import read_json
from mmlens.head_scores import HeadScores
from mmlens.heads import Head, HeadGrid, HeadSet

GRIDS = {
    "qwen3-vl-8b-instruct": (36, 32),
    "qwen3-vl-32b-instruct": (64, 64),
    "qwen2.5-vl-7b-instruct": (28, 28),
    "qwen2.5-vl-32b-instruct": (64, 40),
    "gemma-3-12b-it": (48, 16),
    "gemma-3-27b-it": (62, 32),
    "qwen2.5-7b-instruct": (28, 28),
    "llama-3.1-8b-instruct": (32, 32),
    "llama-3.1-70b-instruct": (80, 64),
    "llama-3.2-1b-instruct": (16, 32),
    "llama-3.2-3b-instruct": (28, 24),
}
"""(n_layers, n_heads) of the models whose heads are published in lists, which name some heads alone."""

_HEAD = re.compile(r"(\d{1,5})-(\d{1,5})")


# ---------------------------------------------------------------------- scores of all heads


def read_mmrethead(file: str | Path) -> HeadScores:
    """The scores of all heads in a result of MMRetHead (arXiv 2605.27243), of one task and context length.

    JSON with "head_score_list", [["layer-head", score], ...]: our `null_calibrated_ram` (its variant "published"). The
    file holds means over its examples, so the HeadScores have one example; `kinds` holds the task that the file names.
    `read_mmrethead_heads` reads lists of some heads.

    Raises MissingFileError where there is no file, ValueError for another content, a head that stands there twice, and
    scores of some heads alone.
    """
    content = _json(file, "a result of MMRetHead")
    scores = dict(_score_list(content, file))
    given = content.get("args")
    arguments: dict[str, Any] = given if isinstance(given, dict) else {}
    task, model = arguments.get("datasets"), arguments.get("model_name_or_path")
    of = ", ".join(each for each in (_base(model), task) if isinstance(each, str) and each)
    name = "multimodal retrieval score" + (f" ({of})" if of else "")
    kinds = (task,) if isinstance(task, str) else None
    return _complete({head: [score] for head, score in scores.items()}, name, file, kinds)


def read_retrieval_head(file: str | Path) -> HeadScores:
    """The retrieval scores of Retrieval Head (arXiv 2404.15574), of every head in every test: our `copy_score`.

    JSON {"layer-head": [score, ...]}, a score for each of the tests, in the order in which they were run.

    Raises MissingFileError where there is no file, ValueError for another content, heads with other numbers of scores,
    and scores of some heads alone.
    """
    return _complete(_score_table(file, "scores of Retrieval Head"), "retrieval score", file)


def read_sparsemm(file: str | Path) -> HeadScores:
    """The visual head scores of SparseMM (arXiv 2506.05344), of every query head: our `visual_head_score`.

    JSON {"layer-head": [score, ...]}; a head's score is the mean of its list, which is what the source uses too. The
    published lists have two entries, which nothing explains.

    Raises as `read_retrieval_head`.
    """
    return _complete(_score_table(file, "scores of SparseMM"), "visual head score", file)


# ---------------------------------------------------------------------- lists of heads


def read_mmrethead_heads(file: str | Path, grid: HeadGrid | tuple[int, int] | None = None) -> HeadSet:
    """A list of heads for retrieval by MMRetHead (arXiv 2605.27243), the highest score first.

    The published lists are the union of four tasks' top 5%, `top(0.05, count="ceiling")` of each. `grid` says which
    heads the model has (`model.grid`); left out, it is known for the models whose lists are published (`GRIDS`).

    Raises MissingFileError where there is no file, ValueError for another content, a model that is not known, a head
    that stands there twice; IndexError for a head that the model does not have.
    """
    content = _json(file, "a list of heads by MMRetHead")
    given = content.get("args")
    model = given.get("model") or given.get("model_name_or_path") if isinstance(given, dict) else None
    ranked = sorted(_score_list(content, file), key=lambda of: -of[1])
    return _head_set([head for head, _ in ranked], grid, model, file)


def read_qrhead(file: str | Path, grid: HeadGrid | tuple[int, int] | None = None) -> HeadSet:
    """A list of query-focused retrieval heads by QRHead (arXiv 2506.09944), the best first.

    YAML with attn_head_set "layer-head,layer-head,...", or "full_heads" for all. Lists named LME were ranked by
    `query_focused_score`; those named NQ by the NDCG@10 of each head's ranking of documents: `document_ndcg`. `grid` as
    in `read_mmrethead_heads`, and errors too.
    """
    import yaml

    where = _file(file, "a list of heads by QRHead")
    try:
        content = yaml.safe_load(where.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as reason:
        raise InvalidValueError(
            f"{str(where)!r} cannot be read as YAML ({' '.join(str(reason).split())}): it is broken or was cut off"
        ) from reason
    written = content.get("attn_head_set") if isinstance(content, dict) else None
    if not isinstance(written, str) or not written.strip():
        raise InvalidValueError(
            f'{str(where)!r} holds no list of QRHead: expected attn_head_set: "13-18,13-21,...", got {shown(written)}'
        )
    model = content.get("model_base_class") or content.get("model_name_or_path")
    if written == "full_heads":
        return HeadSet((), _grid(grid, model, where)).complement()
    return _head_set([_head(each.strip(), where) for each in written.split(",")], grid, model, where)


def read_gaze_heads(file: str | Path, grid: HeadGrid | tuple[int, int] | None = None) -> HeadSet:
    """A ranking of gaze heads (arXiv 2606.14703), the highest `gaze_score` first.

    JSON [[layer, head, score], ...] as published, or [{"layer": ..., "head": ..., "score": ...}, ...] as the source's
    code writes it. The file names no model: `grid` says which heads there are (`model.grid`). Errors as in
    `read_mmrethead_heads`.
    """
    where = _file(file, "a ranking of gaze heads")
    rows = read_json(where)
    expected = "a list of [layer, head, score]"
    if not isinstance(rows, list) or not rows:
        raise InvalidValueError(f"{str(where)!r} holds {shown(rows)}; expected {expected}")
    found: list[tuple[Head, float]] = []
    for row in rows:
        parts = [row.get(key) for key in ("layer", "head", "score")] if isinstance(row, dict) else row
        if not isinstance(parts, list) or len(parts) != 3:
            raise InvalidValueError(f"{str(where)!r} holds the row {shown(row)}; expected {expected}")
        head = _head(f"{parts[0]}-{parts[1]}", where)
        found.append((head, _score(parts[2], head, where)))
    ranked = sorted(found, key=lambda of: -of[1])
    return _head_set([head for head, _ in ranked], grid, None, where)


# ---------------------------------------------------------------------- key-value heads


@dataclass(frozen=True, eq=False, repr=False)
class KeyValueScores:
    """One number for each key-value head of a model, [layer, key-value head]: no score of query heads.

    Under grouped-query attention several query heads share a key-value head, so head 3 of a layer is not the query head
    3. Nothing that takes HeadScores takes these; `of_query_heads` gives each query head the number of the head that it
    reads.

    >>> gates = KeyValueScores(torch.tensor([[0.9, 0.1]]), "gate")
    >>> gates
    KeyValueScores(gate: 1 layers x 2 key-value heads)
    >>> gates.of_query_heads((1, 4)).values.tolist() == torch.tensor([[0.9, 0.9, 0.1, 0.1]]).tolist()
    True
    """

    values: Float[Tensor, "layer key_value_head"]
    name: str = "score of key-value heads"

    def __post_init__(self) -> None:
        instance_of("name", self.name, str, "a text")
        values = instance_of("values", self.values, Tensor, "a tensor [layer, key-value head]")
        if values.ndim != 2 or 0 in values.shape or not values.is_floating_point():
            raise InvalidValueError(
                f"{self.name}: expected floating-point numbers [layer, key-value head] with at least one of each, got "
                f"{values.dtype} {list(values.shape)}"
            )
        if not bool(values.isfinite().all()):
            layer, head = (~values.isfinite()).nonzero()[0].tolist()
            raise InvalidValueError(
                f"{self.name}: the number of key-value head {head} in layer {layer} is {values[layer, head].item()}; "
                "expected a finite one"
            )
        object.__setattr__(self, "values", values.detach().cpu())

    def __repr__(self) -> str:
        layers, heads = self.values.shape
        return f"KeyValueScores({self.name}: {layers} layers x {heads} key-value heads)"

    def of_query_heads(self, grid: HeadGrid | tuple[int, int]) -> HeadScores:
        """The same numbers as scores of the query heads of `grid` (`model.grid`, or (n_layers, n_heads)).

        Of n query heads and k key-value heads in a layer, query head h reads key-value head h // (n / k), as
        transformers lays them out. Raises ValueError where the layers are not as many, or n is no multiple of k.
        """
        grid = HeadGrid.of(grid)
        layers, heads = self.values.shape
        if grid.n_layers != layers:
            raise InvalidValueError(
                f"{self.name} is of {layers} layers with {heads} key-value heads, the grid is of {grid}"
            )
        spread = grid.full().to(self.values.dtype)
        for layer, n_own in enumerate(grid.heads_per_layer):
            if n_own % heads:
                raise InvalidValueError(
                    f"layer {layer} has {n_own} query heads, which {heads} key-value heads cannot share evenly; "
                    f"expected a multiple of {heads}"
                )
            if n_own:
                spread[layer, :n_own] = self.values[layer].repeat_interleave(n_own // heads)
        return HeadScores(spread[None], f"{self.name} of its key-value head", grid=grid)


def read_duo_attention(file: str | Path) -> KeyValueScores:
    """The gates of DuoAttention (arXiv 2410.10819): how much each KEY-VALUE head needs full attention, 0 to 1.

    Tab-separated text, a line for each layer and a column for each key-value head (full_attention_heads.tsv); numbers
    outside 0 to 1 are clipped, as the source does. A folder stands for the file of that name in it.

    Raises MissingFileError where there is no file, ValueError for another content.
    """
    where = path_of("file", file)
    where = _file(where / "full_attention_heads.tsv" if where.is_dir() else where, "gates of DuoAttention")
    try:
        lines = where.read_text(encoding="utf-8-sig").splitlines()
        rows = [[float(cell) for cell in line.split("\t")] for line in lines if line.strip()]
    except (OSError, ValueError) as reason:
        raise InvalidValueError(
            f"{str(where)!r} holds no gates: expected numbers with tabs between them ({reason})"
        ) from reason
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1:
        raise InvalidValueError(
            f"{str(where)!r} holds no gates: expected as many numbers in every line, got {widths or 'no line'}"
        )
    if any(math.isnan(gate) for row in rows for gate in row):
        raise InvalidValueError(f"{str(where)!r} holds a gate that is NaN; expected numbers from 0 to 1")
    return KeyValueScores(torch.tensor(rows).clamp(0, 1), "DuoAttention gate")


# ---------------------------------------------------------------------- plumbing


def _file(path: str | Path, expected: str) -> Path:
    where = path_of("file", path)
    if not where.is_file():
        kind = "is a folder" if where.is_dir() else "there is no file at this path"
        raise MissingFileError(f"{str(where)!r}: {kind}; expected {expected}")
    return where


def _json(path: str | Path, expected: str) -> dict[str, Any]:
    content = read_json(_file(path, expected))
    if not isinstance(content, dict):
        raise InvalidValueError(f"{str(path)!r} holds {shown(content)}; expected {expected}, a JSON object")
    return content


def _base(model: object) -> str:
    """A model's own name, without its owner or folder."""
    return model.rstrip("/").rsplit("/", 1)[-1] if isinstance(model, str) else ""


def _head(written: object, path: str | Path) -> Head:
    match = _HEAD.fullmatch(written) if isinstance(written, str) else None
    if match is None:
        raise InvalidValueError(
            f'{str(path)!r} names the head {shown(written)}; expected "layer-head", as "13-18"'
        )
    return int(match[1]), int(match[2])


def _score(value: object, head: Head, path: str | Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidValueError(
            f"{str(path)!r} gives head {head} the score {shown(value)}; expected a number"
        )
    return float(value)


def _score_list(content: Mapping[str, Any], path: str | Path) -> Iterator[tuple[Head, float]]:
    """The pairs of "head_score_list", each head once."""
    listed = content.get("head_score_list")
    if not isinstance(listed, list) or not listed:
        raise InvalidValueError(
            f'{str(path)!r} holds no scores of MMRetHead: expected "head_score_list", [["layer-head", score], ...]; '
            f"its keys are {sorted(content)[:8]}"
        )
    known: set[Head] = set()
    for row in listed:
        if not isinstance(row, list) or len(row) != 2:
            raise InvalidValueError(
                f'{str(path)!r} holds the row {shown(row)}; expected ["layer-head", score]'
            )
        head = _head(row[0], path)
        if head in known:
            raise InvalidValueError(f"{str(path)!r} lists head {head} twice")
        known.add(head)
        yield head, _score(row[1], head, path)


def _score_table(path: str | Path, expected: str) -> dict[Head, list[float]]:
    """{"layer-head": [score, ...]}, as many scores for every head."""
    content = _json(path, expected)
    table: dict[Head, list[float]] = {}
    for written, scores in content.items():
        head = _head(written, path)
        if not isinstance(scores, list) or not scores:
            raise InvalidValueError(
                f"{str(path)!r} gives head {head} {shown(scores)}; expected a list of scores"
            )
        table[head] = [_score(each, head, path) for each in scores]
    lengths = sorted({len(scores) for scores in table.values()})
    if len(lengths) != 1:
        raise InvalidValueError(
            f"{str(path)!r}: expected as many scores for every head, got {lengths or 'no head'}"
        )
    return table


def _complete(
    scores: Mapping[Head, list[float]], name: str, path: str | Path, kinds: tuple[str, ...] | None = None
) -> HeadScores:
    """Scores of all heads of a full grid, whose size the highest numbers tell."""
    n_layers, n_heads = (max(head[axis] for head in scores) + 1 for axis in range(2))
    if len(scores) < n_layers * n_heads:
        every = itertools.product(range(n_layers), range(n_heads))
        missing = next(head for head in every if head not in scores)
        raise InvalidValueError(
            f"{str(path)!r} holds {len(scores)} of {n_layers * n_heads} heads ({missing} is missing): no score of all "
            "heads; a list of some is read by read_mmrethead_heads(file, grid=model.grid)"
        )
    grid = HeadGrid.of((n_layers, n_heads))
    return HeadScores(
        grid.filled(torch.tensor([scores[head] for head in grid.heads], dtype=torch.float64).T.contiguous()),
        name,
        kinds,
        grid,
    )


def _grid(grid: HeadGrid | tuple[int, int] | None, model: object, path: str | Path) -> HeadGrid:
    if grid is not None:
        return HeadGrid.of(grid)
    known = GRIDS.get(_base(model).lower())
    if known is None:
        named = f"is of {shown(model)}, whose heads are not known here" if model else "names no model"
        raise InvalidValueError(f"{str(path)!r} {named}; say which there are: grid=model.grid")
    return HeadGrid.of(known)


def _head_set(
    heads: Iterable[Head], grid: HeadGrid | tuple[int, int] | None, model: object, path: str | Path
) -> HeadSet:
    own = _grid(grid, model, path)
    try:
        return HeadSet(heads, own)
    except MmlensError as reason:
        raise type(reason)(f"{str(path)!r}: {reason}") from reason
