"""How much faster sweeps are than one full run for each intervention, as ratios.

A language model of 8 layers x 16 heads, d_model 512, after a small image tower. The cases:

    heads-question   zero ablation of each head at the question's positions
    heads            zero ablation of each head at all positions
    positions        residual stream patched from another prompt, by layer and position (the last 32)
    paths-question   path patching from every earlier head to the queries of one, at the question's positions
    paths            the same at all positions
    text-...         heads-question, heads and positions on a text-only prompt, so that TransformerLens' `patching`
                     and nnsight (where it is installed) can take part with the same weights as a LlamaForCausalLM

    python experiments/benchmarks/sweeps.py                              # everything
    python experiments/benchmarks/sweeps.py --only heads-question paths  # some cases

A pair is half of the sampled full runs, the sweep, and the other half, in one process. The first sweep of a model
also tries out which partial runs are exact, which holds for its later ones; its ratio (of CPU time) stands apart. The
sweep is everything that the user calls, the clean run and the source's run included; the other side is the mean of its
sampled runs times the number of interventions, without its preparation (clean and source runs, caches). A full run is
what `mmlens.effect` does for one intervention without its clean run; for paths it is the two frozen runs of the plain
Hugging Face model under plain hooks. Values of all sampled runs must equal the sweep's before a ratio is printed.

The limit is the ratio of multiplications and additions in layers and unembedding: full runs over one clean run and,
for every intervention, what lies after its first layer and first position - of its first layer the part after
attention where only that is touched, of the last layer keys and values, and at the last position the rest. No exact
reuse of depth, positions and last layer can do better; doing less per layer, or for several interventions at once,
could.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import pandas as pd
import torch
from hooked_vlm import (
    IMAGE_TOKEN,
    Run,
    bridge_of,
    inputs_of,
    language_heavy_llava,
    peak_megabytes,
    wall_clock,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

import mmlens
from mmlens.effects.grids import patch_layers_positions
from mmlens.effects.sweeps import sweep
from mmlens.interventions.paths import path_patch
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Intervention, NoChangeWarning
from mmlens.model.prompt import Prompt
from mmlens.token_map import text_only_map

N_LAYERS, D_MODEL, N_HEADS, D_HEAD = 8, 512, 16, 32
D_MLP, D_KEYS, VOCABULARY = 2 * D_MODEL, D_MODEL // 4, 1000
QUESTION, LAST = slice(-20, -4), 32
RECEIVER = (6, 3)
TOLERANCE = 1e-4

Values = list[float]


@dataclass(frozen=True)
class Case:
    """A sweep, and the other ways to the same numbers: for given labels, one run after the other."""

    labels: list[Any]
    sweep: Callable[[], dict[Any, float]]
    others: Mapping[str, Callable[[Sequence[Any]], Values]]
    limit: float
    """The largest ratio to the first of `others` that exact reuse allows."""


# ---------------------------------------------------------------------- models and prompts


def llava() -> LlavaForConditionalGeneration:
    """Attention as initialised hardly tells positions apart; with larger weights what heads do shows."""
    model = language_heavy_llava(N_LAYERS, D_MODEL, N_HEADS, "sdpa")
    for layer in model.model.language_model.layers:
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.self_attn.get_submodule(projection).weight.mul_(4)
    return model


def llama(attention: str) -> LlamaForCausalLM:
    """The language model of `llava` as a text-only model."""
    whole = llava()
    config = LlamaConfig(
        **{
            name: getattr(whole.config.text_config, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings", "rope_parameters", "rms_norm_eps",
            )
        },
        attn_implementation=attention,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    given = {name.replace("language_model.", ""): value for name, value in whole.state_dict().items()}
    model.load_state_dict({name: given[name] for name in model.state_dict()})
    return model.eval()


def prompt_of(length: int, *, with_image: bool, other: bool = False) -> Prompt:
    """The prompt, or the other one to patch from: other words, another image."""
    inputs = inputs_of(length, with_image)
    if other:
        generator = torch.Generator().manual_seed(1)
        ids = inputs["input_ids"]
        words = torch.randint(2, VOCABULARY, ids.shape, generator=generator)
        inputs["input_ids"] = torch.where(ids == IMAGE_TOKEN, ids, words)
        if with_image:
            inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=generator)
    is_question = torch.zeros(1, length, dtype=torch.bool)
    is_question[:, QUESTION] = True
    token_map = text_only_map(inputs["attention_mask"], is_question)
    token_map = dataclasses.replace(token_map, is_image=inputs["input_ids"] == IMAGE_TOKEN)
    return Prompt(inputs=inputs, token_map=token_map, questions=[""], images=[[]], text=[""])


def last_positions(length: int) -> Tensor:
    return (torch.arange(length) >= length - LAST)[None]


def margin(logits: Tensor, prompt: Prompt | None = None) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 6]


# ---------------------------------------------------------------------- the limit


@dataclass(frozen=True)
class Work:
    """Multiplications and additions of parts of a run of `length` positions, causal attention."""

    length: int

    def behind_attention(self, first: int) -> int:
        """W_O and MLP, at positions from `first` on."""
        return (self.length - first) * (D_MODEL**2 + 3 * D_MODEL * D_MLP)

    def keys_and_values(self, first: int) -> int:
        return (self.length - first) * 2 * D_MODEL * D_KEYS

    def layer(self, first: int) -> int:
        n_pairs = (self.length * (self.length + 1) - first * (first + 1)) // 2
        queries = (self.length - first) * D_MODEL**2
        return queries + self.keys_and_values(first) + 2 * D_MODEL * n_pairs + self.behind_attention(first)

    @property
    def unembedding(self) -> int:
        return D_MODEL * VOCABULARY

    @property
    def full(self) -> int:
        return N_LAYERS * self.layer(0) + self.unembedding

    def partial(self, layer: int, first: int, *, behind_attention: bool) -> int:
        """A run from `layer` (or from after its attention) and position `first` on, to the last position's logits."""
        last = self.length - 1
        total = self.unembedding
        for at in range(layer, N_LAYERS):
            starts_here = behind_attention and at == layer
            if at < N_LAYERS - 1:
                total += self.behind_attention(first) if starts_here else self.layer(first)
            elif starts_here:
                total += self.behind_attention(last)
            else:
                total += self.keys_and_values(first) + self.layer(last) - self.keys_and_values(last)
        return total


