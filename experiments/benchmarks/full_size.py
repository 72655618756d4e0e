"""Published configurations at full width, with random weights: they load, hooks fire, and idle hooks cost nothing.

1. The configuration comes from the table below; the depth is all of it, or what the free memory holds.
2. The weights are drawn once. A plain Hugging Face model and a wrapped one share them.
3. A prompt with one image, in the shapes that the published processor gives, goes through both: logits bit-equal,
   every kind of hook point of a middle layer fires with its documented shape, rows of the pattern sum to 1, and
   ablating one head changes the logits.
4. Both run in turn: the median of the pairwise time ratios, with an exact interval of the median. On a CPU the
   time is the process's own (others may share the cores), on a GPU the clock's.

    python experiments/benchmarks/full_size.py --model qwen3-vl-4b
    python experiments/benchmarks/full_size.py --model internvl3.5-8b --layers 12 --device cpu
    python experiments/benchmarks/full_size.py --model qwen3-vl-8b --device cuda --image-side 1024 --pairs 50
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# The models are built from the table; nothing is asked of the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import psutil
import torch
from accelerate import init_empty_weights
from hooked_vlm import paired_ratios, wall_clock
from scipy.stats import quantile_test
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_utils import AttentionInterface
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image
from transformers.utils import logging as transformers_logging

from mmlens import HookedVLM, hook_names
from mmlens.hybrid.speed import process_status

N_TEXT = 40
"""Text tokens around the image."""
N_SHORT = 8
"""Tokens of the prompt of text alone: few, so that what idle hooks cost is not lost in matrix products."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Published:
    """A model on the hub: the numbers of its config.json that shape the computation, and its processor's outputs."""

    hub_id: str
    config: dict[str, Any]
    prompt: Callable[[Any, int], tuple[int, Inputs]]
    """(configuration, pixels a side) -> number of image tokens, and the inputs that come with an image."""


def _qwen3_vl(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """What the sizes of Qwen3-VL share. As in copies of both config.json in public repositories."""
    return {
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": 151936,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            **text,
        },
        "vision_config": {
            "num_heads": 16,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "num_position_embeddings": 2304,
            "hidden_act": "gelu_pytorch_tanh",
            **vision,
        },
    }


