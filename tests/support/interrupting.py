"""An interrupt (Ctrl-C) at a chosen moment: before the n-th line that runs in the package and in what it rests on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

import mmlens
from mmlens import internals

_PLACES = ("/mmlens/", "/contextlib.py", "/hook_points.py", "/nn/modules/module.py", "/torch/overrides.py")


class _Tracer:
    def __init__(self, at: int | None) -> None:
        self.at, self.n_lines = at, 0

    def call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self.line if any(place in frame.f_code.co_filename for place in _PLACES) else None

    def line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.n_lines += 1
            if self.n_lines == self.at:
                raise KeyboardInterrupt(f"before {frame.f_code.co_filename}:{frame.f_lineno}")
        return self.line


def n_lines(run: Callable[[], object]) -> int:
    """How many lines `run()` runs."""
    tracer = _Tracer(None)
    sys.settrace(tracer.call)
    try:
        run()
    finally:
        sys.settrace(None)
    return tracer.n_lines


def interrupted(run: Callable[[], object], at: int) -> KeyboardInterrupt | None:
    """`run()` with an interrupt before its line `at`; None where it ended before that."""
    sys.settrace(_Tracer(at).call)
    try:
        run()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.settrace(None)
    return None


def left_behind(model: mmlens.HookedVLM) -> list[str]:
    """What is still set on the Hugging Face model."""
    left = [name for name, point in model.hook_dict.items() if point.is_live or point._forward_hooks]
    for name, module in model.hf_model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers leaves hooks of its own on some towers, which record hidden states.
        own = [
            hook for hook in hooks if not (getattr(hook, "__module__", "") or "").startswith("transformers.")
        ]
        if own or "forward" in vars(module):
            left.append(name or "the model")
        if hasattr(module, "stands_for"):
            left.append(f"a stand-in at {name}")
    for layer in model.attention_layers:
        tap = model.attention_tap(layer)
        if tap.rows is not None or tap.around is not None or tap.streaming is not None:
            left.append(f"attention of layer {layer}")
    if model.watch:
        left.append("the watch")
    if (
        model.run_state.prompt is not None
        or model.context_level
        or {"forward", "generate"} & vars(model).keys()
    ):
        left.append("a run of the wrapper's own")
    # One that is over does nothing, and the next to end takes it away.
    if not all(getattr(mode, "is_over", False) for mode in internals._get_current_function_mode_stack()):
        left.append("a function mode")
    return left


def plain(model: nn.Module, inputs: Any) -> torch.Tensor:
    """Logits of the Hugging Face model itself."""
    with torch.no_grad():
        return model(**inputs).logits
