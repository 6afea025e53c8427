"""Which method quantises which layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mxperts.checkpoint import Rule
from mxperts.checkpoint.fields import check_pattern
from mxperts.errors import ArgumentError
from mxperts.formats import Scheme
from mxperts.formats.naming import suggest
from mxperts.quantization.methods.problem import Method

RTN = "rtn"
"""Rounding to nearest, which looks at nothing but the weight."""

NEED_TEXT = frozenset({"gptq"})
"""Methods that do nothing better than others without inputs."""


@dataclass(frozen=True, kw_only=True)
class Methods:
    """Which method quantises which layer.

    Attributes:
        default: a name, or a function.
        layers: others, by name, glob or ``re:``; the first match counts.

    Raises:
        ArgumentError: there is no method of one of these names.
        CheckpointError: a regular expression is none.
    """

    default: str | Method = RTN
    layers: Mapping[str, str | Method] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern in self.layers:
            check_pattern("layer_methods", pattern)
        for method in self._all():
            if method != RTN:
                _find(method)

    @property
    def need_text(self) -> bool:
        """Whether one of them needs inputs."""
        return any(method in NEED_TEXT for method in self._all() if isinstance(method, str))

    @property
    def settings(self) -> dict[str, object]:
        """By which an interrupted run is known again."""
        layers = [[pattern, _name(method)] for pattern, method in self.layers.items()]
        return {"method": _name(self.default), "layer_methods": layers}

    def of(self, module: str) -> Method:
        """The method for a layer."""
        rules = (method for pattern, method in self.layers.items() if _rule(pattern).matches(module))
        return _find(next(rules, self.default))

    def rounds(self, module: str) -> bool:
        """Whether a layer is rounded to nearest."""
        rules = (method for pattern, method in self.layers.items() if _rule(pattern).matches(module))
        return next(rules, self.default) == RTN

    def check_layers(self, modules: Iterable[str]) -> None:
        """Every pattern must match one of these.

        Raises:
            ArgumentError: one does not.
        """
        names = list(modules)
        for pattern in self.layers:
            if not any(_rule(pattern).matches(name) for name in names):
                raise ArgumentError(f"the pattern {pattern!r} of layer_methods matches no layer")

    def _all(self) -> list[str | Method]:
        return [self.default, *self.layers.values()]


def _rule(pattern: str) -> Rule:
    return Rule(pattern=pattern, scheme=Scheme("none"))


def _find(method: str | Method) -> Method:
    if not isinstance(method, str):
        return method
    from mxperts.quantization.methods import METHODS

    if method not in METHODS:
        raise ArgumentError(f"unknown method {method!r}; {suggest(method, METHODS)}")
    found: Method = METHODS[method]
    return found


def _name(method: str | Method) -> str:
    return method if isinstance(method, str) else str(getattr(method, "__qualname__", type(method).__qualname__))