def _qwen3_vl_image(config: Any, side: int) -> tuple[int, Inputs]:
    """Patches [patch, channel x time x height x width] in merge blocks, and the grid they come from."""
    vision = config.vision_config
    rows = columns = side // (vision.patch_size * vision.spatial_merge_size) * vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    n_tokens = rows * columns // vision.spatial_merge_size**2
    return n_tokens, {
        "pixel_values": torch.randn(rows * columns, width),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


def _onevision_image(config: Any, side: int) -> tuple[int, Inputs]:
    """The whole view and one tile for each square of 384; a small side gives a narrow image of one tile."""
    size, per_side = config.vision_config.image_size, config.vision_config.image_size // 14
    n_tiles = max(1, side // size)
    height, width = n_tiles * size, n_tiles * size if side >= size else size // 4
    grid = unpad_image(torch.empty(1, n_tiles * per_side, n_tiles * per_side), (height, width)).shape
    # Each row of the tiled view ends in a learnt newline; two tiles a side stay under the limit of anyres_max_9.
    assert n_tiles <= 3
    return per_side**2 + grid[1] * (grid[2] + 1), {
        "pixel_values": torch.randn(1, 1 + n_tiles**2, 3, size, size),
        "image_sizes": torch.tensor([[height, width]]),
    }


def _internvl_image(config: Any, side: int) -> tuple[int, Inputs]:
    """Tiles of 448, and the whole view as one more where there are several."""
    size = config.vision_config.image_size[0]
    n_tiles = max(1, side // size) ** 2
    n_tiles += n_tiles > 1
    return n_tiles * config.image_seq_length, {"pixel_values": torch.randn(n_tiles, 3, size, size)}


PUBLISHED = {
    "qwen3-vl-4b": Published(
        "Qwen/Qwen3-VL-4B-Instruct",
        {
            **_qwen3_vl(
                {"hidden_size": 2560, "intermediate_size": 9728},
                {
                    "depth": 24,
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "out_hidden_size": 2560,
                    "deepstack_visual_indexes": [5, 11, 17],
                },
            ),
            "tie_word_embeddings": True,
        },
        _qwen3_vl_image,
    ),
    "qwen3-vl-8b": Published(
        "Qwen/Qwen3-VL-8B-Instruct",
        {
            **_qwen3_vl(
                {"hidden_size": 4096, "intermediate_size": 12288},
                {
                    "depth": 27,
                    "hidden_size": 1152,
                    "intermediate_size": 4304,
                    "out_hidden_size": 4096,
                    "deepstack_visual_indexes": [8, 16, 24],
                },
            ),
            "tie_word_embeddings": False,
        },
        _qwen3_vl_image,
    ),
    # The vision half, the token ids and the pinpoints are the defaults of transformers' own configuration class,
    # which is documented as this checkpoint's; the text half is Qwen2-7B's. Not certain: the vocabulary's size
    # (152,064 in Qwen2-7B, 152,000 by memory in the converted checkpoint); it changes no hook point.
    "llava-onevision-7b": Published(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        {
            "model_type": "llava_onevision",
            "image_token_index": 151646,
            "video_token_index": 151647,
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "qwen2",
                "vocab_size": 152000,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 32768,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "patch_size": 14,
                "image_size": 384,
                "vision_use_head": False,
            },
        },
        _onevision_image,
    ),
    # The vision half is InternViT-300M-448px as in OpenGVLab's own conversion script; the text half is Qwen3-8B's.
    # Not certain: max_position_embeddings (40,960 in Qwen3-8B); no computation here reaches that far.
    "internvl3.5-8b": Published(
        "OpenGVLab/InternVL3_5-8B-HF",
        {
            "model_type": "internvl",
            "image_token_id": 151671,
            "image_seq_length": 256,
            "downsample_ratio": 0.5,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "qwen3",
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 40960,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            },
            "vision_config": {
                "model_type": "internvl_vision",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "attention_bias": True,
                "use_qk_norm": False,
                "norm_type": "layer_norm",
                "layer_norm_eps": 1e-6,
                "layer_scale_init_value": 0.1,
                "image_size": [448, 448],
                "patch_size": [14, 14],
            },
        },
        _internvl_image,
    ),
}


# ---------------------------------------------------------------------- building


def empty_model(published: Published, n_layers: int | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its buffers, and parameters without data."""
    text = dict(published.config["text_config"])
    text["num_hidden_layers"] = n_layers or text["num_hidden_layers"]
    config = AutoConfig.for_model(**{**published.config, "text_config": text})
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    return model.eval()


def tensors(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """(the dictionary that holds it, its name there, tensor) for all parameters and buffers."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    yield held, name, tensor


def n_bytes(model: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def draw_weights(model: PreTrainedModel, device: torch.device) -> None:
    """Matrices of variance 1 / fan-in, norms of 1, biases of 0; tied weights stay tied."""
    drawn: dict[int, nn.Parameter | Tensor] = {}
    for held, name, tensor in tensors(model):
        if id(tensor) not in drawn:
            if not tensor.is_meta:
                drawn[id(tensor)] = tensor.to(device)
            else:
                weight = torch.empty_like(tensor, device=device)
                if weight.ndim > 1:
                    weight.normal_(0, weight[0].numel() ** -0.5)
                else:
                    weight.fill_(float(name != "bias"))
                drawn[id(tensor)] = nn.Parameter(weight, requires_grad=False)
        held[name] = drawn[id(tensor)]


def share_weights(model: PreTrainedModel, source: PreTrainedModel) -> None:
    for (held, name, _), (_, other, tensor) in zip(tensors(model), tensors(source), strict=True):
        assert name == other
        held[name] = tensor


def depth_that_fits(
    published: Published, dtype: torch.dtype, device: torch.device, memory: float | None
) -> int:
    """All layers, or as many as leave a fifth of the free memory (`memory` GiB where given) to activations."""
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info()[0]
    if memory is not None:
        free = min(free, int(memory * 2**30))
    four, five = (n_bytes(empty_model(published, n, dtype)) for n in (4, 5))
    fits = int((0.8 * free - (four - 4 * (five - four))) // (five - four))
    if fits < 4:
        raise SystemExit(f"{published.hub_id} needs more than {free / 2**30:.1f} GiB even with four layers")
    return min(fits, published.config["text_config"]["num_hidden_layers"])


def inputs_with_image(published: Published, config: Any, side: int, dtype: torch.dtype) -> Inputs:
    """Text, the image's tokens, text."""
    n_image, inputs = published.prompt(config, side)
    image_id = getattr(config, "image_token_id", None) or config.image_token_index
    ids = torch.randint(0, 100_000, (1, N_TEXT + n_image))
    at_image = torch.zeros_like(ids, dtype=torch.bool)
    at_image[:, N_TEXT // 4 : N_TEXT // 4 + n_image] = True
    ids[at_image] = image_id
    if config.model_type == "qwen3_vl":
        ids[:, N_TEXT // 4 - 1], ids[:, N_TEXT // 4 + n_image] = (
            config.vision_start_token_id,
            config.vision_end_token_id,
        )
        inputs["mm_token_type_ids"] = at_image.long()
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


# ---------------------------------------------------------------------- checking


def middle_hook_points(model: HookedVLM) -> list[str]:
    """All hook points of one middle layer and of one vision layer, and those outside the layers."""
    middle = f"blocks.{model.cfg.n_layers // 2}."
    in_tower = f"vision.blocks.{len(model.anatomy.stacks['vision.']) // 2}."
    return [
        name
        for name in model.hook_dict
        if ".blocks." not in f".{name}"
        or name.startswith((middle, in_tower))
        or name.endswith("hook_deepstack")
    ]


def documented_shapes(layers: list[int], sizes: dict[str, int]) -> dict[str, list[int]]:
    """What hook_names.py gives the language side's hook points; the tower's axes are its own."""
    texts = {
        name: text for name, text in hook_names.MODEL_HOOKS.items() if not name.startswith(("vision", "proj"))
    }
    of_block = {**hook_names.BLOCK_HOOKS, **hook_names.BLOCK_IMAGE_HOOKS}
    texts |= {"blocks.{l}." + name: text for name, text in of_block.items()}
    return {
        name.replace("{l}", str(layer)): [sizes[axis] for axis in text[1 : text.index("]")].split(", ")]
        for name, text in texts.items()
        for layer in layers
    }


def check(plain: PreTrainedModel, model: HookedVLM, inputs: Inputs) -> str:
    """Asserts what the module docstring promises of one prompt; says what was seen."""
    ids, cfg = inputs["input_ids"], model.cfg
    middle = cfg.n_layers // 2
    n_image = int(model.image_mask(inputs).sum())
    sizes = {
        "batch": 1, "pos": ids.shape[1], "query": ids.shape[1], "key": ids.shape[1], "image_token": n_image, "1": 1,
        "head": cfg.n_heads, "kv_head": cfg.n_key_value_heads, "d_head": cfg.d_head, "d_model": cfg.d_model,
        "d_mlp": cfg.d_mlp,
    }  # fmt: skip
    clean = plain(**inputs, use_cache=False).logits
    assert bool(clean.isfinite().all())
    assert torch.equal(model(inputs, use_cache=False), clean), "without hooks the logits differ"

    seen: dict[str, list[int]] = {}
    pattern: dict[str, Tensor] = {}

    def look(x: Tensor, hook: Any) -> None:
        seen[hook.name] = list(x.shape)
        if hook.name == f"blocks.{middle}.attn.hook_pattern":
            pattern["last"] = x[:, :, -1].float().cpu()

    names = middle_hook_points(model)
    inside = [name for name in names if name.endswith(("hook_attn_scores", "hook_pattern"))]
    quiet = [name for name in names if name not in inside]
    read = model.run_with_hooks(inputs, fwd_hooks=[(name, look) for name in quiet], use_cache=False)
    assert torch.equal(read, clean), "hooks that only read changed the logits"

    rows: dict[int, Tensor] = {}
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    with model.hooks(fwd_hooks=[(name, look) for name in inside]):
        model.attention_rows(inputs, last, lambda layer, row, real: rows.update({layer: row[:, :, 0].cpu()}))
    assert sorted(rows) == list(range(cfg.n_layers))
    for layer, row in rows.items():
        torch.testing.assert_close(row.sum(-1), torch.ones(1, cfg.n_heads), msg=f"rows of layer {layer}")
    # Read from the family's own eager attention, in the model's dtype.
    torch.testing.assert_close(rows[middle], pattern["last"], atol=2e-2, rtol=2e-2)

    assert set(seen) == set(names), f"never fired: {set(names) - set(seen)}"
    documented = documented_shapes([middle, *model.anatomy.deep_after], sizes)
    n_checked = len(seen.keys() & documented.keys())
    for name in seen.keys() & documented.keys():
        assert seen[name] == documented[name], f"{name} is {seen[name]}, documented as {documented[name]}"
    assert n_checked > 30

    def without_a_head(z: Tensor, hook: Any) -> Tensor:
        z[:, :, cfg.n_heads // 2] = 0
        return z

    hooks = [(f"blocks.{middle}.attn.hook_z", without_a_head)]
    ablated = model.run_with_hooks(inputs, fwd_hooks=hooks, use_cache=False, logits_to_keep=1)
    moved = float((ablated[:, -1] - clean[:, -1]).float().abs().max())
    assert moved > 0, "ablating a head changed no logit"
    return (
        f"logits bit-equal, also under {len(quiet)} reading hooks; {len(seen)} hook points fired, {n_checked} of them "
        f"with a documented shape; pattern rows of {cfg.n_layers} layers sum to 1; one head ablated moves a logit "
        f"by {moved:.3f}"
    )


def idle_ratio(plain: PreTrainedModel, model: HookedVLM, inputs: Inputs, pairs: int) -> str:
    """Time of the wrapped model over the plain one, which runs with transformers' own attention lookup."""
    wrapped = AttentionInterface.get_interface
    own = wrapped.__wrapped__

    def run_plain() -> None:
        AttentionInterface.get_interface = own
        plain(**inputs, use_cache=False)
        AttentionInterface.get_interface = wrapped

    clock = wall_clock if model.device.type == "cuda" else time.process_time
    ratios = paired_ratios(run_plain, lambda: model(inputs, use_cache=False), pairs, clock)
    interval = quantile_test(ratios, q=1.0, p=0.5).confidence_interval(0.95)
    spread = f"single pairs {min(ratios):.3f} to {max(ratios):.3f}"
    exact = "" if np.isnan([*interval]).any() else f"95% interval {interval.low:.3f} to {interval.high:.3f}, "
    return f"{np.median(ratios):.3f} ({exact}{spread}, {pairs} pairs)"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PUBLISHED, required=True)
    parser.add_argument(
        "--layers", type=int, help="language layers; default: as many as the free memory holds"
    )
    parser.add_argument("--memory", type=float, help="GiB to stay under; default: what is free")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--image-side", type=int, help="pixels; default: 1024 on a GPU, 320 on a CPU")
    parser.add_argument("--pairs", type=int, default=6, help="pairs with the image; default: 6")
    parser.add_argument("--text-pairs", type=int, default=40, help="pairs of a short text alone; default: 40")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    transformers_logging.set_verbosity_error()
    published, device = PUBLISHED[arguments.model], torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    side = arguments.image_side or (1024 if device.type == "cuda" else 320)
    of = published.config["text_config"]["num_hidden_layers"]
    n_layers = arguments.layers or depth_that_fits(published, dtype, device, arguments.memory)

    plain = empty_model(published, n_layers, dtype)
    draw_weights(plain, device)
    wrapped = empty_model(published, n_layers, dtype)
    share_weights(wrapped, plain)
    model = HookedVLM(wrapped)
    inputs = inputs_with_image(published, plain.config, side, dtype)
    inputs = {name: x.to(device) for name, x in inputs.items()}
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {arguments.threads} thread(s)"
    )
    print(f"{published.hub_id} in {arguments.dtype} on {where}, torch {torch.__version__}")
    print(
        f"{n_layers} of {of} layers, {sum(w.numel() for w in plain.parameters()) / 1e9:.2f} G parameters, "
        f"{n_bytes(plain) / 2**30:.1f} GiB; {inputs['input_ids'].shape[1]} positions, "
        f"{int(model.image_mask(inputs).sum())} of them visual",
        flush=True,
    )
    print(check(plain, model, inputs), flush=True)
    ids = torch.randint(0, 100_000, (1, N_SHORT), device=device)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    print(
        f"idle ratio, {N_SHORT} tokens of text: {idle_ratio(plain, model, text, arguments.text_pairs)}",
        flush=True,
    )
    print(f"idle ratio, with the image: {idle_ratio(plain, model, inputs, arguments.pairs)}")
    peak = (
        torch.cuda.max_memory_allocated() / 2**30
        if device.type == "cuda"
        else process_status("VmHWM") / 2**20
    )
    print(f"peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
