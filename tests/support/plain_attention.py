"""The truth of the experiments on attention: the plain Hugging Face model's patterns, one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mmlens


@dataclass
class Seen:
    """Of one example: attention averaged over the question [layer, head, pos], and which positions are what."""

    mean: Tensor
    evidence: Tensor
    image: Tensor

    @property
    def ram(self) -> Tensor:
        return self.mean[..., self.evidence].sum(-1)

    @property
    def vision_mass(self) -> Tensor:
        return self.mean[..., self.image].sum(-1)

    def hits(self, layer: int, head: int) -> Tensor:
        """Which evidence tokens are among the head's max(1, floor(.05 L)) key tokens."""
        count = max(1, self.mean.shape[-1] // 20)
        top = self.mean[layer, head].argsort(descending=True, stable=True)[:count]
        return torch.isin(self.evidence.nonzero().flatten(), top)


@torch.no_grad()
def seen_by_plain_model(model: mmlens.HookedVLM, examples: Sequence[mmlens.Example]) -> list[Seen]:
    plain = copy.deepcopy(model.hf_model)
    plain.set_attn_implementation("eager")
    found = []
    for example in examples:
        prompt = model.prompt_examples([example])
        tokens = prompt.token_map
        patterns = torch.stack([a[0] for a in plain(**prompt.inputs, output_attentions=True).attentions])
        mean = patterns[:, :, tokens.is_question[0]].mean(2)
        found.append(Seen(mean, tokens.evidence([example])[0], tokens.is_image[0]))
    return found
