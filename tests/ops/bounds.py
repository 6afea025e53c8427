"""How far results may lie from the exact ones where sums are float32: intervals that follow from the contract.

A sum of terms, of which every partial sum is rounded to float32, lies within ``gamma(n)`` times the sum of the terms'
sizes of the exact one, n being the most roundings that a term goes through; no matter in which order they are added
(Higham, Accuracy and Stability of Numerical Algorithms, 4.2). Where every partial sum in any order fits into 24 bits,
there is no error at all.

Within a layer every number has an interval, which is carried along. Where both its ends round to the same bf16 or
float16 the number is known; where they do not, a float32 sum may come out on either side. Only of a token for which it
is open what scale a block of its activations gets nothing is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dense
import ml_dtypes
import numpy as np
import torch
from torch import Tensor

import mxperts as mx

UNIT = 2.0**-24
"""Half a unit in the last place of float32, of 1."""
SMALLEST = 2.0**-149
SLOPE = 1.2
"""More than the steepest slope of silu and both gelu, with any alpha (1.0998 and 1.1290)."""


def gamma(n: int) -> float:
    return n * UNIT / (1 - n * UNIT)


def roundings(paths: Sequence[str], k: int, dtype: torch.dtype, activation: str | None) -> int:
    """The most roundings that a product of a row of ``k`` goes through on one of these paths of the CPU backend.

    avx512_vnni sums a block exactly and then rounds once a block. The others round once a product of a block,
    ``portable`` also the product itself, and once a block; avx512_bf16 does so for each of the parts that float16 and
    float32 inputs are split into, and adds those.
    """
    blocks = -(-k // 32)
    parts = 1 if activation in FORMATS else {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]
    one_each = min(k, 32) + blocks
    most = {
        "avx512_vnni": blocks,
        "avx512_bf16": one_each + parts - 1,
        "avx2": one_each,
        "portable": one_each + 1,
    }
    return max(most[path] for path in paths)


FORMATS = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8")


@dataclass(frozen=True)
class Interval:
    """Numbers that are known up to an error."""

    mid: np.ndarray
    error: np.ndarray

    @staticmethod
    def known(x: np.ndarray) -> Interval:
        return Interval(x, np.zeros_like(x))

    @staticmethod
    def between(low: np.ndarray, high: np.ndarray) -> Interval:
        return Interval((low + high) / 2, (high - low) / 2)

    def rounded(self, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Both ends in a dtype."""
        return dense.cast(self.mid - self.error, dtype), dense.cast(self.mid + self.error, dtype)

    def settle(self, dtype: torch.dtype) -> Interval:
        """The numbers rounded to a dtype; float32 sums are float32 already."""
        return self if dtype is torch.float32 else Interval.between(*self.rounded(dtype))


def lowest_bit(x: np.ndarray) -> np.ndarray:
    """The value of the lowest bit that is set; Inf of 0."""
    mantissa, exponent = np.frexp(x)
    whole = (np.abs(mantissa) * 2.0**53).astype(np.int64)
    return np.where(x == 0, np.inf, np.ldexp((whole & -whole).astype(np.float64), exponent - 53))


def rounding_error(size: np.ndarray, lowest: np.ndarray, n: int) -> np.ndarray:
    """The most by which a float32 sum is wrong, and the same sum in float64 of up to 2^13 terms.

    Args:
        size: the sum of the terms' sizes.
        lowest: all terms are multiples of this.
        n: roundings.
    """
    return np.where(size <= lowest / UNIT, 0.0, (gamma(n) + 2.0**-40) * size + (n + 1) * SMALLEST)


def product(x: Interval, w: np.ndarray, bias: np.ndarray | None, n: int) -> Interval:
    """``x`` [..., K] times ``w`` [N, K] plus ``bias`` [N], as float32 sums may give it.

    Args:
        n: roundings of the sum; that of the bias comes on top.
    """
    y, spread = x.mid @ w.T, x.error @ np.abs(w).T
    size = np.abs(x.mid) @ np.abs(w).T + spread
    lowest = lowest_bit(x.mid).min(-1)[..., None] * lowest_bit(w).min(-1)
    if bias is not None:
        y, size, lowest = y + bias, size + np.abs(bias), np.minimum(lowest, lowest_bit(bias))
    lowest = np.where(spread > 0, 0.0, lowest)
    return Interval(y, spread + rounding_error(size, lowest, n + (bias is not None)))


def flushed(w: np.ndarray, scales: np.ndarray, parts: int) -> np.ndarray:
    """What vdpbf16ps loses, as it takes operands and gives results below 2^-126 as zero: [N].

    Args:
        w: [N, K], scales included.
        scales: scale bytes [N, blocks], none above 160.
    """
    per_block = 32 * np.ldexp(1.0, scales.astype(int) - 127)
    return parts * 2.0**-126 * (np.abs(w).sum(-1) + per_block.sum(-1))


def activate(h: Interval, name: str, interleaved: bool, constants: dict[str, float]) -> Interval:
    """An activation function, whose float32 result may be next to the right one."""
    a = dense.activate(h.mid, name, interleaved, constants)
    if name.endswith("_no_mul"):
        g, u, eg, eu = h.mid, np.ones_like(h.mid), h.error, np.zeros_like(h.mid)
    elif interleaved:
        g, u, eg, eu = h.mid[::2], h.mid[1::2], h.error[::2], h.error[1::2]
    else:
        (g, u), (eg, eu) = np.split(h.mid, 2), np.split(h.error, 2)
    size, slope = np.abs(g) + eg, np.full_like(g, SLOPE)
    if name == "situ":
        slope = 1 + size / 4  # of beta tanh(g / beta) sigmoid(g); the first factor is at most |g|, sigmoid's slope 1/4
    if name.startswith("relu2"):
        slope, size = 2 * size, size**2
    other = np.abs(u) + eu + abs(constants.get("beta", 1.0)) * (name == "swigluoai")
    error = slope * eg * other + size * eu
    if not name.startswith("relu2"):  # which is rounded once, from an exact number
        error = error + 3 * UNIT * np.abs(a) + SMALLEST
    elif a.size and not np.array_equal(dense.cast(a, torch.float32), a):
        error = error + UNIT * np.abs(a)
    return Interval(a, error)


