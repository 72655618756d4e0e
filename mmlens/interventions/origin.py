"""Which model activations come from: those of another one are taken where the caller says so, and only there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformer_lens import ActivationCache

from mmlens.errors import InvalidTypeError, InvalidValueError
from mmlens.model.fingerprints import same_weights, weights_fingerprints
from mmlens.model.hooked_vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class OfAnotherModel:
    """Activations or means that are known to be of another model: see `of_another_model`."""

    activations: ActivationCache | Mapping[str, Tensor]


def of_another_model(activations: ActivationCache | Mapping[str, Tensor]) -> OfAnotherModel:
    """The same activations (a cache, or `mean_activations`), to be used in another model than they were taken from.

    A source of `patch` and `path_patch` and a reference of `ablate` are of the model that runs, to its weights: numbers
    of another one fit wherever the widths are equal, and mean something else. Where that is the experiment - a
    fine-tuned model patched from its base - this says so.

    >>> import mmlens
    >>> base = mmlens.HookedVLM.from_pretrained("micro")
    >>> tuned = mmlens.HookedVLM.from_pretrained("micro")
    >>> _ = tuned.hf_model.lm_head.weight.detach().mul_(1.1)
    >>> prompt = base.prompt("What colour is K ?")
    >>> _, cache = base.run_with_cache(prompt, names_filter="hook_embed")
    >>> hooks = mmlens.patch("hook_embed", of_another_model(cache))(tuned, prompt)
    >>> mmlens.patch("hook_embed", cache)(tuned, prompt)
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: the source is of another model: its weights are not this one's. ...
    """
    if not isinstance(activations, (ActivationCache, Mapping)):
        raise InvalidTypeError(
            f"of_another_model takes a cache, means or a dict of activations, not {type(activations).__name__}"
        )
    return OfAnotherModel(activations)


def check_origin(activations: Any, model: HookedVLM, what: str) -> None:
    """Raise ValueError where the activations say which model they are of, and it is not `model`.

    Two loads of the same weights are one model, in any dtype. A plain dict says nothing.
    """
    weights = getattr(activations, "weights", None)
    if weights is None:
        source = getattr(activations, "model", None)
        if not isinstance(source, HookedVLM) or source.hf_model is model.hf_model:
            return
        weights = weights_fingerprints(source.hf_model)
    if not same_weights(weights, weights_fingerprints(model.hf_model)):
        raise InvalidValueError(
            f"{what} is of another model: its weights are not this one's. Take it of this model, or say that another "
            "one is meant: of_another_model(...)"
        )
