"""The contract of ``fused_experts`` and ``mx_linear``, computed a second time: value by value, from dense numbers.

Nothing here calls the code under test but ``mx.fake_quantize``, which has tests of its own. Sums are ``math.fsum``,
exact but for one rounding. Where the code under test may round differently, in float64 sums and in transcendental
functions, a bound on its error is carried along: a rounding to the dtype within the layer must come out the same at
both ends of the bound (a property of the data, which is asserted), and the result is an interval, mostly of a single
number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

import mxperts as mx

ULP = 2.0**-53
CASTS = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
ELEMENTS = {
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
}


def cast(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 rounded to float32 and then to ``dtype``, as float64."""
    return x.astype(np.float32).astype(CASTS[dtype]).astype(np.float64)


def settled(x: np.ndarray, error: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """``x`` rounded to ``dtype``; fails if anything within ``error`` of it rounds elsewhere."""
    low, high = cast(x - error, dtype), cast(x + error, dtype)
    assert np.array_equal(low, high), "these data leave a rounding open; take another seed"
    return low


def decode(weight: mx.MXTensor | Tensor, dtype: torch.dtype) -> np.ndarray:
    """A weight's values in ``dtype``, as float64 [..., K]."""
    if isinstance(weight, Tensor):
        return cast(weight.double().numpy(), dtype)
    codes = weight.codes().numpy()
    if weight.format.name == "mxint8":
        elements = codes.view(np.int8) / 64.0
    else:
        elements = codes.view(ELEMENTS[weight.format.name]).astype(np.float64)
    exponents = weight.scales.numpy().astype(int).repeat(32, axis=-1)[..., : elements.shape[-1]] - 127
    return cast(np.ldexp(elements, exponents), dtype)


def butterflies(x: np.ndarray) -> np.ndarray:
    """The Hadamard transform of each block of 32 of one token, in float32 and its order of sums, times 1/4."""
    y = [np.float32(v) for v in x]
    for stride in (1, 2, 4, 8, 16):
        for i in range(len(y)):
            if not i & stride:  # i % 32, as blocks begin at multiples of 32
                y[i], y[i + stride] = y[i] + y[i + stride], y[i] - y[i + stride]
    return np.array([float(v * np.float32(0.25)) for v in y])


def qdq(
    x: np.ndarray, fmt: str | None, dtype: torch.dtype, scale: float | None, *, rotated: bool = False
) -> np.ndarray:
    """One token, quantised and dequantised, and rotated before that."""
    if rotated:
        return cast(qdq(butterflies(x), fmt, torch.float32, scale), dtype)
    if fmt is None:
        return x
    if not fmt.startswith("fp8"):
        return mx.fake_quantize(torch.from_numpy(x).to(dtype), fmt).double().numpy()
    wide = x.astype(np.float32)
    if fmt == "fp8_dynamic":
        s = np.abs(wide).max() / np.float32(448)
        s = s if s else np.float32(1)
    else:
        s = np.float32(scale)
    q = np.clip(wide / s, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (q * s).astype(CASTS[dtype]).astype(np.float64)


def product(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """``x`` [K] times ``w`` [N, K] plus ``bias`` [N]: sums [N], and a bound on float64 sums' error in any order."""
    terms = x * w if bias is None else np.concatenate([x * w, bias[:, None]], axis=1)
    sums = np.array([math.fsum(row) for row in terms])
    size = np.abs(terms).sum(1)
    mantissa, exponent = np.frexp(terms)
    whole = (np.abs(mantissa) * 2.0**53).astype(np.int64)
    lowest_bit = np.where(terms == 0, np.inf, np.ldexp((whole & -whole).astype(np.float64), exponent - 53))
    exact = size <= lowest_bit.min(1) * 2.0**53  # every partial sum is a multiple of the lowest bit and fits
    return sums, np.where(exact, 0.0, size * ULP * (terms.shape[1] + 2))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(min(-x, 709.0)))  # beyond it exp is no float64


def silu(x: float) -> float:
    return x * sigmoid(x)


def clamp(x: float, limit: float) -> float:
    return max(-limit, min(x, limit))


def gelu(x: float) -> float:
    return x * math.erfc(-x / math.sqrt(2)) / 2


def gelu_tanh(x: float) -> float:
    return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def relu2(x: float) -> float:
    return max(x, 0) ** 2


def silu_gated(g: float, u: float, limit: float = math.inf) -> float:
    return silu(min(g, limit)) * clamp(u, limit)


def swigluoai(g: float, u: float, limit: float = 7, alpha: float = 1.702, beta: float = 1) -> float:
    return min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, limit) + beta)


