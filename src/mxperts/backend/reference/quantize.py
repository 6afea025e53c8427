"""Quantisation from the specification: value tables and exact float64, no bit tricks.

float64 holds every float32, bfloat16 and float16 exactly and as a normal number, and so does it hold every value times
any power of two that occurs here. All comparisons below are therefore between exact numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.formats import (
    SCALE_BIAS,
    SCALE_MAX,
    SCALE_NAN,
    BlockFormat,
    ElementFormat,
    NonFinite,
    Recipe,
    Rounding,
    ScaleRule,
    SignedZero,
)
from mxperts.packing import pack, unpack

CHUNK = 1 << 22
"""Values quantised at a time: float64 temporaries stay near half a gigabyte however large the tensor is."""


def quantize(
    x: Tensor, fmt: BlockFormat, recipe: Recipe, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [..., P] and scales uint8 [..., ceil(K / 32)] of ``x`` [..., K]."""
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    packed = torch.empty(rows.shape[0], fmt.packed_size(k), dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows.shape[0], fmt.blocks(k), dtype=torch.uint8, device=x.device)
    step = max(1, CHUNK // max(1, k))
    for start in range(0, rows.shape[0], step):
        chunk = slice(start, start + step)
        codes, scales[chunk] = quantize_to_codes(rows[chunk], fmt, recipe, generator)
        packed[chunk] = pack(codes.flatten(-2), fmt)
    return packed.view(*x.shape[:-1], packed.shape[-1]), scales.view(*x.shape[:-1], scales.shape[-1])


def quantize_to_codes(
    x: Tensor, fmt: BlockFormat, recipe: Recipe, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., ceil(K / 32), 32], padding included, and scales uint8 [..., ceil(K / 32)]."""
    k = x.shape[-1]
    padding = fmt.blocks(k) * fmt.block_size - k
    blocks = torch.nn.functional.pad(x.to(torch.float64), (0, padding)).unflatten(-1, (-1, fmt.block_size))
    blocks = blocks.contiguous()  # [..., K/32, 32]
    nan, inf = blocks.isnan(), blocks.isinf()
    for what, found, policy in (("NaN", nan, recipe.nan), ("Inf", inf, recipe.inf)):
        if policy is NonFinite.RAISE and bool(found.any()):
            raise ArgumentError(f"x holds {what}, which this recipe refuses")

    magnitude = blocks.abs().masked_fill(nan, 0.0).masked_fill(inf, 2.0**128)
    amax = magnitude.amax(-1)  # [..., K/32]
    exponent = scale_exponent(amax, fmt.element, recipe)
    scaled = torch.ldexp(magnitude, -exponent.unsqueeze(-1))
    code = round_to_code(scaled, blocks.signbit(), fmt.element, recipe, generator)
    if fmt.element.has_signed_zero:
        code |= _sign(blocks, code == 0, recipe.signed_zero) * fmt.element.sign_bit
    saturated = torch.zeros_like(nan)
    if recipe.nan is NonFinite.SATURATE:
        saturated |= nan
    if recipe.inf is NonFinite.SATURATE:
        saturated |= inf
    largest = torch.where(blocks.signbit(), _negated_max(fmt.element), len(fmt.element.magnitudes) - 1)
    code = torch.where(saturated, largest, code)

    scale = exponent + SCALE_BIAS
    scale = torch.where(amax == 0, recipe.zero_block_scale, scale)
    poison = torch.zeros_like(amax, dtype=torch.bool)
    if recipe.nan is NonFinite.BLOCK_NAN:
        poison |= nan.any(-1)
    if recipe.inf is NonFinite.BLOCK_NAN:
        poison |= inf.any(-1)
    scale = scale.masked_fill(poison, SCALE_NAN)
    code = code.masked_fill(poison.unsqueeze(-1), 0)
    return code.to(torch.uint8), scale.to(torch.uint8)


def scale_exponent(amax: Tensor, element: ElementFormat, recipe: Recipe) -> Tensor:
    """The exponent of the shared scale, int64 in [-127, 127], for exact float64 ``amax``; -127 where that is 0."""
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2^exponent, 1/2 <= fraction < 1
    mantissa, exponent = fraction * 2, exponent.to(torch.int64) - 1
    mantissa_of_max = element.max / 2.0**element.emax
    match recipe.scale_rule:
        case ScaleRule.FLOOR:
            step = torch.zeros_like(exponent)
        case ScaleRule.EVEN:
            bits = element.mantissa_bits if recipe.even_bits is None else recipe.even_bits
            step = (mantissa >= 2.0 - 2.0 ** -(bits + 1)).to(torch.int64)
            if recipe.even_overflow:  # a step so large that the clamp below gives the largest scale
                step = torch.where(exponent + step >= 128, SCALE_MAX, step)
        case ScaleRule.RCEIL:
            step = (mantissa > mantissa_of_max).to(torch.int64)
        case ScaleRule.CEIL:
            step = (mantissa > 1.0).to(torch.int64)
        case ScaleRule.RFLOOR:
            step = -(mantissa < mantissa_of_max).to(torch.int64)
    exponent = exponent + step - element.emax
    return torch.where(amax == 0, -SCALE_BIAS, exponent).clamp(-SCALE_BIAS, SCALE_MAX - SCALE_BIAS)


def round_to_code(
    scaled: Tensor, negative: Tensor, element: ElementFormat, recipe: Recipe, generator: torch.Generator | None
) -> Tensor:
    """Codes, int64, of scaled magnitudes: the index in the table of magnitudes, negated where that carries the sign."""
    table, midpoints = _tables(element, scaled.device)
    match recipe.rounding:
        case Rounding.TOWARD_ZERO:
            index = torch.searchsorted(table, scaled, right=True) - 1
        case Rounding.HALF_TOWARD_ZERO:
            index = torch.searchsorted(midpoints, scaled)
        case Rounding.HALF_AWAY:
            index = torch.searchsorted(midpoints, scaled, right=True)
        case Rounding.NEAREST_EVEN:
            down, up = torch.searchsorted(midpoints, scaled), torch.searchsorted(midpoints, scaled, right=True)
            index = torch.where(down % 2 == 0, down, up)
        case Rounding.STOCHASTIC:
            if generator is None:
                raise ArgumentError("stochastic rounding needs a generator: pass generator=torch.Generator()")
            below = torch.searchsorted(table, scaled, right=True) - 1
            # Past the largest value the gap is taken as unbounded: it saturates.
            gap = torch.diff(table, append=table.new_tensor([torch.inf]))
            uniform = torch.rand(scaled.shape, dtype=torch.float64, generator=generator, device=scaled.device)
            index = below + (uniform < (scaled - table[below]) / gap[below])
    if element.has_signed_zero:
        return index.clamp(max=len(element.magnitudes) - 1)
    largest = torch.where(negative, _negative_limit(element, recipe), len(element.magnitudes) - 1)
    index = torch.minimum(index, largest)
    return torch.where(negative, -index, index) % (1 << element.bits)


def dequantize(packed: Tensor, scales: Tensor, fmt: BlockFormat, k: int, dtype: torch.dtype) -> Tensor:
    """Values [..., K]: element times 2^(scale - 127), in float32 and then rounded once to ``dtype``.

    In float64 no rounding takes place at all; in float32 only values beyond its range become Inf.
    """
    table = torch.tensor(fmt.element.values, dtype=torch.float64, device=packed.device)
    values = table[unpack(packed, fmt).to(torch.int64)].unflatten(-1, (-1, fmt.block_size))  # [..., K/32, 32]
    scaled = torch.ldexp(values, scales.to(torch.int64).unsqueeze(-1) - SCALE_BIAS)
    scaled = scaled.masked_fill((scales == SCALE_NAN).unsqueeze(-1), torch.nan).flatten(-2)[..., :k]
    return scaled if dtype is torch.float64 else scaled.to(torch.float32).to(dtype)


def fake_quantize(x: Tensor, fmt: BlockFormat, recipe: Recipe, generator: torch.Generator | None = None) -> Tensor:
    """``dequantize(quantize(x))`` in the dtype of ``x``."""
    packed, scales = quantize(x, fmt, recipe, generator)
    return dequantize(packed, scales, fmt, x.shape[-1], x.dtype)


def _sign(blocks: Tensor, is_zero: Tensor, policy: SignedZero) -> Tensor:
    """1 where the code gets its sign bit, int64."""
    negative = blocks.signbit()
    match policy:
        case SignedZero.KEEP:
            return negative.to(torch.int64)
        case SignedZero.DROP:
            return (negative & ~is_zero).to(torch.int64)
        case SignedZero.KEEP_ROUNDED:
            return (negative & (blocks != 0)).to(torch.int64)


def _negative_limit(element: ElementFormat, recipe: Recipe) -> int:
    """Largest magnitude index of a negative integer element."""
    return len(element.magnitudes) - 1 + recipe.use_min


def _negated_max(element: ElementFormat) -> int:
    """The code of ``-max``."""
    return element.values.index(-element.max)


def _tables(element: ElementFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """Magnitudes in increasing order, indexed by code, and the midpoints between neighbours; both exact float64."""
    magnitudes = list(element.magnitudes)
    if not element.has_signed_zero:
        magnitudes.append(-element.min)  # 2.0, which only a negative INT8 can be
    table = torch.tensor(magnitudes, dtype=torch.float64, device=device)
    return table, (table[1:] + table[:-1]) / 2
