"""fused_experts for all but a few tokens: pairs (token, slot) sorted by expert, each projection a grouped product."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda.arguments import CallArguments, Given, active_experts, current, workspace
from mxperts.backend.gpu.cuda.compiler import Kernel
from mxperts.backend.gpu.cuda.layout import STEP, UNIT_ROWS, Tiles
from mxperts.backend.gpu.cuda.macros import hidden_macros, problem_macros
from mxperts.backend.gpu.paths import is_batch_invariant
from mxperts.errors import BackendUnavailable
from mxperts.formats import Activation
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

MOST_PAIRS = 1 << 17
"""Pairs that are computed together; it bounds the workspace. More are computed one part after the other."""
MOST_NARROW = 8
"""Pairs for each expert up to which ``narrow`` was measured to be the faster."""
_FEW, _FEWEST, _MANY = 48, 64, 160
"""Tokens of a tile of ``wide``: most with 16 units, and fewest and most with 8."""
_NARROW = ((8, 4, 4), (16, 3, 10), (32, 2, 24), (64, 2, math.inf))
"""Of ``narrow``: tokens of a tile, blocks on a multiprocessor, and for how many pairs of each expert."""
_SHARES = (1, 2, 4)
_DEPTH = 4
"""Slices that a warp of ``narrow`` has room for."""
_ITEM_COST = 6
"""What an item costs besides its steps, in steps."""
_WARPS = 8
"""That compute, of a block of ``narrow``."""
_MOST_STAGES = 8
TILE_BYTES = 32
_RESERVED = 1024
"""Shared memory that every block has besides its own; as much again is left for what is not sized here."""


@dataclass(frozen=True)
class Product:
    """A kernel that computes a projection, and how.

    Attributes:
        tile: most tokens of an expert that are computed together.
        units: of 32 rows that a block of ``wide`` computes, 8 or 16.
        blocks: on a multiprocessor.
        shares: warps of ``narrow`` that share the K of a unit of rows, of each projection; 0 for the kernel ``wide``.
        exact: whether ``narrow`` adds up blocks of K in float32, and not within the matrix units.
    """

    tile: int
    units: int = 8
    blocks: int = 1
    shares: tuple[int, int] = (0, 0)
    exact: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether it is ``wide``, which is for wgmma."""
        return self.shares == (0, 0)


class Arguments(CallArguments):
    """``Args`` of grouped.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("totals", "tiles", "position", "source", "expert", "local")),
        *((name, ctypes.c_void_p) for name in ("xq", "a", "h", "y")),
        *((name, ctypes.c_int64) for name in ("aligned", "second")),
        *((name, ctypes.c_void_p) for name in ("folded", "base", "outside", "picked", "exact")),
        *((name, ctypes.c_void_p) for name in ("rows1", "rows2", "unfit", "counted")),
        ("positions", ctypes.c_int64),
    )


@dataclass(frozen=True, eq=False)
class _Kernels:
    sort: Kernel
    first_inputs: Kernel
    second_inputs: Kernel
    products: Sequence[Kernel]
    combine: Kernel
    blocks: int


def fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]."""
    for part, result in parts(call, out):
        _fused_experts(part, result, first, second)


