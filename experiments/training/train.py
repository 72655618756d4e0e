"""Train a shipped model: a small vision-language model that answers questions over generated scenes.

    python experiments/training/train.py micro --out mmlens/shipped/micro

Three stages, each on scenes drawn fresh from `mmlens.data.scenes`; recipes.py holds their numbers:

1. the language model alone, on oracle visual tokens: every token of an object, line, frame or image
   is the sum of the embeddings of its words;
2. the vision tower and its projector, regressed onto those sums with the language model frozen;
3. everything together, on pixels.

A row of a batch is one context followed by several questions that cannot see each other: each
question has the positions and the attention it would have if it were asked alone. The answer is
asked for after the chat template's last token, and in addition within the question; the second
loss gives the model the match first and leaves it to learn that the later tokens have to fetch it.
Where a key is of several words, an early layer is asked to name them at the question mark, through
the model's own embeddings: they have to be put together there before anything can be matched. Where a
question asks for a direction, the visual tokens are asked in the same way for what stands to their left
and above them.

Nothing here reads attention or takes a head out: every choice is made by accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from batches import BREAK, MOST_WORDS, SIDES, Batch, Batcher, sums_of_words
from recipes import RECIPES, Phase, Recipe
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from mmlens.data.examples import Example
from mmlens.data.scene import Scene
from mmlens.data.scenes import scene_examples
from mmlens.families.processors import load_processor
from mmlens.statistics import proportion_interval

Counts = dict[tuple[str, str], tuple[int, int]]
"""(right, total) for every (role of the label, kind of task)."""


class Exits:
    """The stream after an early layer, kept while the language model runs."""

    def __init__(self, model: PreTrainedModel, layers: list[int]) -> None:
        self.kept: dict[int, Tensor] = {}
        for layer in layers:
            model.model.language_model.layers[layer - 1].register_forward_hook(self._keep(layer))

    def _keep(self, layer: int):  # type: ignore[no-untyped-def]
        def keep(module: nn.Module, arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self.kept[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def naming_loss(self, model: PreTrainedModel, layer: int, named: Tensor, side: str = "") -> Tensor:
        """Cross entropy of words (row, column, word) read off the stream after a layer.

        What stands at a `side` is read with half of the coordinates, those of that side, turned around: left and up
        can be told apart so.
        """
        stream = self.kept[layer][named[:, 0], named[:, 1]]
        if side:
            drawn = torch.Generator().manual_seed(1 + SIDES.index(side))
            stream = stream * (2 * torch.randint(2, stream.shape[-1:], generator=drawn) - 1)
        logits = model.lm_head(nn.functional.rms_norm(stream, stream.shape[-1:]))
        return nn.functional.cross_entropy(logits, named[:, 2])


def answer_loss(
    model: PreTrainedModel,
    batch: Batch,
    embeddings: Tensor,
    grid_positions: bool,
    deepstack: list[Tensor] | None = None,
) -> tuple[Tensor, Counts]:
    """Weighted cross entropy per question, and (right, total) per (role of the label, kind)."""
    deep = {}
    if grid_positions:
        deep = {
            "visual_pos_masks": batch.visual if deepstack is not None else None,
            "deepstack_visual_embeds": deepstack,
        }
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch.mask,
        position_ids=batch.positions if grid_positions else batch.positions[0],
        use_cache=False,
        **deep,
    ).last_hidden_state
    logits = model.lm_head(hidden[batch.rows, batch.columns])
    losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    counts: Counts = {}
    for hit, role, kind in zip(
        (logits.argmax(-1) == batch.labels).tolist(), batch.roles, batch.label_kinds, strict=True
    ):
        right, total = counts.get((role, kind), (0, 0))
        counts[role, kind] = (right + hit, total + 1)
    return (losses * batch.weights).sum() / batch.roles.count("answer"), counts


class Tally:
    """Accuracy by kind since the last line of the log."""

    def __init__(self) -> None:
        self.counts: Counts = {}

    def add(self, counts: Counts) -> None:
        for label, (right, total) in counts.items():
            before = self.counts.get(label, (0, 0))
            self.counts[label] = (before[0] + right, before[1] + total)

    def line(self) -> str:
        parts = []
        for role in ("answer", "early"):
            shares = [f"{k} {right / n:.3f}" for (r, k), (right, n) in self.counts.items() if r == role]
            parts += [f"{role}: {' '.join(shares)}"] if shares else []
        self.counts.clear()
        return " | ".join(parts)


def optimiser(parameters: list[tuple[str, nn.Parameter]], rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW with decay on the matrices only: not on embeddings, norms or biases."""
    kept = [p for name, p in parameters if p.ndim < 2 or "embed" in name]
    decayed = [p for name, p in parameters if not (p.ndim < 2 or "embed" in name)]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def rate_at(step: int, steps: int, warm_up: int = 50) -> float:
    """Share of the peak rate: linear warm-up, flat, linear to zero over the last quarter."""
    return min(1.0, (step + 1) / warm_up, 4 * (steps - step) / steps)


