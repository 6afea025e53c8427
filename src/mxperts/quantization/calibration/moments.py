"""Adding up what the inputs of a linear layer are like."""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.backend.reference.linear import quantize_input
from mxperts.errors import ArgumentError
from mxperts.formats import Activation, BlockFormat
from mxperts.ops.quantize import fake_quantize
from mxperts.quantization.methods.problem import Inputs
from mxperts.rotation import rotate_input


class Moments:
    """The moments of a layer's inputs, as ``Inputs`` defines them, over any number of batches.

    Args:
        k: values in an input.
        activation: what the layer's input is quantised to.
        input_scale: the scale of a static fp8 activation.
        device: where to add up.
        rotation: by what the layer's input is rotated before it is quantised; rotated inputs are added up.
        clean: whether to add up the unquantised inputs too.

    Attributes:
        rows: how many inputs there were.
        weight: the sum of the squares of their weights.
    """

    def __init__(
        self,
        k: int,
        activation: Activation,
        input_scale: float | None,
        device: torch.device,
        *,
        rotation: str | None = None,
        clean: bool = False,
    ) -> None:
        self._activation, self._input_scale, self._rotation = activation, input_scale, rotation
        self.rows = 0
        self.weight = torch.zeros((), device=device)
        self._moment = torch.zeros(k, k, device=device)
        self._cross = None if activation is None else torch.zeros(k, k, device=device)
        self._clean = torch.zeros(k, k, device=device) if clean and activation is not None else None
        self._amax = torch.zeros(k, device=device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs [..., K].

        Args:
            x: the inputs, of any floating dtype.
            weights: [R], what each row's output is multiplied by: its error counts by the square of that.

        Raises:
            ArgumentError: some are not finite.
        """
        x = x.reshape(-1, x.shape[-1]).to(self._moment.device)  # [R, K]
        if not len(x):
            return
        wide = x.float() if self._rotation is None else rotate_input(x)
        amax = wide.abs().amax(0)
        if not amax.isfinite().all():
            raise ArgumentError("inputs are NaN or infinite: the model overflows on the calibration text")
        torch.maximum(self._amax, amax, out=self._amax)
        read = wide if self._activation is None else self._quantized(x).float()
        self.rows += len(x)
        if weights is None:
            self.weight += len(x)
        else:
            column = weights.to(wide).unsqueeze(-1)
            self.weight += column.square().sum()
            wide, read = wide * column, read * column
        self._moment.addmm_(read.T, read)
        if self._cross is not None:
            self._cross.addmm_(wide.T, read)
        if self._clean is not None:
            self._clean.addmm_(wide.T, wide)

    def inputs(self) -> Inputs:
        """The means; takes what was added up."""
        weight = torch.where(self.weight > 0, self.weight, 1)
        return Inputs(
            rows=self.rows,
            moment=self._moment.div_(weight),
            cross=None if self._cross is None else self._cross.div_(weight),
            amax=self._amax,
            clean=None if self._clean is None else self._clean.div_(weight),
        )

    def _quantized(self, x: Tensor) -> Tensor:
        """``x`` as the matmul reads it."""
        if isinstance(self._activation, BlockFormat) and self._rotation is None:
            return fake_quantize(x, self._activation)
        scale = None if self._input_scale is None else torch.tensor(self._input_scale, device=x.device)
        return quantize_input(x, self._activation, scale, self._rotation)
