"""The activation functions, compiled: in float64 from float32 inputs, rounded once to float32.

The definition is ``backend.reference.activation``; results are at most the next float32, and Inf, NaN and zeros
follow the same rules. The approximations err by less than 1e-9; in float64 no product of a gate and an up projection
leaves the range, so nothing needs scaling, and what vector instructions the CPU has makes no difference to speak of.
There are no branches and no calls of libraries, so that LLVM turns every loop into vector instructions.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mxperts.backend.cpu.jit import jit
from mxperts.ops.activation import ACTIVATIONS, BoundActivation

Floats = npt.NDArray[np.float32]


class ActivationRule(NamedTuple):
    """A ``BoundActivation`` as plain numbers; a limit or ``linear_beta`` that was left out is Inf.

    Attributes:
        function: the place of its name in ``ACTIVATIONS``.
    """

    function: int
    limit: float
    alpha: float
    beta: float
    linear_beta: float


@lru_cache
def activation_rule(activation: BoundActivation) -> ActivationRule:
    """What ``activate`` takes for ``activation``."""

    def constant(value: float | None, neutral: float) -> float:
        return neutral if value is None else value

    return ActivationRule(
        function=_NAMES.index(activation.name),
        limit=constant(activation.limit, math.inf),
        alpha=constant(activation.alpha, 1.0),
        beta=constant(activation.beta, 0.0),
        linear_beta=constant(activation.linear_beta, math.inf),
    )


_NAMES = tuple(ACTIVATIONS)
_SILU = _NAMES.index("silu")
_GELU = _NAMES.index("gelu")
_GELU_TANH = _NAMES.index("gelu_tanh")
_RELU2 = _NAMES.index("relu2")
_SWIGLUOAI = _NAMES.index("swigluoai")
_SITU = _NAMES.index("situ")
_SWIGLUSTEP = _NAMES.index("swiglustep")
_SILU_NO_MUL = _NAMES.index("silu_no_mul")
_GELU_NO_MUL = _NAMES.index("gelu_no_mul")
_GELU_TANH_NO_MUL = _NAMES.index("gelu_tanh_no_mul")
_RELU2_NO_MUL = _NAMES.index("relu2_no_mul")


@intrinsic  # type: ignore[untyped-decorator]
def _muladd(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` in float64, with one rounding where the CPU can do that."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.DoubleType()
        function = builder.module.declare_intrinsic("llvm.fmuladd", [kind], ir.FunctionType(kind, [kind] * 3))
        return builder.call(function, args)

    return types.float64(types.float64, types.float64, types.float64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _power(typing: Any, shifted: Any) -> Any:
    """The power of two whose exponent, as float64 stores it, is in the low bits of ``shifted``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.IntType(64))
        return builder.bitcast(builder.shl(bits, ir.IntType(64)(52)), ir.DoubleType())

    return types.float64(types.float64), generate


def _element(builder: Any, address: Any, index: Any) -> Any:
    """A pointer to the float32 at an index."""
    return builder.gep(builder.inttoptr(address, ir.PointerType(ir.FloatType())), [index])


@intrinsic  # type: ignore[untyped-decorator]
def _load(typing: Any, address: Any, index: Any) -> Any:
    """The float32 at an index from an address, as float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_element(builder, *args), align=4)
        return builder.fpext(value, ir.DoubleType())

    return types.float64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _store(typing: Any, address: Any, index: Any, value: Any) -> Any:
    """Rounds a float64 to float32 and writes it to an index from an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        *place, value = args
        builder.store(builder.fptrunc(value, ir.FloatType()), _element(builder, *place), align=4)

    return types.void(types.int64, types.int64, types.float64), generate


_LOG2_E = math.log2(math.e)
_ROUND = 1.5 * 2.0**52 + 1023  # a sum with it is rounded to an integer k, and its low bits are k + 1023


@jit
def _at_most(x: float, bound: float) -> float:
    """NaN stays NaN."""
    return bound if x > bound else x


@jit
def _at_least(x: float, bound: float) -> float:
    """NaN stays NaN."""
    return bound if x < bound else x


@jit
def _clamp(x: float, bound: float) -> float:
    """From -bound to bound; NaN stays NaN."""
    return _at_most(_at_least(x, -bound), bound)


@jit
def _exp2_parts(x: float) -> tuple[float, float]:
    """``(s, m)`` with 2^x = s (1 + m), s a power of two and |m| < 0.42; x from -1022 to 1023.

    The polynomial approximates (2^r - 1) / r on [-1/2, 1/2] with a relative error of at most 2.4e-10.
    """
    shifted = x + _ROUND
    r = x - (shifted - _ROUND)
    p = _muladd(r, 1.5252717839785781e-05, 0.00015461329959045206)
    p = _muladd(r, p, 0.0013333669460788996)
    p = _muladd(r, p, 0.00961805703681458)
    p = _muladd(r, p, 0.055504107275856786)
    p = _muladd(r, p, 0.2402265092005325)
    p = _muladd(r, p, 0.6931471805815713)
    return _power(shifted), r * p


@jit
def _sigmoid(x: float) -> float:
    """``1 / (1 + exp(-x))``, and 0 where exp(-x) is above the range of float64, as in PyTorch."""
    s, m = _exp2_parts(_at_most(_at_least(x * -_LOG2_E, -1022.0), 1023.0))
    result = 1.0 / (1.0 + _muladd(s, m, s))
    return 0.0 if x < -709.782712893384 else result


