"""What a method of quantising a weight is given, and what it must give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mxperts.formats import BlockFormat, ScaleRule
from mxperts.tensor import MXTensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """The inputs of one linear layer over the calibration text, as moments.

    x̂ is x as the matmul reads it: quantised and dequantised where the scheme quantises activations, else x itself.

    Attributes:
        rows: how many inputs there were.
        moment: mean of x̂ᵀ x̂, float32 [K, K].
        cross: mean of xᵀ x̂, float32 [K, K]; None where x̂ is x.
        amax: largest magnitude of every channel of x, float32 [K].
    """

    rows: int
    moment: Tensor
    cross: Tensor | None
    amax: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """One weight to quantise.

    Attributes:
        weight: [N, K], of any floating dtype, on the device to work on.
        format: to quantise to.
        preset, scale_rule: where scales start from, see ``mxperts.quantize``.
        inputs: of the layer; None where the calibration text brought none, or too few, to this expert.
    """

    weight: Tensor
    format: BlockFormat
    preset: str | None = None
    scale_rule: ScaleRule | str | None = None
    inputs: Inputs | None = None


class Method(Protocol):
    """How a weight's codes and scales are chosen. Without ``inputs`` it must fall back to what needs none."""

    def __call__(self, problem: Problem) -> MXTensor:
        """The quantised weight, of the problem's shape and format, on the weight's device."""
        ...
