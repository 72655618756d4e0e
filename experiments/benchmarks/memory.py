"""Peak memory of measurements over few and over many examples, as ratios: nothing has to hold them all.

Every measurement runs in a process of its own, over `Examples` that are read when they are used; images are files. The
peak is the process's resident memory, torch and the model included (`ru_maxrss`).

    python experiments/benchmarks/memory.py      # 200 and 20,000 examples; an experiment 200 and 1,000
    python experiments/benchmarks/memory.py --only ram --sizes 200 2000
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mmlens
from mmlens.data import Examples, load_examples, save_examples, scene_examples
from mmlens.experiments.experiment import Setup
from mmlens.experiments.masking import EXPERIMENT as MASKING

MODEL = "micro"
N_FILES = 500
"""So many drawn scenes, in files, stand for any number of examples: each is opened anew whenever it is used."""


def ram(model: mmlens.HookedVLM, examples: Examples) -> Any:
    return mmlens.ram(model, examples, progress=False)


def means(model: mmlens.HookedVLM, examples: Examples) -> Any:
    return mmlens.mean_activations(model, examples)


def effect(model: mmlens.HookedVLM, examples: Examples) -> Any:
    return mmlens.effect(model, examples, mmlens.ablate([(0, 1)]), mmlens.accuracy)


def sweep(model: mmlens.HookedVLM, examples: Examples) -> Any:
    heads = {head: mmlens.ablate([head], positions="last") for head in model.heads[:2]}
    return mmlens.sweep(model, examples, heads, mmlens.answer_log_probability, progress=False)


def masking(model: mmlens.HookedVLM, examples: Examples) -> Any:
    """An experiment, half of the examples in each split."""
    half = len(examples) // 2
    setup = Setup(model, examples[:half], examples[half:], progress=False)
    return MASKING.run(setup, shares=(0.05,), modes=("zero",), n_draws=1, n_per_kind=None)


MEASUREMENTS: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    "ram": (ram, (200, 20_000)),
    "means": (means, (200, 20_000)),
    "effect": (effect, (200, 20_000)),
    "sweep": (sweep, (200, 20_000)),
    "masking": (masking, (200, 1_000)),
}


def numbered(folder: str, n: int) -> Examples:
    """`n` examples with ids of their own, of the scenes in the folder one after the other."""
    scenes = load_examples(folder)

    def at(number: int) -> mmlens.Example:
        scene = scenes[number % len(scenes)]
        return mmlens.Example(
            scene.question,
            scene.answer,
            scene.images,
            scene.evidence,
            scene.kind,
            scene.candidates,
            id=str(number),
        )

    return Examples(n, at)


def peak_mib(name: str, folder: str, n: int) -> float:
    """Of a process of its own."""
    command = [sys.executable, __file__, "--only", name, "--within", folder, "--sizes", str(n)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--sizes", nargs="+", type=int, help="numbers of examples, the first the small one")
    parser.add_argument("--within", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.within:
        torch.set_num_threads(1)
        measure, _ = MEASUREMENTS[options.only[0]]
        measure(mmlens.HookedVLM.from_pretrained(MODEL), numbered(options.within, options.sizes[0]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    print(f"{MODEL} on {platform.machine()}, torch {torch.__version__}, one thread; peak memory in MiB")
    with tempfile.TemporaryDirectory() as place:
        half = N_FILES // 2
        kinds = (scene_examples(kind, half, seed=0) for kind in ("objects", "documents"))
        # In turn, so that few examples are of the same sizes as many.
        scenes = [scene for pair in zip(*kinds, strict=True) for scene in pair]
        save_examples(scenes, Path(place))
        for name in options.only:
            few, *more = options.sizes or MEASUREMENTS[name][1]
            base = peak_mib(name, place, few)
            print(f"{name:10} {few:7,} examples {base:8.0f}")
            for n in more:
                peak = peak_mib(name, place, n)
                print(f"{name:10} {n:7,} examples {peak:8.0f}   ratio {peak / base:.3f}", flush=True)


if __name__ == "__main__":
    main()
