"""Annotated shapes and types are checked in every test and doctest, and only there."""

from jaxtyping import install_import_hook

install_import_hook("mmlens", "typechecking.typechecker")
