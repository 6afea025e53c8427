"""The activation functions of an expert: their names and the constants they take. No arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from mxperts.errors import ArgumentError
from mxperts.formats.naming import normalize, suggest


@dataclass(frozen=True, kw_only=True)
class ActivationFunction:
    """One function between the two projections of an expert.

    Attributes:
        name: what ``activation=`` calls it.
        formula: ``g`` is the gate, ``u`` the up projection, ``L`` the limit; ``silu(x) = x * sigmoid(x)``.
        gated: whether there are a gate and an up projection; otherwise there is one input, ``g``.
        defaults: the constants it takes; None means that the constant may be left out.
        required: the constants that must be given.
    """

    name: str
    formula: str
    gated: bool = True
    defaults: Mapping[str, float | None] = field(default_factory=dict)
    required: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BoundActivation:
    """An activation function with its constants; those that it does not take, or that were left out, are None."""

    name: str
    gated: bool
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None
    linear_beta: float | None = None

    def encode(self) -> str:
        """The record as one string, for operators whose arguments must be plain; ``decode`` reads it back."""
        return f"{self.name},{self.limit},{self.alpha},{self.beta},{self.linear_beta}"

    @staticmethod
    @lru_cache
    def decode(text: str) -> BoundActivation:
        """The record that ``encode`` wrote."""
        name, *constants = text.split(",")
        limit, alpha, beta, linear_beta = (None if c == "None" else float(c) for c in constants)
        gated = ACTIVATIONS[name].gated
        return BoundActivation(name=name, gated=gated, limit=limit, alpha=alpha, beta=beta, linear_beta=linear_beta)


ACTIVATIONS = {
    f.name: f
    for f in (
        ActivationFunction(name="silu", formula="silu(min(g, L)) * clamp(u, -L, L)", defaults={"limit": None}),
        ActivationFunction(name="gelu", formula="g * Phi(g) * u, Phi the normal distribution function"),
        ActivationFunction(name="gelu_tanh", formula="g * (1 + tanh(sqrt(2/pi) * (g + 0.044715 * g^3))) / 2 * u"),
        ActivationFunction(name="relu2", formula="max(g, 0)^2 * u"),
        ActivationFunction(
            name="swigluoai",
            formula="min(g, L) * sigmoid(alpha * min(g, L)) * (clamp(u, -L, L) + beta)",
            defaults={"limit": 7.0, "alpha": 1.702, "beta": 1.0},
        ),
        ActivationFunction(
            name="situ",
            formula="beta * tanh(g / beta) * sigmoid(g) * u; with linear_beta b, u becomes b * tanh(u / b)",
            defaults={"linear_beta": None},
            required=("beta",),
        ),
        ActivationFunction(name="swiglustep", formula="min(silu(g), L) * clamp(u, -L, L)", defaults={"limit": 7.0}),
        ActivationFunction(name="silu_no_mul", formula="silu(g)", gated=False),
        ActivationFunction(name="gelu_no_mul", formula="as gelu, without u", gated=False),
        ActivationFunction(name="gelu_tanh_no_mul", formula="as gelu_tanh, without u", gated=False),
        ActivationFunction(name="relu2_no_mul", formula="max(g, 0)^2", gated=False),
    )
}
"""Every activation function by name, with vLLM's names and formulas."""

_ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish_no_mul": "silu_no_mul",
    "gelu_pytorch_tanh_no_mul": "gelu_tanh_no_mul",
}
_POSITIVE = ("limit", "linear_beta")


def bind_activation(
    name: str,
    *,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
) -> BoundActivation:
    """Look an activation function up and give it its constants; None stands for the default.

    Args:
        name: a name in ``ACTIVATIONS``, or the one that Transformers has for it, such as ``gelu_pytorch_tanh``.
        limit, alpha, beta, linear_beta: see ``ActivationFunction.formula``.

    Raises:
        ArgumentError: no such function; a constant that it does not take, lacks, or cannot use.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"unknown activation {name!r}; {suggest('', ACTIVATIONS)}")
    bind = _bind if torch.compiler.is_compiling() else _bind_once  # torch.compile does not look into caches
    return bind(name, limit, alpha, beta, linear_beta)


def _bind(
    name: str, limit: float | None, alpha: float | None, beta: float | None, linear_beta: float | None
) -> BoundActivation:
    key = normalize(name)
    key = _ALIASES.get(key, key)
    if key not in ACTIVATIONS:
        raise ArgumentError(f"unknown activation {name!r}; {suggest(key, ACTIVATIONS)}")
    function = ACTIVATIONS[key]
    given = {"limit": limit, "alpha": alpha, "beta": beta, "linear_beta": linear_beta}
    takes = (*function.defaults, *function.required)
    constants: dict[str, float | None] = {}
    for constant, value in given.items():
        if value is None:
            if constant in function.required:
                raise ArgumentError(f"activation {key!r} needs swiglu_{constant}")
            constants[constant] = function.defaults.get(constant)
            continue
        if constant not in takes:
            known = ", ".join(f"swiglu_{c}" for c in takes) or "no constants"
            raise ArgumentError(f"activation {key!r} takes {known}, not swiglu_{constant}; leave it out")
        if not math.isfinite(value):
            raise ArgumentError(f"swiglu_{constant} must be finite, not {value}")
        if value <= 0 and (constant in _POSITIVE or constant in function.required):
            raise ArgumentError(f"swiglu_{constant} of {key!r} must be above 0, not {value}; None leaves it out")
        constants[constant] = float(value)
    return BoundActivation(name=key, gated=function.gated, **constants)


_bind_once = lru_cache(_bind)
