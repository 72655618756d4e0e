"""Models whose truth is known: real architectures with weights set by hand, so that known heads retrieve.

An image is a grid of cells, one visual token each. Some cells hold an object: the upper half's colour is its key
(red and green channel: cosine and sine of the letter's angle), the lower half's its value (likewise). The question
names a letter, the answer is the value of the cell whose key has the letter's angle. The vision tower passes colours on
linearly: its blocks add nothing, its norms divide by a loud constant, its GELUs work where they are the identity.

| role | attends | writes | where |
|---|---|---|---|
| matching | from the question's letter to the cell with the same key | the cell's value, at the letter | middle |
| moving | from every later position to the letter | what matching wrote there, as the answer | after it |
| reader | exactly as matching does: it shares its keys and values | junk | beside it |
| looker | from every later position to all visual tokens alike | junk | first layer |
| constant | the chat's opening marks, whatever the prompt | a constant that the answer's logits need | first layer |

`matching` and `moving` are the circuit; the other three are decoys, each a known blind spot of a method. Where a head
has nothing to attend to it rests on the chat's opening marks. All other heads and the MLPs are random: they
read everything and write into junk dimensions, which the logits read faintly, so that nothing is exactly without
effect. A loud constant in the stream makes every RMS norm linear to about one part in a thousand; rotary frequencies of
the dimensions that planted heads use are so low that positions do not matter.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmlens.arguments import one_of, seed_of, unknown_name_message, whole_number
from mmlens.data.examples import Evidence, Example
from mmlens.errors import InvalidValueError
from mmlens.families.processors import load_processor
from mmlens.heads import Head, HeadSet
from mmlens.model.hooked_vlm import HookedVLM

FAMILIES = ("qwen3_vl", "llava")
KEYS = tuple("ABCDEFGH")
VALUES = ("red", "green", "blue", "yellow")
SIDE = 5
"""Cells per side of an image."""
_CELLS = {"qwen3_vl": 16, "llava": 8}
"""Side in pixels of what a visual token shows."""
N_OBJECTS = 8
CORRUPTIONS = ("question", "values", "keys")
CIRCUIT = ("matching", "moving")
DECOYS = ("reader", "looker", "constant")

# Dimensions of the stream; those after them are junk.
_LOUD, _SINK, _ASKED, _VISUAL = 0, 1, 2, 3
_ASKED_KEY, _KEY, _VALUE, _FOUND, _ANSWER = (slice(first, first + 2) for first in (4, 6, 8, 10, 12))
_JUNK = 14

_LOUDNESS = 100.0
_SHARPNESS = 48.0
"""Logits between full agreement of a planted query and key and none."""
_CONSTANT = 1.5
"""What the constant head adds to the first value's part of the answer, and the embeddings lack."""
_GAIN = 4.0
"""Logit of the right answer above that of the values at right angles to it."""
_FAINT = 0.2
_STRETCH = 0.9
"""Colours reach this share of the channel's range, so that rounding cuts nothing off."""


@dataclass(frozen=True, eq=False)
class Planted:
    """A model with planted heads: `roles` names them, (layer, head) each; the module's heading says what they do."""

    model: HookedVLM
    roles: dict[str, Head]
    cell: int
    """Side in pixels of the square that one visual token shows."""

    @property
    def circuit(self) -> HeadSet:
        """The heads that answer: matching and moving."""
        return self.named(*CIRCUIT)

    def named(self, *roles: str) -> HeadSet:
        """The heads of these roles. Raises ValueError for a role that there is not."""
        for role in roles:
            if role not in self.roles:
                raise InvalidValueError(unknown_name_message("role", role, self.roles))
        return HeadSet(
            [self.roles[role] for role in roles],
            self.model.grid,
        )

    def examples(self, n: int, seed: int) -> list[Example]:
        """`n` questions about images of their own; example i depends on (seed, i) alone."""
        return [_example(random.Random(f"planted/{seed}/{i}"), self.cell, f"{seed}-{i}") for i in range(n)]

    def other_objects(self, example: Example) -> list[tuple[Evidence, ...]]:
        """The regions of the objects that are not asked for, to compare attention to the evidence with."""
        objects = example.metadata["objects"]
        return [
            _evidence(row, column, self.cell)
            for i, (_, _, row, column) in enumerate(objects)
            if i != example.metadata["asked"]
        ]

    def corrupted(self, examples: Sequence[Example], what: str, seed: int = 0) -> list[Example]:
        """The same examples with one thing changed, to patch from.

        "question" asks for another object of the image, one with another value; "values" gives the asked object
        another value; "keys" exchanges the keys of the asked object and of one with another value. The answer is
        that of the changed example. Raises ValueError for another word.
        """
        if what not in CORRUPTIONS:
            raise InvalidValueError(unknown_name_message("corruption", what, CORRUPTIONS))
        return [
            _corrupted(example, what, random.Random(f"planted/{what}/{seed}/{i}"), self.cell)
            for i, example in enumerate(examples)
        ]