def quantize(a: Interval, fmt: str | None, dtype: torch.dtype, scale: float | None) -> Interval | None:
    """The input of the second projection; None if it is open what scale a block gets."""
    if fmt is None:
        return a
    low, high = a.rounded(dtype)
    least = dense.cast(np.maximum(np.abs(a.mid) - a.error, 0), dtype)
    most = np.maximum(np.abs(low), np.abs(high))
    if fmt == "fp8_dynamic" and least.max() < most.max():
        scales = [np.float32(end.max()) / np.float32(448) for end in (least, most)]
        if not scales[0]:
            return None
        ends = ((low, low < 0), (high, high > 0))  # over the smaller and times the larger scale: further from zero
        scaled = [scaled_e4m3(x, np.where(away, *scales), np.where(away, *scales[::-1])) for x, away in ends]
        return Interval.between(*(dense.cast(x, dtype) for x in scaled))
    if not fmt.startswith("fp8"):  # a larger block has no smaller scale
        bytes_ = [mx.quantize(torch.from_numpy(e).to(dtype), fmt, role="activation").scales for e in (least, most)]
        if not torch.equal(*bytes_):
            return None
    return Interval.between(*(dense.qdq(end, fmt, dtype, scale) for end in (low, high)))


def scaled_e4m3(x: np.ndarray, over: np.ndarray, times: np.ndarray) -> np.ndarray:
    """``x`` over a scale, rounded to E4M3, times another one, in float32."""
    q = np.clip(x.astype(np.float32) / over, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (q * times).astype(np.float64)


def experts(
    x: Tensor,
    gate_up_proj: mx.MXTensor,
    down_proj: mx.MXTensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    paths: Sequence[str],
    activation: str = "silu",
    constants: dict[str, float] | None = None,
    activation_format: str | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    input_scales: tuple[list[float], list[float]] | None = None,
    router_weight_on_input: bool = False,
    weighted_parts: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lowest and highest result of ``fused_experts`` that float32 sums may give, and for which tokens.

    Args:
        top_k_index: local ids or -1.
        paths: those of the CPU backend that may have a part in it.
        input_scales: one for each expert.
        weighted_parts: into how many a sum along K may be split that meet their router's weight before each other.
    """
    dtype, fmt = x.dtype, activation_format
    gate_up, down = dense.decode(gate_up_proj, dtype), dense.decode(down_proj, dtype)
    n1, n2 = (roundings(paths, w.shape[-1], dtype, fmt) for w in (gate_up, down))
    lows, highs, settled = np.zeros(x.shape), np.zeros(x.shape), np.ones(len(x), bool)
    for t, token in enumerate(x.double().numpy()):
        parts, sizes, errors, lowest = [], [], [], []
        for e, w in zip(top_k_index[t].tolist(), top_k_weights[t].float().tolist(), strict=True):
            if e == -1:
                continue
            b1, b2 = (None if b is None else b[e].double().numpy() for b in (gate_up_bias, down_bias))
            s1, s2 = (None, None) if input_scales is None else (input_scales[0][e], input_scales[1][e])
            into = token
            if router_weight_on_input:
                into, w = dense.cast((token.astype(np.float32) * np.float32(w)).astype(np.float64), dtype), 1.0
            h = product(Interval.known(dense.qdq(into, fmt, dtype, s1)), gate_up[e], b1, n1).settle(dtype)
            a = activate(h, activation, interleaved, constants or {}).settle(dtype)
            inner = quantize(a, fmt, dtype, s2)
            if inner is None:
                settled[t] = False
                break
            y = product(inner, down[e], b2, n2)
            parts.append(y.mid * w)
            errors.append(abs(w) * y.error)
            size = np.abs(y.mid) + y.error
            if weighted_parts:
                size = (np.abs(inner.mid) + inner.error) @ np.abs(down[e]).T + np.abs(0.0 if b2 is None else b2)
            sizes.append(abs(w) * size)
            lowest.append(np.where((y.error > 0) | (weighted_parts > 0), 0.0, lowest_bit(y.mid * w)))
        if parts and settled[t]:
            error = np.sum(errors, 0) + rounding_error(
                np.sum(sizes, 0), np.min(lowest, 0), len(parts) + 1 + weighted_parts
            )
            lows[t], highs[t] = Interval(np.sum(parts, 0), error).rounded(dtype)
    return lows, highs, settled


def assert_within(actual: Tensor, bounds: tuple[np.ndarray, np.ndarray, np.ndarray], about: Any = "") -> None:
    """Every number of a token that has bounds lies between them."""
    low, high, settled = bounds
    values = actual.double().numpy()
    wrong = ~((low <= values) & (values <= high)) & settled[:, None]
    assert not wrong.any(), (
        f"{about}: {wrong.sum()} of {wrong.size}: {values[wrong][:3]} not in {low[wrong][:3]}..{high[wrong][:3]}, "
        f"first at {np.argwhere(wrong)[0]}"
    )
