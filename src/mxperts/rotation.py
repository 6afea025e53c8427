"""Block-32 Hadamard rotation: both factors of a product are rotated, which leaves the product and spreads outliers.

A block of 32 values along K is multiplied by the Sylvester Hadamard matrix H32, whose entries are 1 and -1; it is
symmetric, and H32 H32 = 32 I. Inputs become r(x) = 2^-2 H32 x and weights r(w) = 2^-3 H32 w, so that
r(x) · r(w) = x · w exactly in real arithmetic. Both factors are powers of two: the normalisation rounds nothing, which
1 / sqrt(32) for each would.

The order of operations defines the bits: float32, five steps with strides 1, 2, 4, 8, 16, in each of which all pairs
(a, b) that many places apart within the block become (a + b, a - b), every sum rounded to float32; then the power of
two. Nothing is fused or reordered. Inf and NaN do as float32 has it: they reach all of their block.

Source: the matrix by J. J. Sylvester, 1867; rotating operands before quantisation: QuaRot, arXiv 2404.00456; in blocks
of the MX format's size: arXiv 2511.04214.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.formats.naming import suggest

HADAMARD32 = "hadamard32"
ROTATIONS = (HADAMARD32,)
"""The names of rotations; None stands for none."""
BLOCK = 32
"""Values along K that are rotated together, as many as share a scale."""
STRIDES = (1, 2, 4, 8, 16)
"""Of the butterflies, in their order."""
INPUT_FACTOR, WEIGHT_FACTOR = 2.0**-2, 2.0**-3
"""What the products with H32 are multiplied by."""


def rotate_input(x: Tensor) -> Tensor:
    """``2^-2 H32`` times every block of 32 of ``x``: what ``fused_experts`` and ``mx_linear`` do to their inputs.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.

    Returns:
        float32 [..., K]; bits as the module's documentation defines them.

    Raises:
        ArgumentError: another dtype, or K is no multiple of 32.
    """
    return _rotate(x, "x", INPUT_FACTOR)


def rotate_weight(w: Tensor) -> Tensor:
    """``2^-3 H32`` times every block of 32 of ``w``, to be quantised and multiplied with rotated inputs.

    Args:
        w: float32, bfloat16 or float16 [..., K], K a multiple of 32.

    Returns:
        float32 [..., K]; bits as the module's documentation defines them.

    Raises:
        ArgumentError: another dtype, or K is no multiple of 32.
    """
    return _rotate(w, "w", WEIGHT_FACTOR)


def check_rotation(rotation: str | None, **widths: int) -> None:
    """Check a rotation's name, and that rows of some widths can be rotated.

    Args:
        rotation: one of ``ROTATIONS``, or None.
        **widths: values in a row, by what the row is called in the message.

    Raises:
        ArgumentError: there is no such rotation, or a width is no multiple of 32.
    """
    if rotation is None:
        return
    if rotation not in ROTATIONS:
        raise ArgumentError(f"unknown rotation {rotation!r}; {suggest(str(rotation), ROTATIONS)}")
    for name, k in widths.items():
        if k % BLOCK:
            raise ArgumentError(
                f"rotation {rotation!r} needs rows of whole blocks of {BLOCK}, but {name} has {k} values in a row"
            )


def _rotate(x: Tensor, name: str, factor: float) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"{name} must be a float32, bfloat16 or float16 tensor, not {found}")
    if x.ndim == 0:
        raise ArgumentError(f"{name} must have at least one dimension")
    check_rotation(HADAMARD32, **{name: x.shape[-1]})
    y = x.to(torch.float32)
    for stride in STRIDES:
        a, b = y.unflatten(-1, (-1, 2, stride)).unbind(-2)  # [..., K / (2 stride), stride]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
    return y * factor
