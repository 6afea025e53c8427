"""The experts of one layer: which tokens each of them got, and quantising some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxperts.checkpoint.names import SPELLINGS, split_expert
from mxperts.errors import ArgumentError
from mxperts.integrations.transformers.experts import activate, in_order
from mxperts.integrations.transformers.gate import Gate, recognize
from mxperts.ops.linear import mx_linear
from mxperts.ops.prepare import Weight
from mxperts.quantization.calibration.moments import Moments
from mxperts.quantization.calibration.projections import Projections, Readers
from mxperts.quantization.calibration.states import mapped
from mxperts.quantization.leaves import BIAS, WEIGHT, Leaf
from mxperts.tensor import MXTensor

ROWS = 8192
"""Inputs of an expert that are looked at at a time, which bounds memory."""


class RoutedTokens:
    """What an experts module is called with, all batches together.

    Args:
        file: where hidden states are kept.
        tokens: T, of the whole text.
        hidden: H.
        dtype: of hidden states.
    """

    def __init__(self, file: Path, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        file.unlink(missing_ok=True)
        self._states = mapped(file, (tokens, hidden), dtype)
        self._experts: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._end = 0
        self._file = file

    def add(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Add one batch: [T, H], int64 [T, k], the experts of each token, and how much each of them counts, [T, k]."""
        end = self._end + len(hidden_states)
        self._states[self._end : end] = hidden_states.cpu()
        self._experts.append(top_k_index.cpu())
        self._weights.append(top_k_weights.float().cpu())
        self._end = end

    def finish(self, experts: int) -> None:
        """Once all is added: sort by expert."""
        index, weights = torch.cat(self._experts), torch.cat(self._weights)  # [T, k]
        flat = index.flatten()
        order = flat.argsort(stable=True)
        order = order[(flat[order] >= 0) & (flat[order] < experts)]
        counts = torch.bincount(flat[order], minlength=experts).tolist()
        self._tokens = (order // index.shape[1]).split(counts)
        self._shares = weights.flatten()[order].split(counts)

    def of(self, expert: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs of one expert, and how much each of them counts, [<= ROWS, H] and [<= ROWS] at a time."""
        for _, x, share in self.tokens_of(expert, device):
            yield x, share

    def tokens_of(self, expert: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As ``of``, with the numbers of the tokens before them, on the CPU."""
        for tokens, share in zip(self._tokens[expert].split(ROWS), self._shares[expert].split(ROWS), strict=True):
            if len(tokens):
                yield tokens, self._states[tokens].to(device), share.to(device)

    def close(self) -> None:
        """Delete the file."""
        self._file.unlink()


def quantize_experts(
    module: Any,
    leaves: Sequence[Leaf],
    routed: RoutedTokens,
    projections: Projections,
    smooth: Callable[[Expert], None] | None,
    done: Callable[[str, MXTensor, bool], None],
) -> None:
    """Quantise all experts of a layer, with the weights and moments of some in memory at a time.

    The second projection is fitted to what the first gives when it is quantised.

    Args:
        module: the experts; its weights need not be there.
        leaves: their weights and biases in the checkpoint.
        routed: their inputs.
        projections: how to quantise.
        smooth: called with every expert before it is quantised.
        done: told of every linear layer that is quantised.
    """
    experts = experts_of(module, leaves, routed, projections)
    by_name = {leaf.module: expert for expert in experts for leaf in expert.first}
    step = min((projections.at_a_time(leaf.shape[1]) for leaf in leaves if leaf.part == WEIGHT), default=1)
    for start in range(0, len(experts), step):
        group = experts[start : start + step]
        if smooth is not None:
            for expert in group:
                smooth(expert)
        first = [Readers(leaves=expert.first, feed=expert.feed_first) for expert in group]
        for name, (weight, short) in projections.quantize(first).items():
            by_name[name].weights[name] = weight
            done(name, weight, short)
        second = [Readers(leaves=expert.second, feed=expert.feed_second) for expert in group]
        for name, (weight, short) in projections.quantize(second).items():
            done(name, weight, short)
        for expert in group:
            expert.weights.clear()


def experts_of(module: Any, leaves: Sequence[Leaf], routed: RoutedTokens, projections: Projections) -> list[Expert]:
    """The experts of a module: arguments as in ``quantize_experts``."""
    gate = recognize(module)
    by_expert: dict[int, list[Leaf]] = {}
    for leaf in leaves:
        expert = split_expert(leaf.module)
        assert expert is not None, leaf.module
        by_expert.setdefault(expert[1], []).append(leaf)
    return [Expert(module, gate, number, parts, routed, projections) for number, parts in sorted(by_expert.items())]


class Expert:
    """One expert.

    Attributes:
        gate: its activation function, or None for one that only the module itself can compute.
        first, second: the weights of its projections: gate and up, in this order, or one; down.
        weights: those that are quantised already, by name.
    """

    def __init__(
        self,
        module: Any,
        gate: Gate | None,
        number: int,
        leaves: Sequence[Leaf],
        routed: RoutedTokens,
        projections: Projections,
    ) -> None:
        self._module, self.gate, self._projections = module, gate, projections
        self._number, self._routed = number, routed
        canonical = {s: name for name, group in SPELLINGS.items() for s in group}
        weights = {canonical[leaf.module.rpartition(".")[2]]: leaf for leaf in leaves if leaf.part == WEIGHT}
        self._biases = {leaf.module: leaf for leaf in leaves if leaf.part == BIAS}
        self.second = [weights.pop("down_proj")]
        self.first = [weights[name] for name in ("gate_proj", "up_proj", "gate_up_proj") if name in weights]
        self.weights: dict[str, Weight] = {}

    def feed_first(self, moments: Moments) -> None:
        """Add the inputs of the first projection."""
        for x, share in self._routed.of(self._number, self._projections.device):
            moments.add(x, share)

    def feed_second(self, moments: Moments) -> None:
        """Add the inputs of the second."""
        for x, share in self._routed.of(self._number, self._projections.device):
            moments.add(self._between(x), share)

    def amax_between(self) -> tuple[Tensor, int]:
        """Largest magnitude of every channel of the second projection's input, float32 [I], and how many there were."""
        amax, rows = torch.zeros(self.second[0].shape[1], device=self._projections.device), 0
        for x, _ in self._routed.of(self._number, self._projections.device):
            rows += len(x)
            amax = torch.maximum(amax, self._between(x).abs().amax(0).float())
        return amax, rows

    def add_outputs(self, outputs: Tensor) -> None:
        """Add what the expert gives, times how much it counts, to ``outputs``, float32 [T, H].

        Raises:
            ArgumentError: that goes through a norm first.
        """
        (leaf,) = self.second
        if getattr(self._module, "has_post_expert_norm", False):
            raise ArgumentError(f"{leaf.module}: what experts with a norm of their own give cannot be measured")
        for tokens, x, share in self._routed.tokens_of(self._number, self._projections.device):
            y = self._linear(leaf, self._between(x), torch.float32)
            outputs.index_add_(0, tokens, (y * share.unsqueeze(-1)).cpu())

    def _between(self, x: Tensor) -> Tensor:
        """The second projection's inputs [R, I] for the first's [R, H]."""
        parts = [self._linear(leaf, x) for leaf in self.first]
        return activate(self._module, self.gate, in_order(self._module, parts))

    def _linear(self, leaf: Leaf, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        p = self._projections
        bias = self._biases.get(leaf.module)
        if leaf.module not in self.weights:
            self.weights[leaf.module] = p.values(leaf).to(p.device)
        weight = self.weights[leaf.module]
        return mx_linear(
            x,
            weight,
            None if bias is None else p.values(bias).to(p.device),
            activation=p.schemes[leaf.module].activation,
            input_scale=p.numbers.input_scales.get(leaf.module),
            rotation=p.numbers.rotation if isinstance(weight, MXTensor) else None,
            out_dtype=dtype,
            backend=p.backend,
        )
