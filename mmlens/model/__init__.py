"""A Hugging Face vision-language model under hooks: prompts, runs, activations, weights."""

from mmlens.model.bridge import from_bridge as from_bridge
from mmlens.model.cache import VLMActivationCache as VLMActivationCache
from mmlens.model.choosing import positions as positions
from mmlens.model.hooked_vlm import HookedVLM as HookedVLM
from mmlens.model.hooks import HookNeverFiredError as HookNeverFiredError
from mmlens.model.hooks import NoChangeWarning as NoChangeWarning
from mmlens.model.hooks import UnknownHookError as UnknownHookError
from mmlens.model.loading import ModelNotFoundError as ModelNotFoundError
from mmlens.model.loading import shipped_models as shipped_models
from mmlens.model.prompt import Prompt as Prompt
from mmlens.model.prompt_making import UnknownWordWarning as UnknownWordWarning
from mmlens.model.prompt_making import prompt_from_inputs as prompt_from_inputs
