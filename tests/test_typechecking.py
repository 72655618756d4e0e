"""Annotations are checked in every test, also those of functions that are defined anew in every call of another."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor
from typechecking import checked


def doubling(annotation: Any) -> Callable[..., Any]:
    @checked
    def doubled(x: annotation, times: int = 2) -> annotation:
        return x * times if times else str(x)

    return doubled


def test_every_definition_of_a_nested_function_is_checked() -> None:
    for _ in range(3):
        double = doubling(Float[Tensor, "row col"])
        assert double(torch.ones(2, 3)).sum() == 12
        for wrong in (torch.ones(2), torch.ones(2, 3).int(), 1.0):
            with pytest.raises(TypeCheckError, match="checking the parameters of .*doubled"):
                double(wrong)
        with pytest.raises(TypeCheckError, match="checking the return value of .*doubled"):
            double(torch.ones(2, 3), times=0)


def test_functions_of_one_name_have_their_own_checks() -> None:
    rows, number = doubling(Float[Tensor, "row"]), doubling(float)
    assert number(1.5) == 3 and rows(torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(TypeCheckError):
        number(torch.ones(2))
    with pytest.raises(TypeCheckError):
        rows(1.5)


class Value:
    """Something that can be referred to weakly."""


def test_defaults_are_each_definition_s_own_and_go_with_it() -> None:
    def make(default: Any) -> Callable[[], Any]:
        @checked
        def given(x: Value = default) -> Value:
            return x

        return given

    one, two = Value(), Value()
    assert make(one)() is one and make(two)() is two
    alive = weakref.ref(one)
    del one
    gc.collect()
    assert alive() is None


def test_dimensions_of_one_name_are_one_size() -> None:
    def make() -> Callable[..., Any]:
        @checked
        def paired(x: Float[Tensor, "n"], y: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
            return x + y

        return paired

    for _ in range(2):
        assert make()(torch.ones(2), torch.ones(2)).shape == (2,)
        with pytest.raises(TypeCheckError):
            make()(torch.ones(2), torch.ones(1))
