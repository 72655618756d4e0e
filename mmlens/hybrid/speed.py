"""How fast prefill is under hybrid attention, beside dense SDPA on the same model, and how fast it could be."""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mmlens.arguments import flag, names_of, seed_of, shown, whole_number, whole_numbers
from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.heads import Heads, HeadSet, as_head_set
from mmlens.hybrid.dense_heads import hybrid_attention
from mmlens.hybrid.layer import StreamingLayer
from mmlens.hybrid.rule import StreamingRule
from mmlens.internals import attention_implementation
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.hooks import NoChangeWarning

PARTS = ("attention", "prefill", "first token")


@dataclass(frozen=True)
class Work:
    """What a prefill of n tokens computes and moves: floating point operations and bytes, attention and the rest apart.

    Attention: 4 d_head operations for every score that a head computes (q k and the weighted sum of v). The rest: 2
    for every weight of the language layers' matrices and token, and those of the output matrix for one token. Bytes
    are those of the weights once, and of queries, keys, values and outputs once a layer.
    """

    attention_operations: float
    attention_bytes: float
    other_operations: float
    other_bytes: float

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        """The least time: each part at the faster machine limit that binds it."""
        return max(
            self.attention_operations / operations_per_second, self.attention_bytes / bytes_per_second
        ) + max(self.other_operations / operations_per_second, self.other_bytes / bytes_per_second)


def prefill_work(model: HookedVLM, dense: HeadSet | None, n_positions: int, rule: StreamingRule) -> Work:
    """The work of a prefill of text with these heads dense and the others under `rule`; None: all dense."""
    scores = n_positions * (n_positions + 1) / 2
    heads = len(model.grid)
    n_dense = heads if dense is None else len(dense)
    full = n_dense + (heads - n_dense) * rule.share(n_positions)
    size = model.hf_model.dtype.itemsize
    weights = sum(p.numel() for p in model.anatomy.layers.parameters() if p.ndim == 2)
    output = model.hf_model.get_output_embeddings().weight.numel()
    d_head, n_layers = model.cfg.d_head, model.cfg.n_layers
    keys = (model.cfg.n_key_value_heads or model.cfg.n_heads) * n_layers
    return Work(
        attention_operations=4 * d_head * full * scores,
        attention_bytes=2 * (heads + keys) * d_head * n_positions * size,
        other_operations=2 * (weights * n_positions + output),
        other_bytes=(weights + output) * size,
    )


@torch.no_grad()
def machine_rates(model: HookedVLM, repeats: int = 5) -> tuple[float, float]:
    """(operations, bytes) a second of this device in this dtype: the best of a matrix product and of a copy."""
    device, dtype = model.hf_model.device, model.hf_model.dtype
    side = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    products = [_seconds(lambda: one @ other, device) for _ in range(repeats + 1)]
    copies = [_seconds(lambda: target.copy_(source), device) for _ in range(repeats + 1)]
    return 2 * side**3 / min(products), 2 * source.numel() / min(copies)


