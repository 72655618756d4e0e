"""Options of one prompt: variables of its chat template, and options of its processor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import ProcessorMixin

from mmlens import internals
from mmlens.arguments import unknown_name_message
from mmlens.errors import InvalidTypeError
from mmlens.families.processors import option_names, with_options

_OURS = ("tokenize", "return_dict", "return_tensors", "conversation", "self", "processor_kwargs", "kwargs")
"""Parameters of apply_chat_template that prompt making sets itself."""


def template_source(processor: ProcessorMixin) -> str:
    """The chat template as a text; "" where the processor has none."""
    template = getattr(processor, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or ""


def configured(
    processor: ProcessorMixin, options: Mapping[str, Any]
) -> tuple[ProcessorMixin, dict[str, Any]]:
    """The processor with those of the options that are its own, and those that are the chat template's.

    Raises InvalidTypeError for an option that neither knows, with the nearest name.
    """
    if not options:
        return processor, {}
    template_names = set(inspect.signature(ProcessorMixin.apply_chat_template).parameters) - set(_OURS)
    template_names |= internals.template_variables(template_source(processor))
    template = {name: value for name, value in options.items() if name in template_names}
    own_names = option_names(processor)
    for name in options:
        if name not in template and name not in own_names:
            known = sorted({*template_names, *own_names})
            raise InvalidTypeError(unknown_name_message("option of a prompt", name, known))
    own = {name: value for name, value in options.items() if name not in template}
    return with_options(processor, own), template
