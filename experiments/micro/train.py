"""Train the micro model: a small Qwen3-VL that answers questions over generated scenes.

    python experiments/micro/train.py --out mmlens/micro/micro

Three stages, each on scenes drawn fresh from `mmlens.data.scenes`:

1. the language model alone, on oracle visual tokens: every token of an object, line, frame or image
   is the sum of the embeddings of its key and its value;
2. the vision tower and its merger, regressed onto those sums with the language model frozen;
3. everything together, on pixels.

A row of a batch is one context followed by several questions that cannot see each other: each
question has the positions and the attention it would have if it were asked alone. The answer is
asked for after the chat template's last token, and in addition right at the key word; the second
loss gives the model the match first and leaves it to learn that the later tokens have to fetch it.

Nothing here reads attention or takes a head out: every choice is made by accuracy.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmlens.data.examples import Example
from mmlens.data.scenes import (
    CELL,
    CLASSES,
    KEYS,
    KINDS,
    QUESTIONS,
    TEXT_KINDS,
    Scene,
    iterate_scenes,
    scene_examples,
    scene_vocabulary,
)
from mmlens.families.processors import load_processor, without_video
from mmlens.statistics import proportion_interval

TRAIN_SEED = 2**20
"""Training scenes have seeds from here on; `scene_examples` is called with smaller ones elsewhere."""

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unk|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('this template takes image and text parts, not ' + part['type']) }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Every number of the training run."""

    seed: int = 0
    threads: int = 1
    # Language model on oracle tokens.
    lm_steps: int = 800
    lm_rate: float = 2e-3
    lm_decay_early: float = 0.1
    lm_decay: float = 2.5
    lm_decay_from: float = 0.4
    """Share of the stage after which the weight decay rises from `lm_decay_early` to `lm_decay`."""
    key_loss: float = 1.0
    key_loss_until: float = 0.7
    """Share of the stage after which the loss at the key word is left out."""
    settle_steps: int = 600
    """Further steps of stage 1 with the weight decay at `settle_decay` throughout; 0 leaves them out."""
    settle_decay: float = 3.0
    oracle_noise: float = 0.02
    row_length: int = 180
    rows: tuple[tuple[str, int], ...] = (
        ("objects", 3),
        ("documents", 3),
        ("frames", 3),
        ("images", 3),
        ("text_recall", 3),
        ("text_knowledge", 1),
    )
    # Vision tower on the oracle sums.
    vision_steps: int = 2500
    vision_rate: float = 2e-3
    # Everything, on pixels.
    joint_steps: int = 200
    joint_rate: float = 5e-4
    joint_decay: float = 2.5
    shape: dict[str, int] = field(
        default_factory=lambda: {
            "layers": 8,
            "heads": 8,
            "kv_heads": 4,
            "head_dim": 32,
            "width": 128,
            "mlp": 256,
            "vision_layers": 3,
            "vision_width": 96,
            "vision_mlp": 192,
        }
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or mark; left padding; spaces and line ends carry no token."""
    words = [*SPECIALS, "user", "assistant", "system", *scene_vocabulary()]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=list(SPECIALS[1:7]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    return tokenizer


def build_processor() -> ProcessorMixin:
    """Qwen3-VL's processor with patches of 8 pixels; sides that are multiples of 16 are not resized."""
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=CELL // 2,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": CELL * CELL, "longest_edge": 512 * 512},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return without_video(Qwen3VLProcessor)(
        image_processor=image_processor, tokenizer=build_tokenizer(), chat_template=CHAT_TEMPLATE
    )


def build_model(tokenizer: PreTrainedTokenizerFast, shape: dict[str, int]) -> Qwen3VLForConditionalGeneration:
    """The untrained model: Qwen3-VL's own classes, small, its DeepStack branch starting at zero."""
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape["width"],
            "intermediate_size": shape["mlp"],
            "num_hidden_layers": shape["layers"],
            "num_attention_heads": shape["heads"],
            "num_key_value_heads": shape["kv_heads"],
            "head_dim": shape["head_dim"],
            "max_position_embeddings": 4096,
            "initializer_range": 0.05,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": shape["vision_layers"],
            "hidden_size": shape["vision_width"],
            "intermediate_size": shape["vision_mlp"],
            "num_heads": 4,
            "patch_size": CELL // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": shape["width"],
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.05,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    for merger in model.model.visual.deepstack_merger_list:
        nn.init.zeros_(merger.linear_fc2.weight)
        nn.init.zeros_(merger.linear_fc2.bias)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model.float()


