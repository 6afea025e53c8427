"""fused_experts for many tokens: pairs (token, slot) sorted by expert, and each projection as one grouped product."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
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
from mxperts.formats import Activation
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

MOST_PAIRS = 1 << 17
"""Pairs that are computed together; it bounds the workspace. More are computed one part after the other."""
MOST_NARROW = 32
"""Pairs for each expert up to which ``narrow`` was measured to be the faster."""
_FEW, _FEWEST, _MANY = 48, 64, 160
"""Tokens of a tile of ``wide``: most with 16 units, and fewest and most with 8."""
_NARROW = ((8, 4, 4), (16, 3, 10), (32, 2, 24), (64, 2, math.inf))
"""Of ``narrow``: tokens of a tile, blocks on a multiprocessor, and for how many pairs of each expert."""
_SHARES = (1, 2, 4)
_ITEM_COST = 6
"""What an item costs besides its steps, in steps."""
_WARPS = 8
"""That compute, of a block of ``narrow``."""
_MOST_STAGES = 8
_TILE_BYTES = 32
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
        depth: slices that a warp of ``narrow`` has room for.
    """

    tile: int
    units: int = 8
    blocks: int = 1
    shares: tuple[int, int] = (0, 0)
    depth: int = 4

    @property
    def is_wide(self) -> bool:
        """Whether it is ``wide``, which is for wgmma."""
        return self.shares == (0, 0)


class _Arguments(CallArguments):
    """``Args`` of grouped.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("totals", "tiles", "position", "source", "expert", "local")),
        *((name, ctypes.c_void_p) for name in ("xq", "a", "h", "y")),
        *((name, ctypes.c_int64) for name in ("aligned", "second")),
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
    tokens, k = call.top_k_index.shape
    together = max(1, MOST_PAIRS // k)
    if tokens <= together:
        _fused_experts(call, out, first, second)
        return
    for start in range(0, tokens, together):
        turn = slice(start, start + together)
        part = replace(
            call,
            hidden_states=call.hidden_states[turn],
            top_k_index=call.top_k_index[turn],
            top_k_weights=call.top_k_weights[turn],
        )
        _fused_experts(part, out[turn], first, second)


def _fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    given, layout = Given(call, out), call.layout
    tokens, k = call.top_k_index.shape
    pairs, dtype, activation, device = tokens * k, out.dtype, call.activation_format, out.device
    index, stream = current(device)
    planes = hidden_macros(dtype, activation).planes
    product = choose_product(
        pairs, layout.experts, (first, second), planes, device_of(index), invariant=is_batch_invariant()
    )
    kernels = _kernels(layout, dtype, activation, call.activation.name, product, index)
    rows = pairs if given.per_expert1 else tokens
    # One projection's inputs, and its results, are done with when the other's are written.
    _memory, addresses = workspace(
        device,
        totals=8,
        tiles=_TILE_BYTES * most_tiles(pairs, layout.experts, product.tile),
        position=4 * pairs,
        source=4 * pairs,
        expert=2 * pairs,
        local=2 * pairs,
        a=2 * planes * max(rows * first.steps, pairs * second.steps) * STEP,
        h=pairs * UNIT_ROWS * max(first.units * dtype.itemsize, second.units * 4),
    )
    direct = given.direct and not product.is_wide
    arguments = _Arguments(
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
        wgmma: whether it has Hopper's instructions; others have ``mma.sync``.
    """

    multiprocessors: int
    wgmma: bool


@lru_cache
def device_of(index: int) -> Device:
    """The device with an index."""
    properties: Any = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, torch.cuda.get_device_capability(index) == (9, 0))


