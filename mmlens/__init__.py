"""TransformerLens for vision-language models: hook points that know their pixels, and causal tests of heads.

The names here are what most notebooks need. Everything else is in the rooms: `mmlens.data`, `.model`,
`.interventions`, `.metrics`, `.scores`, `.effects`, `.attribution`, `.hybrid`, `.viz`, `.experiments`, `.runs`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmlens.attribution import attribute as attribute
from mmlens.data import Evidence as Evidence
from mmlens.data import Example as Example
from mmlens.data import examples_from as examples_from
from mmlens.data import load_data as load_data
from mmlens.data import load_examples as load_examples
from mmlens.data import scene_examples as scene_examples
from mmlens.data import split_examples as split_examples
from mmlens.effects import effect as effect
from mmlens.effects import sweep as sweep
from mmlens.errors import MmlensError as MmlensError
from mmlens.errors import MmlensWarning as MmlensWarning
from mmlens.head_scores import HeadScores as HeadScores
from mmlens.heads import HeadSet as HeadSet
from mmlens.hybrid import hybrid_attention as hybrid_attention
from mmlens.interventions import ablate as ablate
from mmlens.interventions import bias_attention as bias_attention
from mmlens.interventions import compose as compose
from mmlens.interventions import knockout as knockout
from mmlens.interventions import mean_activations as mean_activations
from mmlens.interventions import patch as patch
from mmlens.interventions import path_patch as path_patch
from mmlens.metrics import accuracy as accuracy
from mmlens.metrics import answer_log_probability as answer_log_probability
from mmlens.metrics import generated_accuracy as generated_accuracy
from mmlens.metrics import logit_difference as logit_difference
from mmlens.model import HookedVLM as HookedVLM
from mmlens.model import Prompt as Prompt
from mmlens.model import from_bridge as from_bridge
from mmlens.model import positions as positions
from mmlens.scores import attention_mass as attention_mass
from mmlens.scores import ram as ram

if TYPE_CHECKING:
    from mmlens import experiments as experiments
    from mmlens import runs as runs
    from mmlens import viz as viz
    from mmlens.experiments import core_heads as core_heads

__version__ = "0.1.0"

# What draws figures is loaded when it is first used.
_LATER = ("experiments", "runs", "viz")
_ROOMS = (
    *("data", "model", "interventions", "metrics", "scores", "effects"),
    *("attribution", "hybrid", "statistics", "token_map"),
)


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "core_heads":
        return importlib.import_module(f"{__name__}.experiments").core_heads
    rooms = [
        room for room in _ROOMS if not name.startswith("_") and name in vars(globals().get(room, object))
    ]
    hint = f"; it is {__name__}.{rooms[0]}.{name}" if rooms else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "core_heads"})
