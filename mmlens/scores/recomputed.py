"""What papers state of their head scores, and the same recomputed from the scores that they published.

The numbers in this module are facts of the sources that are named beside them; no score of theirs is here.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mmlens.arguments import path_of
from mmlens.errors import InvalidValueError, MissingFileError, MmlensError, MmlensWarning
from mmlens.head_scores import HeadScores, half_mass_share
from mmlens.heads import Head, HeadSet, head_name
from mmlens.scores.published import (
    GRIDS,
    read_duo_attention,
    read_gaze_heads,
    read_mmrethead,
    read_mmrethead_heads,
    read_qrhead,
    read_retrieval_head,
    read_sparsemm,
)

PUBLISHED_RHO = pd.DataFrame(
    [
        ("Qwen3-VL-8B", 5.6, 6.7, 7.2, 8.2),
        ("Qwen2.5-VL-7B", 5.8, 7.8, 6.4, 10.2),
        ("Gemma3-12B", 6.1, 6.6, 7.2, 8.0),
    ],
    columns=["model", "text", "image", "rendered text", "identical image"],
).assign(what="mean of rho_0.5 in % at five context lengths, 8k to 128k")
"""rho_0.5 of the null-calibrated score in %, by where the evidence stands (arXiv 2605.27243).

Each is the mean of rho_0.5 at five context lengths, 8k to 128k tokens: no one length gives them all, nor do the scores
averaged over the lengths.
"""

_RHO_OF = {
    "Qwen3-VL-8B-Instruct": "Qwen3-VL-8B",
    "Qwen2.5-VL-7B-Instruct": "Qwen2.5-VL-7B",
    "gemma-3-12b-it": "Gemma3-12B",
}
_TASKS = {
    "mm_niah_retrieval-text": "text",
    "mm_niah_retrieval-image": "image",
    "text_needle_image": "rendered text",
    "identical_retrieval-image": "identical image",
}
_LENGTHS = (8, 16, 32, 64, 128)
_UNIONS = {
    "Qwen3-VL-8B-Instruct": (106, 104, 95, 95, 112),
    "Qwen3-VL-32B-Instruct": (388, 361, 347, 332, 324),
    "Qwen2.5-VL-7B-Instruct": (77, 77, 80, 97, 99),
    "Qwen2.5-VL-32B-Instruct": (236, 226, 214, 223, 246),
    "gemma-3-12b-it": (71, 73, 84, 95, 100),
    "gemma-3-27b-it": (170, 187, 206, 232, 251),
}
"""Heads in the union of the four tasks' top 5%, at each of the lengths (the source's list of retriever heads)."""

_RETRIEVAL_HEADS = {
    (16, 19): 0.94,
    (11, 15): 0.92,
    (8, 26): 0.80,
    (6, 9): 0.62,
    (7, 12): 0.61,
    (17, 22): 0.56,
    (11, 2): 0.46,
    (6, 16): 0.44,
    (19, 15): 0.42,
    (21, 30): 0.40,
}
"""The ten highest heads of Llama-2-7B-80K, and their scores (the source's README), in `_RETRIEVAL_TESTS` tests."""
_RETRIEVAL_MODEL, _RETRIEVAL_TESTS = "llama-2-7b-80k", 586

COLUMNS = ("source", "model", "what", "stated", "recomputed", "agrees", "note")


class Row(NamedTuple):
    """One statement: `agrees` is None where nothing is stated, or the files are not all that it is about."""

    source: str
    model: str
    what: str
    stated: str
    recomputed: str
    agrees: bool | None = None
    note: str = ""


def recompute_published(folder: str | Path) -> pd.DataFrame:
    """What the papers state of their head scores, next to the same recomputed from the published files in a folder.

    The folder (or one file) is looked through with all below it, for results of MMRetHead, Retrieval Head and SparseMM,
    lists of QRHead and gaze heads, and gates of DuoAttention. A row for each statement: source, model, what, stated,
    recomputed, agrees, note. `agrees` is None where nothing is stated, where no cut is given, and where the files are a
    part of what the statement is about. A file of one of these formats that cannot be read has a row that says why.

    Raises MissingFileError where there is no such folder, ValueError where none of the formats is in it.
    """
    where = path_of("folder", folder)
    if not where.exists():
        raise MissingFileError(f"{str(where)!r} is not there; expected a folder with published head scores")
    files = [where] if where.is_file() else sorted(path for path in where.rglob("*") if path.is_file())
    found: dict[str, list[Path]] = {}
    for path in files:
        source = _source_of(path)
        if source is not None:
            found.setdefault(source, []).append(path)
    if not found:
        raise InvalidValueError(
            f"{str(where)!r} holds no published head scores ({len(files)} file(s) looked at); expected JSON of "
            "MMRetHead, Retrieval Head, SparseMM or gaze heads, YAML of QRHead, or "
            "full_attention_heads.tsv of DuoAttention"
        )
    with warnings.catch_warnings():
        # Sources cut through ties too, and by the same order of heads.
        warnings.filterwarnings("ignore", ".*cut through a tie", MmlensWarning)
        rows = [row for source, of in _SOURCES.items() if source in found for row in of(found[source])]
    return pd.DataFrame(rows, columns=list(COLUMNS))


# ---------------------------------------------------------------------- which file is whose


def _source_of(path: Path) -> str | None:
    """The source whose format a file has, told by its name and content; None where it has none of them."""
    if path.suffix == ".tsv":
        return "DuoAttention" if path.name == "full_attention_heads.tsv" else None
    if path.suffix in (".yaml", ".yml"):
        return "QRHead" if "attn_head_set" in path.read_text(encoding="utf-8", errors="replace") else None
    if path.suffix != ".json":
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return _source_of_json(content, path)


def _source_of_json(content: Any, path: Path) -> str | None:
    if isinstance(content, dict) and "head_score_list" in content:
        return "MMRetHead"
    if isinstance(content, dict) and content and all(re.fullmatch(r"\d+-\d+", key) for key in content):
        # Both have one format; the models of one are no vision-language models.
        is_visual = re.search(
            r"sparsemm|visual_head|llava|qwen.*vl|^qwen$", f"{path.parent} {path.stem}".lower()
        )
        return "SparseMM" if is_visual else "Retrieval Head"
    first = content[0] if isinstance(content, list) and content else None
    if (isinstance(first, list) and len(first) == 3) or (
        isinstance(first, dict) and {"layer", "head"} <= set(first)
    ):
        return "gaze heads"
    return None


# ---------------------------------------------------------------------- each source's statements


class _Result(NamedTuple):
    model: str
    task: str
    length: int
    scores: HeadScores


def _of_mmrethead(paths: Sequence[Path]) -> Iterator[Row]:
    source, results, lists = "MMRetHead", [], []
    for path in paths:
        given = json.loads(path.read_text(encoding="utf-8-sig")).get("args")
        arguments = given if isinstance(given, dict) else {}
        model = str(arguments.get("model_name_or_path") or arguments.get("model") or path.stem).rsplit(
            "/", 1
        )[-1]
        task, length = _TASKS.get(str(arguments.get("datasets"))), arguments.get("input_max_length")
        try:
            if "total_model_heads" in arguments:
                lists.append((model, str(arguments.get("source_context", "")), read_mmrethead_heads(path)))
            elif task is None or not isinstance(length, int) or not arguments.get("add_null_score", True):
                yield Row(
                    source,
                    model,
                    "not compared",
                    "",
                    "",
                    None,
                    f"{path.name}: another task, or no null query",
                )
            else:
                results.append(_Result(model, task, length // 1024, read_mmrethead(path)))
        except MmlensError as reason:
            yield _not_read(source, model, reason)
    seen: set[tuple[str, str, int]] = set()
    for each in results:
        if each[:3] in seen:
            raise InvalidValueError(
                f"two results of MMRetHead are of {each.model}, {each.task}, {each.length}k; expected one of each"
            )
        seen.add(each[:3])
    for model in dict.fromkeys(each.model for each in results):
        own = [each for each in results if each.model == model]
        yield from _rho_rows(source, model, own)
        yield from _union_rows(source, model, own)
    for model, context, heads in lists:
        stated = dict(zip(_LENGTHS, _UNIONS.get(model, ()), strict=False)).get(
            int(re.sub(r"\D", "", context) or 0)
        )
        same = None if stated is None else stated == len(heads)
        yield Row(source, model, f"heads in the list of {context}", _text(stated), str(len(heads)), same)


def _rho_rows(source: str, model: str, results: Sequence[_Result]) -> Iterator[Row]:
    for task in _TASKS.values():
        own = sorted((each for each in results if each.task == task), key=lambda each: each.length)
        if not own:
            continue
        of_length = {each.length: 100 * half_mass_share(each.scores) for each in own}
        mean = float(np.mean(list(of_length.values())))
        known = PUBLISHED_RHO.set_index("model")[task].get(_RHO_OF.get(model, ""))
        whole = tuple(of_length) == _LENGTHS
        averaged = HeadScores(
            np.stack([each.scores.per_example[0].numpy() for each in own]), grid=own[0].scores.grid
        )
        yield Row(
            source,
            model,
            f"rho_0.5 in %, {task}: mean over {len(own)} context lengths",
            _text(known, ".1f"),
            f"{mean:.1f}",
            None if known is None or not whole else f"{mean:.1f}" == f"{known:.1f}",
            "at " + ", ".join(f"{length}k {rho:.1f}" for length, rho in of_length.items())
            + f"; of the averaged scores {100 * half_mass_share(averaged):.1f}"
            + ("" if whole else "; stated for 8k, 16k, 32k, 64k and 128k"),
        )  # fmt: skip


def _union_rows(source: str, model: str, results: Sequence[_Result]) -> Iterator[Row]:
    stated = dict(zip(_LENGTHS, _UNIONS.get(model, ()), strict=False))
    for length in _LENGTHS:
        own = {each.task: each.scores for each in results if each.length == length}
        if len(own) < len(_TASKS):
            continue
        sizes = {
            count: len(set().union(*(scores.top(0.05, count=count) for scores in own.values())))
            for count in ("ceiling", "nearest")
        }
        n_top = len(next(iter(own.values())).top(0.05, count="ceiling"))
        known = stated.get(length)
        yield Row(
            source,
            model,
            f"heads in the union of four tasks' top 5%, {length}k",
            _text(known),
            str(sizes["ceiling"]),
            None if known is None else known == sizes["ceiling"],
            f"top 5%: the ceiling, {n_top} of {len(next(iter(own.values())).grid)} heads; by the nearest number "
            f"{sizes['nearest']}",
        )


def _of_retrieval_head(paths: Sequence[Path]) -> Iterator[Row]:
    source = "Retrieval Head"
    for path in paths:
        model = path.stem.split(".first")[0]
        try:
            scores = read_retrieval_head(path)
        except MmlensError as reason:
            yield _not_read(source, model, reason)
            continue
        note = f"{len(scores)} tests"
        if model == _RETRIEVAL_MODEL:
            whole = len(scores) == _RETRIEVAL_TESTS
            note += "" if whole else f" of {_RETRIEVAL_TESTS}"
            top = scores.top(len(_RETRIEVAL_HEADS))
            shared = sum(head in _RETRIEVAL_HEADS for head in top)
            own = [f"{float(scores.values[head]):.2f}" for head in top]
            same = list(top) == list(_RETRIEVAL_HEADS) and own == [
                f"{s:.2f}" for s in _RETRIEVAL_HEADS.values()
            ]
            yield Row(
                source,
                model,
                "the ten highest heads",
                _named(_RETRIEVAL_HEADS, [f"{score:.2f}" for score in _RETRIEVAL_HEADS.values()]),
                _named(top, own),
                same if whole else None,
                f"{note}; {shared} of {len(top)} shared",
            )
        values = scores.values.numpy()
        yield Row(
            source,
            model,
            "heads with a score above 0.1",
            "less than 5%",
            f"{100 * float((values > 0.1).mean()):.1f}%",
            None,
            f"{note}; the abstract names no cut; {100 * float((values == 0).mean()):.0f}% of all heads never copy",
        )


def _of_sparsemm(paths: Sequence[Path]) -> Iterator[Row]:
    source = "SparseMM"
    for path in paths:
        try:
            scores = read_sparsemm(path)
        except MmlensError as reason:
            yield _not_read(source, path.stem, reason)
            continue
        top = scores.top(0.05)
        held = float(sum(scores.values[head] for head in top) / scores.values.sum())
        yield Row(
            source,
            path.stem,
            "heads that see",
            "less than 5%",
            f"rho_0.5 = {100 * half_mass_share(scores):.1f}%",
            None,
            f"the top 5% hold {100 * held:.0f}% of the score; highest {head_name(next(iter(top)))}; the paper's cut is "
            "not given",
        )


def _of_qrhead(paths: Sequence[Path]) -> Iterator[Row]:
    source = "QRHead"
    lists: dict[str, list[tuple[str, HeadSet]]] = {}
    for path in paths:
        model = path.stem.split("_qr_head")[0].split("_full_head")[0]
        try:
            heads = read_qrhead(path)
        except MmlensError as reason:
            yield _not_read(source, model, reason)
            continue
        stated = re.search(r"#\s*top\s*(\d+)", path.read_text(encoding="utf-8-sig"))
        n_all = len(heads) + len(heads.complement())
        if len(heads) < n_all:
            lists.setdefault(model, []).append((path.stem.rsplit("_", 1)[-1], heads))
        yield Row(
            source,
            model,
            f"heads in {path.name}",
            stated[1] if stated else "",
            str(len(heads)),
            int(stated[1]) == len(heads) if stated else None,
            f"{100 * len(heads) / n_all:.1f}% of {n_all}",
        )
    for model, own in lists.items():
        for (one, heads), (other, others) in itertools.combinations(own, 2):
            yield Row(source, model, f"heads of {one} and {other}", "", f"{len(heads & others)} shared", None)


def _of_duo_attention(paths: Sequence[Path]) -> Iterator[Row]:
    source = "DuoAttention"
    for path in paths:
        model = path.parents[1].name if "lr=" in path.parent.name else path.parent.name
        try:
            gates = read_duo_attention(path)
        except MmlensError as reason:
            yield _not_read(source, model, reason)
            continue
        values = gates.values.double().numpy()
        # The source keeps the gates at or above a quantile, so that this share of the heads is streaming.
        shares = {share: float(np.quantile(values, 1 - share)) for share in (0.25, 0.5)}
        cuts = ", ".join(f"{share:.0%} of them at a gate of {cut:.2f}" for share, cut in shares.items())
        yield Row(
            source,
            model,
            "key-value heads with a gate of at least 0.5",
            "",
            f"{100 * float((values >= 0.5).mean()):.0f}% of {values.shape[0]} x {values.shape[1]}",
            None,
            f"KEY-VALUE heads, no query heads; full attention for {cuts} (25% is used for models whose query heads "
            "have key-value heads of their own, 50% for those that share them)",
        )


def _of_gaze_heads(paths: Sequence[Path]) -> Iterator[Row]:
    source = "gaze heads"
    # The files name no model: the widest grid that is known holds every head.
    widest = tuple(np.max(list(GRIDS.values()), axis=0).tolist())
    for path in paths:
        try:
            heads = read_gaze_heads(path, widest)
        except MmlensError as reason:
            yield _not_read(source, path.stem, reason)
            continue
        layers = sorted({layer for layer, _ in heads})
        shown = " ".join(head_name(head) for head in list(heads)[:3])
        note = f"in layers {layers[0]} to {layers[-1]}; highest {shown}"
        stated = re.search(r"top(\d+)", path.stem)
        same = int(stated[1]) == len(heads) if stated else None
        yield Row(
            source, path.stem, "heads in the list", stated[1] if stated else "", str(len(heads)), same, note
        )


_SOURCES: dict[str, Callable[[Sequence[Path]], Iterator[Row]]] = {
    "MMRetHead": _of_mmrethead,
    "Retrieval Head": _of_retrieval_head,
    "SparseMM": _of_sparsemm,
    "QRHead": _of_qrhead,
    "DuoAttention": _of_duo_attention,
    "gaze heads": _of_gaze_heads,
}


def _not_read(source: str, model: str, reason: Exception) -> Row:
    return Row(source, model, "not read", "", "", None, str(reason))


def _text(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)


def _named(heads: Any, scores: Sequence[str]) -> str:
    pairs: Iterator[tuple[Head, str]] = zip(heads, scores, strict=True)
    return ", ".join(f"{head_name(head)} {score}" for head, score in pairs)
