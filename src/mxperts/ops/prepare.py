"""The weights of experts: their shapes and format, and a backend's own layout of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.formats import Activation, BlockFormat, parse_activation
from mxperts.formats import format as lookup
from mxperts.ops.dispatch import Problem, resolve
from mxperts.ops.quantize import FLOAT_DTYPES
from mxperts.rotation import check_rotation
from mxperts.tensor import MXTensor

_T = TypeVar("_T")

Weight = MXTensor | Tensor
"""A weight in an MX format, or a dense one of float32, bfloat16 or float16."""


@dataclass(frozen=True, kw_only=True)
class ExpertsLayout:
    """What the weights of experts are, apart from their numbers.

    Attributes:
        weight: the format of both projections; None if they are dense.
        experts, hidden, intermediate: E, H and I.
        gated: whether ``gate_up_proj`` has the 2I rows of a gate and an up projection, or I rows.
        interleaved: whether gate and up rows alternate; otherwise all gate rows come first.
        rotation: by what the weights are rotated, and inputs are to be; None for nothing.
    """

    weight: BlockFormat | None
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    interleaved: bool
    rotation: str | None = None

    def __hash__(self) -> int:
        return self._hash  # computed once: a layout is looked up for every call

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @property
    def gate_up_rows(self) -> int:
        """Rows of ``gate_up_proj``."""
        return self.intermediate * (2 if self.gated else 1)

    def projections(self, kind: Callable[..., _T]) -> tuple[_T, _T]:
        """Both projections of packed experts as a backend's records, which ``kind`` makes of these keywords."""
        assert self.weight is not None, "dense weights"
        return (
            kind(
                format=self.weight,
                rows=self.gate_up_rows,
                k=self.hidden,
                gated=self.gated,
                interleaved=self.interleaved,
            ),
            kind(format=self.weight, rows=self.hidden, k=self.intermediate),
        )

    def encode(self) -> str:
        """The record as one string, for operators whose arguments must be plain; ``decode`` reads it back."""
        numbers = (self.experts, self.hidden, self.intermediate, int(self.gated), int(self.interleaved))
        return ",".join([str(self.weight), *(str(n) for n in numbers), self.rotation or ""])

    @staticmethod
    @lru_cache
    def decode(text: str) -> ExpertsLayout:
        """The record that ``encode`` wrote."""
        weight, experts, hidden, intermediate, gated, interleaved, rotation = text.split(",")
        return ExpertsLayout(
            weight=None if weight == "None" else lookup(weight),
            experts=int(experts),
            hidden=int(hidden),
            intermediate=int(intermediate),
            gated=gated == "1",
            interleaved=interleaved == "1",
            rotation=rotation or None,
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PreparedExperts:
    """The weights of experts as one backend wants them: the result of ``prepare``.

    Attributes:
        weights: the backend's own tensors.
        layout: what they stand for.
        backend: the backend that can read them.
    """

    weights: tuple[Tensor, ...]
    layout: ExpertsLayout
    backend: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.weights)

    def unprepare(self) -> tuple[Weight, Weight]:
        """``gate_up_proj`` and ``down_proj`` as they were given to ``prepare``, bit for bit."""
        layout = self.layout
        problem = _problem(layout, self.weights[0].device, torch.bfloat16, None)
        tensors = resolve(self.backend, problem).backend.load("unprepare")(self.weights, layout)
        if layout.weight is None:
            gate_up, down = tensors
            return gate_up, down
        gate_up_packed, gate_up_scales, down_packed, down_scales = tensors
        return (
            MXTensor(gate_up_packed, gate_up_scales, layout.weight, layout.hidden),
            MXTensor(down_packed, down_scales, layout.weight, layout.intermediate),
        )

    def __repr__(self) -> str:
        layout = self.layout
        return (
            f"PreparedExperts(backend={self.backend}, weight={layout.weight}, E={layout.experts}, H={layout.hidden}, "
            f"I={layout.intermediate}, nbytes={self.nbytes})"
        )


def prepare(
    gate_up_proj: Weight,
    down_proj: Weight,
    *,
    interleaved: bool = False,
    activation_format: Activation = None,
    dtype: torch.dtype = torch.bfloat16,
    rotation: str | None = None,
    backend: str = "auto",
) -> PreparedExperts:
    """Lay the weights of experts out as a backend wants them, once, at load.

    Args:
        gate_up_proj, down_proj, interleaved: as ``fused_experts`` takes them.
        activation_format, dtype: of the hidden states that they will meet; "auto" chooses the backend by them.
        rotation: as ``fused_experts`` takes it.
        backend: "auto" or a backend's name.

    Returns:
        What ``fused_experts`` takes in place of ``gate_up_proj``, with None in place of ``down_proj``. It may share
        memory with the arguments.

    Raises:
        ArgumentError: the two weights do not fit together, or cannot be rotated.
        BackendUnavailable: the named backend cannot run here.
    """
    layout = layout_of(gate_up_proj, down_proj, interleaved=interleaved, rotation=rotation)
    problem = _problem(layout, gate_up_proj.device, dtype, parse_activation(activation_format))
    chosen = resolve(backend, problem).backend
    weights = chosen.load("prepare")(canonical_tensors(gate_up_proj, down_proj), layout)
    return PreparedExperts(weights=tuple(weights), layout=layout, backend=chosen.name)


