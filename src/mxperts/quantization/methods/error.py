"""How far a quantised weight takes its layer's output from what it was."""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.ops.quantize import dequantize
from mxperts.quantization.methods.problem import Inputs
from mxperts.tensor import MXTensor


def output_error(weight: Tensor, quantized: MXTensor, inputs: Inputs) -> float:
    """The mean over the calibration text of ‖x Wᵀ - x̂ Ŵᵀ‖²: squared errors, summed over outputs and over a stack.

    Where the layer reads quantised activations, E‖x Wᵀ‖² comes from ``inputs.clean``. Without that it is left out: what
    is returned may then be below zero, and compares different Ŵ for one and the same W.

    Args:
        weight: W [..., N, K], any floating dtype.
        quantized: Ŵ [..., N, K].
        inputs: of the layer.
    """
    exact = weight.to(torch.float64)
    rounded = dequantize(quantized, torch.float64)
    moment = inputs.moment.to(torch.float64)
    if inputs.cross is None:
        difference = exact - rounded
        return _product(difference, moment, difference)
    error = _product(rounded, moment, rounded) - 2 * _product(exact, inputs.cross.to(torch.float64), rounded)
    return error + (0.0 if inputs.clean is None else _product(exact, inputs.clean.to(torch.float64), exact))


def _product(a: Tensor, moment: Tensor, b: Tensor) -> float:
    """tr(a M bᵀ)."""
    return float(((a @ moment) * b).sum())
