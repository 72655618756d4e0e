"""TransformerLens for vision-language models: hook points that know their pixels, and causal tests of heads."""

from mmlens.bridge import from_bridge as from_bridge
from mmlens.core_heads import CoreHeads as CoreHeads
from mmlens.core_heads import core_heads as core_heads
from mmlens.data.examples import Evidence as Evidence
from mmlens.data.examples import Example as Example
from mmlens.data.examples import load_examples as load_examples
from mmlens.data.examples import save_examples as save_examples
from mmlens.data.examples import split_examples as split_examples
from mmlens.data.scenes import scene_examples as scene_examples
from mmlens.heads import HeadScores as HeadScores
from mmlens.heads import HeadSet as HeadSet
from mmlens.hooked_vlm import HookedVLM as HookedVLM
from mmlens.hooked_vlm import HookNeverFiredError as HookNeverFiredError
from mmlens.hooked_vlm import UnknownHookError as UnknownHookError
from mmlens.interventions.ablation import ablate as ablate
from mmlens.interventions.ablation import mean_activations as mean_activations
from mmlens.interventions.compose import compose as compose
from mmlens.metrics.attention import attention_mass as attention_mass
from mmlens.metrics.attention import evidence_attention as evidence_attention
from mmlens.metrics.attention import key_token_coverage as key_token_coverage
from mmlens.metrics.attention import key_token_ratio as key_token_ratio
from mmlens.metrics.attention import ram as ram
from mmlens.metrics.attention import vision_mass as vision_mass
from mmlens.metrics.effects import Effect as Effect
from mmlens.metrics.effects import effect as effect
from mmlens.metrics.outcomes import accuracy as accuracy
from mmlens.metrics.outcomes import answer_log_probability as answer_log_probability
from mmlens.metrics.outcomes import invalid as invalid
from mmlens.metrics.outcomes import logit_difference as logit_difference
from mmlens.prompt import Prompt as Prompt
from mmlens.token_map import TokenMap as TokenMap

__version__ = "0.1.0"
