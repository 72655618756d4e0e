"""Noise on the image embeddings, which no prompt holds: an intervention, not a corruption of the prompt."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.arguments import (
    flag,
    seed_of,
)
from mmlens.arguments import number as real_number
from mmlens.errors import InvalidValueError
from mmlens.hook_names import block
from mmlens.interventions.corruptions import CorruptionError
from mmlens.interventions.edits import (
    Change,
    Edit,
    EditContext,
    check_call,
)
from mmlens.model.choosing import IfAny, Positions, if_any, positions_mask
from mmlens.model.evaluation import check_same_twice
from mmlens.model.fingerprints import example_seed
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.hooks import Hook, Intervention
from mmlens.model.prompt import Prompt


def noise_images(
    std: float = 3.0, *, positions: Positions = None, deepstack: bool = True, seed: int = 0
) -> Intervention:
    """Add Gaussian noise to the image embeddings as they enter the language model (`image.hook_embed`).

    Every element gets noise of mean 0 and of `std` times the standard deviation that all elements of the example's
    clean image embeddings have (Meng et al. 2022, ROME, section 2.1: 3 times that of the subjects' embeddings). At
    `positions` alone, those of them that are visual: `lambda prompt: prompt.token_map.box(0, box)`. Learnt
    separators are visual. `positions=if_any("image")` leaves examples without an image as they are.

    Where the family adds visual features to the stream again between layers (`hook_deepstack`), these get noise of
    `std` times their own deviation too, or the image would reach the model clean; `deepstack=False` leaves them be.

    An example's noise depends on `seed`, its tokens and its images: it is the same in every run, in any batch, and
    where a run computes the prompt's end alone. Each prompt is run once without noise, to measure the deviation.
    Generated tokens get none.

    Raises ValueError for a `std` that is not above 0; when built, CorruptionError where an example has no visual
    position to be changed or the family's prompts have none at all, and as `Edit`.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> prompt = model.prompt_examples(mmlens.scene_examples("objects", 2, seed=0))
    >>> hooks = noise_images(seed=1)(model, prompt)
    >>> logits = model.run_with_hooks(prompt, fwd_hooks=hooks)
    >>> hooks[0][1].fired, hooks[0][1].size > 0
    (1, True)
    """
    std, seed = real_number("std", std, above=0), seed_of(seed)
    flag("deepstack", deepstack)

    def intervention(model: HookedVLM, prompt: Prompt) -> list[Hook]:
        check_call(model, prompt)
        is_image = model.image_mask(prompt)
        if is_image is None:
            raise CorruptionError(
                f"prompts of {model.family.model_type!r} have no visual positions: the model reads images by "
                "cross-attention, so no image embedding enters the stream"
            )
        is_image = is_image.cpu()
        chosen = positions_mask(prompt, if_any("image") if positions is None else positions)
        assert chosen is not None
        where = chosen.cpu() & is_image
        clean = (~where.any(1)).nonzero().flatten().tolist()
        if clean and not isinstance(positions, IfAny):
            raise CorruptionError(
                f"noise_images: example(s) {clean} would stay clean: they have "
                + ("no image" if positions is None else "no visual position among those chosen")
                + "; if_any(positions) leaves them so"
            )
        if len(clean) == len(prompt):
            return []
        names = ["image.hook_embed"]
        if deepstack:
            names += [block(layer, "hook_deepstack") for layer in model.anatomy.deep_after]
        check_same_twice(model.hf_model)
        with torch.no_grad():
            _, cache = model.run_with_cache(prompt, names_filter=names, logits_to_keep=1)
        return [
            (
                name,
                Edit(
                    model,
                    prompt,
                    name,
                    _added(_noise(prompt, is_image, cache[name], std, [seed, number]), is_image),
                    positions=if_any(where),
                    generated=False,
                ),
            )
            for number, name in enumerate(names)
        ]

    return intervention


def _noise(
    prompt: Prompt,
    is_image: Bool[Tensor, "batch pos"],
    embeddings: Float[Tensor, "image_token d_model"],
    std: float,
    seeds: list[int],
) -> Float[Tensor, "image_token d_model"]:
    """Noise for every example, drawn on the CPU, so that it is the same on all devices."""
    noise = []
    for example, own in enumerate(embeddings.split(is_image.sum(1).tolist())):
        rng = np.random.default_rng([*seeds, *example_seed(prompt, example)])
        drawn = torch.from_numpy(rng.standard_normal(tuple(own.shape), dtype=np.float32))
        noise.append(drawn * (std * float(own.double().std(correction=0))) if len(own) else drawn)
    return torch.cat(noise).to(embeddings)


def _added(noise: Float[Tensor, "image_token d_model"], is_image: Bool[Tensor, "batch pos"]) -> Change:
    """The change that adds to each visual row in hand the noise of its position."""
    number = torch.full(is_image.shape, -1)
    number[is_image] = torch.arange(len(noise))

    def change(x: Tensor, here: EditContext) -> Tensor:
        rows = here.of_prompt(number, -1)
        rows = rows[rows >= 0]
        if len(rows) != len(x):
            raise InvalidValueError(
                f"noise_images: the run has {len(x)} image tokens where its prompt has {len(rows)}; it was built for "
                "another prompt"
            )
        return x + noise[rows.to(noise.device)].to(x)

    return change
