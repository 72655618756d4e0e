"""Several devices on a machine that has none: tensors that say they are elsewhere and hold their numbers on the CPU.

An operation on tensors of two devices is refused, as between two GPUs, and all others give the CPU's own numbers.
So a test sees on any machine whether a model whose layers are on different devices runs, and what it computes.

    with fake_devices():
        x = torch.ones(3, device="fake:1")
        x + torch.ones(3, device="fake:0")     # RuntimeError
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

_CPU = torch.device("cpu")


@contextmanager
def fake_devices() -> Iterator[None]:
    """Within the block there are devices "fake:0", "fake:1", and so on."""
    _register()
    with _Operations(), _Constructors():
        yield


class FakeTensor(Tensor):
    """A tensor on a fake device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> FakeTensor:
        fake = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        fake.held = held
        return fake

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {self.device}"


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """What PyTorch does below the reach of a dispatch mode, or would do otherwise on a device it does not know."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            device = kwargs.pop("device", None)
            made = func(*tree_map_only(FakeTensor, lambda x: x.held, args), **kwargs)
            return made if device is None else made.to(device)
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            args = args[0], tuple(torch.tensor(at) if isinstance(at, list) else at for at in args[1])
        if func is F.scaled_dot_product_attention:
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    device = kwargs.get("device")
    device = _device_of(func, args, tensors) if device is None else torch.device(device)
    if device.type == "fake" and device.index is None:
        device = torch.device("fake", 0)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": _CPU}
    held_args, held_kwargs = tree_map_only(FakeTensor, lambda x: x.held, (args, kwargs))
    # What an operation in place gives back is the tensor that it was given.
    given = {id(x.held): x for x in tensors if isinstance(x, FakeTensor)}

    def placed(x: Tensor) -> Tensor:
        return given.get(id(x)) if id(x) in given else x if device == _CPU else FakeTensor(x, device)

    return tree_map_only(Tensor, placed, func(*held_args, **held_kwargs))


def _device_of(func: Any, args: Any, tensors: list[Tensor]) -> torch.device:
    """The one device of an operation's tensors. Numbers on the CPU go with any, as do copies and masks from there."""
    name = getattr(func, "__name__", "")
    if name.startswith("copy_"):
        return args[0].device
    if name.startswith(("index.Tensor", "index_put")):
        tensors = [x for x in tensors if x.device != _CPU or x is args[0]]
    devices = {x.device for x in tensors if x.ndim or x.device != _CPU}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: tensors on {', '.join(sorted(map(str, devices)))}")
    return devices.pop() if devices else _CPU


@functools.cache
def _register() -> None:
    class Hook(_DummyPrivateUse1Hook):
        # Nobody shall choose the device by himself.
        def is_available(self) -> bool:
            return False

    class Module(_DummyBackendModule):
        # Tests that come later in this process ask PyTorch which device there is.
        def is_available(self) -> bool:
            return False

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    _setup_privateuseone_for_python_backend("fake", backend_module=Module(), hook=Hook())
