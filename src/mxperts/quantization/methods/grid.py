"""The numbers that a weight may become: elements of a format, times powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.backend.reference.quantize import round_to_code, scale_exponent
from mxperts.formats import SCALE_BIAS, SCALE_MAX, Role, recipe
from mxperts.quantization.methods.problem import Problem
from mxperts.tensor import MXTensor

STEPS = (0, -1, 1, -2)
"""Exponents that a search tries for a block's scale, relative to the one that the scale rule gives; that comes first
and so stays where no other is better."""


class Grid:
    """What rounding to one format under one recipe does, with the scale in the caller's hands.

    Args:
        problem: whose format, preset, scale rule and device.
    """

    def __init__(self, problem: Problem) -> None:
        self.format = problem.format
        self.recipe = recipe(problem.format, Role.WEIGHT, preset=problem.preset, scale_rule=problem.scale_rule)
        self._values = torch.tensor(problem.format.element.values, dtype=torch.float32, device=problem.weight.device)

    def exponents(self, blocks: Tensor) -> Tensor:
        """Exponents of the shared scales that the scale rule gives to ``blocks`` [..., 32]: int64 [...]."""
        return scale_exponent(blocks.abs().amax(-1).to(torch.float64), self.format.element, self.recipe)

    def candidates(self, blocks: Tensor) -> Tensor:
        """The exponents that a search tries for ``blocks`` [..., 32]: int64 [len(STEPS), ...]."""
        return self.near(self.exponents(blocks))

    def near(self, exponents: Tensor) -> Tensor:
        """``STEPS`` away from ``exponents`` [...], within the range of scales: int64 [len(STEPS), ...]."""
        steps = torch.tensor(STEPS, device=exponents.device).view(-1, *[1] * exponents.ndim)
        return (exponents + steps).clamp(-SCALE_BIAS, SCALE_MAX - SCALE_BIAS)

    def codes(self, x: Tensor, exponents: Tensor) -> Tensor:
        """The codes nearest to ``x``, float32, at the scales 2^exponents, which are broadcast: int64; zeros are +0."""
        element = self.format.element
        scaled = (x * power_of_two(-exponents)).to(torch.float64)
        codes = round_to_code(scaled.abs(), scaled < 0, element, self.recipe, None)
        return codes | ((scaled < 0) & (codes > 0)) * element.sign_bit if element.has_signed_zero else codes

    def values(self, codes: Tensor, exponents: Tensor) -> Tensor:
        """The numbers that codes stand for at the scales 2^exponents, float32."""
        return self._values[codes] * power_of_two(exponents)

    def nearest(self, x: Tensor, exponents: Tensor) -> Tensor:
        """``x``, float32, rounded to the elements at the scales 2^exponents, which are broadcast."""
        return self.values(self.codes(x, exponents), exponents)

    def tensor(self, values: Tensor, exponents: Tensor, shape: torch.Size) -> MXTensor:
        """The MX tensor of this ``shape`` whose values are ``values`` [..., K'], all of them elements at their scales.

        Args:
            values: K' is K padded to whole blocks.
            exponents: [..., K' / 32].
            shape: [..., N, K].
        """
        codes = self.codes(values, exponents.repeat_interleave(self.format.block_size, -1)).to(torch.uint8)
        empty = (codes == 0).unflatten(-1, (-1, self.format.block_size)).all(-1)
        scales = (exponents + SCALE_BIAS).masked_fill(empty, self.recipe.zero_block_scale).to(torch.uint8)
        codes, scales = codes[..., : shape[-1]].reshape(shape), scales.reshape(*shape[:-1], scales.shape[-1])
        return MXTensor.from_codes(codes, scales, self.format)


def power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents, float32 and exact, for exponents -127 ... 127; made of bits, as ``exp2`` may be off by one."""
    bits = ((exponents + SCALE_BIAS) << 23).masked_fill(exponents == -SCALE_BIAS, 1 << 22)
    return bits.to(torch.int32).view(torch.float32)