Counts = dict[tuple[str, str], tuple[int, int]]
"""(right, total) for every (role of the label, kind of task)."""


@dataclass
class Batch:
    """Contexts with several questions each. `second` is the other word of an oracle visual token, or -1."""

    kinds: list[str]
    ids: Tensor
    second: Tensor
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


class Batcher:
    """Turns scenes into batches; every question of a row is drawn with replacement."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, row_length: int, seed: int) -> None:
        self.vocab: dict[str, int] = tokenizer.get_vocab()
        self.row_length = row_length
        self.rng = random.Random(f"questions/{seed}")
        self.streams = {kind: iterate_scenes(kind, TRAIN_SEED + seed) for kind in KINDS + TEXT_KINDS}
        self.words: dict[str, list[int]] = {}
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        if text not in self.words:
            self.words[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.words[text]

    def words_of(self, cell: tuple[str, ...]) -> list[int]:
        """Token ids of the words of one cell."""
        return [self.vocab[word] for word in cell]

    def context(self, scene: Scene) -> tuple[list[int], list[int], list[tuple[int, int, int]], int]:
        """Token ids, second words, (t, h, w) positions of what precedes the question; the next position."""
        vocab = self.vocab
        ids = [vocab["<|im_start|>"], vocab["user"]]
        second = [-1, -1]
        positions = [(0, 0, 0), (1, 1, 1)]
        here = 2
        for grid in scene.contents:
            ids.append(vocab["<|vision_start|>"])
            second.append(-1)
            positions.append((here,) * 3)
            here += 1
            for row, line in enumerate(grid):
                for column, words in enumerate(line):
                    ids.append(vocab[words[0]] if words else vocab["<|image_pad|>"])
                    second.append(vocab[words[1]] if words else -2)
                    positions.append((here, here + row, here + column))
            here += max(len(grid), len(grid[0]))
            ids.append(vocab["<|vision_end|>"])
            second.append(-1)
            positions.append((here,) * 3)
            here += 1
        preamble = self.encode(scene.preamble) if scene.preamble else []
        ids += preamble
        second += [-1] * len(preamble)
        positions += [(here + i,) * 3 for i in range(len(preamble))]
        return ids, second, positions, here + len(preamble)

    def batch(self, kinds: list[str], key_loss: float = 0.0) -> Batch:
        """One row per entry of `kinds`."""
        vocab = self.vocab
        tail = [vocab["<|im_end|>"], vocab["<|im_start|>"], vocab["assistant"]]
        key_ids = {vocab[key] for key in (*KEYS, *CLASSES)}
        size = (len(kinds), self.row_length)
        ids = np.full(size, vocab["<|endoftext|>"])
        second = np.full(size, -1)
        positions = np.zeros((3, *size), dtype=np.int64)
        branch = np.full(size, -1)
        targets: list[tuple[int, int, int, float, str, str]] = []
        scenes = []
        for row, kind in enumerate(kinds):
            scene = next(self.streams[kind])
            scenes.append(scene)
            row_ids, row_second, row_positions, start = self.context(scene)
            end = len(row_ids)
            ids[row, :end] = row_ids
            second[row, :end] = row_second
            positions[:, row, :end] = np.array(row_positions).T
            branch[row, :end] = 0
            keys = sorted(scene.facts)
            for number in itertools.count(1):
                key = self.rng.choice(keys)
                text = QUESTIONS[kind][self.rng.randrange(len(QUESTIONS[kind]))].format(key=key)
                answer = vocab[scene.facts[key]]
                question = [*self.encode(text), *tail, answer]
                stop = end + len(question)
                if stop > self.row_length:
                    break
                ids[row, end:stop] = question
                positions[:, row, end:stop] = np.arange(start, start + len(question))
                branch[row, end:stop] = number
                key_at = next(i for i in reversed(range(len(question) - 1)) if question[i] in key_ids)
                if key_loss > 0:
                    targets.append((row, end + key_at, answer, key_loss, "key", kind))
                targets.append((row, stop - 2, answer, 1.0, "answer", kind))
                targets.append((row, stop - 1, vocab["<|im_end|>"], 0.1, "end", kind))
                end = stop
        longest = int((branch >= 0).any(axis=0).sum())
        ids, second, positions, branch = (
            ids[:, :longest],
            second[:, :longest],
            positions[..., :longest],
            branch[:, :longest],
        )
        group = torch.from_numpy(branch)
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        seen = (group[:, None, :] == 0) | (group[:, None, :] == group[:, :, None])
        rows, columns, labels, weights, roles, label_kinds = zip(*targets, strict=True)
        return Batch(
            kinds=kinds,
            ids=torch.from_numpy(ids),
            second=torch.from_numpy(second),
            visual=torch.from_numpy(second != -1),
            positions=torch.from_numpy(positions),
            mask=(causal & seen)[:, None],
            rows=torch.tensor(rows),
            columns=torch.tensor(columns),
            labels=torch.tensor(labels),
            weights=torch.tensor(weights),
            roles=list(roles),
            label_kinds=list(label_kinds),
            scenes=scenes,
        )


def oracle_embeddings(model: Qwen3VLForConditionalGeneration, batch: Batch) -> Tensor:
    """Embeddings of all tokens, visual ones as the sum of the embeddings of their words."""
    table: Tensor = model.get_input_embeddings().weight
    two = (batch.second >= 0)[..., None]
    return table[batch.ids] + torch.where(two, table[batch.second.clamp(min=0)], 0.0)


def answer_loss(
    model: Qwen3VLForConditionalGeneration,
    batch: Batch,
    embeddings: Tensor,
    deepstack: list[Tensor] | None = None,
) -> tuple[Tensor, Counts]:
    """Weighted cross entropy per question, and (right, total) per (role of the label, kind)."""
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        visual_pos_masks=batch.visual if deepstack is not None else None,
        deepstack_visual_embeds=deepstack,
        use_cache=False,
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
        for role in ("answer", "key"):
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


def train_language_model(model: Qwen3VLForConditionalGeneration, batcher: Batcher, recipe: Recipe) -> None:
    """Stage 1: the language model on oracle visual tokens."""
    named = [*model.model.language_model.named_parameters()]
    optimizer = optimiser(named, recipe.lm_rate, recipe.lm_decay_early)
    kinds = [kind for kind, count in recipe.rows for _ in range(count)]
    tally, started = Tally(), time.time()
    noise = torch.Generator().manual_seed(recipe.seed)
    model.train()
    for step in range(recipe.lm_steps):
        share = step / recipe.lm_steps
        batch = batcher.batch(kinds, recipe.key_loss if share < recipe.key_loss_until else 0.0)
        embeddings = oracle_embeddings(model, batch)
        blur = torch.randn(embeddings.shape, generator=noise) * recipe.oracle_noise
        loss, counts = answer_loss(model, batch, embeddings + blur * batch.visual[..., None])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lm_rate * rate_at(step, recipe.lm_steps)
        optimizer.param_groups[0]["weight_decay"] = (
            recipe.lm_decay if share >= recipe.lm_decay_from else recipe.lm_decay_early
        )
        optimizer.step()
        tally.add(counts)
        if (step + 1) % 50 == 0:
            print(
                f"lm {step + 1:5d} {time.time() - started:6.0f}s loss {loss.item():.3f}  {tally.line()}",
                flush=True,
            )


def pixels(processor: ProcessorMixin, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Patches and grids of all images of the scenes, by the model's own image processor."""
    inputs = processor.image_processor(
        images=[image for scene in scenes for image in scene.images], return_tensors="pt"
    )
    return inputs["pixel_values"], inputs["image_grid_thw"]


