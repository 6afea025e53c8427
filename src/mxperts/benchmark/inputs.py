"""Random numbers for a problem: packed weights, made as bytes without an unquantised layer, routings, hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mxperts.benchmark.problem import ROUTINGS, Problem, Shape
from mxperts.formats import FP8_STATIC, MXFP4, BlockFormat
from mxperts.ops.quantize import quantize
from mxperts.tensor import MXTensor

SCALE_BYTE = 119
"""Middle of the scale bytes of MXFP4 weights; other formats, whose elements are larger, have it lower."""
SCALE_SPREAD = 4
"""Scale bytes lie this far around the middle."""
POOL_BLOCKS = 1 << 14
"""Different blocks of codes; a weight is a random sequence of them."""
STATIC_INPUT_SCALES = (0.0125, 0.25)
"""For static fp8: the largest input of either projection here, over 448, roughly."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Packed weights of one copy of the layer: ``gate_up_proj`` [E, 2I, H], gate rows first, and ``down_proj``."""

    gate_up: MXTensor
    down: MXTensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.gate_up.nbytes + self.down.nbytes


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one call gets besides weights: hidden states [T, H], expert ids int64 [T, k], router weights [T, k]."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor

    @property
    def active_experts(self) -> int:
        """Different experts among the ids."""
        return int(self.top_k_index.unique().numel())


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a problem's contenders share.

    Attributes:
        problem: what they were made for.
        layers: copies of the layer, each with weights of its own; a call takes them in turn.
        calls: different ones; a call takes them in turn.
    """

    problem: Problem
    layers: tuple[Weights, ...]
    calls: tuple[Call, ...]

    def layer(self, i: int) -> Weights:
        """The weights of call ``i``."""
        return self.layers[i % len(self.layers)]

    def call(self, i: int) -> Call:
        """The rest of call ``i``."""
        return self.calls[i % len(self.calls)]

    @property
    def input_scales(self) -> tuple[float, float] | None:
        """For static fp8 activations."""
        return STATIC_INPUT_SCALES if self.problem.scheme.activation == FP8_STATIC else None


def make_inputs(
    problem: Problem,
    copies: int = 1,
    layers: tuple[Weights, ...] | None = None,
    *,
    routings: int = ROUTINGS,
    disjoint: bool = False,
) -> Inputs:
    """Random inputs of a problem, the same for the same seed and device.

    Args:
        problem: what for.
        copies: layers to make.
        layers: take these instead, which were made for the same shape and weight format.
        routings: calls to make, each with a routing and hidden states of its own.
        disjoint: whether calls of one token are to hit different experts, as long as there are any left.
    """
    if layers is None:
        layers = make_layers(problem, copies)
    generator = torch.Generator().manual_seed(problem.seed)
    shape, tokens, device = problem.shape, problem.tokens, problem.device
    sets = _disjoint(shape, routings, generator) if disjoint and tokens == 1 else []
    calls = []
    for i in range(routings):
        x = torch.randn(tokens, shape.hidden, generator=generator).to(problem.dtype)
        ids = sets[i] if sets else torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k).indices
        weights = torch.randn(tokens, shape.top_k, generator=generator).softmax(dim=-1)
        calls.append(
            Call(
                hidden_states=x.to(device),
                top_k_index=ids.contiguous().to(device),
                top_k_weights=weights.to(device),
            )
        )
    return Inputs(problem=problem, layers=layers, calls=tuple(calls))


def _disjoint(shape: Shape, count: int, generator: torch.Generator) -> list[Tensor]:
    """Expert ids [1, k] of so many tokens; no expert twice before every one that fits in has been taken."""
    sets: list[Tensor] = []
    while len(sets) < count:
        order = torch.randperm(shape.experts, generator=generator)
        sets += order[: shape.experts // shape.top_k * shape.top_k].view(-1, 1, shape.top_k).unbind()
    return sets[:count]


def make_layers(problem: Problem, copies: int) -> tuple[Weights, ...]:
    """Copies of the layer on the problem's device, each with random weights of its own."""
    generator = torch.Generator(problem.device).manual_seed(problem.seed)
    return tuple(make_weights(problem, generator) for _ in range(copies))


def make_weights(problem: Problem, generator: torch.Generator) -> Weights:
    """One copy of the layer."""
    shape, fmt = problem.shape, problem.scheme.weight
    assert fmt is not None, problem
    return Weights(
        gate_up=random_weight((shape.experts, 2 * shape.intermediate, shape.hidden), fmt, generator),
        down=random_weight((shape.experts, shape.hidden, shape.intermediate), fmt, generator),
    )


def random_weight(shape: tuple[int, int, int], fmt: BlockFormat, generator: torch.Generator) -> MXTensor:
    """A weight [E, N, K] whose codes are those of normally distributed blocks and whose scales are random.

    Only bytes are made, on the generator's device: blocks are drawn from a pool of quantised ones, one expert at a
    time.
    """
    experts, rows, k = shape
    blocks, device = fmt.blocks(k), generator.device
    pool = _pool(fmt).to(device)
    packed = torch.empty(experts, rows, fmt.packed_size(k), dtype=torch.uint8, device=device)
    for expert in packed:
        index = torch.randint(POOL_BLOCKS, (rows, blocks), generator=generator, device=device)
        expert.copy_(pool[index].flatten(-2))
    if padding := blocks * fmt.block_size - k:
        _clear_padding(packed, padding, fmt)
    middle = SCALE_BYTE + MXFP4.element.emax - fmt.element.emax
    scales = torch.randint(
        middle - SCALE_SPREAD,
        middle + SCALE_SPREAD + 1,
        (experts, rows, blocks),
        dtype=torch.uint8,
        generator=generator,
        device=device,
    )
    return MXTensor(packed, scales, fmt, k)


@lru_cache
def _pool(fmt: BlockFormat) -> Tensor:
    """Packed codes of normally distributed blocks: uint8 [POOL_BLOCKS, bytes a block]."""
    values = torch.randn(POOL_BLOCKS, fmt.block_size, generator=torch.Generator().manual_seed(0))
    return quantize(values, fmt, backend="reference").packed


def _clear_padding(packed: Tensor, padding: int, fmt: BlockFormat) -> None:
    """Make the last ``padding`` codes of every row zero, as padding is stored."""
    bits = padding * fmt.element.bits
    whole, rest = divmod(bits, 8)
    last = packed.shape[-1] - whole
    packed[..., last:] = 0
    if rest:
        packed[..., last - 1] &= (1 << (8 - rest)) - 1
