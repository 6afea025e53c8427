"""A recipe: every choice by which a block of numbers becomes codes and a shared scale."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass


class ScaleRule(enum.Enum):
    """How a block's scale 2^s follows from ``amax``, the largest magnitude in the block.

    ``emax`` and ``max`` are the element format's; ``amax = m * 2^e`` with ``1 <= m < 2``, always exact. The result is
    clamped to [-127, 127].
    """

    FLOOR = "floor"
    """s = e - emax. OCP MX v1.0, section 6.3: values above ``max`` saturate."""
    EVEN = "even"
    """s = (exponent of amax rounded half up to the element's mantissa bits) - emax. AMD Quark, vLLM's emulation."""
    RCEIL = "rceil"
    """s = ceil(log2(amax / max)): the smallest scale at which nothing saturates. NVIDIA, vLLM's MXFP8."""
    CEIL = "ceil"
    """s = ceil(log2(amax)) - emax. torchao, AMD Quark."""
    RFLOOR = "rfloor"
    """s = floor(log2(amax / max)): the largest scale at which ``amax`` reaches ``max``. triton_kernels' ROUND_DOWN."""


class Rounding(enum.Enum):
    """How a scaled value between two neighbouring elements is rounded; beyond ``max`` it always saturates."""

    NEAREST_EVEN = "nearest_even"
    """To the nearest; a tie to the even code. Required by OCP MX v1.0, section 6.3."""
    HALF_AWAY = "half_away"
    """To the nearest; a tie away from zero. triton_kernels' FP4, microxcaling's ``nearest``."""
    HALF_TOWARD_ZERO = "half_toward_zero"
    """To the nearest; a tie toward zero. ggml."""
    TOWARD_ZERO = "toward_zero"
    """Truncation."""
    STOCHASTIC = "stochastic"
    """Up with a probability equal to the distance from the lower neighbour, in units of the gap; needs a generator."""


class SignedZero(enum.Enum):
    """Which sign an element that becomes zero has, in formats that have -0."""

    KEEP = "keep"
    """The sign of the input."""
    DROP = "drop"
    """Always +0."""
    KEEP_ROUNDED = "keep_rounded"
    """The sign of the input if that was not itself a zero. compressed-tensors' MXFP4."""


class NonFinite(enum.Enum):
    """What an Inf, or a NaN, in a block does."""

    BLOCK_NAN = "block_nan"
    """The scale becomes 0xFF: the whole block decodes to NaN."""
    SATURATE = "saturate"
    """Inf counts as 2^128 for the scale and becomes +-max; NaN is left out of ``amax`` and becomes +-max."""
    RAISE = "raise"
    """``ArgumentError``."""


class Role(enum.Enum):
    """Which operand is quantised: presets treat the two differently."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One complete set of choices; with a format and a block it determines every bit.

    Attributes:
        scale_rule: see ``ScaleRule``.
        rounding: see ``Rounding``.
        signed_zero: see ``SignedZero``.
        nan: what a NaN in a block does.
        inf: what an Inf in a block does.
        zero_block_scale: scale byte of a block of zeros (any byte below 0xFF decodes to the same zeros).
        even_bits: mantissa bits that ``ScaleRule.EVEN`` rounds ``amax`` to; None means the element's own.
        even_overflow: whether an ``amax`` that ``ScaleRule.EVEN`` rounds up to 2^128, beyond float32, gets the largest
            scale, 2^127; otherwise it gets 2^(128 - emax), as if the range had no end. Both decode to Inf.
        use_min: whether an integer element may take its most negative code (-2.0 in INT8).
    """

    scale_rule: ScaleRule = ScaleRule.EVEN
    rounding: Rounding = Rounding.NEAREST_EVEN
    signed_zero: SignedZero = SignedZero.KEEP
    nan: NonFinite = NonFinite.BLOCK_NAN
    inf: NonFinite = NonFinite.BLOCK_NAN
    zero_block_scale: int = 0
    even_bits: int | None = None
    even_overflow: bool = False
    use_min: bool = False

    def encode(self) -> str:
        """The recipe as one string, for operators whose arguments must be plain; ``decode`` reads it back."""
        return ",".join(
            str(v.value) if isinstance(v, enum.Enum) else str(v)
            for v in (getattr(self, f.name) for f in dataclasses.fields(self))
        )

    @staticmethod
    def decode(text: str) -> Recipe:
        """The recipe that ``encode`` wrote."""
        rule, rounding, zero, nan, inf, zero_scale, even_bits, even_overflow, use_min = text.split(",")
        return Recipe(
            scale_rule=ScaleRule(rule),
            rounding=Rounding(rounding),
            signed_zero=SignedZero(zero),
            nan=NonFinite(nan),
            inf=NonFinite(inf),
            zero_block_scale=int(zero_scale),
            even_bits=None if even_bits == "None" else int(even_bits),
            even_overflow=even_overflow == "True",
            use_min=use_min == "True",
        )
