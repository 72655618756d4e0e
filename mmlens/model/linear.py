"""The weight that a linear module or an embedding applies, however it stores it.

1. A plain module's weight is its own parameter: a view of it edits the model.
2. Anything else - adapters (LoRA and its kin), 8-bit and 4-bit weights - is asked for it: what it makes of the unit
   vectors, less what it makes of zeros, are the columns of its matrix. That holds for every kind, and is checked on
   one more vector: a module that is not linear has no weight.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from mmlens import internals
from mmlens.errors import InvalidValueError, StateError, UnsupportedError
from mmlens.internals import attach, detach
from mmlens.interrupts import Temporary

_AROUND = ("base_layer", "original_module")
"""Where PEFT's layers and wrappers keep the module that they stand around."""
_ROWS = 1024
"""Unit vectors at once."""


class NoWeightError(InvalidValueError):
    """A weight that the model does not have in TransformerLens' sense; the message says why."""


def unadapted(module: nn.Module) -> nn.Module:
    """The model's own module inside an adapter's layers."""
    while inner := next(filter(None, map(internals.children_of(module).get, _AROUND)), None):
        module = inner
    return module


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear one: plain, adapted or quantised."""
    inner = unadapted(module)
    return isinstance(inner, nn.Linear) or all(
        hasattr(inner, name) for name in ("in_features", "out_features")
    )


def n_embeddings(embedding: nn.Module) -> int:
    """How many tokens an embedding knows, which an offloaded or quantised one says too."""
    inner: Any = unadapted(embedding)
    return int(getattr(inner, "num_embeddings", None) or len(inner.weight))


def weight_of(module: nn.Module, like: Tensor | None = None, name: str = "a weight") -> Tensor:
    """[out, in] of a linear module, [token, d] of an embedding; on the device and in the dtype of `like`, if given.

    Raises NoWeightError where `module` is neither, and StateError where a dropout of an adapter is active.
    """
    if _is_plain(module):
        if like is not None:
            with align_module_device(module):
                held: Any = module.weight
                return held.to(like.device)
        weight: Any = module.weight
        if weight.is_meta:
            raise UnsupportedError(
                f"{name} cannot be read: its weight is offloaded, and on a device only while it runs. Load the model "
                "with real weights (no offload) before reading them"
            )
        return weight
    weight = _columns(module, name) if is_linear(module) else _rows(module, name)
    return weight if like is None else weight.to(device=like.device, dtype=like.dtype)


def bias_of(module: nn.Module, name: str = "a bias") -> Tensor:
    """The bias of a linear module, zeros where it has none."""
    if _is_plain(module) or not is_linear(module):
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            return bias
        weight = weight_of(module, name=name)
        return weight.new_zeros(weight.shape[0])
    _check_still(module, name)
    with torch.no_grad():
        return _applied(module, _zeros(module, name))[0]


def gradients_pass(model: nn.Module) -> Temporary[None]:
    """UnsupportedError where a linear module of `model` is run and passes no gradient on to its input.

    Some quantised ones do not (torch's own 8-bit modules): gradients would take what goes through them for constant,
    and be wrong without a word.
    """

    def check(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read = next((x for x in inputs if isinstance(x, Tensor)), None)
        if read is None or not (read.requires_grad and torch.is_grad_enabled()) or module in passed:
            return
        passed.add(module)
        if not _passes_gradient(module, read):
            name = next(name for name, part in model.named_modules() if part is module)
            raise UnsupportedError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}, which has no derivative: gradients "
                "through it would be wrong. Load the model unquantised, or with weights that are quantised in another "
                "way (bitsandbytes, torchao's weight-only kinds)"
            )

    passed: set[nn.Module] = set()
    modules = [part for part in model.modules() if is_linear(part) and not _is_plain(part)]

    def begin() -> None:
        for part in modules:
            attach(part, "output", check)

    def end() -> None:
        for part in modules:
            detach(part, "output", check)

    return Temporary(begin, end)


def _passes_gradient(module: nn.Module, read: Tensor) -> bool:
    """Tried on one row of what the module reads: torch lets an operation without derivative look as if it had one."""
    row = read.detach().reshape(-1, read.shape[-1])[:1].clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = _applied(module, row)
        return made.requires_grad and torch.autograd.grad(made.sum(), row, allow_unused=True)[0] is not None


def _is_plain(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    return (
        unadapted(module) is module
        and isinstance(weight, Tensor)
        # A tensor made of others, as torchao's are, holds its numbers in a form of its own.
        and not internals.is_made_of_others(weight)
        and weight.is_floating_point()
        and weight.dtype.itemsize > 1
        and (not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward)
    )


@torch.no_grad()
def _columns(module: nn.Module, name: str) -> Tensor:
    """[out, in] of a linear module that is not plain."""
    _check_still(module, name)
    zeros = _zeros(module, name)
    width, constant = zeros.shape[-1], _applied(module, zeros)
    units = torch.eye(width, dtype=zeros.dtype, device=zeros.device)
    weight = torch.cat([_applied(module, rows) - constant for rows in units.split(_ROWS)]).T
    tried = torch.rand(1, width, generator=torch.Generator().manual_seed(0)).to(zeros) - 0.5
    expected, given = (tried @ weight.T + constant).float(), _applied(module, tried).float()
    # A quantised module may also round what it reads, to 8 bits.
    exact = _is_plain(unadapted(module))
    tolerance = 0.1 if not exact else 10 * torch.finfo(zeros.dtype).eps * width**0.5
    if not bool((given - expected).norm() <= tolerance * (expected.norm() + constant.float().norm() + 1e-30)):
        raise NoWeightError(
            f"{name} cannot be read: {type(module).__name__} does more than multiply by a matrix"
        )
    return weight


@torch.no_grad()
def _rows(module: nn.Module, name: str) -> Tensor:
    """[token, d] of an embedding that is not plain, without a factor that the model's own embedding applies."""
    inner: Any = unadapted(module)
    if not hasattr(inner, "num_embeddings"):
        raise NoWeightError(
            f"{name} cannot be read: {type(module).__name__} is no linear module and no embedding"
        )
    _check_still(module, name)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    ids = torch.arange(n_embeddings(module), device=device)
    rows = _applied(module, ids)
    if inner is module or not _is_plain(inner):
        return rows
    applied, stored = inner.forward(ids).double(), inner.weight.double()
    factor = (applied * stored).sum() / (stored * stored).sum()
    return rows if torch.equal(applied, stored) else (rows / factor).to(rows.dtype)


def _applied(module: nn.Module, x: Tensor) -> Tensor:
    # `forward`, not the module itself: a probe must not fire hooks.
    return module.forward(x)


def _zeros(module: nn.Module, name: str) -> Tensor:
    """One input of zeros, [1, in]."""
    inner: Any = unadapted(module)
    width = getattr(inner, "in_features", None)
    held = (*module.parameters(), *module.buffers())
    device = next((tensor.device for tensor in held), torch.device("cpu"))
    if device.type == "meta" or width is None:
        raise NoWeightError(
            f"{name} cannot be read: {type(inner).__name__} keeps it "
            + ("on another device until it runs" if width is not None else "in a form of its own")
        )
    full = next((t.dtype for t in held if t.is_floating_point() and t.dtype.itemsize > 1), None)
    dtype = full or getattr(inner, "compute_dtype", None) or torch.get_default_dtype()
    return torch.zeros(1, int(width), dtype=dtype, device=device)


def _check_still(module: nn.Module, name: str) -> None:
    drops = (part for part in module.modules() if isinstance(part, internals.DROPOUT))
    if any(part.training and part.p > 0 for part in drops):
        raise StateError(f"{name} cannot be read while an adapter's dropout is active: call model.eval()")
