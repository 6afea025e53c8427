"""Adding up what the inputs of a linear layer are like."""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.backend.reference.linear import quantize_input
from mxperts.errors import ArgumentError
from mxperts.formats import Activation, BlockFormat
from mxperts.ops.quantize import fake_quantize
from mxperts.quantization.methods.problem import Inputs


class Moments:
    """The moments of a layer's inputs, as ``Inputs`` defines them, over any number of batches.

    Args:
        k: values in an input.
        activation: what the layer's input is quantised to.
        input_scale: the scale of a static fp8 activation.
        device: where to add up.
    """

    def __init__(self, k: int, activation: Activation, input_scale: float | None, device: torch.device) -> None:
        self._activation, self._input_scale = activation, input_scale
        self._rows = 0
        self._moment = torch.zeros(k, k, device=device)
        self._cross = None if activation is None else torch.zeros(k, k, device=device)
        self._amax = torch.zeros(k, device=device)

    @property
    def rows(self) -> int:
        """How many inputs there were."""
        return self._rows

    def add(self, x: Tensor) -> None:
        """Add inputs [..., K].

        Raises:
            ArgumentError: some are not finite.
        """
        x = x.reshape(-1, x.shape[-1])
        if not len(x):
            return
        wide = x.float()  # [R, K]
        amax = wide.abs().amax(0)
        if not amax.isfinite().all():
            raise ArgumentError("inputs are NaN or infinite: the model overflows on the calibration text")
        read = wide if self._activation is None else self._quantized(x).float()
        self._rows += len(x)
        self._moment.addmm_(read.T, read)
        if self._cross is not None:
            self._cross.addmm_(wide.T, read)
        torch.maximum(self._amax, amax, out=self._amax)

    def inputs(self) -> Inputs:
        """The means; takes what was added up."""
        rows = max(self._rows, 1)
        return Inputs(
            rows=self._rows,
            moment=self._moment.div_(rows),
            cross=None if self._cross is None else self._cross.div_(rows),
            amax=self._amax,
        )

    def _quantized(self, x: Tensor) -> Tensor:
        """``x`` as the matmul reads it."""
        if isinstance(self._activation, BlockFormat):
            return fake_quantize(x, self._activation)
        scale = None if self._input_scale is None else torch.tensor(self._input_scale, device=x.device)
        return quantize_input(x, self._activation, scale)
