"""Prefill under hybrid attention against dense SDPA on the same model, and the least times that there could be.

1. The language model of Qwen3-VL's architecture with random weights: by default small (8 layers x 16 heads, 4 key-value
   heads, d_model 512, d_head 32), or a published shape (`--model qwen3-vl-8b`).
2. A share of the heads is dense, drawn once: spread over all layers at random, or all in as few layers as hold them,
   since heads of the highest RAM are not spread evenly. The others see sinks and a window.
3. `mmlens.hybrid.speed.prefill_speed`: random ids, either side in turn, two runs of warm-up; attention, prefill and
   first token apart; medians of the pairs' ratios beside the ratio of the least times.

    python experiments/benchmarks/hybrid.py
    python experiments/benchmarks/hybrid.py --model qwen3-vl-8b --device cuda --dtype bfloat16 \
        --sink 512 --window 4096 --lengths 8192 16384 32768 65536 131072 --fractions 0.017 0.026 0.043 0.087 0.13 0.217
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

# The models are built from a table; nothing is asked of the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from full_size import PUBLISHED, Published, _qwen3_vl, _qwen3_vl_image, draw_weights, empty_model
from transformers.utils import logging as transformers_logging

from mmlens import HookedVLM
from mmlens.head_scores import share_of
from mmlens.heads import HeadSet
from mmlens.hybrid.speed import PARTS, prefill_speed

SMALL = Published(
    "qwen3_vl, d_model 512, d_mlp 1,536",
    {
        **_qwen3_vl(
            {
                "hidden_size": 512,
                "intermediate_size": 1536,
                "num_hidden_layers": 8,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "head_dim": 32,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5_000_000,
                    "mrope_section": [6, 5, 5],
                    "mrope_interleaved": True,
                },
            },
            {
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "out_hidden_size": 512,
                "deepstack_visual_indexes": [0],
            },
        ),
        "tie_word_embeddings": True,
    },
    _qwen3_vl_image,
)

PAPER = {8192: 1.17, 16384: 1.2, 32768: 1.37, 65536: 1.78, 131072: 2.46}
"""Speed-up of prefill by length (arXiv 2606.05843, App. G.4), Qwen3-VL-8B on its authors' machine."""


def dense_heads(model: HookedVLM, count: int, seed: int) -> dict[str, HeadSet]:
    """`count` heads drawn from all, and as many in as few neighbouring layers as hold them, from the middle on."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    every = HeadSet.every((n_layers, n_heads))
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    first = min(n_layers // 2, n_layers - -(-count // n_heads)) * n_heads
    packed = range(first, first + count)
    heads = list(every)
    return {
        f"{name}, {count} of {len(every)}": HeadSet(sorted(heads[at] for at in chosen), every.grid)
        for name, chosen in (("spread", drawn), ("packed", packed))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PUBLISHED, help="a published shape (default: the small one)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 16384])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.05])
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-ups", type=int, default=2)
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    torch.manual_seed(options.seed)
    published = PUBLISHED[options.model] if options.model else SMALL
    hf_model = empty_model(published, options.layers, getattr(torch, options.dtype))
    draw_weights(hf_model, torch.device(options.device))
    model = HookedVLM(hf_model)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor()
    print(
        f"{published.hub_id}: {model.cfg.n_layers} layers x {model.cfg.n_heads} heads, {options.dtype}; "
        f"{name or platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s), torch {torch.__version__}"
    )
    dense: dict[str, HeadSet] = {}
    for fraction in options.fractions:
        dense |= dense_heads(model, share_of(fraction, model.cfg.n_layers * model.cfg.n_heads), options.seed)
    table = prefill_speed(
        model,
        dense,
        options.lengths,
        sink=options.sink,
        window=options.window,
        parts=options.parts,
        repeats=options.repeats,
        warm_ups=options.warm_ups,
        seed=options.seed,
    )
    table["of_limit"] = table["speedup"] / table["limit"]
    table["paper"] = [PAPER.get(length) if options.model else None for length in table["length"]]
    for column in ("dense_peak_bytes", "hybrid_peak_bytes"):
        table[column.replace("bytes", "mb")] = table.pop(column) / 2**20
    print(table.drop(columns="dense_share").to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    if options.csv:
        table.to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