def train_language_model(
    model: PreTrainedModel,
    batcher: Batcher,
    recipe: Recipe,
    phase: Phase,
    exits: Exits,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """One phase of stage 1: the language model on oracle visual tokens."""
    named = [*model.model.language_model.named_parameters()]
    newline = getattr(model.model, "image_newline", None)
    if newline is not None:
        named.append(("image_newline", newline))
    if phase.frozen_embeddings:
        named = [(name, p) for name, p in named if "embed" not in name]
    optimizer = optimiser(named, phase.rate, phase.decay)
    kinds = [kind for kind, count in phase.rows for _ in range(count)]
    tally, started = Tally(), time.time()
    noise = torch.Generator().manual_seed(recipe.seed)
    model.train()
    for step in range(phase.steps):
        share = step / phase.steps
        batch = batcher.batch(kinds, phase.row_length, phase.early if share < phase.early_until else 0.0)
        embeddings = sums_of_words(model, batch.words)
        blur = torch.randn(embeddings.shape, generator=noise) * recipe.oracle_noise
        blurred = embeddings + blur * batch.visual[..., None]
        loss, counts = answer_loss(model, batch, blurred, recipe.architecture.grid_positions)
        if phase.naming and share < phase.naming_until:
            loss = loss + phase.naming * exits.naming_loss(model, recipe.name_after, batch.named)
            if len(batch.hops):
                loss = loss + phase.naming * exits.naming_loss(model, recipe.hop_after, batch.hops) / 3
            for side, words in batch.neighbours.items():
                for read in ("", side) if len(words) else ():
                    loss = loss + phase.naming * exits.naming_loss(model, recipe.name_after, words, read)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = phase.rate * rate_at(step, phase.steps)
        late = phase.late_decay is not None and share >= phase.late_from
        optimizer.param_groups[0]["weight_decay"] = phase.late_decay if late else phase.decay
        optimizer.step()
        tally.add(counts)
        if (step + 1) % 50 == 0:
            print(
                f"lm {step + 1:5d} {time.time() - started:6.0f}s loss {loss.item():.3f}  {tally.line()}",
                flush=True,
            )
        if after_step is not None:
            after_step(step + 1)


def visual_words(batcher: Batcher, scenes: list[Scene]) -> Tensor:
    """Words of every visual token of the scenes, in the order of the features."""
    words = [batcher.words_of(scene, token) for scene in scenes for token in batcher.visual_tokens(scene)]
    return torch.tensor([[*several, *[-1] * (MOST_WORDS - len(several))] for several in words])


def train_vision(model: PreTrainedModel, processor: ProcessorMixin, batcher: Batcher, recipe: Recipe) -> None:
    """Stage 2: the tower and its projector, by mean squared error onto the oracle sums."""
    language = {id(p) for p in model.model.language_model.parameters()}
    named = [(n, p) for n, p in model.model.named_parameters() if id(p) not in language]
    named = [(n.removeprefix("visual."), p) for n, p in named if n != "image_newline"]
    optimizer = optimiser(named, recipe.vision_rate, 0.01)
    kinds = [kind for kind, count in recipe.vision_rows for _ in range(count)] or list(recipe.kinds)
    errors: list[float] = []
    started = time.time()
    for step in range(recipe.vision_steps):
        scenes = [next(batcher.streams[kind]) for kind in kinds]
        words = visual_words(batcher, scenes)
        with torch.no_grad():
            target = sums_of_words(model, words)
        output, _ = recipe.architecture.features(model, processor, [scene.images for scene in scenes])
        real = words[:, 0] != BREAK
        loss = (output - target)[real].pow(2).sum(-1).mean() / target[real].pow(2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.vision_rate * rate_at(step, recipe.vision_steps)
        optimizer.step()
        errors.append(loss.item())
        if (step + 1) % 100 == 0:
            print(
                f"vision {step + 1:5d} {time.time() - started:6.0f}s error {np.mean(errors[-100:]):.4f}",
                flush=True,
            )


def train_joint(model: PreTrainedModel, processor: ProcessorMixin, batcher: Batcher, recipe: Recipe) -> None:
    """Stage 3: all weights, on pixels."""
    inside = {id(p) for p in model.model.language_model.parameters()}
    language = [(f"language.{name}", p) for name, p in model.model.language_model.named_parameters()]
    rest = [(name, p) for name, p in model.model.named_parameters() if id(p) not in inside]
    text_optimizer = optimiser(language, recipe.joint_rate, recipe.joint_decay)
    visual_optimizer = optimiser(rest, recipe.joint_rate, 0.01)
    kinds = [kind for kind, count in recipe.joint_rows for _ in range(count)]
    tally, started = Tally(), time.time()
    for step in range(recipe.joint_steps):
        batch = batcher.batch(kinds, recipe.joint_row_length, recipe.joint_early)
        seen, deepstack = recipe.architecture.features(
            model, processor, [scene.images for scene in batch.scenes if scene.images]
        )
        text = model.get_input_embeddings()(batch.words[..., 0].clamp(min=0))
        embeddings = text.masked_scatter(batch.visual[..., None], seen)
        loss, counts = answer_loss(model, batch, embeddings, recipe.architecture.grid_positions, deepstack)
        text_optimizer.zero_grad()
        visual_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in (*text_optimizer.param_groups, *visual_optimizer.param_groups):
            group["lr"] = recipe.joint_rate * rate_at(step, recipe.joint_steps)
        text_optimizer.step()
        visual_optimizer.step()
        tally.add(counts)
        if (step + 1) % 25 == 0:
            print(
                f"joint {step + 1:5d} {time.time() - started:6.0f}s loss {loss.item():.4f}  {tally.line()}",
                flush=True,
            )


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, processor: ProcessorMixin, examples: list[Example], batch_size: int = 20
) -> float:
    """Share of examples whose most likely next token, of the whole vocabulary, is the answer."""
    model.eval()
    right = 0
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        texts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [
                            *({"type": "image"} for _ in e.images),
                            {"type": "text", "text": e.question},
                        ],
                    }
                ],
                add_generation_prompt=True,
                tokenize=False,
            )
            for e in chunk
        ]
        images = [list(e.images) for e in chunk]
        inputs = processor(
            text=texts, images=images if images[0] else None, padding=True, return_tensors="pt"
        )
        predicted = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        answers = torch.tensor([processor.tokenizer.convert_tokens_to_ids(e.answer) for e in chunk])
        right += int((predicted == answers).sum())
    return right / len(examples)


