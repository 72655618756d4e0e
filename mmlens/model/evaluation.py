"""Whether a model gives the same numbers twice: in training mode, dropout and its kin make every run another one."""

from __future__ import annotations

import re

from torch import nn

from mmlens import internals
from mmlens.errors import StateError

_RANDOM = re.compile(r"drop|jitter")
"""Attributes of this kind hold a rate: attention_dropout, layerdrop, drop_prob, jitter_noise ..."""


def active_in_training(model: nn.Module) -> list[str]:
    """The modules that are in training mode and compute something else there: dropout, jitter, batch statistics.

    >>> layer = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    >>> active_in_training(layer.train()), active_in_training(layer.eval())
    (['1 (p 0.1)'], [])
    """
    found = []
    for name, module in model.named_modules():
        if not module.training:
            continue
        rates = {
            key: value
            for key, value in vars(module).items()
            if (_RANDOM.search(key) or (key == "p" and isinstance(module, internals.DROPOUT)))
            and isinstance(value, float)
            and value > 0
        }
        if isinstance(module, internals.BATCH_STATISTICS):
            found.append(f"{name} (statistics of the batch)")
        elif rates:
            found.append(f"{name} ({', '.join(f'{key} {value:g}' for key, value in rates.items())})")
    return found


def check_same_twice(model: nn.Module) -> None:
    """Raise StateError where two runs of the model would differ; `model` is the Hugging Face model.

    Training mode alone is no fault: without dropout, runs are the same in it.
    """
    active = active_in_training(model)
    if active:
        raise StateError(
            f"the model is in training mode, where dropout and its kin make every run another one ({len(active)} "
            f"module(s), such as {active[0]}): call model.eval() to measure"
        )
