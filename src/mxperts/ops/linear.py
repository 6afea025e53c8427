"""mx_linear: a linear layer with a quantised weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.formats import FP8_STATIC, Activation, BlockFormat, parse_activation
from mxperts.formats import format as lookup
from mxperts.ops.dispatch import Problem, run
from mxperts.ops.eager import is_eager
from mxperts.ops.experts import InputScale, as_input_scale, check_scale_values
from mxperts.ops.prepare import Weight, canonical_tensors, check_weight, weight_format
from mxperts.ops.quantize import FLOAT_DTYPES
from mxperts.rotation import check_rotation


def mx_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    input_scale: InputScale | None = None,
    rotation: str | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """``x @ weight.T + bias``: ``x`` quantised to ``activation`` and back, exact products, one rounding at the end.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: [N, K], an MXTensor or a dense float tensor; rounded to the dtype of ``x``.
        bias: float [N], used as float32.
        activation: what ``x`` is quantised to: None, a block format or its name, "fp8_static" (also "fp8") or
            "fp8_dynamic" (E4M3, one scale a token).
        input_scale: for static fp8, the scale of ``x``: a number or a float tensor with one element.
        rotation: by what the weight was rotated and ``x`` is to be, None or "hadamard32"; see ``fused_experts``.
        out_dtype: what the result is rounded to, float32, bfloat16 or float16; None stands for the dtype of ``x``.
        backend: "auto" or a backend's name.

    Returns:
        [..., N] in ``out_dtype``.

    Raises:
        ArgumentError: a shape, dtype, device or value that does not fit; the value of a scale is looked at only on CPU.
        FormatError: unknown activation format.
        BackendUnavailable: the named backend cannot run here.
    """
    if not isinstance(x, Tensor):
        raise ArgumentError(f"x must be a torch.Tensor, not {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"x must be float32, bfloat16 or float16, not {x.dtype}")
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"out_dtype must be float32, bfloat16 or float16, not {out_dtype}")
    check_weight(weight, "weight", "[N, K]", ndim=2)
    rows, k = weight.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ArgumentError(f"x must have shape [..., {k}] for a weight of shape {(rows, k)}, not {tuple(x.shape)}")
    if bias is not None:
        if not bias.is_floating_point():
            raise ArgumentError(f"bias must be a float tensor, not {bias.dtype}")
        if tuple(bias.shape) != (rows,):
            raise ArgumentError(f"bias must have shape {(rows,)}, not {tuple(bias.shape)}")
    for name, device in (("weight", weight.device), ("bias", None if bias is None else bias.device)):
        if device not in (None, x.device):
            raise ArgumentError(f"{name} is on {device} but x on {x.device}; move one of them")
    activation = parse_activation(activation)
    if (activation == FP8_STATIC) != (input_scale is not None):
        raise ArgumentError(
            "activation='fp8_static' needs input_scale; 'fp8_dynamic' finds its own"
            if input_scale is None
            else f"input_scale is of use only with activation='fp8_static', not {activation}"
        )
    check_rotation(rotation, weight=k)
    scale = None if input_scale is None else as_input_scale(input_scale, "input_scale", 1, x.device)
    fmt = weight_format(weight)
    tensors, out_dtype = canonical_tensors(weight), out_dtype or x.dtype
    if is_eager(x, bias, scale, *tensors):
        return _execute(x, tensors, fmt, bias, activation, scale, rotation, out_dtype, backend)
    activation_name = "" if activation is None else str(activation)
    y: Tensor = _mx_linear_op(
        x, tensors, "" if fmt is None else fmt.name, bias, activation_name, scale, rotation, out_dtype, backend
    )
    return y


@torch.library.custom_op("mxperts::mx_linear", mutates_args=())
def _mx_linear_op(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor | None,
    rotation: str | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    f, a = lookup(fmt) if fmt else None, parse_activation(activation or None)
    return _execute(x, weight, f, bias, a, input_scale, rotation, out_dtype, backend)


def _execute(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: BlockFormat | None,
    bias: Tensor | None,
    activation: Activation,
    input_scale: Tensor | None,
    rotation: str | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Look at the values, which only now are there under torch.compile, and run the backend."""
    if input_scale is not None and x.device.type == "cpu":
        check_scale_values(input_scale, "input_scale")
    problem = Problem(
        op="mx_linear", device=x.device, dtype=x.dtype, weight=fmt, activation=activation, rotation=rotation
    )
    y: Tensor = run(backend, problem, x, weight, fmt, bias, activation, input_scale, rotation, out_dtype)
    return y


@_mx_linear_op.register_fake
def _(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor | None,
    rotation: str | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight[0].shape[0]), dtype=out_dtype)
