"""Methods by name."""

from __future__ import annotations

from mxperts.errors import ArgumentError
from mxperts.formats.naming import suggest
from mxperts.quantization.methods.problem import Method

RTN = "rtn"
"""Rounding to nearest, which looks at nothing but the weight."""


def find_method(method: str | Method) -> Method:
    """A method by its name; a function is returned as it is.

    Raises:
        ArgumentError: there is none of this name.
    """
    if not isinstance(method, str):
        return method
    from mxperts.quantization.methods import METHODS

    if method not in METHODS:
        raise ArgumentError(f"unknown method {method!r}; {suggest(method, METHODS)}")
    return METHODS[method]


def name_of(method: str | Method) -> str:
    """By which an interrupted run is known again."""
    return method if isinstance(method, str) else getattr(method, "__qualname__", type(method).__qualname__)
