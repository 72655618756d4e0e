"""What a prompt costs against the processor's own call, as ratios, and what share of RAM over a data set it takes.

Both sides run in turn in one process; of their processor time, the median of the pairwise ratios is printed. The
processor's own call is `apply_chat_template(messages, tokenize=True, return_dict=True)` of the same chat.

    python experiments/benchmarks/prompts.py               # everything
    python experiments/benchmarks/prompts.py --pairs 5 --examples 0
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from hooked_vlm import paired_ratios
from PIL import Image
from transformers.utils import logging as transformers_logging

import mmlens
from mmlens.model import batches
from mmlens.model.batches import Batches

MODELS = ("micro", "llava-onevision", "internvl")
WORDS = "What colour is the letter K"
"""Words that the shipped models know: each of another would be warned of."""


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Smooth shades with noise over them."""
    generator = np.random.default_rng(seed)
    shades = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
    noise = generator.integers(0, 55, size=(height, width, 3))
    return Image.fromarray((shades + noise).astype(np.uint8))


def asked(n_images: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """One turn of images and a question."""
    content: list[dict[str, Any]] = [
        {"type": "image", "image": photograph(seed, *size)} for seed in range(n_images)
    ]
    return [{"role": "user", "content": [*content, {"type": "text", "text": WORDS}]}]


def talk(n_turns: int) -> list[dict[str, Any]]:
    """Turns of text alone."""
    roles = ("user", "assistant")
    chat = [
        {"role": roles[turn % 2], "content": [{"type": "text", "text": f"{WORDS} {WORDS}"}]}
        for turn in range(n_turns - 1 + n_turns % 2)
    ]
    return chat


CHATS: dict[str, Callable[[], list[Any]]] = {
    "text alone": lambda: [talk(1)],
    "small image, 128 x 128": lambda: [asked(1, (128, 128))],
    "photograph, 1600 x 1200": lambda: [asked(1, (1600, 1200))],
    "four images, 640 x 480": lambda: [asked(4, (640, 480))],
    "a talk of 41 turns": lambda: [talk(41)],
    "batch of 16 small images": lambda: [asked(1, (128, 128)) for _ in range(16)],
}


def sides(model: mmlens.HookedVLM, chats: list[Any]) -> tuple[Callable[[], object], Callable[[], object]]:
    """The processor's own call, and ours."""
    processor = model.processor
    padding = {"padding": True, "padding_side": "left"} if len(chats) > 1 else {}

    def own() -> object:
        return processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs=padding,
        )

    return own, lambda: model.prompt(chats)


def shares(
    model: mmlens.HookedVLM, examples: list[mmlens.Example], pairs: int
) -> Iterator[tuple[float, float]]:
    """Of RAM over a data set, what share of the time passes while it waits for prompts: made in place, and ahead."""
    prompts = [prompt for _, prompt in Batches(model, examples, answers=False)]

    def took(what: Any) -> float:
        start = time.perf_counter()
        mmlens.ram(model, what, progress=False)
        return time.perf_counter() - start

    took(prompts)
    for _ in range(pairs):
        ready = took(prompts)
        in_place, ahead = took_in_place(model, took, examples), took(examples)
        yield (in_place - ready) / in_place, (ahead - ready) / ahead


def took_in_place(model: mmlens.HookedVLM, took: Callable[[Any], float], examples: list[Any]) -> float:
    """The time with each batch's prompt made when it is asked for."""
    kept = batches.ahead
    batches.ahead = lambda functions: (function() for function in functions)
    try:
        return took(examples)
    finally:
        batches.ahead = kept


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.set_verbosity_error()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{arguments.threads} thread(s)")  # fmt: skip
    for name in arguments.models:
        model = mmlens.HookedVLM.from_pretrained(name)
        print(f"\n{name}: a prompt / the processor's own call")
        for said, make in CHATS.items():
            own, ours = sides(model, make())
            # Of the processor, since other work on the machine is not the prompts'.
            ratios = paired_ratios(own, ours, arguments.pairs, clock=time.process_time)
            start = time.process_time()
            own()
            took = 1e3 * (time.process_time() - start)
            print(
                f"{said:30s} x{np.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f}, {took:.1f} ms)"
            )
    if arguments.examples:
        model = mmlens.HookedVLM.from_pretrained("micro")
        examples = mmlens.scene_examples("documents", arguments.examples, seed=0)
        found = list(shares(model, examples, max(arguments.pairs // 5, 1)))
        in_place, ahead = np.median(found, axis=0)
        print(f"\nRAM over {arguments.examples} examples: {in_place:.0%} of the time waits for prompts made in place, "
              f"{ahead:.0%} for those made ahead")  # fmt: skip


if __name__ == "__main__":
    main()
