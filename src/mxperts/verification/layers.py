"""Layers whose exact answer does not depend on the order of a sum, and that answer.

All numbers are integers times one power of two, and the magnitudes of the terms of every sum come to less than 2^24
units: float32 holds each partial sum, in whatever order, by whatever unit it is formed. What is rounded, to the dtype
of the hidden states or to the activation format, is rounded as ``fused_experts`` documents it. Zeros have no sign here:
which one an exact sum of 0 has depends on its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mxperts.formats import E4M3, FP8_DYNAMIC, FP8_STATIC, BlockFormat, Role, Rounding, Scheme, recipe
from mxperts.verification.definition import (
    BLOCK,
    Bits,
    Float,
    dequantize,
    elements,
    floor_log2,
    magnitudes,
    nearest,
    quantize,
)

Exact = npt.NDArray[np.object_]
"""Python integers: numbers in units of ``UNIT``."""

UNIT = 60
"""Numbers are counted in units of 2^-60."""
_FLOAT32_BITS = 24
HIDDEN, INTERMEDIATE, EXPERTS = 80, 48, 4
TOKENS = (0, 1, 6, 72)
"""Sizes of batches: none, one token, few, and enough that experts get tiles of tokens."""
_STATES = 6
INPUT_SCALES = (0.03125, 0.5)
"""Of static fp8 activations: powers of two, so that what they scale stays exact."""
FUNCTION = "relu2"
_TOP = 7
"""The largest hidden state, and 7 * 2^n the largest activation: divided by 448, the scale of dynamic fp8, they give
powers of two."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """An MX tensor as bytes.

    Attributes:
        codes: uint8 [..., K], padded with zero codes to whole blocks.
        scales: uint8 [..., K/32].
        k: values in a row.
    """

    codes: Bits
    scales: Bits
    k: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """``mx_linear`` on hidden states of which one value is 7 and all others are 0: it gives back every weight.

    Attributes:
        scheme: formats of the weight and of its input.
        dtype: of the hidden states.
    """

    scheme: Scheme
    dtype: Float

    @cached_property
    def weight(self) -> Weights:
        """[N, 80]: every finite code in every column, under scales from 2^-27 to 2^13."""
        fmt = _weight(self.scheme)
        finite = np.array([c for c, v in enumerate(elements(fmt.element)) if v is not None], dtype=np.uint8)
        rows, columns = np.arange(max(len(finite), BLOCK))[:, None], np.arange(HIDDEN)
        scales = np.array([100, 120, 126, 127, 128, 140], dtype=np.uint8)
        blocks = -(-HIDDEN // BLOCK)
        return Weights(
            codes=np.pad(finite[(rows + 37 * columns) % len(finite)], ((0, 0), (0, blocks * BLOCK - HIDDEN))),
            scales=scales[(rows + np.arange(blocks)) % len(scales)],
            k=HIDDEN,
        )

    @cached_property
    def hidden_states(self) -> Bits:
        """[80, 80]."""
        x = np.zeros((HIDDEN, HIDDEN), dtype=self.dtype.bits)
        np.fill_diagonal(x, self.dtype.pattern(Fraction(_TOP)))
        return x

    def answer(self) -> Bits:
        """[80, N]."""
        x = _exact(_activation(self.hidden_states, self.dtype, self.scheme, INPUT_SCALES[0]), self.dtype)
        w = _exact(_values(self.weight, _weight(self.scheme), self.dtype), self.dtype)
        return _rounded(np.diag(x)[:, None] * w.T >> UNIT, self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts:
    """``fused_experts`` with ``relu2``: 4 experts of [2 * 48, 80] and [80, 48], two of them for each token.

    No token has the last expert; some have one or none instead of two (id -1).

    Attributes:
        scheme: formats of the weights and of the inputs of both projections.
        dtype: of the hidden states.
    """

    scheme: Scheme
    dtype: Float

    @cached_property
    def gate_up(self) -> Weights:
        """[4, 96, 80]: a gate has one weight, of the hidden state that is 1; up rows are full."""
        codes, scales = _scattered(_weight(self.scheme), (EXPERTS, 2 * INTERMEDIATE, HIDDEN), seed=1)
        one = _code(_weight(self.scheme), positive=True)
        minus_one = _code(_weight(self.scheme), positive=False)
        signs = np.arange(INTERMEDIATE) % 5 == 3
        codes[:, :INTERMEDIATE] = 0
        codes[:, :INTERMEDIATE, 1] = np.where(signs, minus_one, one)
        # of the first rows the gate is 4 and up 14: the largest activation, 224
        scales[:, :INTERMEDIATE, 0] = scales.min()
        scales[:, 0, 0], scales[:, INTERMEDIATE, 0] = scales.min() + 2, scales.min() + 1
        codes[:, INTERMEDIATE] = 0
        codes[:, INTERMEDIATE, 0] = one
        return Weights(codes=codes, scales=scales, k=HIDDEN)

    @cached_property
    def down(self) -> Weights:
        """[4, 80, 48]: rows are full, but only the first of each expert takes the largest activation."""
        codes, scales = _scattered(_weight(self.scheme), (EXPERTS, HIDDEN, INTERMEDIATE), seed=2)
        codes[:, 1:, 0] = 0  # the largest activation would hide the others
        return Weights(codes=codes, scales=scales, k=INTERMEDIATE)

    def hidden_states(self, tokens: int) -> Bits:
        """[tokens, 80]: six kinds of token, of 7, 1 and then -1, 0 and 1; the last is zeros."""
        x = _random((_STATES, HIDDEN), seed=3) % 3 - 1
        x[:, 0], x[:, 1], x[-1] = _TOP, 1, 0
        patterns = [[_pattern(Fraction(int(v)), self.dtype) for v in row] for row in x]
        return np.array(patterns, dtype=self.dtype.bits)[np.arange(tokens) % _STATES]

    def routing(self, tokens: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Expert ids [tokens, 2] and their weights, powers of two."""
        t = np.arange(tokens)[:, None]
        ids = (t // _STATES + t + np.arange(2)) % (EXPERTS - 1)
        ids[t[:, 0] % 5 == 4, 1] = -1
        ids[t[:, 0] % 35 == 34] = -1
        weights = np.ldexp(np.float32(1), (t + np.arange(2)) % 3 - 1).astype(np.float32)
        return ids, weights

    def answer(self, tokens: int) -> Bits:
        """[tokens, 80]."""
        ids, weights = self.routing(tokens)
        factor = np.array([int(4 * w) for w in weights.ravel()], dtype=object).reshape(*ids.shape, 1)
        terms = self._of_pairs[np.arange(tokens)[:, None] % _STATES, ids] * factor // 4  # [tokens, 2, 80]
        terms = np.where(ids[..., None] >= 0, terms, 0)
        _check_order(abs(terms).sum(1), _finest(terms.swapaxes(1, 2)))
        return _rounded(terms.sum(1), self.dtype)

    @cached_property
    def _of_pairs(self) -> Exact:
        """The result of every kind of token in every expert, [6, 4, 80]."""
        fmt = _weight(self.scheme)
        gate_up = _exact(_values(self.gate_up, fmt, self.dtype), self.dtype)
        down = _exact(_values(self.down, fmt, self.dtype), self.dtype)
        x = _exact(_activation(self.hidden_states(_STATES), self.dtype, self.scheme, INPUT_SCALES[0]), self.dtype)
        found = []
        for expert in range(EXPERTS):
            h = _exact(_rounded(_product(x, gate_up[expert]), self.dtype), self.dtype)
            gate, up = h[:, :INTERMEDIATE], h[:, INTERMEDIATE:]
            squared = np.maximum(gate, 0) ** 2 >> UNIT
            a = _rounded(squared * up >> UNIT, self.dtype)
            found.append(
                _product(_exact(_activation(a, self.dtype, self.scheme, INPUT_SCALES[1]), self.dtype), down[expert])
            )
        return np.stack(found, axis=1)


def _weight(scheme: Scheme) -> BlockFormat:
    assert scheme.weight is not None, scheme
    return scheme.weight


def _random(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.int64]:
    """Integers in 0 … 2^24, by a multiplication."""
    places = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed << 20)
    return ((places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).astype(np.int64).reshape(shape)


def _scattered(fmt: BlockFormat, shape: tuple[int, int, int], seed: int) -> tuple[Bits, Bits]:
    """Codes, padded, and scales that make numbers below 4 in units of 2^-6."""
    table = elements(fmt.element)
    emax = floor_log2(magnitudes(fmt.element)[-1])
    few = [c for c, v in enumerate(table) if v is not None and (v * 64 / Fraction(2) ** emax).denominator == 1]
    blocks = -(-shape[-1] // BLOCK)
    codes = np.array(few, dtype=np.uint8)[_random(shape, seed) % len(few)]
    scales = 127 - emax + _random((*shape[:-1], blocks), seed + 1) % 2
    padded = np.pad(codes, ((0, 0), (0, 0), (0, blocks * BLOCK - shape[-1])))
    return padded, scales.astype(np.uint8)


def _code(fmt: BlockFormat, *, positive: bool) -> int:
    """The code of the largest power of two, or of its negative."""
    largest = Fraction(2) ** floor_log2(magnitudes(fmt.element)[-1])
    found = [c for c, v in enumerate(elements(fmt.element)) if v == largest]
    return next(c for c in found if (c < fmt.element.sign_bit) == positive)


def _values(weight: Weights, fmt: BlockFormat, dtype: Float) -> Bits:
    return dequantize(weight.codes, weight.scales, fmt, dtype)[..., : weight.k]


def _activation(x: Bits, dtype: Float, scheme: Scheme, static_scale: float) -> Bits:
    """Hidden states as the scheme's activation format holds them."""
    activation = scheme.activation
    if activation is None:
        return x
    if isinstance(activation, BlockFormat):
        codes, scales = quantize(x, dtype, activation, recipe(activation, Role.ACTIVATION))
        return dequantize(codes, scales, activation, dtype)[:, : x.shape[1]]
    assert activation in (FP8_STATIC, FP8_DYNAMIC), activation
    return np.array([_fp8(row, dtype, static_scale if activation == FP8_STATIC else None) for row in x], dtype.bits)


def _fp8(row: Bits, dtype: Float, static_scale: float | None) -> list[int]:
    """A token in E4M3 under a scale that is a power of two."""
    values = [dtype.value(int(pattern)) for pattern in row]
    table = magnitudes(E4M3)
    scale = Fraction(static_scale) if static_scale else max(map(abs, values)) / table[-1] or Fraction(1)
    exponent = floor_log2(scale)
    assert scale == Fraction(2) ** exponent, f"{scale} is no power of two"
    found = []
    for value in values:
        ratio = abs(value) / scale
        index = nearest(ratio.numerator, 1 - ratio.denominator.bit_length(), E4M3, Rounding.NEAREST_EVEN)
        found.append(_pattern(table[index] * scale * (-1 if value < 0 else 1), dtype))
    return found


def _exact(x: Bits, dtype: Float) -> Exact:
    """Patterns as numbers."""
    distinct, place = np.unique(x, return_inverse=True)
    found = []
    for pattern in distinct:
        value = dtype.value(int(pattern)) * (1 << UNIT)
        assert value.denominator == 1, f"{pattern:#x} is finer than 2^-{UNIT}"
        found.append(value.numerator)
    exact: Exact = np.array(found, dtype=object)[place].reshape(x.shape)
    return exact


def _product(x: Exact, w: Exact) -> Exact:
    """``x`` [T, K] times ``w`` [N, K] transposed."""
    _check_order(abs(x) @ abs(w).T, _finest(x)[:, None] * _finest(w))
    sums: Exact = x @ w.T >> UNIT
    return sums


def _finest(x: Exact) -> Exact:
    """The largest power of two of which all numbers along the last dimension are multiples."""
    found: Exact = _LOWEST_BIT(x).min(-1)
    return found


_LOWEST_BIT = np.frompyfunc(lambda v: v & -v or 1 << UNIT, 1, 1)


def _check_order(totals: Exact, finest: Exact) -> None:
    """Assert that sums are exact in float32 whatever their order; ``totals`` are their terms' magnitudes, added up."""
    assert (totals < finest * (1 << _FLOAT32_BITS)).all(), "a sum depends on its order"


def _rounded(x: Exact, dtype: Float) -> Bits:
    """Numbers as patterns; zeros without a sign."""
    patterns = [_pattern(Fraction(v, 1 << UNIT), dtype) for v in x.ravel()]
    return np.array(patterns, dtype=dtype.bits).reshape(x.shape)


def _pattern(x: Fraction, dtype: Float) -> int:
    return dtype.pattern(abs(x)) | (dtype.sign if x < 0 else 0)