def report_accuracy(
    model: PreTrainedModel, processor: ProcessorMixin, kinds: tuple[str, ...], n: int, seed: int
) -> dict[str, float]:
    """Print and return accuracy by kind on n fresh examples each."""
    shares = {}
    for kind in kinds:
        shares[kind] = accuracy(model, processor, scene_examples(kind, n, seed))
        right = round(shares[kind] * n)
        low, high = proportion_interval([1] * right + [0] * (n - right))
        print(f"{kind:20s} {shares[kind]:.4f}  [{low:.4f}, {high:.4f}]  n = {n}", flush=True)
    return shares


def save(model: PreTrainedModel, processor: ProcessorMixin, recipe: Recipe, out: Path) -> None:
    """The folder as `save_pretrained` writes it, and tasks.json: the kinds the model learnt."""
    out.mkdir(parents=True, exist_ok=True)
    training = model.training
    model.eval().save_pretrained(out)
    model.train(training)
    processor.save_pretrained(out)
    tasks = {"visual": list(recipe.kinds), "text": list(recipe.text_kinds)}
    (out / "tasks.json").write_text(json.dumps(tasks, indent=1) + "\n", encoding="utf-8")


STAGES = ("language", "vision", "settle", "joint")


def train(recipe: Recipe, out: Path, first: str = "language", checkpoints: tuple[int, ...] = ()) -> None:
    """The whole recipe; the folder is written after every stage.

    `first` is the stage to begin with, on what the stages before it wrote to the folder. `checkpoints` are steps of
    stage 1, counted through its phases, at which the model is kept in out/checkpoints/STEP; its tower is untrained.
    """
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    kinds = (*recipe.kinds, *recipe.text_kinds)
    processor = recipe.architecture.build_processor(kinds)
    if first == "language":
        model = recipe.architecture.build_model(processor.tokenizer, recipe.shape)
    else:
        model = AutoModelForImageTextToText.from_pretrained(out).float()
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters", flush=True)

    def scenes_of(stream: int) -> Batcher:
        return Batcher(
            recipe.architecture, processor.tokenizer, kinds, 8 * recipe.seed + stream, recipe.early_at_key
        )

    exits = Exits(model, [layer for layer in (recipe.name_after, recipe.hop_after) if layer])
    if first == "language":
        done = 0
        for phase in recipe.phases:

            def keep(step: int, before: int = done) -> None:
                if before + step in checkpoints:
                    save(model, processor, recipe, out / "checkpoints" / f"{before + step:05d}")

            train_language_model(model, scenes_of(phase.stream), recipe, phase, exits, keep)
            done += phase.steps
        save(model, processor, recipe, out)
    if first in STAGES[:2]:
        train_vision(model, processor, scenes_of(1), recipe)
        save(model, processor, recipe, out)
    if first in STAGES[:3]:
        for phase in recipe.settle:
            train_language_model(model, scenes_of(phase.stream), recipe, phase, exits)
            save(model, processor, recipe, out)
    train_joint(model, processor, scenes_of(2), recipe)
    save(model, processor, recipe, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a shipped model, or measure its accuracy.")
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first", choices=STAGES, default=STAGES[0], help="the stage to begin with")
    parser.add_argument("--evaluate", action="store_true", help="only measure the folder's accuracy")
    parser.add_argument(
        "--examples", type=int, default=1000, help="fresh examples of each kind to measure on"
    )
    parser.add_argument("--evaluation-seed", type=int, default=900_000)
    parser.add_argument(
        "--checkpoints", type=int, nargs="*", default=(), help="steps of stage 1 at which the model is kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = replace(RECIPES[options.recipe], seed=options.seed, threads=options.threads)
    if not options.evaluate:
        train(recipe, options.out, options.first, tuple(options.checkpoints))
    # Measured on what was written, through the plain transformers classes.
    model = AutoModelForImageTextToText.from_pretrained(options.out)
    kinds = (*recipe.kinds, *recipe.text_kinds)
    report_accuracy(model, load_processor(options.out), kinds, options.examples, options.evaluation_seed)


if __name__ == "__main__":
    main()
