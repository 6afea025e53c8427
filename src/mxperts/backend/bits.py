"""What kernels add to the bits of a block's largest magnitude to get its scale."""

from __future__ import annotations

from mxperts.formats import ElementFormat, Recipe, ScaleRule

_FRACTION_BITS = 23
_ONE = 1 << _FRACTION_BITS


def scale_step(recipe: Recipe, element: ElementFormat) -> tuple[int, int]:
    """The scale rule as arithmetic on float32 bits.

    Args:
        recipe: whose scale rule it is.
        element: the element format.

    Returns:
        What is added to the 23-bit fraction of amax, and to its exponent besides the carry.
    """
    match recipe.scale_rule:
        case ScaleRule.FLOOR:
            return 0, 0
        case ScaleRule.EVEN:
            bits = element.mantissa_bits if recipe.even_bits is None else recipe.even_bits
            return (_ONE >> (bits + 1) if bits < _FRACTION_BITS else 0), 0
        case ScaleRule.RCEIL:
            return _ONE - 1 - _fraction_of_max(element), 0
        case ScaleRule.CEIL:
            return _ONE - 1, 0
        case ScaleRule.RFLOOR:
            return _ONE - _fraction_of_max(element), -1


def _fraction_of_max(element: ElementFormat) -> int:
    """The 23-bit fraction of the largest element."""
    return int((element.max / 2.0**element.emax - 1) * _ONE)