def parts(call: ExpertsCall, out: Tensor) -> Iterator[tuple[ExpertsCall, Tensor]]:
    """A call as several of at most ``MOST_PAIRS`` pairs, which bounds the workspace."""
    tokens, k = call.top_k_index.shape
    together = max(1, MOST_PAIRS // k)
    if tokens <= together:
        yield call, out
        return
    for start in range(0, tokens, together):
        turn = slice(start, start + together)
        part = replace(
            call,
            hidden_states=call.hidden_states[turn],
            top_k_index=call.top_k_index[turn],
            top_k_weights=call.top_k_weights[turn],
        )
        yield part, out[turn]


def _fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    given, layout = Given(call, out), call.layout
    tokens, k = call.top_k_index.shape
    pairs, dtype, activation, device = tokens * k, call.hidden_states.dtype, call.activation_format, out.device
    index, stream = current(device)
    planes = hidden_macros(dtype, activation).planes
    exact = call.accumulation == "exact" or dtype is torch.float32
    product = choose_product(
        pairs, layout.experts, (first, second), planes, device_of(index), invariant=is_batch_invariant(), exact=exact
    )
    kernels = _kernels(layout, dtype, out.dtype, activation, call.activation.name, product, index)
    rows = pairs if given.per_expert1 else tokens
    # One projection's inputs, and its results, are done with when the other's are written.
    _memory, addresses = workspace(
        device,
        totals=8,
        tiles=TILE_BYTES * most_tiles(pairs, layout.experts, product.tile),
        position=4 * pairs,
        source=4 * pairs,
        expert=2 * pairs,
        local=2 * pairs,
        a=2 * planes * max(rows * first.steps, pairs * second.steps) * STEP,
        h=pairs * UNIT_ROWS * max(first.units * dtype.itemsize, second.units * 4),
    )
    direct = given.direct and not product.is_wide
    arguments = Arguments(
        **{**given.fields, **addresses, "direct": direct},
        xq=addresses["a"],
        y=addresses["h"],
        aligned=given.x.stride(0) * dtype.itemsize % 16 == 0 and given.x.data_ptr() % 16 == 0,
        second=False,
    )
    kernels.sort(1, arguments, stream)
    if not direct:
        kernels.first_inputs(rows, arguments, stream)
    kernels.products[0](kernels.blocks, arguments, stream)
    arguments.second = True
    kernels.second_inputs(pairs, arguments, stream)
    kernels.products[1](kernels.blocks, arguments, stream)
    kernels.combine(tokens, arguments, stream)


@dataclass(frozen=True)
class Device:
    """What a launch depends on.

    Attributes:
        multiprocessors: their number.
        shared_bytes: that a block can have.
        shared_bytes_together: that the blocks on a multiprocessor have.
        wgmma: whether it has Hopper's instructions; others have ``mma.sync``.
    """

    multiprocessors: int
    shared_bytes: int
    shared_bytes_together: int
    wgmma: bool


@lru_cache
def device_of(index: int) -> Device:
    """The device with an index."""
    properties: Any = torch.cuda.get_device_properties(index)
    return Device(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
        torch.cuda.get_device_capability(index) == (9, 0),
    )


@lru_cache(maxsize=1024)
def choose_product(
    pairs: int,
    experts: int,
    projections: tuple[Tiles, Tiles],
    planes: int,
    device: Device,
    *,
    invariant: bool = False,
    exact: bool = False,
) -> Product:
    """What computes so many pairs, each expert's being about as many.

    Args:
        pairs: tokens times slots.
        experts: of the layer.
        projections: first and second.
        planes: bf16 numbers of an input: they share the shared memory with the weights' codes.
        device: that computes.
        invariant: whether it must add up alike for any number of pairs.
        exact: whether sums must be as exact as float32 has them: those of matrix units are truncated.
    """
    each = pairs / active_experts(pairs, experts)
    if device.wgmma and (invariant or each > MOST_NARROW) and not exact:
        return wide(each, planes)
    product = narrow(pairs, each, projections, planes, device, (1,) if invariant else _SHARES)
    return replace(product, exact=exact)


def wide(each: float, planes: int) -> Product:
    """The kernel for Hopper.

    Args:
        each: pairs of an expert.
        planes: see ``choose_product``.
    """
    most = each + 2 * math.sqrt(each)  # of nearly every expert
    if most <= _FEW:
        return Product(_FEW, units=16)
    limit = _MANY if planes == 1 else _FEWEST
    return Product(max(_FEWEST, even_tile(most, limit)))


def even_tile(most: float, limit: int) -> int:
    """Tokens of a tile when so many are shared out evenly to as few tiles as may be, a multiple of 16."""
    return -(-math.ceil(most / math.ceil(most / limit)) // 16) * 16


def narrow(
    pairs: int,
    each: float,
    projections: tuple[Tiles, Tiles],
    planes: int,
    device: Device,
    shares: Sequence[int] = _SHARES,
) -> Product:
    """The kernel for any device.

    Args:
        pairs, projections, planes, device: see ``choose_product``.
        each: pairs of an expert.
        shares: what warps may share a unit.

    Raises:
        BackendUnavailable: too little shared memory.
    """
    wanted = next(i for i, (_, _, most) in enumerate(_NARROW) if each <= most)
    for tile, blocks, _ in reversed(_NARROW[: wanted + 1]):
        sizes = {n: narrow_bytes(tile, n, planes, projections[0].slice_bytes) for n in shares}
        fitting = [n for n, size in sizes.items() if size <= device.shared_bytes - _RESERVED]
        if fitting:
            tiles = round(max(pairs / each, pairs / tile))
            chosen = [share(tiles * p.units, p.steps, blocks * device.multiprocessors, fitting) for p in projections]
            together = device.shared_bytes_together // (max(sizes[n] for n in chosen) + _RESERVED)
            return Product(tile, blocks=max(1, min(blocks, together)), shares=(chosen[0], chosen[1]))
    raise BackendUnavailable(f"{device.shared_bytes} bytes of shared memory are too few; use path 'triton'")


def share(units: int, steps: int, blocks: int, shares: Sequence[int] = _SHARES) -> int:
    """Warps that best share a unit, so that all blocks have about as much to do.

    Args:
        units: of all tiles.
        steps: of a unit.
        blocks: that are there at a time.
        shares: the choices.
    """
    return min(shares, key=lambda n: -(-units * n // (_WARPS * blocks)) * (-(-steps // n) + _ITEM_COST))


def chunk(tile: int, warps: int, planes: int) -> int:
    """Steps whose inputs a block of ``narrow`` has in shared memory: no fewer than weights are copied ahead."""
    return max(8 if tile * planes <= 16 else 4, _DEPTH * warps)


def narrow_bytes(tile: int, warps: int, planes: int, slice_bytes: int) -> int:
    """Shared memory of a block of ``narrow``, ``warps`` of which share a unit: inputs, twice, and places for slices."""
    return 2 * planes * tile * chunk(tile, warps, planes) * STEP * 2 + _WARPS * _DEPTH * -(-slice_bytes // 16) * 16


def most_tiles(pairs: int, experts: int, tokens: int) -> int:
    """Most tiles that ``pairs`` fall into, however they are spread over the experts."""
    return (pairs + min(pairs, experts) * (tokens - 1)) // tokens


def stages(product: Product, slice_bytes: int, planes: int, shared_bytes: int) -> tuple[int, int]:
    """Steps that a block of ``wide`` keeps in so much shared memory, and the bytes that they take."""
    stage = -(-(planes * product.tile * STEP * 2 + product.units * slice_bytes) // 1024) * 1024
    number = min(_MOST_STAGES, (shared_bytes - 2 * _RESERVED) // stage)
    return number, number * stage + 1024  # from where an address is a multiple of 1024


def sorting(experts: int) -> tuple[int, int]:
    """The experts that ``sort`` has room for, and its warps."""
    room = -(-experts // 64) * 64
    return room, 32 if room <= 512 else 16


def sort_kernel(experts: int, blocks: int, macros: Mapping[str, str], device: int) -> Kernel:
    """``sort``, whose blocks are a cluster."""
    room, segments = sorting(experts)
    more = {"SEGMENTS": str(segments), "EXPERTS": str(room), "CLUSTER": str(blocks)}
    size = 4 * room * (segments + 4)
    return Kernel("sort", {**macros, **more}, device, threads=32 * segments, shared_bytes=size, cluster=blocks)


@lru_cache(maxsize=256)
def _kernels(
    layout: ExpertsLayout,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    activation: Activation,
    function: str,
    product: Product,
    device: int,
) -> _Kernels:
    assert layout.weight is not None
    properties, planes = device_of(device), hidden_macros(dtype, activation).planes
    coarse = product.is_wide and product.units == 8
    macros = {
        **problem_macros(layout, dtype, out_dtype, activation, function),
        "WGMMA": str(int(product.is_wide)),
        "FOLDED": "0",
        "MOST_N": str(product.tile),
        "STEP_N": "16" if coarse else "8",
        "LEAST_N": str(_FEWEST) if coarse else "8",
    }

    def kernel(name: str, threads: int, shared_bytes: int = 0, **more: int) -> Kernel:
        every = {**macros, **{k: str(int(v)) for k, v in more.items()}}
        return Kernel(name, every, device, threads=threads, shared_bytes=shared_bytes)

    slice_bytes = Tiles(format=layout.weight, rows=UNIT_ROWS, k=STEP).slice_bytes
    if product.is_wide:
        number, shared = stages(product, slice_bytes, planes, properties.shared_bytes)
        products = [kernel("wide", 32 * (product.units + 4), shared, STAGES=number, UNITS=product.units)] * 2
    else:
        products = [
            kernel(
                "narrow",
                32 * _WARPS,
                narrow_bytes(product.tile, n, planes, slice_bytes),
                SHARE=n,
                UNITS=_WARPS // n,
                CHUNK=chunk(product.tile, n, planes),
                DEPTH=_DEPTH,
                BLOCKS=product.blocks,
                EXACT=product.exact,
            )
            for n in product.shares
        ]
    return _Kernels(
        sort_kernel(layout.experts, 1, macros, device),
        kernel("inputs", 128, SECOND=0),
        kernel("inputs", 128, SECOND=1),
        products,
        kernel("combine", 128),
        properties.multiprocessors * product.blocks,
    )
