"""fused_experts and mx_linear on CPU: what the kernel is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mxperts.backend.cpu import prepared
from mxperts.backend.cpu.activation import ActivationRule, activation_rule
from mxperts.backend.cpu.call import (
    BF16,
    BLOCKS,
    DYNAMIC,
    FP16,
    FP32,
    NONE,
    STATIC,
    Given,
    Placed,
    Settings,
    continued,
    record,
)
from mxperts.backend.cpu.call import template as make_template
from mxperts.backend.cpu.jit import exclusive, threads
from mxperts.backend.cpu.layer import compiled_steps, layer
from mxperts.backend.cpu.layout import STRIP, Projection
from mxperts.backend.cpu.memory import Plan, Workspace
from mxperts.backend.cpu.pack import Packing, pack_block
from mxperts.backend.cpu.paths import Path, careful_path, choose
from mxperts.backend.cpu.routing import COUNTERS, MOST_PIECES
from mxperts.backend.cpu.rows import compiled_rows, scratch_bytes
from mxperts.backend.cpu.rule import BLOCK, block_rule
from mxperts.backend.cpu.strip import Kernels, kernels_of, multiply_strip, values_bytes
from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Activation, BlockFormat, Role, recipe
from mxperts.ops.activation import BoundActivation
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

KINDS = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
MOST_SUMS = 1 << 24
"""Numbers of the second projection's result that are kept before they are summed up: more tokens go in turns."""
_AMAX = {BF16: 0x71800000, FP16: 0x47000000, FP32: 0x71800000}  # 2^100, but 2^15 where fp16 could overflow
_NO_FUNCTION = ActivationRule(0, 0.0, 0.0, 0.0, 0.0)

_workspace, _careful_workspace = Workspace(), Workspace()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Problem:
    """All that tells the templates of calls apart, but for their path, threads and tokens; one object for each."""

    up: Projection | None
    down: Projection
    experts: int
    k: int
    kind: int
    out_kind: int
    activation: Activation
    rotation: str | None
    function: ActivationRule
    map_size: int = 0
    on_input: bool = False
    scale1_step: int = 0
    scale2_step: int = 0


