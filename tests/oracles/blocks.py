"""Blocks of 32 numbers that quantisers get wrong, one function a category."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from mxperts.formats import BlockFormat, ElementFormat

BLOCK = 32
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ORDINARY = ("normal", "log_uniform", "ties", "near_ties", "thresholds", "zeros", "outlier")
"""Categories in which every block is finite and its amax a normal float32 well inside the range."""
EXTREME = ("subnormal", "huge")
"""Finite blocks at the ends of the range."""
SPECIAL = ("nonfinite",)
CATEGORIES = ORDINARY + EXTREME + SPECIAL


def make(category: str, fmt: BlockFormat, dtype: torch.dtype, count: int) -> Tensor:
    """``count`` blocks of a category: [count, 32] of ``dtype``, the same at every call."""
    seed = zlib.crc32(f"{category} {fmt.name} {dtype}".encode())
    generator = torch.Generator().manual_seed(seed)
    return _MAKERS[category](fmt.element, dtype, count, generator)


def ulp_step(x: Tensor, step: int) -> Tensor:
    """The number ``step`` units in the last place further from zero."""
    ints = torch.int32 if x.dtype is FP32 else torch.int16
    return (x.view(ints) + step).view(x.dtype)


def _exponents(dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    """Powers of two [count, 1] at which every element format's whole range is normal in ``dtype``, float64."""
    low, high = (-4, 1) if dtype is FP16 else (-80, 80)
    return torch.exp2(torch.randint(low, high, (count, 1), generator=generator).double())


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


def _normal(element: ElementFormat, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(count, BLOCK, generator=generator, dtype=torch.float64)
    return (x * _exponents(dtype, count, generator)).to(dtype)


def _log_uniform(element: ElementFormat, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    spread = 6 if dtype is FP16 else 24
    exponent = (torch.rand(count, BLOCK, generator=generator, dtype=torch.float64) * 2 - 1) * spread
    return (torch.exp2(exponent) * _signs((count, BLOCK), generator)).to(dtype)


def _outlier(element: ElementFormat, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(count, BLOCK, generator=generator, dtype=torch.float64)
    x[:, 5] *= 100
    return x.to(dtype)


def _midpoints(element: ElementFormat) -> Tensor:
    table = torch.tensor(element.magnitudes, dtype=torch.float64)
    return (table[1:] + table[:-1]) / 2


def _tie_blocks(element: ElementFormat, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    """The largest power of two first, which every scale rule scales alike, then midpoints between codes."""
    midpoints = _midpoints(element)
    midpoints = midpoints[midpoints < 2.0**element.emax]
    x = midpoints[torch.randint(0, len(midpoints), (count, BLOCK), generator=generator)]
    x[:, 0] = 2.0**element.emax
    return (x * _signs((count, BLOCK), generator) * _exponents(dtype, count, generator)).to(dtype)


def _near_ties(element: ElementFormat, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    x = _tie_blocks(element, dtype, count, generator)
    steps = torch.randint(0, 2, (count, BLOCK), generator=generator) * 2 - 1
    steps[:, 0] = 0
    return ulp_step(x, steps.to(torch.int32 if dtype is FP32 else torch.int16))


def thresholds(element: ElementFormat) -> list[float]:
    """Every amax in [1, 2) at which some scale rule steps: 1, the even rule's for each width, max's mantissa."""
    even = [2.0 - 2.0 ** -(bits + 1) for bits in (1, 2, 3, 7, 8)]
    return sorted({1.0, *even, element.max / 2.0**element.emax})


def _thresholds(element: ElementFormat, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    """amax exactly at a threshold, and one ulp of ``dtype`` to either side."""
    cases = list(itertools.product(thresholds(element), (-1, 0, 1)))
    mantissa, steps = (torch.tensor(v, dtype=torch.float64) for v in zip(*cases, strict=True))
    pick = torch.arange(count) % len(cases)
    amax = (mantissa[pick, None] * _exponents(dtype, count, generator)).to(dtype)
    amax = ulp_step(amax, steps[pick, None].to(torch.int32 if dtype is FP32 else torch.int16))
    x = (torch.rand(count, BLOCK, generator=generator, dtype=torch.float64) * 2 - 1) * amax.double()
    x = x.to(dtype)
    x[:, 7] = amax[:, 0]
    return x


def _zeros(element: ElementFormat, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    """Blocks of +0, of -0, of both; zeros of either sign among values; values that round to zero."""
    zeros = _signs((count, BLOCK), generator) * 0.0
    x = torch.where(
        torch.rand(count, BLOCK, generator=generator) < 0.5, zeros, _normal(element, FP32, count, generator)
    )
    exponent = -20 if dtype is FP16 else -40
    tiny = torch.rand(count, BLOCK, generator=generator) < 0.2
    x = torch.where(tiny, _signs((count, BLOCK), generator) * 2.0**exponent, x / x.abs().amax(-1, keepdim=True))
    x[0], x[1], x[2] = 0.0, -0.0, zeros[2]
    return x.nan_to_num(0.0).to(dtype)


def _subnormal(element: ElementFormat, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    """Blocks of which all values, or all but a few, are below or near the smallest normal number of ``dtype``."""
    smallest = torch.finfo(dtype).smallest_normal
    reach = torch.exp2(torch.randint(-2, 8, (count, 1), generator=generator).double())
    x = (torch.rand(count, BLOCK, generator=generator, dtype=torch.float64) * 2 - 1) * reach * smallest
    return x.to(dtype)


def _huge(element: ElementFormat, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    """The largest finite number of ``dtype``, and numbers within a factor of eight of it."""
    largest = torch.finfo(dtype).max
    reach = torch.exp2(-3 * torch.rand(count, 1, generator=generator, dtype=torch.float64))
    reach[::4] = 1.0
    x = (torch.rand(count, BLOCK, generator=generator, dtype=torch.float64) * 2 - 1) * reach * largest
    x[:, 3] = reach[:, 0] * largest
    return x.to(dtype)


def _nonfinite(element: ElementFormat, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    """Inf, -Inf, NaN alone among numbers, all of them together, and whole blocks of each."""
    x = _normal(element, dtype, count, generator)
    inf, nan = torch.inf, torch.nan
    for i in range(count):
        match i % 7:
            case 0:
                x[i, 3] = inf
            case 1:
                x[i, 4] = -inf
            case 2:
                x[i, 5] = nan
            case 3:
                x[i, 3], x[i, 30] = inf, nan
            case 4:
                x[i] = inf
            case 5:
                x[i] = nan
            case 6:
                x[i], x[i, 9] = 0.0, -inf
    return x


_MAKERS: dict[str, Callable[[ElementFormat, torch.dtype, int, torch.Generator], Tensor]] = {
    "normal": _normal,
    "log_uniform": _log_uniform,
    "ties": _tie_blocks,
    "near_ties": _near_ties,
    "thresholds": _thresholds,
    "zeros": _zeros,
    "outlier": _outlier,
    "subnormal": _subnormal,
    "huge": _huge,
    "nonfinite": _nonfinite,
}


def golden_blocks(fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    """Every category, each with enough blocks to have each of its cases once: [n, 32]."""
    return torch.cat([make(c, fmt, dtype, 21 if c == "thresholds" else 8) for c in CATEGORIES])
