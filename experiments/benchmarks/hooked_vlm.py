"""What hook points and attention rows cost against the plain Hugging Face model, as ratios.

Both sides run in turn in one process and the median of the pairwise ratios is printed, since the clock of a
shared machine drifts. Peak memory is that of one forward above the loaded model, in a process of its own.

    python experiments/benchmarks/hooked_vlm.py            # everything
    python experiments/benchmarks/hooked_vlm.py --length 2048 --pairs 5
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

# Before transformers is imported: the bridge asks the hub for a processor by the model's name, with retries.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from mmlens import HookedVLM, attention_mass
from mmlens.hybrid.speed import peak_bytes

IMAGE_TOKEN = 1
Run = Callable[[], object]


def language_heavy_llava(
    n_layers: int, d_model: int, n_heads: int, attention: str
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights: 256 visual tokens per image and grouped queries."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 128, "patch_size": 8, "projection_dim": 64,
        },
        text_config={
            "model_type": "llama", "vocab_size": 1000, "hidden_size": d_model, "intermediate_size": 2 * d_model,
            "num_hidden_layers": n_layers, "num_attention_heads": n_heads, "num_key_value_heads": n_heads // 4,
            "max_position_embeddings": 32768,
        },
        image_token_index=IMAGE_TOKEN,
        image_seq_length=256,
    )  # fmt: skip
    config._attn_implementation = attention
    config.architectures = ["LlavaForConditionalGeneration"]
    return LlavaForConditionalGeneration(config).eval()


def inputs_of(length: int, with_image: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (1, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if with_image:
        ids[:, 4:260] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(1, 3, 128, 128, generator=generator)
    return inputs


def bridge_of(model: LlavaForConditionalGeneration) -> Callable[..., object]:
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.transformers import helpers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(1000)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w0"
    )
    # Where torchvision is missing the bridge installs it by pip, which replaces the torch that is being measured.
    helpers._ensure_torchvision = lambda: False
    return TransformerBridge.boot_transformers("llava", hf_model=model, tokenizer=tokenizer, device="cpu")


def variants(length: int) -> dict[str, Callable[[], Run]]:
    """Name -> a function that builds the model and gives what is timed."""
    inputs = inputs_of(length)
    shape = (8, 512, 16)
    queries = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    queries[:, -20:-4] = True
    evidence = torch.zeros_like(queries)
    evidence[:, 40:60] = True

    def plain(**options: object) -> Run:
        attention = "eager" if options else "sdpa"
        model = language_heavy_llava(*shape, attention)
        return lambda: model(**inputs, use_cache=False, **options)

    def hooked() -> Run:
        model = HookedVLM(language_heavy_llava(*shape, "sdpa"))
        return lambda: model(inputs, use_cache=False)

    def ram() -> Run:
        model = HookedVLM(language_heavy_llava(*shape, "sdpa"))
        return lambda: attention_mass(model, inputs, queries, evidence)

    def all_patterns() -> Run:
        bridge = bridge_of(language_heavy_llava(*shape, "eager"))
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(shape[0])]
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        return lambda: bridge.run_with_cache(ids, pixel_values=pixels, names_filter=lambda n: n in names)

    return {
        "HF SDPA (the base)": plain,
        "HookedVLM, no hooks": hooked,
        "HookedVLM, RAM of all heads": ram,
        "HF eager, output_attentions": lambda: plain(output_attentions=True),
        "TransformerBridge, all patterns": all_patterns,
    }


def made_variant(length: int, name: str) -> Run:
    return variants(length)[name]()


def wall_clock() -> float:
    """Seconds, with what a GPU still has to do waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def paired_ratios(base: Run, other: Run, pairs: int, clock: Callable[[], float] = wall_clock) -> list[float]:
    """Time of other / time of base in pairs run in turn (the order alternates), after one run of each."""
    ratios = []
    for run in (base, other):
        run()
    for pair in range(pairs):
        took = {}
        for run in (base, other) if pair % 2 else (other, base):
            start = clock()
            run()
            took[run] = clock() - start
        ratios.append(took[other] / took[base])
    return ratios


def ratio(base: Run, other: Run, pairs: int) -> tuple[float, float, float]:
    """Median, minimum and maximum of `paired_ratios`."""
    ratios = paired_ratios(base, other, pairs)
    return float(np.median(ratios)), min(ratios), max(ratios)


def _peak(make: Callable[..., Run], *arguments: object) -> float:
    """In bytes, of this process."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    with torch.no_grad():
        return peak_bytes(make(*arguments), torch.device("cpu"))


def peak_megabytes(make: Callable[..., Run], *arguments: object) -> float:
    """Peak memory of the run that make(*arguments) gives, above what it loaded, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, make, *arguments).result() / 2**20


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.set_verbosity_error()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{arguments.threads} thread(s)")  # fmt: skip

    inputs = inputs_of(24, with_image=False)
    plain = language_heavy_llava(28, 32, 4, "sdpa")
    model = HookedVLM(language_heavy_llava(28, 32, 4, "sdpa"))
    assert torch.equal(model(inputs), plain(**inputs).logits)
    plain_run, hooked_run = (
        (lambda: plain(**inputs, use_cache=False)),
        (lambda: model(inputs, use_cache=False)),
    )
    median, low, high = ratio(plain_run, hooked_run, 40 * arguments.pairs)
    print(
        f"\nidle, 28 thin layers, 24 tokens: HookedVLM / HF SDPA = {median:.3f} (single pairs {low:.2f} to {high:.2f})"
    )

    print(f"\n8 layers, 16 heads, 4 KV heads, d_model 512, {arguments.length} tokens with one image of 256:")
    print(f"{'':34s}{'time':>8s}{'single pairs':>18s}{'peak MB':>10s}{'memory':>9s}")
    made = variants(arguments.length)
    base = made["HF SDPA (the base)"]()
    base_peak = peak_megabytes(made_variant, arguments.length, "HF SDPA (the base)")
    print(f"{'HF SDPA (the base)':34s}{'x1.00':>8s}{'':18s}{base_peak:10.0f}{'x1.00':>9s}")
    for name, make in list(made.items())[1:]:
        other = make()
        pairs = arguments.pairs if "HookedVLM" in name else 3
        median, low, high = ratio(base, other, pairs)
        del other
        peak = peak_megabytes(made_variant, arguments.length, name)
        spread, memory = f"{low:.2f} to {high:.2f}", f"x{peak / base_peak:.2f}"
        print(f"{name:34s}{f'x{median:.2f}':>8s}{spread:>18s}{peak:10.0f}{memory:>9s}")


if __name__ == "__main__":
    main()
