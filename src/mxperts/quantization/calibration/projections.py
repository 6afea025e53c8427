"""Quantising linear layers by what their inputs are like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxperts.formats import BlockFormat, Scheme
from mxperts.quantization.calibration.moments import Moments
from mxperts.quantization.choice import Methods
from mxperts.quantization.leaves import Leaf
from mxperts.quantization.methods.problem import Inputs, Method, Problem
from mxperts.quantization.plan import Numbers
from mxperts.tensor import MXTensor

_WORKSPACE = 16
"""Matrices [K, K] of float32 that a method, and the moments it is given, take at a time; gptq takes most."""

Feed = Callable[[Moments], None]
"""Adds all inputs [..., K] of a linear layer, a part at a time."""


def enough(rows: int, k: int) -> bool:
    """Whether so many inputs say something of K channels: with less than a quarter of K, hardly."""
    return 4 * rows >= k


@dataclass(frozen=True, kw_only=True)
class Readers:
    """Linear layers that read the same input.

    Attributes:
        leaves: their weights; what is not to be quantised is left out.
        feed: adds their input to moments; None where there is none.
    """

    leaves: Sequence[Leaf]
    feed: Feed | None


@dataclass(frozen=True, kw_only=True)
class Projections:
    """How to quantise linear layers.

    Attributes:
        methods: how codes and scales are chosen.
        schemes: of every linear layer.
        numbers: where scales start from, and static input scales.
        values: reads the weight of a linear layer.
        device: where to work.
        backend: what runs quantised layers.
        memory: bytes that quantising may take, about.
    """

    methods: Methods
    schemes: dict[str, Scheme]
    numbers: Numbers
    values: Callable[[Leaf], Tensor]
    device: torch.device
    backend: str
    memory: int

    def unquantised(self) -> Projections:
        """The same, with nothing to quantise."""
        return replace(self, schemes=dict.fromkeys(self.schemes, Scheme("none")))

    def at_a_time(self, k: int) -> int:
        """How many layers with K channels can be quantised at a time."""
        return max(1, self.memory // (_WORKSPACE * 4 * k * k))

    def quantize(self, readers: Sequence[Readers]) -> dict[str, tuple[MXTensor, bool]]:
        """Quantise linear layers, all that are of one shape and format at a time.

        Layers of one format that read the same input are one matrix, as rows are independent and what is worked out of
        the inputs is the same.

        Returns:
            By layer, the weight, and whether its method wanted inputs and there were not ``enough``.
        """
        stacks: dict[tuple[BlockFormat, Method, int, int, bool], list[tuple[list[Leaf], Inputs | None]]] = {}
        for group in readers:
            for scheme, scale, method, leaves in self._alike(group.leaves):
                fmt, k = scheme.weight, leaves[0].shape[1]
                assert fmt is not None
                wanted = group.feed if not self.methods.rounds(leaves[0].module) else None
                inputs = None if wanted is None else self._inputs(k, scheme, scale, wanted)
                key = fmt, method, sum(leaf.shape[0] for leaf in leaves), k, inputs is None
                stacks.setdefault(key, []).append((leaves, inputs))
        found: dict[str, tuple[MXTensor, bool]] = {}
        for (fmt, method, *_), stack in stacks.items():
            found |= self._solve(fmt, method, stack)
        return found

    def _alike(self, leaves: Sequence[Leaf]) -> Iterator[tuple[Scheme, float | None, Method, list[Leaf]]]:
        """The layers that are quantised, by how they are."""
        groups: dict[tuple[Scheme, float | None, Method], list[Leaf]] = {}
        for leaf in leaves:
            scheme, scale = self.schemes[leaf.module], self.numbers.input_scales.get(leaf.module)
            if scheme.weight is not None:
                groups.setdefault((scheme, scale, self.methods.of(leaf.module)), []).append(leaf)
        for key, group in groups.items():
            yield *key, group

    def _inputs(self, k: int, scheme: Scheme, scale: float | None, feed: Feed) -> Inputs | None:
        moments = Moments(k, scheme.activation, scale, self.device, rotation=self.numbers.rotation)
        feed(moments)
        return moments.inputs() if enough(moments.rows, k) else None

    def _solve(
        self, fmt: BlockFormat, method: Method, stack: Sequence[tuple[list[Leaf], Inputs | None]]
    ) -> dict[str, tuple[MXTensor, bool]]:
        weights = [
            torch.cat([self.numbers.rotated(self.values(leaf).to(self.device)) for leaf in leaves])
            for leaves, _ in stack
        ]
        inputs = [i for _, i in stack if i is not None]
        problem = Problem(
            weight=torch.stack(weights) if len(stack) > 1 else weights[0],  # [E, N, K] or [N, K]
            format=fmt,
            preset=self.numbers.preset,
            scale_rule=self.numbers.scale_rule,
            inputs=_stack(inputs) if inputs else None,
        )
        solution, found = method(problem), {}
        for number, (leaves, given) in enumerate(stack):
            matrix, start = solution[number] if len(stack) > 1 else solution, 0
            for leaf in leaves:
                rows = slice(start, start + leaf.shape[0])
                short = given is None and not self.methods.rounds(leaf.module)
                found[leaf.module] = matrix[rows].contiguous(), short
                start = rows.stop
        return found


def _stack(inputs: Sequence[Inputs]) -> Inputs:
    """The inputs of a stack of layers."""
    if len(inputs) == 1:
        return inputs[0]
    crosses = [i.cross for i in inputs if i.cross is not None]
    return Inputs(
        rows=min(i.rows for i in inputs),
        moment=torch.stack([i.moment for i in inputs]),
        cross=torch.stack(crosses) if crosses else None,
        amax=torch.stack([i.amax for i in inputs]),
    )
