"""The activation functions, in float64 from already rounded inputs, rounded to float32 and then to the output dtype.

No intermediate overflows or loses digits to cancellation, so the result is what float32 arithmetic approximates. Where
a formula meets Inf the rules of IEEE 754 apply to it as ``ActivationFunction.formula`` has it: NaN gives NaN; a gate of
-Inf gives NaN in ``silu``, ``gelu`` and what is made of them (Inf times 0, as in PyTorch and vLLM), -0 times ``u`` in
``situ`` and 0 times ``u`` in ``relu2``; a finite gate, however negative, gives -0 times ``u`` where it underflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mxperts.ops.activation import BoundActivation


def activate(h: Tensor, activation: BoundActivation, *, interleaved: bool) -> Tensor:
    """Activations [..., I] in the dtype of ``h``.

    Args:
        h: [..., 2I], gate then up, or gate and up alternating if ``interleaved``; [..., I] if not gated.
    """
    wide = h.to(torch.float64)
    if not activation.gated:
        result = _POINTWISE[activation.name.removesuffix("_no_mul")](wide)
    else:
        gate, up = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
        result = _gated(gate, up, activation)
    return result.to(torch.float32).to(h.dtype)


def _gated(g: Tensor, u: Tensor, a: BoundActivation) -> Tensor:
    if a.name == "situ":
        assert a.beta is not None
        if a.linear_beta is not None:
            u = a.linear_beta * torch.tanh(u / a.linear_beta)
        return a.beta * torch.tanh(g / a.beta) * torch.sigmoid(g) * u
    if a.limit is not None:
        u = u.clamp(-a.limit, a.limit)
    match a.name:
        case "swigluoai":
            assert a.alpha is not None
            assert a.beta is not None
            g = g.clamp(max=a.limit)
            return g * torch.sigmoid(a.alpha * g) * (u + a.beta)
        case "swiglustep":
            return _silu(g).clamp(max=a.limit) * u
        case _:
            return _POINTWISE[a.name](g if a.limit is None else g.clamp(max=a.limit)) * u


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _gelu(x: Tensor) -> Tensor:
    """``x * (1 + erf(x / sqrt(2))) / 2``, without the cancellation at negative x."""
    twice_phi: Tensor = torch.special.erfc(x * -math.sqrt(0.5))
    return x * twice_phi / 2


def _gelu_tanh(x: Tensor) -> Tensor:
    """``(1 + tanh(z)) / 2 = sigmoid(2 z)``, without the cancellation at negative x."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _relu2(x: Tensor) -> Tensor:
    return torch.relu(x) ** 2


_POINTWISE = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu2": _relu2}