@lru_cache(maxsize=1024)
def choose_product(
    pairs: int, experts: int, projections: tuple[Tiles, Tiles], planes: int, device: Device, *, invariant: bool = False
) -> Product:
    """What computes so many pairs, each expert's being about as many.

    Args:
        pairs: tokens times slots.
        experts: of the layer.
        projections: first and second.
        planes: bf16 numbers of an input: they share the shared memory with the weights' codes.
        device: that computes.
        invariant: whether it must be the same, and add up alike, for any number of pairs.
    """
    active = active_experts(pairs, experts)
    if device.wgmma and (invariant or pairs > MOST_NARROW * active):
        return wide(pairs / active, planes)
    if invariant:
        return Product(64, blocks=max(1, 2 // planes), shares=(1, 1))
    tile, blocks = next(((n, b) for n, b, most in _NARROW if pairs <= most * active), _NARROW[-1][:2])
    blocks = max(1, blocks // planes)
    tiles = round(max(active, pairs / tile))
    shares = [share(tiles * p.units, p.steps, blocks * device.multiprocessors) for p in projections]
    return Product(tile, blocks=blocks, shares=(shares[0], shares[1]))


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
    return Product(max(_FEWEST, -(-math.ceil(most / math.ceil(most / limit)) // 16) * 16))


def share(units: int, steps: int, blocks: int) -> int:
    """Warps that best share a unit, so that all blocks have about as much to do.

    Args:
        units: of all tiles.
        steps: of a unit.
        blocks: that are there at a time.
    """
    return min(_SHARES, key=lambda n: -(-units * n // (_WARPS * blocks)) * (-(-steps // n) + _ITEM_COST))


def chunk(product: Product) -> int:
    """Steps whose inputs a block of ``narrow`` has in shared memory: as many as a warp's copies are ahead, at least."""
    least = max(product.shares) * (product.depth - 1)
    return next(n for n in (4 if product.tile > 16 else 8, 8, 16, 32, 64) if n >= least)


def most_tiles(pairs: int, experts: int, tokens: int) -> int:
    """Most tiles that ``pairs`` fall into, however they are spread over the experts."""
    return (pairs + min(pairs, experts) * (tokens - 1)) // tokens


def stages(product: Product, slice_bytes: int, planes: int, shared_bytes: int) -> tuple[int, int]:
    """Steps that a block of ``wide`` keeps in so much shared memory, and the bytes that they take."""
    stage = -(-(planes * product.tile * STEP * 2 + product.units * slice_bytes) // 1024) * 1024
    number = min(_MOST_STAGES, (shared_bytes - 2 * _RESERVED) // stage)
    return number, number * stage + 1024  # from where an address is a multiple of 1024


@lru_cache(maxsize=256)
def _kernels(
    layout: ExpertsLayout, dtype: torch.dtype, activation: Activation, function: str, product: Product, device: int
) -> _Kernels:
    assert layout.weight is not None
    properties: Any = torch.cuda.get_device_properties(device)
    planes = hidden_macros(dtype, activation).planes
    experts = -(-layout.experts // 64) * 64
    segments = 32 if experts <= 512 else 16
    macros = {
        **problem_macros(layout, dtype, activation, function),
        "WGMMA": str(int(product.is_wide)),
        "MOST_N": str(product.tile),
        "STEP_N": "16" if product.is_wide and product.units == 8 else "8",
        "LEAST_N": "64" if product.is_wide and product.units == 8 else "8",
    }

    def kernel(name: str, threads: int, shared_bytes: int = 0, **more: int) -> Kernel:
        every = {**macros, **{k: str(v) for k, v in more.items()}}
        return Kernel(name, every, device, threads=threads, shared_bytes=shared_bytes, overlaps=True)

    slice_bytes, blocks = Tiles(format=layout.weight, rows=UNIT_ROWS, k=STEP).slice_bytes, product.blocks
    if product.is_wide:
        number, shared = stages(product, slice_bytes, planes, properties.shared_memory_per_block_optin)
        products = [kernel("wide", 32 * (product.units + 4), shared, STAGES=number, UNITS=product.units)] * 2
    else:
        steps = chunk(product)
        place = -(-slice_bytes // 16) * 16
        shared = 2 * planes * product.tile * steps * STEP * 2 + _WARPS * product.depth * place
        blocks = min(blocks, properties.shared_memory_per_multiprocessor // (shared + _RESERVED))
        choices = {"CHUNK": steps, "BLOCKS": blocks, "DEPTH": product.depth}
        products = [
            kernel("narrow", 32 * _WARPS, shared, SHARE=n, UNITS=_WARPS // n, **choices) for n in product.shares
        ]
    return _Kernels(
        kernel("sort", 32 * segments, 4 * experts * (segments + 3), SEGMENTS=segments, EXPERTS=experts),
        kernel("inputs", 128, SECOND=0),
        kernel("inputs", 128, SECOND=1),
        products,
        kernel("combine", 128),
        properties.multi_processor_count * blocks,
    )
