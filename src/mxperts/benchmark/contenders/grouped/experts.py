"""The experts of one call, from dense weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mxperts.benchmark.contenders.grouped.routing import blocks_of
from mxperts.benchmark.contenders.grouped.tiles import Tiles, candidates, fastest
from mxperts.benchmark.contenders.loop import SWIGLU_ALPHA, SWIGLU_LIMIT, Quantize
from mxperts.benchmark.device.replay import Stopwatch
from mxperts.benchmark.inputs import Call
from mxperts.benchmark.problem import Problem

BLOCK = 1024
"""Columns that a block of threads takes where nothing is multiplied."""


class GroupedExperts:
    """Two grouped products, the gate between them and the sum after them; memory for results is there beforehand.

    Pairs are sorted by their experts when it is made, not in the call: a layer would have to, but how fast it sorts is
    not what this is here for.

    Args:
        problem: sizes and activation function.
        call: what to compute.
        tiles: of both products.
    """

    def __init__(self, problem: Problem, call: Call, tiles: Tiles) -> None:
        shape = problem.shape
        x = call.hidden_states
        self._problem, self._call, self._tiles = problem, call, tiles
        self._blocks = blocks_of(call.top_k_index, tiles.m, shape.experts)
        self._pairs = problem.tokens * shape.top_k
        self._h = x.new_empty(self._pairs, 2 * shape.intermediate)
        self._a = x.new_empty(self._pairs, shape.intermediate)
        self._y = x.new_empty(self._pairs, shape.hidden)
        self._out = x.new_empty(problem.tokens, shape.hidden)

    def __call__(self, gate_up: Tensor, down: Tensor, quantize: Quantize) -> Tensor:
        """The weighted sum of each token's experts [T, H], in the same memory every time.

        Args:
            gate_up, down: [E, 2I, H] and [E, H, I], in the dtype of the hidden states.
            quantize: applied to the inputs of both projections.
        """
        from mxperts.benchmark.contenders.grouped import kernels

        shape, call = self._problem.shape, self._call
        self._multiply(quantize(call.hidden_states, 0), gate_up, self._h, slots=shape.top_k, weighted=False)
        kernels.gate[(self._pairs, -(-shape.intermediate // BLOCK))](
            self._h,
            self._a,
            shape.intermediate,
            SWIGLU_ALPHA,
            SWIGLU_LIMIT,
            SWIGLUOAI=self._problem.activation == "swigluoai",
            BLOCK=BLOCK,
        )
        self._multiply(quantize(self._a, 1), down, self._y, slots=1, weighted=True)
        sum_pairs(self._y, None, self._out)
        return self._out

    def _multiply(self, x: Tensor, weight: Tensor, y: Tensor, *, slots: int, weighted: bool) -> None:
        from mxperts.benchmark.contenders.grouped import kernels

        tiles, blocks, (_, n, k) = self._tiles, self._blocks, weight.shape
        blocks_m = blocks.experts.numel()
        kernels.grouped_matmul[(blocks_m * -(-n // tiles.n),)](
            x,
            weight,
            y,
            self._call.top_k_weights,
            blocks.pairs,
            blocks.experts,
            self._pairs,
            n,
            blocks_m,
            K=k,
            SLOTS=slots,
            WEIGHTED=weighted,
            BLOCK_M=tiles.m,
            BLOCK_N=tiles.n,
            BLOCK_K=tiles.k,
            GROUP_M=tiles.group,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def sum_pairs(y: Tensor, router_weights: Tensor | None, out: Tensor) -> None:
    """The sum over each token's experts: ``y`` [T * k, H], times float32 [T, k] if given, to ``out`` [T, H]."""
    from mxperts.benchmark.contenders.grouped import kernels

    tokens, width = out.shape
    kernels.sum_slots[(tokens, -(-width // BLOCK))](
        y,
        y if router_weights is None else router_weights,
        out,
        width,
        SLOTS=len(y) // tokens,
        WEIGHTED=router_weights is not None,
        BLOCK=BLOCK,
    )


def tiles_for(
    problem: Problem, call: Call, gate_up: Tensor, down: Tensor, as_is: Quantize, stopwatch: Stopwatch | None
) -> Tiles:
    """The tiles with which a call with these weights is fastest; without a stopwatch, vLLM's default."""
    shape = problem.shape

    def make(tiles: Tiles) -> Callable[[], Tensor]:
        experts = GroupedExperts(problem, call, tiles)
        return lambda: experts(gate_up, down, as_is)

    with torch.no_grad():
        return fastest(candidates(problem.tokens, shape.top_k, shape.experts), make, stopwatch)
