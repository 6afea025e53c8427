"""Whether a contender computes what it says, before anything is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.benchmark.inputs import Inputs
from mxperts.formats import FP8_STATIC, Activation
from mxperts.ops.experts import fused_experts

MAX_TOKENS = 4
"""Most tokens that are checked."""


class Reference:
    """What call 0 of a problem's inputs must give for some of its tokens, by activation format.

    The reference computes a token alone as it does among others, so the contender runs the whole call.

    Args:
        inputs: of the problem.
        max_weights: weights that the reference, which takes its time, is to multiply with at most, but one token.
    """

    def __init__(self, inputs: Inputs, max_weights: int = 300_000_000) -> None:
        self._inputs = inputs
        problem, shape = inputs.problem, inputs.problem.shape
        count = min(problem.tokens, MAX_TOKENS, max(1, max_weights // (shape.top_k * shape.values)))
        self.tokens = torch.linspace(0, problem.tokens - 1, count).round().long().to(problem.device)
        self._results: dict[str, Tensor] = {}

    def error(self, result: Tensor, activation: Activation) -> float:
        """Relative rms error of a contender's call 0, [T, H]; NaN and Inf count as infinite."""
        expected = self._expected(activation)
        difference = result[self.tokens].double() - expected
        error = float(difference.norm() / expected.norm())
        return error if error == error else float("inf")

    def _expected(self, activation: Activation) -> Tensor:
        key = str(activation)
        if key not in self._results:
            inputs, call, layer = self._inputs, self._inputs.call(0), self._inputs.layer(0)
            self._results[key] = fused_experts(
                call.hidden_states[self.tokens],
                layer.gate_up,
                layer.down,
                call.top_k_index[self.tokens],
                call.top_k_weights[self.tokens],
                activation=inputs.problem.activation,
                activation_format=activation,
                input_scales=inputs.input_scales if activation == FP8_STATIC else None,
                backend="reference",
            ).double()
        return self._results[key]
