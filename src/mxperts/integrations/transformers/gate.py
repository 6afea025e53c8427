"""Which activation function an experts module computes, found out by trying it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mxperts.backend.reference.activation import activate
from mxperts.ops.activation import bind_activation

LARGEST = 1000.0
"""Of the numbers that gates are tried on: a limit beyond it would be taken for none."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """An activation function as ``fused_experts`` names it.

    Attributes:
        name: ``activation``.
        constants: ``swiglu_limit`` and so on.
    """

    name: str
    constants: dict[str, Any] = field(default_factory=dict)

    def apply(self, h: Tensor, *, interleaved: bool) -> Tensor:
        """The function itself: computed in float32 or better, rounded once to the dtype of ``h`` [..., 2I]."""
        constants = {name.removeprefix("swiglu_"): value for name, value in self.constants.items()}
        return activate(h, bind_activation(self.name, **constants), interleaved=interleaved)


def recognize(module: Any) -> Gate | None:
    """The activation function that an experts module's own ``_apply_gate`` or ``act_fn`` computes.

    Models write these in many ways and give their constants many names, so they are told apart by what they do to a
    few hundred numbers, not by what they are called.

    Returns:
        None if it is none that ``fused_experts`` knows.
    """
    gate, up = _probe()
    if module.has_gate:
        parts = (gate, up)
        h = torch.cat(parts, dim=-1) if module.is_concatenated else torch.stack(parts, dim=-1).flatten(-2)
        found = module._apply_gate(h)
    else:
        h, found = gate, module.act_fn(gate)
    for candidate in _candidates(module):
        expected = candidate.apply(h, interleaved=not module.is_concatenated)
        # float32 in another order: 1 + erf(-40) is off by 2^-24, times 40 * 40; the two gelus differ by 1e-2 here
        if torch.allclose(found, expected, rtol=1e-5, atol=1e-3):
            return candidate
    return None


def _probe() -> tuple[Tensor, Tensor]:
    """Gates and up values, float32 whatever the default: dense up to 40, then growing to ``LARGEST`` on both sides."""
    dense = torch.linspace(-40, 40, 641, dtype=torch.float32, device="cpu")
    far = torch.logspace(math.log10(40), math.log10(LARGEST), 80, dtype=torch.float32, device="cpu")
    gate = torch.cat([dense, far, -far, far, -far])
    return gate, torch.cat([40 * torch.sin(1.7 * dense), far, far, -far, -far])


def _candidates(module: Any) -> Iterator[Gate]:
    suffix = "" if module.has_gate else "_no_mul"
    for name in ("silu", "gelu", "gelu_tanh", "relu2"):
        yield Gate(name=name + suffix)
    if not module.has_gate:
        return
    numbers = sorted({abs(float(v)) for v in _numbers(module)} | {7.0})
    for limit in numbers:
        yield Gate(name="silu", constants={"swiglu_limit": limit})
        yield Gate(name="swiglustep", constants={"swiglu_limit": limit})
        for alpha in {*numbers, 1.702}:
            constants = {"swiglu_limit": limit, "swiglu_alpha": alpha, "swiglu_beta": 1.0}
            yield Gate(name="swigluoai", constants=constants)


def _numbers(module: Any) -> Iterator[float]:
    """The positive numbers among a module's own attributes: its limits and other constants."""
    for value in vars(module).values():
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST:
            yield value