@jit
def _tanh(x: float) -> float:
    """``(exp(2 x) - 1) / (exp(2 x) + 1)``, without cancellation near 0, whose sign it keeps."""
    y = _at_most(_at_least(x * (2 * _LOG2_E), -64.0), 64.0)
    s, m = _exp2_parts(y)
    expm1 = m if s == 1.0 else _muladd(s, m, s - 1.0)
    return expm1 / (expm1 + 2.0)


@jit
def _phi(x: float) -> float:
    """The normal distribution function, ``erfc(-x / sqrt(2)) / 2``.

    For negative x it is exp(-x^2 / 2) t P(t), with t = 1 / (1 - x / 4) and a polynomial P with a relative error of at
    most 5.7e-10; for positive x, one minus that. It is 0 where erfc is below the range of float64.
    """
    a = abs(x)
    t = 1.0 / _muladd(a, 0.25, 1.0)
    p = _muladd(t, -0.011158147510547242, 0.06094537625959235)
    p = _muladd(t, p, -0.12348538911574344)
    p = _muladd(t, p, 0.10871842246222228)
    p = _muladd(t, p, -0.0595081875821408)
    p = _muladd(t, p, 0.049359935556029494)
    p = _muladd(t, p, 0.03666686439578363)
    p = _muladd(t, p, 0.06453824626473059)
    p = _muladd(t, p, 0.08094758960200767)
    p = _muladd(t, p, 0.09350391107800642)
    p = _muladd(t, p, 0.09973582194470769)
    p = _muladd(t, p, 0.09973555636328098)
    s, m = _exp2_parts(_at_least(a * a * (-0.5 * _LOG2_E), -1022.0))
    tail = _muladd(s, m, s) * (t * p)
    result = 1.0 - tail if x > 0.0 else tail
    return 0.0 if x < -38.50340264793 else result


@jit
def _phi_tanh(x: float) -> float:
    """``(1 + tanh(z)) / 2 = sigmoid(2 z)``, without the cancellation at negative x."""
    return _sigmoid(2 * math.sqrt(2 / math.pi) * _muladd(0.044715 * x * x, x, x))


@jit
def activate(g: Floats, u: Floats, out: Floats, rule: ActivationRule) -> None:
    """Write the activations of gates ``g`` and up projections ``u``, not yet rounded to the hidden dtype, to ``out``.

    All have one length and are contiguous. ``out`` may be ``g`` or ``u``, but then nothing is vectorised.

    Args:
        u: not read by the functions without an up projection.
    """
    activate_at(g.ctypes.data, u.ctypes.data, out.ctypes.data, out.shape[0], rule)


@jit
def activate_at(g: int, u: int, out: int, n: int, rule: ActivationRule) -> None:
    """``activate`` with the addresses of ``n`` float32 each, for kernels: passing an array counts a reference to it."""
    if rule.function == _SILU:
        for i in range(n):
            x = _at_most(_load(g, i), rule.limit)
            _store(out, i, x * _sigmoid(x) * _clamp(_load(u, i), rule.limit))
    elif rule.function == _GELU:
        for i in range(n):
            x = _load(g, i)
            _store(out, i, x * _phi(x) * _load(u, i))
    elif rule.function == _GELU_TANH:
        for i in range(n):
            x = _load(g, i)
            _store(out, i, x * _phi_tanh(x) * _load(u, i))
    elif rule.function == _RELU2:
        for i in range(n):
            x = _at_least(_load(g, i), 0.0)
            _store(out, i, x * x * _load(u, i))
    elif rule.function == _SWIGLUOAI:
        for i in range(n):
            x = _at_most(_load(g, i), rule.limit)
            _store(out, i, x * _sigmoid(rule.alpha * x) * (_clamp(_load(u, i), rule.limit) + rule.beta))
    elif rule.function == _SITU and rule.linear_beta == np.inf:
        for i in range(n):
            x = _load(g, i)
            _store(out, i, rule.beta * _tanh(x / rule.beta) * _sigmoid(x) * _load(u, i))
    elif rule.function == _SITU:
        for i in range(n):
            x = _load(g, i)
            y = rule.linear_beta * _tanh(_load(u, i) / rule.linear_beta)
            _store(out, i, rule.beta * _tanh(x / rule.beta) * _sigmoid(x) * y)
    elif rule.function == _SWIGLUSTEP:
        for i in range(n):
            x = _load(g, i)
            _store(out, i, _at_most(x * _sigmoid(x), rule.limit) * _clamp(_load(u, i), rule.limit))
    elif rule.function == _SILU_NO_MUL:
        for i in range(n):
            x = _load(g, i)
            _store(out, i, x * _sigmoid(x))
    elif rule.function == _GELU_NO_MUL:
        for i in range(n):
            x = _load(g, i)
            _store(out, i, x * _phi(x))
    elif rule.function == _GELU_TANH_NO_MUL:
        for i in range(n):
            x = _load(g, i)
            _store(out, i, x * _phi_tanh(x))
    elif rule.function == _RELU2_NO_MUL:
        for i in range(n):
            x = _at_least(_load(g, i), 0.0)
            _store(out, i, x * x)