def fused_experts(call: ExpertsCall, out: Tensor) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]."""
    layout = call.layout
    tiles1, tiles2, careful = call.weights if call.prepared else prepared.of_experts(call.weights, layout)
    x, k, kind = _rows(call.hidden_states), call.top_k_index.shape[1], KINDS[call.hidden_states.dtype]
    scale1, scale2 = call.input_scales or (None, None)
    problem = _problem(
        layout,
        k,
        kind,
        KINDS[out.dtype],
        call.activation_format,
        call.activation,
        0 if call.expert_map is None else call.expert_map.shape[0],
        call.router_weight_on_input,
        _per_expert(scale1),
        _per_expert(scale2),
    )
    held = _Held()
    ids, routing = held.keep(call.top_k_index, torch.int64), held.keep(call.top_k_weights, torch.float32)
    given = Given(
        hidden_at=x.data_ptr(),
        hidden_stride=x.stride(0) * x.itemsize,
        ids_at=ids.data_ptr(),
        routing_at=routing.data_ptr(),
        map_at=held.address(call.expert_map, torch.int64),
        tiles1_at=tiles1.data_ptr(),
        tiles2_at=tiles2.data_ptr(),
        careful_experts_at=careful.data_ptr() + kind * layout.experts,
        bias1_at=held.address(call.gate_up_bias, torch.float32),
        bias2_at=held.address(call.down_bias, torch.float32),
        scale1_at=held.address(scale1, torch.float32),
        scale2_at=held.address(scale2, torch.float32),
        out_at=out.data_ptr(),
    )
    path = choose(layout.weight, call.activation_format, call.accumulation)
    tokens, step = x.shape[0], max(1, MOST_SUMS // (k * layout.hidden))
    if tokens <= step:
        _run(problem, path, tokens, given)
        return
    for first in range(0, tokens, step):
        part = given._replace(
            hidden_at=given.hidden_at + first * given.hidden_stride,
            ids_at=given.ids_at + 8 * first * k,
            routing_at=given.routing_at + 4 * first * k,
            out_at=given.out_at + first * layout.hidden * out.itemsize,
        )
        _run(problem, path, min(step, tokens - first), part)


def mx_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: BlockFormat,
    bias: Tensor | None,
    activation: Activation,
    input_scale: Tensor | None,
    rotation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``x`` [..., K] times ``weight`` [N, K] transposed, plus ``bias`` [N]: [..., N] in ``out_dtype``.

    The weight is brought to the backend's layout once and kept as long as it lives.
    """
    shape = Projection(format=fmt, rows=weight[0].shape[0], k=x.shape[-1])
    tiles, careful = prepared.of_linear(weight, shape)
    rows, kind = _rows(x.reshape(-1, shape.k)), KINDS[x.dtype]
    out = torch.empty(*x.shape[:-1], shape.rows, dtype=out_dtype)
    tokens, step = rows.shape[0], max(1, MOST_SUMS // shape.rows)
    problem = _linear_problem(shape, kind, KINDS[out_dtype], activation, rotation)
    held = _Held()
    given = Given(
        hidden_at=rows.data_ptr(),
        hidden_stride=rows.stride(0) * rows.itemsize,
        ids_at=held.keep(torch.zeros(min(step, tokens)), torch.int64).data_ptr(),
        routing_at=held.keep(torch.ones(min(step, tokens)), torch.float32).data_ptr(),
        map_at=0,
        tiles1_at=0,
        tiles2_at=tiles.data_ptr(),
        careful_experts_at=careful.data_ptr() + kind,
        bias1_at=0,
        bias2_at=held.address(bias, torch.float32),
        scale1_at=held.address(input_scale, torch.float32),
        scale2_at=0,
        out_at=out.data_ptr(),
    )
    path = choose(fmt, activation, "auto")
    for first in range(0, tokens, step):
        part = given._replace(
            hidden_at=given.hidden_at + first * given.hidden_stride,
            out_at=given.out_at + first * shape.rows * out.itemsize,
        )
        _run(problem, path, min(step, tokens - first), part)
    return out


def _run(problem: _Problem, path: Path, tokens: int, given: Given) -> None:
    """Run a call, and after it once more, with care, what that marked."""
    nbytes, template = _template(problem, path, tokens, threads(), False)
    with exclusive():
        data = record(template, given, _workspace.address(nbytes))
        if not layer(data.ctypes.data):
            return
        nbytes, template = _template(problem, careful_path(), tokens, threads(), True)
        again = continued(record(template, given, _careful_workspace.address(nbytes)), data)
        layer(again.ctypes.data)


@lru_cache(maxsize=1024)
def _problem(
    layout: ExpertsLayout,
    k: int,
    kind: int,
    out_kind: int,
    activation_format: Activation,
    activation: BoundActivation,
    map_size: int,
    on_input: bool,
    scale1_step: int,
    scale2_step: int,
) -> _Problem:
    up, down = prepared.projections(layout)
    return _Problem(
        up=up,
        down=down,
        experts=layout.experts,
        k=k,
        kind=kind,
        out_kind=out_kind,
        activation=activation_format,
        rotation=layout.rotation,
        function=activation_rule(activation),
        map_size=map_size,
        on_input=on_input,
        scale1_step=scale1_step,
        scale2_step=scale2_step,
    )


@lru_cache(maxsize=1024)
def _linear_problem(
    shape: Projection, kind: int, out_kind: int, activation: Activation, rotation: str | None
) -> _Problem:
    return _Problem(
        up=None,
        down=shape,
        experts=1,
        k=1,
        kind=kind,
        out_kind=out_kind,
        activation=activation,
        rotation=rotation,
        function=_NO_FUNCTION,
    )


@lru_cache(maxsize=1024)
def _template(p: _Problem, path: Path, tokens: int, threads: int, careful_only: bool) -> tuple[int, Any]:
    """Bytes of a call's workspace, and its record but for what it is given."""
    activation, fmt, linear = p.activation, p.down.format, p.up is None
    up = p.down if p.up is None else p.up
    kernels, packing = _parts(path, p.kind, fmt, activation)
    pairs, planes = tokens * p.k, max(1, packing.planes)
    # Rows that begin a multiple of 4 KiB apart would meet in the same lines of the first-level cache.
    x1_bytes, x2_bytes = (shape.blocks * kernels.block_bytes + 64 for shape in (up, p.down))
    scratch = scratch_bytes(values_bytes(kernels), BLOCK * up.blocks)
    qdq = _qdq(activation)
    plan = Plan()
    placed = Placed(
        careful_at=plan.add(pairs),
        y_at=plan.add(4 * pairs * p.down.strips * STRIP),
        order_at=plan.add(8 * pairs),
        start_at=plan.add(8 * (p.experts + 1)),
        active_at=plan.add(8 * p.experts),
        counters_at=plan.add(8 * COUNTERS),
        pieces1_at=plan.add(8 * MOST_PIECES),
        pieces2_at=plan.add(8 * MOST_PIECES),
        table1_at=plan.add(8 * pairs * planes),
        table2_at=plan.add(8 * pairs * planes),
        x1_at=plan.add((pairs if p.scale1_step else tokens) * planes * x1_bytes),
        x2_at=plan.add(0 if linear else pairs * planes * x2_bytes),
        a_at=plan.add(0 if linear or qdq != DYNAMIC else 4 * pairs * p.down.blocks * BLOCK),
        scratch_at=plan.add(threads * scratch),
    )
    functions = {
        name: function.address
        for part in (compiled_rows(), compiled_steps())
        for name, function in part._asdict().items()
    }
    settings = Settings(
        kind=p.kind,
        out_kind=p.out_kind,
        linear=int(linear),
        qdq=qdq,
        rotated=int(p.rotation is not None),
        planes=planes,
        marks=int(not kernels.careful),
        careful_only=int(careful_only),
        threads=threads,
        tokens=tokens,
        k=p.k,
        width=up.k,
        map_size=p.map_size,
        on_input=int(p.on_input),
        per_pair=p.scale1_step,
        experts=p.experts,
        hidden=p.down.rows,
        intermediate=p.down.k,
        gated=int(up.gated),
        interleaved=int(up.interleaved),
        blocks1=up.blocks,
        strips1=up.strips,
        blocks2=p.down.blocks,
        strips2=p.down.strips,
        scale1_step=p.scale1_step,
        scale2_step=p.scale2_step,
        amax=_AMAX[p.kind],
        x1_bytes=x1_bytes,
        x2_bytes=x2_bytes,
        scratch_bytes=scratch,
        values_bytes=values_bytes(kernels),
        tile_bytes=p.down.tile_bytes,
        block_bytes=kernels.block_bytes,
        multiply=multiply_strip(kernels, fmt).address,
        pack_block=pack_block(packing).address,
        **functions,
    )
    rule = block_rule(activation, recipe(activation, Role.ACTIVATION)) if isinstance(activation, BlockFormat) else None
    return plan.nbytes, make_template(placed, settings, rule, p.function)


def _parts(path: Path, kind: int, weight: BlockFormat, activation: Activation) -> tuple[Kernels, Packing]:
    """The kernels of a path and what they read."""
    kernels = kernels_of(path, kind)
    if path.integers:
        assert isinstance(activation, BlockFormat), activation
        return kernels, Packing(weight, activation, 0)
    if kernels.careful:
        return kernels, Packing(weight, None, 0)
    # Elements of MX formats have 8 significant bits at most, as bf16 has.
    planes = 1 if isinstance(activation, BlockFormat) else {BF16: 1, FP16: 2, FP32: 3}[kind]
    return kernels, Packing(weight, None, planes)


def _qdq(activation: Activation) -> int:
    if isinstance(activation, BlockFormat):
        return BLOCKS
    return {None: NONE, FP8_STATIC: STATIC, FP8_DYNAMIC: DYNAMIC}[activation]


def _rows(x: Tensor) -> Tensor:
    """``x`` [M, K], each row in one piece."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def _per_expert(scale: Tensor | None) -> int:
    return int(scale is not None and scale.numel() > 1)


class _Held:
    """Keeps the tensors alive whose addresses a call holds."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def keep(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor in a dtype and one piece."""
        self.tensors.append(tensor.to(dtype).contiguous())
        return self.tensors[-1]

    def address(self, tensor: Tensor | None, dtype: torch.dtype) -> int:
        """Where it is; 0 for none."""
        return 0 if tensor is None else self.keep(tensor, dtype).data_ptr()
