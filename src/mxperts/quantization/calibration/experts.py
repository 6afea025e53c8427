"""The experts of one layer: which tokens each of them got, and quantising one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxperts.checkpoint.names import SPELLINGS, split_expert
from mxperts.integrations.transformers.experts import activate, in_order
from mxperts.integrations.transformers.gate import recognize
from mxperts.ops.linear import mx_linear
from mxperts.ops.prepare import Weight
from mxperts.quantization.calibration.projections import Projections
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
        self._end = 0
        self._file = file

    def add(self, hidden_states: Tensor, top_k_index: Tensor) -> None:
        """Add one batch: [T, H], and int64 [T, k], the experts of each token."""
        end = self._end + len(hidden_states)
        self._states[self._end : end] = hidden_states.cpu()
        self._experts.append(top_k_index.cpu())
        self._end = end

    def finish(self, experts: int) -> None:
        """Once all is added: sort by expert."""
        index = torch.cat(self._experts)  # [T, k]
        flat = index.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts)
        first = int((flat < 0).sum())
        tokens = order[first:] // index.shape[1]
        self._tokens: Sequence[Tensor] = tokens[: int(counts.sum())].split(counts.tolist())

    def of(self, expert: int, device: torch.device) -> Iterator[Tensor]:
        """The inputs of one expert, [<= ROWS, H] at a time."""
        for tokens in self._tokens[expert].split(ROWS):
            if len(tokens):
                yield self._states[tokens].to(device)  # [R, H]

    def close(self) -> None:
        """Delete the file."""
        self._file.unlink()


def quantize_experts(
    module: Any,
    leaves: Sequence[Leaf],
    routed: RoutedTokens,
    projections: Projections,
    done: Callable[[str, MXTensor, int], None],
) -> None:
    """Quantise all experts of a layer, with one expert's weights and moments in memory at a time.

    The second projection is fitted to what the first gives when it is quantised.

    Args:
        module: the experts; its weights need not be there.
        leaves: their weights and biases in the checkpoint.
        routed: their inputs.
        projections: how to quantise.
        done: told of every linear layer that is quantised.
    """
    gate = recognize(module)
    by_expert: dict[int, list[Leaf]] = {}
    for leaf in leaves:
        expert = split_expert(leaf.module)
        assert expert is not None, leaf.module
        by_expert.setdefault(expert[1], []).append(leaf)
    for number, parts in sorted(by_expert.items()):
        expert = _Expert(module, gate, parts, projections)

        def first(add: Callable[[Tensor], None], number: int = number) -> None:
            for x in routed.of(number, projections.device):
                add(x)

        def second(add: Callable[[Tensor], None], number: int = number, expert: _Expert = expert) -> None:
            for x in routed.of(number, projections.device):
                add(expert.between(x))

        for name, (weight, rows) in projections.quantize(expert.first, first).items():
            expert.weights[name] = weight
            done(name, weight, rows)
        for name, (weight, rows) in projections.quantize(expert.second, second).items():
            done(name, weight, rows)


class _Expert:
    """One expert.

    Attributes:
        first, second: the weights of its projections: gate and up, in this order, or one; down.
        weights: those that are quantised already, by name.
    """

    def __init__(self, module: Any, gate: Any, leaves: Sequence[Leaf], projections: Projections) -> None:
        self._module, self._gate, self._projections = module, gate, projections
        canonical = {s: name for name, group in SPELLINGS.items() for s in group}
        weights = {canonical[leaf.module.rpartition(".")[2]]: leaf for leaf in leaves if leaf.part == WEIGHT}
        self._biases = {leaf.module: leaf for leaf in leaves if leaf.part == BIAS}
        self.second = [weights.pop("down_proj")]
        self.first = [weights[name] for name in ("gate_proj", "up_proj", "gate_up_proj") if name in weights]
        self.weights: dict[str, Weight] = {}

    def between(self, x: Tensor) -> Tensor:
        """The second projection's inputs [R, I] for the first's [R, H]."""
        parts = [self._linear(leaf, x) for leaf in self.first]
        return activate(self._module, self._gate, in_order(self._module, parts))

    def _linear(self, leaf: Leaf, x: Tensor) -> Tensor:
        p = self._projections
        bias = self._biases.get(leaf.module)
        return mx_linear(
            x,
            self.weights.setdefault(leaf.module, p.values(leaf).to(p.device)),
            None if bias is None else p.values(bias).to(p.device),
            activation=p.schemes[leaf.module].activation,
            input_scale=p.numbers.input_scales.get(leaf.module),
            backend=p.backend,
        )