def planted_model(family: str = "qwen3_vl", *, seed: int = 0) -> Planted:
    """A Qwen3-VL or LLaVA whose retrieval heads are known, with the shipped model's tokenizer.

    `seed` draws the heads, MLPs and embeddings that are not planted, and which heads are. Raises ValueError for
    another family.

    >>> planted = planted_model("llava")
    >>> planted.circuit <= planted.named("matching", "moving", "reader")
    True
    >>> len(planted.examples(2, seed=0)[0].images)
    1
    """
    processor, config = _parts(one_of("family of planted models", family, FAMILIES))
    seed = seed_of(seed)
    hf_model = _from_config(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _VISION[family](hf_model, processor)
        roles = _plant_language(hf_model, processor.tokenizer, generator)
    return Planted(HookedVLM(hf_model, processor), roles, _CELLS[family])


def _from_config(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model whose every weight, those that nothing here sets too, is of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def unrelated_examples(family: str, n: int, seed: int) -> list[Example]:
    """Examples whose evidence and answer are drawn without a look at image and question: there is nothing to find.

    The evidence is any cell; the answer one of two candidates, so that the sign of what an ablation does to
    `logit_difference` is a toss of a coin, whatever the model.
    """
    cell, examples = _CELLS[one_of("family", family, _CELLS)], []
    n, seed = whole_number("n", n, least=0), seed_of(seed)
    for i in range(n):
        rng = random.Random(f"unrelated/{seed}/{i}")
        asked = _example(rng, cell, f"unrelated-{seed}-{i}")
        evidence = _evidence(rng.randrange(SIDE), rng.randrange(SIDE), cell)
        answer = rng.choice(VALUES[:2])
        examples.append(replace(asked, evidence=evidence, answer=answer, candidates=VALUES[:2], metadata={}))
    return examples


def untrained_model(family: str = "qwen3_vl", *, seed: int = 0, n_layers: int | None = None) -> HookedVLM:
    """The same architecture with random weights, in which there is nothing to find.

    Matrices have the spread 1.3 / sqrt(inputs), which keeps attention from being even. `n_layers` of the language model
    where it should have others than `planted_model`'s. Raises ValueError for another family.

    >>> untrained_model("llava", n_layers=2).cfg.n_layers
    2
    """
    processor, config = _parts(one_of("family of planted models", family, FAMILIES))
    seed = seed_of(seed)
    if n_layers is not None:
        n_layers = whole_number("n_layers", n_layers, least=1)
        config = copy.deepcopy(config)
        config.get_text_config().num_hidden_layers = n_layers
    hf_model = _from_config(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in hf_model.parameters():
            if weight.ndim > 1:
                spread = 1.3 / math.sqrt(weight[0].numel())
                weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    return HookedVLM(hf_model, processor)


# ---------------------------------------------------------------------- examples


def _angle(index: int, count: int) -> tuple[float, float]:
    return math.cos(2 * math.pi * index / count), math.sin(2 * math.pi * index / count)


def _colour(index: int, count: int) -> tuple[int, int, int]:
    cosine, sine = _angle(index, count)
    return round(127.5 * (1 + _STRETCH * cosine)), round(127.5 * (1 + _STRETCH * sine)), 255


def _draw(objects: Sequence[Sequence[Any]], cell: int) -> Image.Image:
    canvas = np.full((SIDE * cell, SIDE * cell, 3), 128, dtype=np.uint8)
    for key, value, row, column in objects:
        top, left = row * cell, column * cell
        canvas[top : top + cell // 2, left : left + cell] = _colour(KEYS.index(key), len(KEYS))
        canvas[top + cell // 2 : top + cell, left : left + cell] = _colour(VALUES.index(value), len(VALUES))
    return Image.fromarray(canvas)


def _evidence(row: int, column: int, cell: int) -> tuple[Evidence, ...]:
    left, top = float(column * cell), float(row * cell)
    return (Evidence(0, (left, top, left + cell, top + cell)),)


def _asking(objects: Sequence[Sequence[Any]], asked: int, cell: int, name: str) -> Example:
    key, value, row, column = objects[asked]
    return Example(
        question=f"What colour is the {key}?",
        answer=value,
        images=(_draw(objects, cell),),
        evidence=_evidence(row, column, cell),
        kind="planted",
        candidates=VALUES,
        id=name,
        metadata={"objects": [list(each) for each in objects], "asked": asked},
    )


def _example(rng: random.Random, cell: int, name: str) -> Example:
    cells = rng.sample([(row, column) for row in range(SIDE) for column in range(SIDE)], N_OBJECTS)
    keys = rng.sample(KEYS, N_OBJECTS)
    # Every value stands in an image, so that there is always one to exchange with.
    values = [*VALUES, *rng.choices(VALUES, k=N_OBJECTS - len(VALUES))]
    rng.shuffle(values)
    objects = [(key, value, *at) for key, value, at in zip(keys, values, cells, strict=True)]
    return _asking(objects, rng.randrange(N_OBJECTS), cell, name)


def _corrupted(example: Example, what: str, rng: random.Random, cell: int) -> Example:
    objects = [tuple(each) for each in example.metadata["objects"]]
    asked = example.metadata["asked"]
    key, value, row, column = objects[asked]
    other = rng.choice([i for i, each in enumerate(objects) if each[1] != value])
    if what == "question":
        return _asking(objects, other, cell, example.id)
    if what == "values":
        objects[asked] = (key, rng.choice([each for each in VALUES if each != value]), row, column)
        return _asking(objects, asked, cell, example.id)
    objects[asked], objects[other] = (objects[other][0], *objects[asked][1:]), (key, *objects[other][1:])
    return _asking(objects, other, cell, example.id)


# ---------------------------------------------------------------------- architectures


def _shipped_folder() -> str:
    return str(resources.files("mmlens.shipped") / "micro")


def _qwen3_vl() -> tuple[ProcessorMixin, PretrainedConfig]:
    processor = load_processor(_shipped_folder())
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    ends = {name: tokenizer.convert_tokens_to_ids(f"<|vision_{name}|>") for name in ("start", "end")}
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 64,
            "num_hidden_layers": 5,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e8,
                "mrope_interleaved": True,
                "mrope_section": [6, 5, 5],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ends["start"],
        vision_end_token_id=ends["end"],
        tie_word_embeddings=False,
    )
    return processor, config


def _llava() -> tuple[ProcessorMixin, PretrainedConfig]:
    shipped = load_processor(_shipped_folder())
    tokenizer, patch = shipped.tokenizer, 8
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE * patch}, crop_size={"height": SIDE * patch, "width": SIDE * patch}
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=shipped.chat_template,
    )
    config = AutoConfig.for_model(
        "llava",
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": patch,
            "image_size": SIDE * patch,
            "projection_dim": 32,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-1,
    )
    return processor, config


_PARTS = {"qwen3_vl": _qwen3_vl, "llava": _llava}


@functools.cache
def _parts(family: str) -> tuple[ProcessorMixin, PretrainedConfig]:
    return _PARTS[family]()


# ---------------------------------------------------------------------- vision


def _silence(*modules: nn.Linear | nn.Conv3d) -> None:
    for module in modules:
        module.weight.zero_()
        if module.bias is not None:
            module.bias.zero_()


def _of_channels(processor: ProcessorMixin, n_pixels: int) -> tuple[Tensor, Tensor]:
    """Weight of a pixel of the red and of the green channel, and an offset: their weighted sum over `n_pixels`
    normalised pixels of one colour is the cosine (the sine) that the colour stands for."""
    mean, deviation = (
        torch.tensor(getattr(processor.image_processor, name)[:2], dtype=torch.float32)
        for name in ("image_mean", "image_std")
    )
    return 2 * deviation / (_STRETCH * n_pixels), (2 * mean - 1) / _STRETCH


_STEADY = 8.0
"""Where GELU is the identity to float precision, content of size 1 and all."""


def _read_colours(
    first: nn.Linear, second: nn.Linear, reads: Sequence[Sequence[tuple[int, float]]], unit: float
) -> None:
    """Two layers with a GELU between them: [reads] as key and value, the constants of a visual token beside them.

    reads[i] are (input dimension, weight) of the four numbers; `unit` is what a content of 1 is in the input.
    """
    _silence(first, second)
    for i, parts in enumerate(reads):
        for dimension, weight in parts:
            first.weight[i, dimension] = weight / unit
        first.bias[i] = _STEADY
        target = (*range(_KEY.start, _KEY.stop), *range(_VALUE.start, _VALUE.stop))[i]
        second.weight[target, i] = 1
        second.bias[target] = -_STEADY
    second.bias[_LOUD], second.bias[_VISUAL] = _LOUDNESS, 1


def _plant_qwen3_vision(hf_model: PreTrainedModel, processor: ProcessorMixin) -> None:
    vision: Any = hf_model.model.visual
    for block in vision.blocks:
        _silence(block.attn.proj, block.mlp.linear_fc2)
    for merger in vision.deepstack_merger_list:
        _silence(merger.linear_fc1, merger.linear_fc2)
    vision.pos_embed.weight.zero_()
    embed = vision.patch_embed.proj
    weight, offset = _of_channels(processor, embed.weight[0, 0].numel())
    _silence(embed)
    for channel in range(2):
        # The twin keeps the mean at zero, which the norm takes away.
        for dimension, sign in ((2 + channel, 1), (4 + channel, -1)):
            embed.weight[dimension, channel] = sign * weight[channel]
            embed.bias[dimension] = sign * offset[channel]
    embed.bias[0], embed.bias[1] = _LOUDNESS, -_LOUDNESS
    width = len(embed.bias)
    merger = vision.merger
    _plain_norm(merger.norm)
    # Patches of a 2 x 2 block come row by row: the upper two show the key, the lower two the value.
    reads = [
        [(patch * width + 2 + channel, 0.5) for patch in patches]
        for patches in ((0, 1), (2, 3))
        for channel in range(2)
    ]
    _read_colours(merger.linear_fc1, merger.linear_fc2, reads, 1 / (_LOUDNESS * math.sqrt(2 / width)))


def _plant_clip_vision(hf_model: PreTrainedModel, processor: ProcessorMixin) -> None:
    tower = hf_model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    for layer in tower.encoder.layers:
        _silence(layer.self_attn.out_proj, layer.mlp.fc2)
    embeddings = tower.embeddings
    embed = embeddings.patch_embedding
    patch = embed.kernel_size[0]
    weight, offset = _of_channels(processor, patch * patch // 2)
    embed.weight.zero_()
    embeddings.class_embedding.zero_()
    positions = embeddings.position_embedding.weight
    positions.zero_()
    halves = (slice(0, patch // 2), slice(patch // 2, patch))
    for i, (half, channel) in enumerate((half, channel) for half in halves for channel in range(2)):
        for dimension, sign in ((2 + i, 1), (6 + i, -1)):
            embed.weight[dimension, channel, half] = sign * weight[channel]
            positions[:, dimension] = sign * offset[channel]
    positions[:, 0], positions[:, 1] = _LOUDNESS, -_LOUDNESS
    width = positions.shape[1]
    _plain_norm(tower.pre_layrnorm)
    projector: Any = hf_model.model.multi_modal_projector
    reads = [[(2 + i, 1.0)] for i in range(4)]
    _read_colours(projector.linear_1, projector.linear_2, reads, 1 / (_LOUDNESS * math.sqrt(2 / width)))


def _plain_norm(norm: nn.LayerNorm) -> None:
    norm.weight.fill_(1)
    norm.bias.zero_()


_VISION = {"qwen3_vl": _plant_qwen3_vision, "llava": _plant_clip_vision}


# ---------------------------------------------------------------------- language


Reads = dict[int, tuple[int, float]]
"""Dimension of a head -> (dimension of the stream that it reads or writes, weight), for content of 1 in the stream."""


@dataclass(frozen=True)
class _Language:
    """A decoder, its sizes, and how the weights of a planted head are written."""

    decoder: Any
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int

    @property
    def unit(self) -> float:
        """What a content of 1 in the stream is after a norm."""
        return math.sqrt(self.d_model) / _LOUDNESS

    @property
    def slow(self) -> tuple[int, int, int, int]:
        """Dimensions of a head that hardly rotate: the slowest pair, and the next."""
        half = self.d_head // 2
        return half - 1, self.d_head - 1, half - 2, self.d_head - 2

    def siblings(self, group: int) -> range:
        """The heads that share the keys and values of a group."""
        size = self.n_heads // self.n_kv_heads
        return range(group * size, (group + 1) * size)

    def rows(self, projection: nn.Linear, head: int) -> Tensor:
        return projection.weight[head * self.d_head : (head + 1) * self.d_head]

    def read(self, projection: nn.Linear, head: int, reads: Reads, scale: float = 1.0) -> None:
        rows = self.rows(projection, head)
        rows.zero_()
        for dimension, (source, weight) in reads.items():
            content = _LOUDNESS if source == _LOUD else 1.0
            rows[dimension, source] = scale * weight / (self.unit * content)

    def write(self, layer: int, head: int, writes: Reads) -> None:
        columns = self.rows_of_output(layer, head)
        columns.zero_()
        for dimension, (target, weight) in writes.items():
            columns[target, dimension] = weight

    def rows_of_output(self, layer: int, head: int) -> Tensor:
        return self.decoder.layers[layer].self_attn.o_proj.weight[
            :, head * self.d_head : (head + 1) * self.d_head
        ]

    def plant(
        self,
        layer: int,
        group: int,
        heads: Sequence[int],
        query: Reads,
        length: float,
        key: Reads,
        value: Reads,
    ) -> None:
        """A group's keys and values, and the queries of some of its heads; `length` is a full query's."""
        attention = self.decoder.layers[layer].self_attn
        if hasattr(attention, "q_norm"):
            # Queries and keys have length sqrt(d_head) here, whatever the weights; the norm's weight sharpens.
            attention.q_norm.weight[list(self.slow)] = _SHARPNESS / math.sqrt(self.d_head)
            scale = 1.0
        else:
            scale = _SHARPNESS * math.sqrt(self.d_head) / length
        for head in heads:
            self.read(attention.q_proj, head, query, scale)
        # A part that no query reads keeps the length of keys without content from being that of their rounding.
        self.read(attention.k_proj, group, {**key, self.slow[3]: (_LOUD, 1.0)})
        self.read(attention.v_proj, group, value)


def _plant_language(hf_model: PreTrainedModel, tokenizer: Any, generator: torch.Generator) -> dict[str, Head]:
    text: Any = hf_model.config.get_text_config()
    language = _Language(
        hf_model.get_decoder(),
        text.hidden_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.head_dim,
    )
    _draw_background(language, generator)
    _plant_words(hf_model, language, tokenizer, generator)
    n_layers = len(language.decoder.layers)
    first, second = language.slow[:2]
    in_key, in_value, found, answer = (
        range(part.start, part.stop) for part in (_KEY, _VALUE, _FOUND, _ANSWER)
    )
    asked_key = range(_ASKED_KEY.start, _ASKED_KEY.stop)
    nothing = {0: (_JUNK, 0.3), 1: (_JUNK + 1, 0.3)}

    def drawn(n: int, among: Sequence[int]) -> list[int]:
        return [among[i] for i in torch.randperm(len(among), generator=generator)[:n].tolist()]

    # Matching, and beside it the reader, which attends alike and writes junk.
    layer = n_layers // 3
    (group,) = drawn(1, range(language.n_kv_heads))
    matching, reader = drawn(2, language.siblings(group))
    language.plant(
        layer,
        group,
        [matching, reader],
        query={first: (asked_key[0], 2), second: (asked_key[1], 2), language.slow[2]: (_LOUD, 1)},
        length=math.sqrt(5),
        key={first: (in_key[0], 1), second: (in_key[1], 1), language.slow[2]: (_SINK, 1)},
        value={0: (in_value[0], 1), 1: (in_value[1], 1)},
    )
    language.write(layer, matching, {0: (found[0], 1), 1: (found[1], 1)})
    language.write(layer, reader, nothing)
    roles = {"matching": (layer, matching), "reader": (layer, reader)}

    layer = 2 * n_layers // 3
    (group,) = drawn(1, range(language.n_kv_heads))
    (moving,) = drawn(1, language.siblings(group))
    language.plant(
        layer,
        group,
        [moving],
        query={first: (_LOUD, 2), second: (_LOUD, 1)},
        length=math.sqrt(5),
        key={first: (_ASKED, 1), second: (_SINK, 1)},
        value={0: (found[0], 1), 1: (found[1], 1)},
    )
    language.write(layer, moving, {0: (answer[0], 1), 1: (answer[1], 1)})
    roles["moving"] = (layer, moving)

    group, other = drawn(2, range(language.n_kv_heads))
    (looker,) = drawn(1, language.siblings(group))
    (constant,) = drawn(1, language.siblings(other))
    always = {first: (_LOUD, 1.0)}
    language.plant(
        0, group, [looker], always, 1, {first: (_VISUAL, 1)}, {0: (in_value[0], 1), 1: (in_value[1], 1)}
    )
    language.write(0, looker, nothing)
    language.plant(0, other, [constant], always, 1, {first: (_SINK, 1)}, {0: (_SINK, 1)})
    language.write(0, constant, {0: (answer[0], _CONSTANT)})
    return roles | {"looker": (0, looker), "constant": (0, constant)}


def _draw_background(language: _Language, generator: torch.Generator) -> None:
    """Random heads and MLPs that read all of the stream and write into its junk dimensions."""

    def draw(weight: Tensor, spread: float) -> None:
        weight.copy_(spread * torch.randn(weight.shape, generator=generator))

    def reads(projection: nn.Linear, of_constant: float, of_content: float) -> None:
        draw(projection.weight, of_content / language.unit)
        draw(projection.weight[:, _LOUD], of_constant)

    part = 1 / math.sqrt(language.d_model)
    for layer in language.decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        reads(attention.q_proj, 0.25, 3 * part)
        reads(attention.k_proj, 0.25, 3 * part)
        reads(attention.v_proj, 0.0, part)
        reads(mlp.gate_proj, 0.1, part)
        reads(mlp.up_proj, 0.1, part)
        for module in (attention.o_proj, mlp.down_proj):
            draw(module.weight, 0.3 / math.sqrt(module.weight.shape[1]))
            module.weight[:_JUNK] = 0


def _plant_words(
    hf_model: PreTrainedModel, language: _Language, tokenizer: Any, generator: torch.Generator
) -> None:
    embed: Tensor = hf_model.get_input_embeddings().weight
    embed.copy_(0.3 * torch.randn(embed.shape, generator=generator))
    embed[:, :_JUNK] = 0
    embed[:, _LOUD] = _LOUDNESS
    embed[:, _ANSWER.start] = -_CONSTANT
    embed[_token(tokenizer, "<|im_start|>"), _SINK] = 1
    for i, letter in enumerate(KEYS):
        row = embed[_token(tokenizer, letter)]
        row[_ASKED] = 1
        row[_ASKED_KEY] = torch.tensor(_angle(i, len(KEYS)))
    read: Tensor = hf_model.get_output_embeddings().weight
    n_junk = read.shape[1] - _JUNK
    read.copy_(
        _FAINT * _GAIN / language.unit / math.sqrt(n_junk) * torch.randn(read.shape, generator=generator)
    )
    read[:, :_JUNK] = 0
    for i, value in enumerate(VALUES):
        read[_token(tokenizer, value), _ANSWER] = _GAIN / language.unit * torch.tensor(_angle(i, len(VALUES)))


def _token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InvalidValueError(
            f"the shipped model's tokenizer has no single token for {text!r}: it gives {ids}"
        )
    return int(ids[0])
