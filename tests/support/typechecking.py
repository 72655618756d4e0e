"""What checks the shapes and types of mmlens' annotations while the tests run.

It stands in for jaxtyping's own decorator. That one builds the checks of a function where it is defined, also of one
that is never called and of each definition of a nested one: once half the time of tests that make many models. Here
they are built in the first call, once for each piece of code.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any, NoReturn, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import AnnotationError, TypeCheckError, jaxtyped

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_dimensions = jaxtyped("context")
"""Within it a dimension of one name has one size."""

_UNCHECKED = inspect.Parameter.empty
_Checks = tuple[Callable[..., Any], Callable[[Any], Any] | None]
_built: dict[tuple[int, ...], tuple[Any, _Checks]] = {}


def checked(definition: Any = None, **_: Any) -> Any:
    """A function with its arguments and what it returns checked in every call, or a dataclass with its fields checked
    as it is made. Takes jaxtyped's options, and needs none of them."""
    if definition is None:
        return checked
    if inspect.isclass(definition):
        made = vars(definition).get("__init__")
        if dataclasses.is_dataclass(definition) and not hasattr(made, "__wrapped__"):
            definition.__init__ = checked(made)  # type: ignore[method-assign]
        return definition
    if not isinstance(definition, FunctionType) or not definition.__annotations__:
        return definition
    checks: _Checks | None = None

    @functools.wraps(definition)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checks
        if jaxtyping.config.jaxtyping_disable:
            return definition(*args, **kwargs)
        if checks is None:
            checks = _checks(definition)
        parameters, returned = checks
        with _dimensions:
            try:
                parameters(*args, **kwargs)
            except BeartypeCallHintViolation as error:
                raise _wrong("parameters", definition, error) from None
            except TypeError as error:
                # Not the function's parameters: its own error says so.
                if isinstance(error, AnnotationError):
                    raise
            result = definition(*args, **kwargs)
            if returned is not None:
                try:
                    returned(result)
                except BeartypeCallHintViolation as error:
                    raise _wrong("return value", definition, error) from None
            return result

    return call


def _wrong(what: str, function: FunctionType, error: Exception) -> TypeCheckError:
    return TypeCheckError(f"checking the {what} of {function.__module__}.{function.__qualname__}: {error}")


def _checks(function: FunctionType) -> _Checks:
    """What checks the arguments, and what the result."""
    annotations = function.__annotations__
    key = (id(function.__code__), *map(id, annotations.values()))
    if key not in _built:
        # The key's objects are kept, so that no other gets their place in memory.
        _built[key] = ((function.__code__, tuple(annotations.values())), _build(function))
    return _built[key][1]


def _build(function: FunctionType) -> _Checks:
    hints = {name: _resolved(hint, function) for name, hint in function.__annotations__.items()}
    returns = hints.pop("return", _UNCHECKED)
    if returns is NoReturn:
        # There is no result to check.
        returns = _UNCHECKED
    parameters = _empty(
        [
            parameter.replace(
                annotation=_UNCHECKED, default=_UNCHECKED if parameter.default is _UNCHECKED else None
            )
            for parameter in inspect.signature(function).parameters.values()
        ],
        function,
        hints,
    )
    # beartype looks at defaults once, here. Kept, each would live as long as the checks.
    parameters.__defaults__, parameters.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    check = _check(parameters)
    parameters.__defaults__ = function.__defaults__ and (None,) * len(function.__defaults__)
    parameters.__kwdefaults__ = function.__kwdefaults__ and dict.fromkeys(function.__kwdefaults__)
    if returns is _UNCHECKED:
        return check, None
    value = inspect.Parameter("value", inspect.Parameter.POSITIONAL_ONLY)
    return check, _check(_empty([value], function, {"value": returns}))


def _empty(
    parameters: list[inspect.Parameter], function: FunctionType, hints: dict[str, Any]
) -> FunctionType:
    """A function of these parameters that does nothing."""
    scope: dict[str, Any] = {}
    exec(f"def empty{inspect.Signature(parameters)}: pass", scope)
    empty = scope["empty"]
    empty.__name__, empty.__qualname__, empty.__module__ = (
        function.__name__,
        function.__qualname__,
        function.__module__,
    )
    empty.__annotations__ = hints
    return empty


def _resolved(hint: Any, function: FunctionType) -> Any:
    """The hint that a string stands for; Any where it names what only a type checker imports."""
    try:
        named = SimpleNamespace(__annotations__={"value": hint})
        return get_type_hints(named, function.__globals__, include_extras=True)["value"]
    except Exception:
        return Any
