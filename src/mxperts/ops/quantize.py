"""quantize, dequantize and fake_quantize: between numbers and MX numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.formats import BlockFormat, NonFinite, Preset, Recipe, Role, Rounding, ScaleRule, SignedZero
from mxperts.formats import format as lookup
from mxperts.formats import recipe as make_recipe
from mxperts.ops.dispatch import Problem, run
from mxperts.ops.eager import is_eager
from mxperts.tensor import MXTensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    x: Tensor,
    fmt: BlockFormat | str,
    *,
    scale_rule: ScaleRule | str | None = None,
    rounding: Rounding | str | None = None,
    preset: Preset | str | None = None,
    role: Role | str = Role.WEIGHT,
    signed_zero: SignedZero | str | None = None,
    nan: NonFinite | str | None = None,
    inf: NonFinite | str | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> MXTensor:
    """Quantise a tensor to an MX format, in blocks of 32 along its last dimension.

    Args:
        x: float32, bfloat16 or float16 [..., K], K >= 1. A last block that is not full is padded with zeros.
        fmt: block format or its name.
        scale_rule: "floor", "even", "rceil", "ceil" or "rfloor" instead of the preset's; see ``ScaleRule``.
        rounding: "nearest_even", "half_away", "half_toward_zero", "toward_zero" or "stochastic" instead of
            the preset's.
        preset: whose numbers to give where nothing else is said: "quark", "vllm", "ocp", "torchao", "triton_kernels",
            "compressed_tensors", "ggml". The default follows AMD Quark for MXFP4 and MXFP6, ``rceil`` for MXFP8 and
            OCP's ``floor`` for MXINT8.
        role: "weight" or "activation": presets treat the sign of zero differently.
        signed_zero: "keep", "drop" or "keep_rounded" instead of the preset's.
        nan, inf: "block_nan", "saturate" or "raise": what a NaN or an Inf in a block does.
        generator: random numbers for stochastic rounding.
        backend: "auto" or a backend's name.

    Returns:
        Packed codes and scales. Elements beyond the largest value saturate; a block of zeros gets scale 0 (preset
        "quark": 1); a block with NaN or Inf gets scale 0xFF, unless the recipe says otherwise.

    Raises:
        ArgumentError: ``x`` has another dtype or no values; or NaN or Inf where "raise" was asked for.
        FormatError: unknown format, preset or choice.
        BackendUnavailable: the named backend cannot run here.

    Source: OCP MX v1.0, section 6.3.
    """
    fmt = lookup(fmt)
    choices = make_recipe(
        fmt, role, preset=preset, scale_rule=scale_rule, rounding=rounding, signed_zero=signed_zero, nan=nan, inf=inf
    )
    _check(x, choices, generator)
    if generator is not None:  # a generator cannot pass through an operator's schema
        packed, scales = run(backend, _problem("quantize", x, fmt), x, fmt, choices, generator)
    elif is_eager(x):
        packed, scales = run(backend, _problem("quantize", x, fmt), x, fmt, choices)
    else:
        packed, scales = _quantize_op(x, fmt.name, choices.encode(), backend)
    return MXTensor(packed, scales, fmt, x.shape[-1])


def dequantize(t: MXTensor, dtype: torch.dtype = torch.bfloat16, *, backend: str = "auto") -> Tensor:
    """The values of an MX tensor: element times 2^(scale - 127), in float32 and rounded once to ``dtype``.

    Args:
        t: any MX tensor.
        dtype: float32, bfloat16 or float16; float64 gives the exact values.
        backend: "auto" or a backend's name.

    Returns:
        [..., K]. Scale 0xFF gives NaN, scale 0 is 2^-127; values beyond the range of ``dtype`` become Inf.

    Raises:
        ArgumentError: another dtype.
        BackendUnavailable: the named backend cannot run here.

    Source: OCP MX v1.0, section 5.
    """
    if not isinstance(t, MXTensor):
        raise ArgumentError(f"t must be an MXTensor, not {type(t).__name__}; MXTensor.from_packed makes one")
    if dtype not in (*FLOAT_DTYPES, torch.float64):
        raise ArgumentError(f"dtype must be float32, bfloat16, float16 or float64, not {dtype}")
    if is_eager(t.packed, t.scales):
        return _dequantize(t.packed, t.scales, t.format, t.k, dtype, backend)
    values: Tensor = _dequantize_op(t.packed, t.scales, t.format.name, t.k, dtype, backend)
    return values


def fake_quantize(
    x: Tensor,
    fmt: BlockFormat | str,
    *,
    scale_rule: ScaleRule | str | None = None,
    rounding: Rounding | str | None = None,
    preset: Preset | str | None = None,
    role: Role | str = Role.ACTIVATION,
    signed_zero: SignedZero | str | None = None,
    nan: NonFinite | str | None = None,
    inf: NonFinite | str | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """Quantise and dequantise ("QDQ"): the nearest thing to ``x`` that the format can hold, in the dtype of ``x``.

    Equal to ``dequantize(quantize(x, ..., role=role), x.dtype)``. The gradient passes straight through.

    Args, Raises: as ``quantize``; ``role`` is "activation" by default.

    Returns:
        The shape and dtype of ``x``.
    """
    fmt = lookup(fmt)
    choices = make_recipe(
        fmt, role, preset=preset, scale_rule=scale_rule, rounding=rounding, signed_zero=signed_zero, nan=nan, inf=inf
    )
    _check(x, choices, generator)
    if generator is not None:
        values: Tensor = _StochasticFakeQuantize.apply(x, fmt, choices, generator, backend)  # type: ignore[no-untyped-call]
    elif is_eager(x):
        values = run(backend, _problem("fake_quantize", x, fmt), x, fmt, choices)
    else:
        values = _fake_quantize_op(x, fmt.name, choices.encode(), backend)
    return values


def _check(x: Tensor, choices: Recipe, generator: torch.Generator | None) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentError(f"x must be a torch.Tensor, not {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"x must be float32, bfloat16 or float16, not {x.dtype}; convert it first")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ArgumentError(f"x must have at least one value along its last dimension; its shape is {tuple(x.shape)}")
    if (choices.rounding is Rounding.STOCHASTIC) != (generator is not None):
        raise ArgumentError(
            "stochastic rounding needs a generator: pass generator=torch.Generator()"
            if generator is None
            else f"a generator is of use only with rounding='stochastic', not '{choices.rounding.value}'"
        )


def _problem(op: str, x: Tensor, fmt: BlockFormat) -> Problem:
    return Problem(op=op, device=x.device, dtype=x.dtype, weight=fmt)


@torch.library.custom_op("mxperts::quantize", mutates_args=())
def _quantize_op(x: Tensor, fmt: str, recipe: str, backend: str) -> tuple[Tensor, Tensor]:
    f = lookup(fmt)
    packed, scales = run(backend, _problem("quantize", x, f), x, f, Recipe.decode(recipe))
    return packed, scales


@_quantize_op.register_fake
def _(x: Tensor, fmt: str, recipe: str, backend: str) -> tuple[Tensor, Tensor]:
    f, (*rows, k) = lookup(fmt), x.shape
    return x.new_empty((*rows, f.packed_size(k)), dtype=torch.uint8), x.new_empty(
        (*rows, f.blocks(k)), dtype=torch.uint8
    )


@torch.library.custom_op("mxperts::dequantize", mutates_args=())
def _dequantize_op(packed: Tensor, scales: Tensor, fmt: str, k: int, dtype: torch.dtype, backend: str) -> Tensor:
    return _dequantize(packed, scales, lookup(fmt), k, dtype, backend)


def _dequantize(packed: Tensor, scales: Tensor, fmt: BlockFormat, k: int, dtype: torch.dtype, backend: str) -> Tensor:
    problem = Problem(op="dequantize", device=packed.device, dtype=dtype, weight=fmt)
    values: Tensor = run(backend, problem, packed, scales, fmt, k, dtype)
    return values


@_dequantize_op.register_fake
def _(packed: Tensor, scales: Tensor, fmt: str, k: int, dtype: torch.dtype, backend: str) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], k), dtype=dtype)


@torch.library.custom_op("mxperts::fake_quantize", mutates_args=())
def _fake_quantize_op(x: Tensor, fmt: str, recipe: str, backend: str) -> Tensor:
    f = lookup(fmt)
    values: Tensor = run(backend, _problem("fake_quantize", x, f), x, f, Recipe.decode(recipe))
    return values


@_fake_quantize_op.register_fake
def _(x: Tensor, fmt: str, recipe: str, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None


_fake_quantize_op.register_autograd(_straight_through)


class _StochasticFakeQuantize(torch.autograd.Function):
    """``fake_quantize`` with a generator, straight-through gradient included."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fmt: BlockFormat, choices: Recipe, generator: torch.Generator, backend: str
    ) -> Tensor:
        values: Tensor = run(backend, _problem("fake_quantize", x, fmt), x, fmt, choices, generator)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None