def train_vision(
    model: Qwen3VLForConditionalGeneration, processor: ProcessorMixin, batcher: Batcher, recipe: Recipe
) -> None:
    """Stage 2: the tower and its merger, by mean squared error onto the oracle sums."""
    named = [*model.model.visual.named_parameters()]
    optimizer = optimiser(named, recipe.vision_rate, 0.01)
    table = model.get_input_embeddings().weight.detach()
    blank = model.config.image_token_id
    errors: list[float] = []
    started = time.time()
    for step in range(recipe.vision_steps):
        scenes = [next(batcher.streams[kind]) for kind in KINDS]
        words = [
            batcher.words_of(cell)
            for scene in scenes
            for grid in scene.contents
            for line in grid
            for cell in line
        ]
        first = torch.tensor([w[0] if w else blank for w in words])
        second = torch.tensor([w[1] if w else -1 for w in words])
        target = table[first] + torch.where((second >= 0)[:, None], table[second.clamp(min=0)], 0.0)
        patches, grids = pixels(processor, scenes)
        output = model.model.visual(patches, grid_thw=grids).pooler_output
        loss = (output - target).pow(2).sum(-1).mean() / target.pow(2).sum(-1).mean()
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


def train_joint(
    model: Qwen3VLForConditionalGeneration, processor: ProcessorMixin, batcher: Batcher, recipe: Recipe
) -> None:
    """Stage 3: all weights, on pixels, answers after the template only."""
    language = [(f"language.{name}", p) for name, p in model.model.language_model.named_parameters()]
    visual = [(f"visual.{name}", p) for name, p in model.model.visual.named_parameters()]
    text_optimizer = optimiser(language, recipe.joint_rate, recipe.joint_decay)
    visual_optimizer = optimiser(visual, recipe.joint_rate, 0.01)
    kinds = [kind for kind, count in recipe.rows for _ in range(count)]
    tally, started = Tally(), time.time()
    for step in range(recipe.joint_steps):
        batch = batcher.batch(kinds)
        patches, grids = pixels(processor, batch.scenes)
        seen = model.model.visual(patches, grid_thw=grids)
        embeddings = model.get_input_embeddings()(batch.ids).masked_scatter(
            batch.visual[..., None], seen.pooler_output
        )
        loss, counts = answer_loss(model, batch, embeddings, seen.deepstack_features)
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
    model: Qwen3VLForConditionalGeneration,
    processor: ProcessorMixin,
    examples: list[Example],
    batch_size: int = 20,
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
    model: Qwen3VLForConditionalGeneration, processor: ProcessorMixin, n: int, seed: int
) -> dict[str, float]:
    """Print and return accuracy by kind on n fresh examples each."""
    shares = {}
    for kind in KINDS + TEXT_KINDS:
        shares[kind] = accuracy(model, processor, scene_examples(kind, n, seed))
        right = round(shares[kind] * n)
        low, high = proportion_interval([1] * right + [0] * (n - right))
        print(f"{kind:15s} {shares[kind]:.4f}  [{low:.4f}, {high:.4f}]  n = {n}", flush=True)
    return shares