def limit(length: int, partial_runs: Sequence[int], *, full_runs: int = 1, whole: int = 1) -> float:
    """Full runs, `full_runs` for each intervention, over the partial ones and the sweep's own `whole` runs."""
    work = Work(length)
    return full_runs * len(partial_runs) * work.full / (whole * work.full + sum(partial_runs))


# ---------------------------------------------------------------------- the sides


def swept(
    model: HookedVLM, prompt: Prompt, make: Callable[[], Mapping[Any, Intervention]]
) -> dict[Any, float]:
    with warnings.catch_warnings():
        # At the last layer, positions before the last do nothing to its logits.
        warnings.simplefilter("ignore", NoChangeWarning)
        # A prompt of its own, for which no earlier sweep's runs are still kept.
        table = sweep(model, dataclasses.replace(prompt), make(), margin, progress=False)
    return dict(zip(table["intervention"], table["value"], strict=True))


def full_runs(
    model: HookedVLM, prompt: Prompt, made: Mapping[Any, Intervention], labels: Sequence[Any]
) -> Values:
    return [
        float(margin(model.run_with_hooks(prompt, fwd_hooks=made[label](model, prompt), logits_to_keep=1)))
        for label in labels
    ]


class FrozenRuns:
    """Path patching by its definition, with plain hooks on the plain model: two whole runs for every sender."""

    def __init__(
        self, hf_model: LlavaForConditionalGeneration, prompt: Prompt, source: Prompt, positions: slice
    ) -> None:
        self.model, self.inputs, self.positions = hf_model, prompt.inputs, positions
        self.layers = hf_model.model.language_model.layers
        self.z, self.mlp = self._recorded(prompt)
        self.source_z, _ = self._recorded(source)

    def __call__(self, labels: Sequence[tuple[int, int]]) -> Values:
        return [self._patched(*label) for label in labels]

    def _recorded(self, prompt: Prompt) -> tuple[list[Tensor], list[Tensor]]:
        z: list[Tensor] = []
        mlp: list[Tensor] = []
        with hooked(
            *(
                (layer.self_attn.o_proj, lambda module, args, output: z.append(args[0]))
                for layer in self.layers
            ),
            *((layer.mlp, lambda module, args, output: mlp.append(output)) for layer in self.layers),
        ):
            self.model(**prompt.inputs, logits_to_keep=1, use_cache=False)
        return z, mlp

    def _patched(self, layer: int, head: int) -> float:
        z = list(self.z)
        z[layer] = z[layer].clone()
        of_head = slice(head * D_HEAD, (head + 1) * D_HEAD)
        z[layer][:, self.positions, of_head] = self.source_z[layer][:, self.positions, of_head]
        of_receiver = slice(RECEIVER[1] * D_HEAD, (RECEIVER[1] + 1) * D_HEAD)
        query = self.layers[RECEIVER[0]].self_attn.q_proj
        read: list[Tensor] = []

        def frozen(value: Tensor, module: Any, args: Any, output: Tensor) -> Tensor:
            return value

        def replaced(value: Tensor, module: Any, args: Any) -> tuple[Tensor]:
            return (value,)

        def received(module: Any, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[..., of_receiver] = read[0]
            return output

        with (
            hooked(
                *((self.layers[at].self_attn.o_proj, partial(replaced, z[at])) for at in range(N_LAYERS)),
                before=True,
            ),
            hooked(
                *((self.layers[at].mlp, partial(frozen, self.mlp[at])) for at in range(N_LAYERS)),
                (query, lambda module, args, output: read.append(output[..., of_receiver])),
            ),
        ):
            self.model(**self.inputs, logits_to_keep=1, use_cache=False)
        with hooked((query, received)):
            return float(margin(self.model(**self.inputs, logits_to_keep=1, use_cache=False).logits))


@contextmanager
def hooked(*hooks: tuple[torch.nn.Module, Callable[..., Any]], before: bool = False) -> Iterator[None]:
    """Plain hooks after modules, or before them."""
    handles = [
        module.register_forward_pre_hook(function) if before else module.register_forward_hook(function)
        for module, function in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_transformer_lens(case: str, length: int) -> Callable[[Sequence[Any]], Values]:
    """The sweep through transformer_lens.patching, for chosen rows of its index."""
    from transformer_lens import patching

    bridge = bridge_of(llama("eager"))
    tokens, source = (
        prompt_of(length, with_image=False, other=other).inputs["input_ids"] for other in (False, True)
    )
    activation, axes, setter = (
        "z",
        ["layer", "head"],
        zero_at(QUESTION if case == "heads-question" else slice(None)),
    )
    cache: Any = {f"blocks.{layer}.attn.hook_z": None for layer in range(N_LAYERS)}
    if case == "positions":
        activation, axes, setter = "resid_pre", ["layer", "pos"], patching.layer_pos_patch_setter
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(N_LAYERS)]
        _, cache = bridge.run_with_cache(source, names_filter=lambda name: name in names)

    def run(labels: Sequence[Any]) -> Values:
        rows = pd.DataFrame(list(labels), columns=axes)
        return patching.generic_activation_patch(
            bridge, tokens, cache, lambda logits: margin(logits)[0], setter, activation, index_df=rows
        ).tolist()

    return run


def zero_at(positions: slice) -> Callable[..., Tensor]:
    def setter(z: Tensor, index: Sequence[int], clean: Any) -> Tensor:
        z[:, positions, index[1]] = 0
        return z

    return setter


def by_nnsight(case: str, length: int) -> Callable[[Sequence[Any]], Values]:
    """The sweep through nnsight, one trace for each intervention."""
    from nnsight import NNsight

    plain = llama("sdpa")
    model = NNsight(plain)
    tokens, source = (
        prompt_of(length, with_image=False, other=other).inputs["input_ids"] for other in (False, True)
    )
    options = {"logits_to_keep": 1, "use_cache": False}
    positions = QUESTION if case == "heads-question" else slice(None)

    def ablated(layer: int, head: int) -> float:
        with model.trace(input_ids=tokens, **options):
            z = model.model.layers[layer].self_attn.o_proj.input
            z[:, positions, head * D_HEAD : (head + 1) * D_HEAD] = 0
            logits = model.output.logits.save()
        return float(margin(logits))

    streams: list[Tensor] = []
    if case == "positions":
        layers = plain.model.layers
        with hooked(*((layer, lambda module, args, output: streams.append(args[0])) for layer in layers)):
            plain(source, **options)

    def patched(layer: int, position: int) -> float:
        with model.trace(input_ids=tokens, **options):
            stream = model.model.layers[layer].input
            stream[:, position] = streams[layer][:, position]
            logits = model.output.logits.save()
        return float(margin(logits))

    one = patched if case == "positions" else ablated
    return lambda labels: [one(*label) for label in labels]


# ---------------------------------------------------------------------- the cases


def heads_case(name: str, length: int, *, with_image: bool) -> Case:
    model, prompt = HookedVLM(llava()), prompt_of(length, with_image=with_image)
    positions = "question" if name == "heads-question" else None
    first = length + QUESTION.start if positions else 0

    def make() -> dict[Any, Intervention]:
        return {head: mmlens.ablate([head], positions=positions) for head in model.heads}

    work = Work(length)
    partial_runs = [work.partial(layer, first, behind_attention=True) for layer, _ in model.heads]
    return Case(
        model.heads,
        partial(swept, model, prompt, make),
        {"a full run each": partial(full_runs, model, prompt, make())},
        limit(length, partial_runs),
    )


def positions_case(length: int, *, with_image: bool) -> Case:
    model = HookedVLM(llava())
    prompt, source = (prompt_of(length, with_image=with_image, other=other) for other in (False, True))

    def make() -> dict[Any, Intervention]:
        own = dataclasses.replace(source)
        return patch_layers_positions(model, own, prompt=prompt, positions=last_positions(length))

    made, work = make(), Work(length)
    partial_runs = [work.partial(layer, first, behind_attention=False) for layer, first in made]
    return Case(
        list(made),
        partial(swept, model, prompt, make),
        {"a full run each": partial(full_runs, model, prompt, made)},
        limit(length, partial_runs, whole=2),
    )


def paths_case(name: str, length: int) -> Case:
    model = HookedVLM(llava())
    prompt, source = (prompt_of(length, with_image=True, other=other) for other in (False, True))
    positions, where = ("question", QUESTION) if name == "paths-question" else (None, slice(None))
    senders = [head for head in model.heads if head[0] < RECEIVER[0]]
    first = length + QUESTION.start if positions else 0

    def make() -> dict[Any, Intervention]:
        own = dataclasses.replace(source)
        return {head: path_patch([head], [(*RECEIVER, "q")], own, positions=positions) for head in senders}

    partial_runs = [Work(length).partial(RECEIVER[0], first, behind_attention=False)] * len(senders)
    return Case(
        senders,
        partial(swept, model, prompt, make),
        {"two frozen runs each": FrozenRuns(llava(), prompt, source, where)},
        limit(length, partial_runs, full_runs=2, whole=2),
    )


def text_case(name: str, length: int) -> Case:
    case = (
        positions_case(length, with_image=False)
        if name == "positions"
        else heads_case(name, length, with_image=False)
    )
    others = {**case.others, "TransformerLens": by_transformer_lens(name, length)}
    if importlib.util.find_spec("nnsight") is not None:
        others["nnsight"] = by_nnsight(name, length)
    return dataclasses.replace(case, others=others)


CASES: dict[str, Callable[[int], Case]] = {
    "heads-question": lambda length: heads_case("heads-question", length, with_image=True),
    "heads": lambda length: heads_case("heads", length, with_image=True),
    "positions": lambda length: positions_case(length, with_image=True),
    "paths-question": lambda length: paths_case("paths-question", length),
    "paths": lambda length: paths_case("paths", length),
    "text-heads-question": lambda length: text_case("heads-question", length),
    "text-heads": lambda length: text_case("heads", length),
    "text-positions": lambda length: text_case("positions", length),
}


# ---------------------------------------------------------------------- measuring


def took(run: Callable[[], Any]) -> tuple[Any, np.ndarray]:
    """What it gives, and its seconds of wall clock and of the process's CPU time."""
    start = np.array([wall_clock(), time.process_time()])
    result = run()
    return result, np.array([wall_clock(), time.process_time()]) - start


def ratios(case: Case, pairs: int, samples: Mapping[str, int]) -> tuple[dict[str, np.ndarray], float, float]:
    """[1 + pairs, (wall, CPU)] of every other side, the largest difference of values, and how far values spread.

    The first row is of the model's first sweep.

    Raises AssertionError where a sampled value is not the sweep's.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in case.others}
    largest = spread = 0.0
    for name in case.others:
        case.others[name](case.labels[:1])
    for pair in range(1 + pairs):
        chosen = {name: random.Random(pair).sample(case.labels, samples[name]) for name in case.others}
        values: dict[str, Values] = {name: [] for name in case.others}
        seconds = {name: np.zeros(2) for name in case.others}

        def half(part: slice) -> None:
            for name, run in case.others.items():
                own, spent = took(lambda: run(chosen[name][part]))  # noqa: B023
                values[name] += own  # noqa: B023
                seconds[name] += spent  # noqa: B023

        half(slice(None, None, 2))
        table, of_sweep = took(case.sweep)
        half(slice(1, None, 2))
        spread = max(table.values()) - min(table.values())
        for name, own in values.items():
            labels = chosen[name][::2] + chosen[name][1::2]
            off = max(abs(table[label] - value) for label, value in zip(labels, own, strict=True))
            assert off <= TOLERANCE and off <= 5e-2 * spread, (
                f"{name} is off by {off:.2g} where values spread {spread:.2g}"
            )
            largest = max(largest, off)
            found[name].append(seconds[name] / len(own) * len(case.labels) / of_sweep)
    return {name: np.array(own) for name, own in found.items()}, largest, spread


def made_side(name: str, length: int, side: str | None) -> Run:
    """The sweep, or one run of another side."""
    case = CASES[name](length)
    return case.sweep if side is None else partial(case.others[side], case.labels[:1])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--sample", type=int, default=8, help="full runs in each pair")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"torch {torch.__version__}, 1 thread; {arguments.length} tokens")  # fmt: skip
    if importlib.util.find_spec("nnsight") is None:
        print("nnsight: not installed")
    for name in arguments.only:
        case = CASES[name](arguments.length)
        # Eager attention is long to wait for, and its runs are all alike.
        samples = {side: arguments.sample if side != "TransformerLens" else 2 for side in case.others}
        found, off, spread = ratios(case, arguments.pairs, samples)
        print(
            f"\n{name}: {len(case.labels)} interventions; largest difference {off:.1g}, values spread {spread:.2g}"
        )
        head = f"{'':26s}" + 2 * f"{{:>8s}}{'single pairs':>18s}" + "{:>8s}{:>8s}{:>10s}"
        print(head.format("wall", "CPU", "first", "limit", "peak MB"))
        for at, (side, own) in enumerate(found.items()):
            columns = []
            for column in own[1:].T:
                columns += [f"x{np.median(column):.1f}", f"{column.min():.1f} to {column.max():.1f}"]
            wall, wall_spread, cpu, cpu_spread = columns
            first = f"x{own[0, 1]:.1f}"
            memory = (
                ""
                if arguments.no_memory
                else f"{peak_megabytes(made_side, name, arguments.length, side):.0f}"
            )
            most = f"x{case.limit:.1f}" if at == 0 else ""
            print(
                f"{side:26s}{wall:>8s}{wall_spread:>18s}{cpu:>8s}{cpu_spread:>18s}{first:>8s}{most:>8s}{memory:>10s}"
            )
        if not arguments.no_memory:
            print(
                f"{'the sweep':94s}{peak_megabytes(made_side, name, arguments.length, None):10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
