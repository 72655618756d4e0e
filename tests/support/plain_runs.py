"""The independent truth of the ablation experiments: the plain Hugging Face model with heads cut out of its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch

import mmlens
from mmlens.experiments.experiment import Setup

KINDS, TEXT_KINDS = ("objects", "documents"), ("text_recall",)


def scenes(n: int, seed: int, kinds: Sequence[str] = (*KINDS, *TEXT_KINDS)) -> list[mmlens.Example]:
    return [example for kind in kinds for example in mmlens.scene_examples(kind, n, seed)]


def small_setup(model: mmlens.HookedVLM, n_selection: int = 4, n_evaluation: int = 5) -> Setup:
    return Setup(model, scenes(n_selection, 1), scenes(n_evaluation, 2), batch_size=10, progress=False)


@torch.no_grad()
def without_heads(
    model: mmlens.HookedVLM, heads: Iterable[tuple[int, int]], examples: Sequence[mmlens.Example]
) -> dict[str, tuple[float, float]]:
    """{id: (accuracy, logit difference)} with the heads' columns of the output projections set to zero, one by one."""
    plain = copy.deepcopy(model.hf_model)
    width = model.cfg.d_head
    for layer, head in heads:
        projection = plain.model.language_model.layers[layer].self_attn.o_proj
        projection.weight[:, head * width : (head + 1) * width] = 0
    found = {}
    for example in examples:
        prompt = model.prompt_examples([example])
        logits = plain(**prompt.inputs).logits[0, -1]
        answer = int(prompt.answer_ids[0])
        wrong = prompt.candidate_ids[0][prompt.candidate_ids[0] != answer]
        found[example.id] = (float(logits.argmax() == answer), float(logits[answer] - logits[wrong].max()))
    return found