def save(model: Qwen3VLForConditionalGeneration, processor: ProcessorMixin, out: Path) -> None:
    """The folder as `save_pretrained` writes it."""
    out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(out)
    processor.save_pretrained(out)


def train(recipe: Recipe, out: Path) -> None:
    """The whole recipe; the folder is written after every stage that leaves a usable model."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer, recipe.shape)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters", flush=True)

    def scenes_of(stage: int) -> Batcher:
        return Batcher(processor.tokenizer, recipe.row_length, 4 * recipe.seed + stage)

    train_language_model(model, scenes_of(0), recipe)
    if recipe.settle_steps:
        train_language_model(model, scenes_of(3), settling(recipe))
    train_vision(model, processor, scenes_of(1), recipe)
    save(model, processor, out)
    train_joint(model, processor, scenes_of(2), recipe)
    save(model, processor, out)


def settling(recipe: Recipe) -> Recipe:
    """Stage 1 once more from where it ended: strong decay throughout, no loss at the key word."""
    return replace(
        recipe,
        lm_steps=recipe.settle_steps,
        lm_decay_early=recipe.settle_decay,
        lm_decay=recipe.settle_decay,
        key_loss_until=0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the micro model, or measure its accuracy.")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--settle-steps", type=int, default=Recipe.settle_steps)
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    parser.add_argument("--evaluate", action="store_true", help="only measure the folder's accuracy")
    parser.add_argument(
        "--examples", type=int, default=1000, help="fresh examples of each kind to measure on"
    )
    parser.add_argument("--evaluation-seed", type=int, default=900_000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.evaluate:
        recipe = Recipe(seed=options.seed, threads=options.threads, settle_steps=options.settle_steps)
        train(recipe, options.out)
    # Measured on what was written, through the plain transformers classes.
    model = Qwen3VLForConditionalGeneration.from_pretrained(options.out)
    report_accuracy(model, load_processor(options.out), options.examples, options.evaluation_seed)


if __name__ == "__main__":
    main()