def situ(g: float, u: float, beta: float, linear_beta: float = 0) -> float:
    return beta * math.tanh(g / beta) * sigmoid(g) * (linear_beta * math.tanh(u / linear_beta) if linear_beta else u)


def swiglustep(g: float, u: float, limit: float = 7) -> float:
    return min(silu(g), limit) * clamp(u, limit)


FUNCTIONS: dict[str, Callable[..., float]] = {
    "silu": silu_gated,
    "gelu": lambda g, u: gelu(g) * u,
    "gelu_tanh": lambda g, u: gelu_tanh(g) * u,
    "relu2": lambda g, u: relu2(g) * u,
    "swigluoai": swigluoai,
    "situ": situ,
    "swiglustep": swiglustep,
    "silu_no_mul": silu,
    "gelu_no_mul": gelu,
    "gelu_tanh_no_mul": gelu_tanh,
    "relu2_no_mul": relu2,
}


def activate(h: np.ndarray, name: str, interleaved: bool, constants: dict[str, float]) -> np.ndarray:
    """float64 [I] of ``h`` [2I] or [I]."""
    if name.endswith("_no_mul"):
        inputs = (h,)
    else:
        inputs = (h[::2], h[1::2]) if interleaved else (h[: len(h) // 2], h[len(h) // 2 :])
    return np.array([FUNCTIONS[name](*map(float, values), **constants) for values in zip(*inputs, strict=True)])


def linear(
    x: Tensor,
    weight: mx.MXTensor | Tensor,
    bias: Tensor | None,
    fmt: str | None,
    scale: float | None,
    *,
    rotated: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest right result of ``mx_linear`` of ``x`` [T, K]."""
    dense, b = decode(weight, x.dtype), None if bias is None else bias.double().numpy()
    lows, highs = [], []
    for token in x.double().numpy():
        y, error = product(qdq(token, fmt, x.dtype, scale, rotated=rotated), dense, b)
        lows.append(cast(y - error, x.dtype))
        highs.append(cast(y + error, x.dtype))
    return np.array(lows), np.array(highs)


def experts(
    x: Tensor,
    gate_up_proj: mx.MXTensor | Tensor,
    down_proj: mx.MXTensor | Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    activation: str = "silu",
    constants: dict[str, float] | None = None,
    activation_format: str | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    input_scales: tuple[list[float], list[float]] | None = None,
    router_weight_on_input: bool = False,
    rotated: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest right result of ``fused_experts``; ids are local or -1, input scales one for each expert."""
    dtype = x.dtype
    gate_up, down = decode(gate_up_proj, dtype), decode(down_proj, dtype)
    lows, highs = np.zeros(x.shape), np.zeros(x.shape)
    for t, token in enumerate(x.double().numpy()):
        parts, error = [], np.zeros(x.shape[1])
        for e, w in zip(top_k_index[t].tolist(), top_k_weights[t].float().tolist(), strict=True):
            if e == -1:
                continue
            b1 = None if gate_up_bias is None else gate_up_bias[e].double().numpy()
            b2 = None if down_bias is None else down_bias[e].double().numpy()
            s1, s2 = (None, None) if input_scales is None else (input_scales[0][e], input_scales[1][e])
            into = token
            if router_weight_on_input:
                into, w = cast((token.astype(np.float32) * np.float32(w)).astype(np.float64), dtype), 1.0
            into = qdq(into, activation_format, dtype, s1, rotated=rotated)
            h = settled(*product(into, gate_up[e], b1), dtype)
            a = activate(h, activation, interleaved, constants or {})
            transcendental = not activation.startswith("relu2")  # whose one rounding is the same everywhere
            a = settled(a, np.abs(a) * 64 * ULP * transcendental, dtype)
            y, y_error = product(qdq(a, activation_format, dtype, s2, rotated=rotated), down[e], b2)
            parts.append(y * w)
            error += np.abs(w) * (y_error + np.abs(y) * ULP)
        if parts:
            total = np.array([math.fsum(column) for column in zip(*parts, strict=True)])
            error += np.abs(parts).sum(0) * ULP * len(parts)
            lows[t], highs[t] = cast(total - error, dtype), cast(total + error, dtype)
    return lows, highs


def assert_within(actual: Tensor, bounds: tuple[np.ndarray, np.ndarray]) -> None:
    """Every number lies between its bounds, which are mostly equal."""
    low, high = bounds
    values = actual.double().numpy()
    wrong = ~((low <= values) & (values <= high))
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size}: {values[wrong][:3]} not in {low[wrong][:3]}..{high[wrong][:3]}"
    )
