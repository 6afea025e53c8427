"""A scalar element format: four numbers and an encoding, from which everything else is derived."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from functools import cached_property


class Encoding(enum.Enum):
    """How the bit patterns of an element map to numbers."""

    FINITE = "finite"
    """Sign, exponent, mantissa; every code is a finite number."""
    NAN = "nan"
    """As FINITE, but all exponent and mantissa bits set is NaN (E4M3)."""
    IEEE = "ieee"
    """As IEEE 754: the largest exponent holds Inf (mantissa 0) and NaN (E5M2)."""
    TWOS_COMPLEMENT = "twos_complement"
    """A two's complement integer times a fixed power of two (INT8)."""


@dataclass(frozen=True, kw_only=True)
class ElementFormat:
    """One element format of OCP MX v1.0, table 1.

    Attributes:
        name: OCP's name, such as ``E2M1``.
        exponent_bits: width of the exponent field; 0 for integers.
        mantissa_bits: width of the stored mantissa; for integers all bits but the sign.
        bias: exponent bias; an integer format is scaled as if all its codes were subnormal.
        encoding: what the bit patterns mean.

    Source: OCP Microscaling Formats (MX) v1.0, section 5.3.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    encoding: Encoding

    @property
    def bits(self) -> int:
        """Width of one code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_bit(self) -> int:
        """The code with only the sign bit set: -0 where the format has one."""
        return 1 << (self.bits - 1)

    @property
    def has_signed_zero(self) -> bool:
        """Whether +0 and -0 have different codes."""
        return self.encoding is not Encoding.TWOS_COMPLEMENT

    def decode(self, code: int) -> float:
        """The number that ``code`` stands for: exact, possibly NaN or Inf; -0.0 keeps its sign.

        Raises:
            ValueError: ``code`` has bits beyond the format's width.
        """
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"code {code} is outside 0..{(1 << self.bits) - 1} of {self.name}")
        if self.encoding is Encoding.TWOS_COMPLEMENT:
            integer = code - (code & self.sign_bit) * 2
            return math.ldexp(integer, 1 - self.bias - self.mantissa_bits)
        sign = -1.0 if code & self.sign_bit else 1.0
        exponent = (code >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        all_ones = exponent == (1 << self.exponent_bits) - 1
        if self.encoding is Encoding.IEEE and all_ones:
            return math.nan if mantissa else sign * math.inf
        if self.encoding is Encoding.NAN and all_ones and mantissa == (1 << self.mantissa_bits) - 1:
            return math.nan
        if exponent == 0:
            return sign * math.ldexp(mantissa, 1 - self.bias - self.mantissa_bits)
        return sign * math.ldexp((1 << self.mantissa_bits) + mantissa, exponent - self.bias - self.mantissa_bits)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The number of every code, indexed by code."""
        return tuple(self.decode(code) for code in range(1 << self.bits))

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """The finite values >= 0 in increasing order; the index of each is its code."""
        return tuple(v for v in self.values[: self.sign_bit] if math.isfinite(v))

    @property
    def max(self) -> float:
        """Largest finite value."""
        return self.magnitudes[-1]

    @property
    def min(self) -> float:
        """Most negative finite value: ``-max``, but -2.0 for INT8."""
        return min(v for v in self.values if math.isfinite(v))

    @property
    def emax(self) -> int:
        """Exponent of the largest power of two that is representable."""
        return math.frexp(self.max)[1] - 1

    @property
    def smallest(self) -> float:
        """Smallest value above zero."""
        return self.magnitudes[1]

    def __str__(self) -> str:
        return self.name
