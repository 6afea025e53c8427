"""Quantising the linear layers that read one input, by what that input is like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxperts.formats import Scheme
from mxperts.quantization.calibration.moments import Moments
from mxperts.quantization.leaves import Leaf
from mxperts.quantization.methods.problem import Inputs, Method, Problem
from mxperts.quantization.plan import Numbers
from mxperts.tensor import MXTensor

Feed = Callable[[Callable[[Tensor], None]], None]
"""Hands over all inputs [..., K] of a linear layer, a part at a time, as often as it is called."""


def enough(rows: int, k: int) -> bool:
    """Whether so many inputs say something of K channels: with fewer than a quarter, most directions were never seen."""
    return 4 * rows >= k


@dataclass(frozen=True, kw_only=True)
class Projections:
    """How to quantise linear layers.

    Attributes:
        method: how codes and scales are chosen.
        schemes: of every linear layer.
        numbers: where scales start from, and static input scales.
        values: reads the weight of a linear layer.
        device: where to work.
        backend: what runs quantised layers.
    """

    method: Method
    schemes: dict[str, Scheme]
    numbers: Numbers
    values: Callable[[Leaf], Tensor]
    device: torch.device
    backend: str

    def quantize(self, leaves: Sequence[Leaf], feed: Feed | None) -> dict[str, tuple[MXTensor, int]]:
        """Quantise linear layers that read the same input.

        Layers of one format are one problem, as rows are independent and what is worked out of the inputs is the same.

        Args:
            leaves: their weights; what is not to be quantised is left out.
            feed: their input; None where there is none.

        Returns:
            By layer, the weight and how many inputs it was fitted to: 0 if there were not ``enough``.
        """
        groups: dict[tuple[Scheme, float | None], list[Leaf]] = {}
        for leaf in leaves:
            if self.schemes[leaf.module].weight is not None:
                key = self.schemes[leaf.module], self.numbers.input_scales.get(leaf.module)
                groups.setdefault(key, []).append(leaf)
        found: dict[str, tuple[MXTensor, int]] = {}
        for (scheme, scale), group in groups.items():
            inputs = None if feed is None else self._inputs(group[0].shape[1], scheme, scale, feed)
            found |= self._solve(group, scheme, inputs)
        return found

    def _inputs(self, k: int, scheme: Scheme, scale: float | None, feed: Feed) -> Inputs | None:
        moments = Moments(k, scheme.activation, scale, self.device)
        feed(moments.add)
        return moments.inputs() if enough(moments.rows, k) else None

    def _solve(self, group: Sequence[Leaf], scheme: Scheme, inputs: Inputs | None) -> dict[str, tuple[MXTensor, int]]:
        assert scheme.weight is not None
        weights = [self.values(leaf).to(self.device) for leaf in group]
        problem = Problem(
            weight=weights[0] if len(weights) == 1 else torch.cat(weights),
            format=scheme.weight,
            preset=self.numbers.preset,
            scale_rule=self.numbers.scale_rule,
            inputs=inputs,
        )
        whole, start, found = self.method(problem), 0, {}
        for leaf, weight in zip(group, weights, strict=True):
            rows = slice(start, start + len(weight))
            found[leaf.module] = whole[rows].contiguous(), 0 if inputs is None else inputs.rows
            start += len(weight)
        return found
