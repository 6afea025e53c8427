"""How CUDA kernels make bf16 numbers of codes: the numbers that stand for a format in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mxperts.formats import SCALE_MAX, BlockFormat

_BF16_BIAS, _BF16_MANTISSA = 127, 7


@dataclass(frozen=True, kw_only=True)
class Bf16Rule:
    """A format's way from codes to bf16. Patterns are bf16 numbers; with a power of two they become the elements.

    The exponent and mantissa bits of a float element, put where bf16 has its own, are a bf16 number, subnormal where
    the element is, that differs from the element by the difference of the exponents' biases.

    Attributes:
        bits: width of a code.
        integer: whether codes are two's complement.
        offset: elements are patterns times 2^offset.
        shift, mask: of 8-bit floats: from the upper byte of a half, right by so much, and what then counts.
        low: of 6-bit floats: where a pattern has the two bits that 4-bit floats lack.
        high_exponent: whether one of those is the first exponent bit.
    """

    bits: int
    integer: bool
    offset: int
    shift: int = 0
    mask: int = 0
    low: int = 0
    high_exponent: bool = False

    @property
    def largest_scale(self) -> int:
        """The largest scale byte with which the factor that patterns are multiplied by is a bf16 number."""
        return SCALE_MAX - max(0, self.offset)

    def rest_left(self, register: int) -> int:
        """How far to the left the two bits of a block's register are to be moved."""
        if self.high_exponent:
            return 5 - (register if register < 4 else register + 4)
        return 4 - 2 * register

    def macros(self) -> dict[str, str]:
        """What common.cuh calls them."""
        left = "((r) < 4 ? 5 - (r) : 1 - (r))" if self.high_exponent else "(4 - 2 * (r))"
        return {
            "BITS": str(self.bits),
            "INTEGER": str(int(self.integer)),
            "OFFSET": str(self.offset),
            "SHIFT": str(self.shift),
            "MASK": f"0x{self.mask:08x}u",
            "LOW": f"0x{self.low:08x}u",
            "REST_LEFT(r)": left,
        }


@lru_cache
def bf16_rule(fmt: BlockFormat) -> Bf16Rule:
    """The rule of a format with 4, 6 or 8 bits."""
    element = fmt.element
    if not element.has_signed_zero:
        return Bf16Rule(bits=element.bits, integer=True, offset=1 - element.bias - element.mantissa_bits)
    offset = _BF16_BIAS - element.bias
    if element.bits == 8:
        shift = 14 - (_BF16_MANTISSA - 1 + element.exponent_bits)  # from bit 14, the first below the sign
        mask = ((1 << 7) - 1) << (_BF16_MANTISSA - element.mantissa_bits)
        return Bf16Rule(bits=8, integer=False, offset=offset, shift=shift, mask=mask | mask << 16)
    if element.bits == 6:
        high = element.exponent_bits == 3
        low = 1 << 9 | 1 << 5 if high else 1 << 5 | 1 << 4
        return Bf16Rule(bits=6, integer=False, offset=offset, low=low | low << 16, high_exponent=high)
    return Bf16Rule(bits=4, integer=False, offset=offset)
