"""Annotated shapes and types are checked in every test and doctest, and only there."""

import jaxtyping
from typechecking import checked

# What the hook puts over every function and class.
jaxtyping.jaxtyped = checked
jaxtyping.install_import_hook("mmlens", None)