@torch.no_grad()
def prefill_speed(
    model: HookedVLM,
    dense: Mapping[str, Heads],
    lengths: Sequence[int],
    *,
    sink: int = 512,
    window: int = 4096,
    parts: Sequence[str] = PARTS,
    repeats: int = 5,
    warm_ups: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Dense SDPA and hybrid attention on random tokens, in turn on the same model: the protocol of the paper's G.4.

    Language model alone, one row of random ids; `warm_ups` runs of either side, then `repeats` pairs. Parts:
    "attention" is the attention calls of all layers on random q, k and v; "prefill" one forward with a cache, logits
    of the last position; "first token" `generate` of one token.

    One row for each set of heads, length and part: seconds of either side (means), `speedup` (median of the pairs'
    ratios) with the lowest and highest, `limit` (the ratio of the least times by `prefill_work` at `machine_rates`;
    for attention that of its parts), and peak bytes above what the model holds (CUDA and Linux, else NaN).

    The work is that of layers that attend to the whole prompt: where a family's own window cuts it, the limit is not
    reached. Raises ValueError for a model that was not loaded with SDPA; where no length exceeds `sink` + `window`, so
    that nothing would stream; for a length below 2, an unknown part, or no repeats.
    """
    model_of(model)
    parts = names_of("parts", parts, PARTS)
    lengths = whole_numbers("lengths", lengths)
    repeats, warm_ups = whole_number("repeats", repeats), whole_number("warm_ups", warm_ups, least=0)
    seed = seed_of(seed)
    flag("progress", progress)
    if not isinstance(dense, Mapping) or not dense:
        raise InvalidTypeError(
            f"dense is {shown(dense)}; expected a dict {{name: heads}} with at least one entry"
        )
    if any(length < 2 for length in lengths) or repeats < 1:
        raise InvalidValueError(
            f"lengths are 2 or more, repeats 1 or more, not lengths={list(lengths)} and repeats={repeats}"
        )
    rule = StreamingRule(sink, window)
    sets = {name: as_head_set(heads, model.grid, at_least=0) for name, heads in dense.items()}
    if all(rule.sees_all(length) for length in lengths):
        raise InvalidValueError(
            f"no head would stream: none of the lengths {list(lengths)} exceeds {sink} sinks and a window of {window}"
        )
    implementation = attention_implementation(model.hf_model)
    if implementation != "sdpa":
        raise InvalidValueError(
            f"hybrid attention is timed against SDPA, and the model was loaded with {implementation!r} attention"
        )
    rates = machine_rates(model)
    device = model.hf_model.device
    rows: list[dict[str, Any]] = []
    todo = [(length, name, part) for length in lengths for name in sets for part in parts]
    for length, name, part in tqdm(todo, desc="prefill", disable=not progress):
        heads = sets[name]
        plain, hybrid = _runs(model, part, length, heads, rule, seed)
        for run in (plain, hybrid):
            for _ in range(warm_ups):
                run()
        took = []
        for pair in range(repeats):
            one = {}
            for run in (plain, hybrid) if pair % 2 else (hybrid, plain):
                one[run] = _seconds(run, device)
            took.append((one[plain], one[hybrid]))
        ratios = [before / after for before, after in took]
        least = [_least(prefill_work(model, which, length, rule), part, rates) for which in (None, heads)]
        rows.append(
            {
                "heads": name,
                "n_dense": len(heads),
                "dense_share": len(heads) / len(model.grid),
                "length": length,
                "part": part,
                "dense_seconds": float(np.mean([before for before, _ in took])),
                "hybrid_seconds": float(np.mean([after for _, after in took])),
                "speedup": float(np.median(ratios)),
                "lowest": min(ratios),
                "highest": max(ratios),
                "limit": least[0] / least[1],
                "dense_peak_bytes": peak_bytes(plain, device),
                "hybrid_peak_bytes": peak_bytes(hybrid, device),
            }
        )
    return pd.DataFrame(rows)


def _least(work: Work, part: str, rates: tuple[float, float]) -> float:
    if part == "attention":
        return Work(work.attention_operations, work.attention_bytes, 0.0, 0.0).seconds(*rates)
    return work.seconds(*rates)


def _runs(
    model: HookedVLM, part: str, length: int, heads: HeadSet, rule: StreamingRule, seed: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The part with all heads dense, and with `heads` alone."""
    drawn = torch.Generator().manual_seed(seed)
    if part == "attention":
        calls = _attention_calls(model, length, heads, rule, drawn)
        return (lambda: [dense() for dense, _ in calls]), (lambda: [hybrid() for _, hybrid in calls])
    ids = random_ids(model, length, drawn)

    def plain() -> object:
        if part == "prefill":
            return model.hf_model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return model.hf_model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)

    def hybrid() -> object:
        with warnings.catch_warnings(), hybrid_attention(model, heads, sink=rule.sink, window=rule.window):
            # A length within sinks and window is dense on either side, as its limit of 1 says.
            warnings.simplefilter("ignore", NoChangeWarning)
            return plain()

    return plain, hybrid


def random_ids(model: HookedVLM, length: int, drawn: torch.Generator) -> Tensor:
    """[1, pos] random ids of the vocabulary, none of which stands for an image."""
    size = model.hf_model.get_input_embeddings().weight.shape[0]
    special = {
        value
        for name, value in model.hf_model.config.to_dict().items()
        if name.endswith("token_id") and isinstance(value, int)
    }
    allowed = torch.tensor([index for index in range(size) if index not in special])
    return allowed[torch.randint(len(allowed), (1, length), generator=drawn)].to(model.hf_model.device)


def _attention_calls(
    model: HookedVLM, length: int, heads: HeadSet, rule: StreamingRule, drawn: torch.Generator
) -> list[tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """(dense, hybrid) attention of every layer, on the same random q, k, v."""
    device, dtype = model.hf_model.device, model.hf_model.dtype
    n_keys = model.cfg.n_key_value_heads or model.cfg.n_heads
    shapes = (model.cfg.n_heads, n_keys, n_keys)
    query, key, value = (
        torch.randn(1, count, length, model.cfg.d_head, generator=drawn).to(device, dtype) for count in shapes
    )
    by_layer = heads.by_layer()

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=n_keys != model.cfg.n_heads
        )

    def hybrid_of(layer: int) -> Callable[[], Tensor]:
        is_dense = torch.zeros(model.cfg.n_heads, dtype=torch.bool)
        is_dense[by_layer.get(layer, [])] = True
        streaming = StreamingLayer(f"layer {layer}", is_dense, rule)
        if not streaming.acts_on(query, 0):
            return dense
        return lambda: streaming.run(query, key, value, None, True, None)

    return [(dense, hybrid_of(layer)) for layer in model.grid.layers]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """By events of the device on CUDA, else by the clock."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1000
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak_bytes(run: Callable[[], object], device: torch.device) -> float:
    """Most memory that the run held above what was held before; NaN where this cannot be seen."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    return _peak_of_process(run)


def _peak_of_process(run: Callable[[], object]) -> float:
    """By the kernel's high-water mark, restarted (Linux): freed pages that malloc keeps do not count."""
    restart = Path("/proc/self/clear_refs")
    if not restart.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)
    try:
        restart.write_text("5")
    except OSError:
        return float("nan")
    before = process_status("VmRSS")
    run()
    return 1024.0 * (process_status("VmHWM") - before)


def process_status(field: str) -> int:
    """A field of this process's status in Linux, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
