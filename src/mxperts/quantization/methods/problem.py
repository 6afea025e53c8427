"""What a method of quantising a weight is given, and what it must give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.formats import BlockFormat, ScaleRule
from mxperts.ops.quantize import FLOAT_DTYPES
from mxperts.tensor import MXTensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """The inputs of one linear layer over the calibration text, as moments. x̂ is x as the matmul reads it: quantised
    and dequantised where the scheme quantises activations, else x itself. Means may be weighted by row: by the square
    of the router's weight in a mixture of experts, by which an error in the expert's output counts.

    Attributes:
        rows: how many inputs there were; of a stack of layers the fewest.
        moment: mean of x̂ᵀ x̂, float32 [..., K, K].
        cross: mean of xᵀ x̂, float32 [..., K, K]; None where x̂ is x.
        amax: largest magnitude of every channel of x, float32 [..., K].
        clean: mean of xᵀ x, float32 [..., K, K], which only ``output_error`` reads; None where x̂ is x, or not known.

    Leading dimensions, if there are any, are those of the weight.

    Raises:
        ArgumentError: shapes do not fit together, or a moment holds NaN or Inf.
    """

    rows: int
    moment: Tensor
    cross: Tensor | None
    amax: Tensor
    clean: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.moment.shape
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise ArgumentError(f"a moment is [..., K, K], not {tuple(shape)}")
        for name, t in (("moment", self.moment), ("cross", self.cross), ("clean", self.clean)):
            if t is None:
                continue
            if t.shape != shape:
                raise ArgumentError(f"{name} must be {tuple(shape)} as the moment is, not {tuple(t.shape)}")
            if not bool(t.isfinite().all()):
                raise ArgumentError(
                    f"the {name} of the layer's inputs holds NaN or Inf: the model gives such values on the "
                    "calibration text; look for the layer in which they begin"
                )
        if self.amax.shape != shape[:-1]:
            raise ArgumentError(f"amax must be {tuple(shape[:-1])}, one value a channel, not {tuple(self.amax.shape)}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """One weight to quantise, or a stack of weights, such as all experts' of a layer, that are quantised at a time.

    Attributes:
        weight: [..., N, K], bfloat16, float16 or float32, on the device to work on.
        format: to quantise to.
        preset, scale_rule: where scales start from, see ``mxperts.quantize``.
        inputs: of the layer; None where the calibration text brought none, or too few, to this expert.

    Raises:
        ArgumentError: another dtype, shapes do not fit together, or the weight holds NaN or Inf.
    """

    weight: Tensor
    format: BlockFormat
    preset: str | None = None
    scale_rule: ScaleRule | str | None = None
    inputs: Inputs | None = None

    def __post_init__(self) -> None:
        weight = self.weight
        if weight.dtype not in FLOAT_DTYPES:
            raise ArgumentError(f"a weight must be bfloat16, float16 or float32, not {weight.dtype}")
        if weight.ndim < 2 or not weight.numel():
            raise ArgumentError(f"a weight is [..., N, K] and not empty; its shape is {tuple(weight.shape)}")
        if not bool(weight.isfinite().all()):
            raise ArgumentError("the weight holds NaN or Inf, for which there is no best code; repair the checkpoint")
        if self.inputs is not None:
            *experts, _, k = weight.shape
            if tuple(self.inputs.moment.shape) != (*experts, k, k):
                raise ArgumentError(
                    f"a weight of {tuple(weight.shape)} has inputs whose moment is {(*experts, k, k)}, not "
                    f"{tuple(self.inputs.moment.shape)}"
                )
            if self.inputs.moment.device != weight.device:
                raise ArgumentError(
                    f"the weight is on {weight.device} but its inputs on {self.inputs.moment.device}; move one of them"
                )


class Method(Protocol):
    """How a weight's codes and scales are chosen. Without ``inputs`` it must fall back to what needs none."""

    def __call__(self, problem: Problem) -> MXTensor:
        """The quantised weight, of the problem's shape and format, on the weight's device."""
        ...


def operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight as float32 [E, N, K'], and the moments of its inputs, x̂ᵀ x̂ and xᵀ x̂, as float32 [E, K', K'].

    E = 1 where there is no stack. K' is K padded to whole blocks: padding has weight 0 and moment 0. Without inputs,
    the moment is the identity.
    """
    weight, inputs, k = problem.weight.to(torch.float32), problem.inputs, problem.weight.shape[-1]
    weight = weight.reshape(-1, *weight.shape[-2:])
    padding = problem.format.blocks(k) * problem.format.block_size - k

    def padded(moment: Tensor) -> Tensor:
        return torch.nn.functional.pad(moment.to(torch.float32).reshape(-1, k, k), (0, padding, 0, padding))

    moment = torch.eye(k, device=weight.device).expand(len(weight), k, k) if inputs is None else inputs.moment
    cross = None if inputs is None or inputs.cross is None else padded(inputs.cross)
    return torch.nn.functional.pad(weight, (0, padding)), padded(moment), cross
