"""The activation functions in Triton: rounded once to float32, from float64 where float32 would not do.

The definition is ``backend.reference.activation``. Products, sums and clamps are float64, so that nothing overflows and
constants keep their digits; only polynomials that are added to something larger, and the first guess of a reciprocal,
are float32, of which every GPU has plenty. Results are at most the next float32, and Inf, NaN and zeros follow the same
rules.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
_ROUND = tl.constexpr(1.5 * 2.0**23)  # a sum with it is rounded to an integer
_OVERFLOW = tl.constexpr(-709.782712893384)  # exp(-x) is above the range of float64 for any x below this
_NO_PHI = tl.constexpr(-38.50340264793)  # erfc(-x / sqrt(2)) is below the range of float64 for any x below this
_ROOT = tl.constexpr(2 * math.sqrt(2 / math.pi))


@triton.jit
def activate(g, u, ACTIVATION: tl.constexpr):
    """Activations float32 of gates ``g`` and up projections ``u``, float32, not yet rounded to the hidden dtype.

    Args:
        u: not looked at by functions without an up projection; then anything of the shape of ``g``.
        ACTIVATION: a ``BoundActivation``.
    """
    x = g.to(tl.float64)
    NAME: tl.constexpr = ACTIVATION.name
    if NAME == "silu_no_mul":
        y = x * _sigmoid(x)
    elif NAME == "gelu_no_mul":
        y = x * _phi(x)
    elif NAME == "gelu_tanh_no_mul":
        y = x * _phi_tanh(x)
    elif NAME == "relu2_no_mul":
        x = _at_least(x, 0.0)
        y = x * x
    else:
        v = u.to(tl.float64)
        if NAME == "situ":
            y = _tanh(x * (1 / ACTIVATION.beta)) * ACTIVATION.beta * _sigmoid(x)
            if ACTIVATION.linear_beta is not None:
                v = _tanh(v * (1 / ACTIVATION.linear_beta)) * ACTIVATION.linear_beta
        else:
            if ACTIVATION.limit is not None:
                v = _at_most(_at_least(v, -ACTIVATION.limit), ACTIVATION.limit)
                if NAME != "swiglustep":
                    x = _at_most(x, ACTIVATION.limit)
            if NAME == "silu":
                y = x * _sigmoid(x)
            elif NAME == "swigluoai":
                y = x * _sigmoid(x * ACTIVATION.alpha)
                v = v + ACTIVATION.beta
            elif NAME == "swiglustep":
                y = _at_most(x * _sigmoid(x), ACTIVATION.limit)
            elif NAME == "gelu":
                y = x * _phi(x)
            elif NAME == "gelu_tanh":
                y = x * _phi_tanh(x)
            else:
                tl.static_assert(NAME == "relu2", "unknown activation function")
                x = _at_least(x, 0.0)
                y = x * x
        y = y * v
    return y.to(tl.float32)


@triton.jit
def _at_most(x, BOUND: tl.constexpr):
    """NaN stays NaN."""
    bound = tl.full(x.shape, BOUND, tl.float64)  # a number beside a comparison would be float32
    return tl.where(x > bound, bound, x)


@triton.jit
def _at_least(x, BOUND: tl.constexpr):
    """NaN stays NaN."""
    bound = tl.full(x.shape, BOUND, tl.float64)
    return tl.where(x < bound, bound, x)


@triton.jit
def _exp_parts(x):
    """``(s, m)``, float64, with e^x = s (1 + m), s a power of two and |m| < 0.42; x float64 from -708 to 0.

    The error of ``m`` is at most 2^-26, and at most 2^-26 of ``m`` itself.
    """
    shifted = x.to(tl.float32) * _LOG2_E + _ROUND
    k = shifted - _ROUND
    r = x - k.to(tl.float64) * _LN_2
    low = r.to(tl.float32)
    p = low * 1.98951016e-04 + 1.39297922e-03
    p = p * low + 8.33330377e-03
    p = p * low + 4.16665019e-02
    p = p * low + 1.66666667e-01
    p = p * low + 0.5
    m = r + (low * low * p).to(tl.float64)
    return ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True), m


@triton.jit
def _inverse(x):
    """``1 / x`` of float64 from 1 to 2^24, with an error of 2^-40 of it."""
    guess = (1.0 / x.to(tl.float32)).to(tl.float64)
    return guess * (2.0 - x * guess)


@triton.jit
def _sigmoid(x):
    """``1 / (1 + exp(-x))``, and 0 where exp(-x) is above the range of float64, as in PyTorch."""
    size = tl.where(x < 0.0, x, -x)
    s, m = _exp_parts(_at_least(size, -708.0))
    e = s + s * m
    result = _inverse(1.0 + e) * tl.where(x < 0.0, e, 1.0)
    return tl.where(x < tl.full(x.shape, _OVERFLOW, tl.float64), 0.0, result)


@triton.jit
def _tanh(x):
    """``(1 - exp(-2 x)) / (1 + exp(-2 x))``, without cancellation near 0, whose sign it keeps."""
    twice = tl.where(x < 0.0, 2.0 * x, -2.0 * x)
    s, m = _exp_parts(_at_least(twice, -64.0))
    expm1 = tl.where(s == 1.0, m, s * m + (s - 1.0))
    size = expm1 * _inverse(expm1 + 2.0)
    return tl.where(x < 0.0, size, tl.where(x == 0.0, x, -size))


@triton.jit
def _phi(x):
    """The normal distribution function, ``erfc(-x / sqrt(2)) / 2``.

    For negative x it is exp(-x^2 / 2) t P(t), with t = 1 / (1 - x / 4) and a polynomial P with a relative error of at
    most 5.7e-10; for positive x, one minus that. It is 0 where erfc is below the range of float64.
    """
    size = tl.where(x < 0.0, x, -x)
    size = _at_least(size, -37.6)
    t = _inverse(1.0 - 0.25 * size)
    p = t * -0.011158147510547242 + 0.06094537625959235
    p = p * t - 0.12348538911574344
    p = p * t + 0.10871842246222228
    p = p * t - 0.0595081875821408
    p = p * t + 0.049359935556029494
    p = p * t + 0.03666686439578363
    p = p * t + 0.06453824626473059
    p = p * t + 0.08094758960200767
    p = p * t + 0.09350391107800642
    p = p * t + 0.09973582194470769
    p = p * t + 0.09973555636328098
    s, m = _exp_parts(size * size * -0.5)
    tail = (s + s * m) * (t * p)
    result = tl.where(x > 0.0, 1.0 - tail, tail)
    return tl.where(x < tl.full(x.shape, _NO_PHI, tl.float64), 0.0, result)


@triton.jit
def _phi_tanh(x):
    """``(1 + tanh(z)) / 2 = sigmoid(2 z)``, without the cancellation at negative x."""
    return _sigmoid((0.044715 * x * x * x + x) * _ROOT)