def layout_of(
    gate_up_proj: Weight,
    down_proj: Weight,
    *,
    interleaved: bool,
    gated: bool | None = None,
    rotation: str | None = None,
) -> ExpertsLayout:
    """The layout of two weights that fit together.

    Args:
        gated: what the activation function asks for; None takes either.
        rotation: by what they are rotated.

    Raises:
        ArgumentError: they do not fit together, or not to ``gated``, ``interleaved`` or ``rotation``.
    """
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        check_weight(weight, name, "[E, 2I, H]" if name == "gate_up_proj" else "[E, H, I]", ndim=3)
    gate_up_format, down_format = weight_format(gate_up_proj), weight_format(down_proj)
    if gate_up_format != down_format:
        raise ArgumentError(
            f"gate_up_proj and down_proj must have one format, not {gate_up_format or 'dense'} "
            f"and {down_format or 'dense'}; requantise one of them"
        )
    (experts, rows, hidden), (down_experts, down_rows, intermediate) = gate_up_proj.shape, down_proj.shape
    shapes = f"gate_up_proj has shape {tuple(gate_up_proj.shape)} and down_proj {tuple(down_proj.shape)}"
    if experts != down_experts:
        raise ArgumentError(f"{shapes}: they must agree in E, the first dimension")
    if hidden != down_rows:
        raise ArgumentError(f"{shapes}: the last dimension of the one must be the second of the other, H")
    if gated is None and rows in (intermediate, 2 * intermediate):
        gated = rows == 2 * intermediate
    expected = {True: 2 * intermediate, False: intermediate}
    if gated is None or rows != expected[gated]:
        what = {True: "a gated activation needs 2I", False: "one without a gate needs I", None: "2I, or I, are needed"}
        raise ArgumentError(f"{shapes}, so that I = {intermediate}, but gate_up_proj has {rows} rows: {what[gated]}")
    if interleaved and not gated:
        raise ArgumentError("interleaved=True needs gate and up rows, but gate_up_proj has only one row for each of I")
    if gate_up_proj.device != down_proj.device:
        raise ArgumentError(
            f"gate_up_proj is on {gate_up_proj.device} but down_proj on {down_proj.device}; move one of them"
        )
    check_rotation(rotation, gate_up_proj=hidden, down_proj=intermediate)
    return ExpertsLayout(
        weight=gate_up_format,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        gated=gated,
        interleaved=interleaved,
        rotation=rotation,
    )


def check_weight(weight: Weight, name: str, dimensions: str, *, ndim: int) -> None:
    """Raise ``ArgumentError`` unless ``weight`` is an MXTensor or a dense float tensor with ``ndim`` dimensions."""
    if not isinstance(weight, MXTensor | Tensor):
        raise ArgumentError(f"{name} must be an MXTensor or a torch.Tensor, not {type(weight).__name__}")
    if isinstance(weight, Tensor) and weight.dtype not in FLOAT_DTYPES:
        raise ArgumentError(
            f"{name} must be float32, bfloat16 or float16, not {weight.dtype}; "
            "wrap packed codes and their scales with MXTensor.from_packed"
        )
    if weight.ndim != ndim or 0 in weight.shape:
        raise ArgumentError(f"{name} must have shape {dimensions}, none of them 0, not {tuple(weight.shape)}")


def weight_format(weight: Weight) -> BlockFormat | None:
    """The format of a weight; None for a dense one."""
    return weight.format if isinstance(weight, MXTensor) else None


def canonical_tensors(*weights: Weight) -> list[Tensor]:
    """For each weight its packed codes and its scales, or the dense tensor itself."""
    tensors: list[Tensor] = []
    for weight in weights:
        tensors += [weight.packed, weight.scales] if isinstance(weight, MXTensor) else [weight]
    return tensors


def _problem(layout: ExpertsLayout, device: torch.device, dtype: torch.dtype, activation: Activation) -> Problem:
    return Problem(
        op="fused_experts",
        device=device,
        dtype=dtype,
        weight=layout.weight,
        activation=activation,
        rotation=layout.rotation,
    )
