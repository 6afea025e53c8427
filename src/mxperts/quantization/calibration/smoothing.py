"""Folding channel scales into norms and projections: the model computes the same bits, and its inputs are even.

Scales are powers of two. What a norm gives is divided by them, because its weight is, and the columns of everything
that reads it are multiplied; likewise for the rows of an ``up`` projection and the columns of ``down``. That this
changes no bit is not assumed but tried, on the first part of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mxperts.checkpoint.names import SPELLINGS, split_expert
from mxperts.errors import ArgumentError
from mxperts.integrations.transformers import is_experts
from mxperts.quantization.calibration.experts import Expert
from mxperts.quantization.calibration.layer import Texts, forward, own_forward, run_to
from mxperts.quantization.calibration.projections import Projections, enough
from mxperts.quantization.calibration.sites import seeing
from mxperts.quantization.calibration.source import SourceModel
from mxperts.quantization.leaves import WEIGHT, Leaf
from mxperts.quantization.methods.smoothing import channel_scales

LINEAR_IN_UP = ("silu", "gelu", "gelu_tanh")
"""Activation functions, without limits, in which twice as large an ``up`` gives twice as large a result."""


def smooth_layer(source: SourceModel, index: int, texts: Texts, projections: Projections) -> None:
    """Fold scales into a decoder layer that is loaded but for its experts, wherever what reads a norm is quantised.

    Raises:
        ArgumentError: something else than linear layers, experts and routers reads a norm that quantised layers read,
            or the layer no longer computes the same.
    """
    layer = _Layer(source, index, texts, projections)
    before = layer.outputs()
    divided: dict[str, Tensor] = {}
    for norm, readers in layer.readers().items():
        scales = layer.scales(readers)
        if scales is not None:
            layer.fold(norm, readers, scales)
            divided |= dict.fromkeys(readers, scales)
    if not divided:
        return
    source.load_layer(index, projections)
    for name, value in layer.outputs().items():
        scales = divided.get(name.partition(":")[0])
        same = value if scales is None or ":" in name else value * scales.to(value)
        if not torch.equal(same, before[name]):
            raise ArgumentError(
                f"decoder layer {index} ({type(source.model.layers[index]).__name__}) does not compute the same with "
                f"scales folded into its norms, first in {name.partition(':')[0]}: it cannot be smoothed"
            )


def smooth_expert(expert: Expert, source: SourceModel, projections: Projections) -> None:
    """Fold scales of the second projection's input into ``up``, unless too few inputs came to this expert.

    Raises:
        ArgumentError: the activation function is not linear in ``up``, or ``up`` is not stored apart from ``gate``.
    """
    (down,) = expert.second
    up = expert.first[-1]
    if projections.schemes[down.module].weight is None:
        return
    gate = expert.gate
    if gate is None or gate.name not in LINEAR_IN_UP or gate.constants or len(expert.first) != 2:
        what = "its own activation function" if gate is None else gate.name
        raise ArgumentError(
            f"{down.module}: smoothing needs silu or gelu without limits, and gate and up apart; this has {what} and "
            f"{' and '.join(leaf.module.rpartition('.')[2] for leaf in expert.first)}"
        )
    amax, rows = expert.amax_between()
    expert.weights.clear()
    if not enough(rows, down.shape[1]):
        return
    scales = channel_scales(amax, [projections.values(down).to(projections.device)])
    source.edits.scale_rows(up.module, 1 / scales)
    source.edits.scale_columns(down.module, scales)


class _Layer:
    """A decoder layer's norms, and what reads them."""

    def __init__(self, source: SourceModel, index: int, texts: Texts, projections: Projections) -> None:
        self._source, self._model, self._index, self._texts = source, source.model, index, texts
        self._projections = projections
        self._tensors = {self._model.target(name): name for name in source.tensors[index]}
        self._leaves: dict[str, list[Leaf]] = {}
        for leaf in source.leaves[index]:
            self._leaves.setdefault(self._model.target(leaf.source.name).rpartition(".")[0], []).append(leaf)

    def readers(self) -> dict[str, list[str]]:
        """The norms whose output quantised layers read, and all modules that read each.

        Raises:
            ArgumentError: one of these is something that has no columns to scale.
        """
        modules = self._modules()
        given: dict[str, Tensor] = {}
        read: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def after(module: nn.Module, args: object, output: Tensor) -> None:
                given[name] = output

            return after

        hooks = [m.register_forward_hook(keep(name)) for name, m in modules.items() if _is_norm(m)]
        others = {name: module for name, module in modules.items() if not _is_norm(module)}
        with seeing(others, lambda name, *args: args and read.setdefault(name, args[0])):
            self._first()
        for hook in hooks:
            hook.remove()
        found: dict[str, list[str]] = {}
        for norm, output in given.items():
            names = [n for n, x in read.items() if x.data_ptr() == output.data_ptr() and x.numel() == output.numel()]
            if not any(self._quantised(name) for name in names):
                continue
            found[norm] = names
            for name in names:
                if name not in self._leaves:
                    kind = type(modules[name]).__name__
                    raise ArgumentError(f"{name}, a {kind}, reads {norm} and has no columns to scale: not smoothed")
        return found

    def scales(self, readers: Sequence[str]) -> Tensor | None:
        """By what the input of these modules is to be divided, [K]; None for nothing."""
        k = self._columns(readers[0])[0].shape[1]
        amax, rows = torch.zeros(k, device=self._projections.device), 0

        def see(x: Tensor, *args: object) -> None:
            nonlocal rows
            x = x.reshape(-1, k)
            rows += len(x)
            torch.maximum(amax, x.abs().amax(0).float(), out=amax)

        run_to(self._model, self._index, self._texts, readers[0], see)
        weights = [
            self._projections.values(leaf).to(self._projections.device).abs().amax(0, keepdim=True)
            for name in readers
            for leaf in self._columns(name)
            if self._projections.schemes[leaf.module].weight is not None
        ]
        return channel_scales(amax, weights) if enough(rows, k) else None

    def fold(self, norm: str, readers: Sequence[str], scales: Tensor) -> None:
        """Have the checkpoint read with these scales in its norm, and their inverse in what reads that."""
        for suffix in ("weight", "bias"):
            if f"{norm}.{suffix}" in self._tensors:
                self._source.edits.scale_vector(self._tensors[f"{norm}.{suffix}"], 1 / scales)
        for leaf in (leaf for name in readers for leaf in self._columns(name)):
            self._source.edits.scale_columns(leaf.module, scales)

    def outputs(self) -> dict[str, Tensor]:
        """What the layer gives, and what it calls its experts with, for the first part of the text."""
        experts = {name: module for name, module in self._modules().items() if is_experts(module)}
        found: dict[str, Tensor] = {}

        def see(name: str, x: Tensor, *args: Tensor) -> None:
            found.update({name: x, **{f"{name}:{i}": arg for i, arg in enumerate(args)}})

        with seeing(experts, see, torch.zeros_like):
            found[f"{self._model.prefix}{self._index}:"] = self._first()
        return found

    def _first(self) -> Tensor:
        ids, states, _ = next(self._texts.batches())
        return forward(self._model, self._index, ids, states, own_forward(self._model, self._index))

    def _modules(self) -> dict[str, nn.Module]:
        """Modules that have parameters and no modules in them, and experts."""
        prefix = f"{self._model.prefix}{self._index}"
        return {
            f"{prefix}.{name}": module
            for name, module in self._model.layers[self._index].named_modules()
            if is_experts(module) or (not list(module.children()) and list(module.parameters(recurse=False)))
        }

    def _quantised(self, module: str) -> bool:
        return any(self._projections.schemes[leaf.module].weight is not None for leaf in self._leaves.get(module, ()))

    def _columns(self, module: str) -> list[Leaf]:
        """The weights of a module that read its input: not the second projection of experts."""
        return [leaf for leaf in self._leaves[module] if leaf.part == WEIGHT and not _is_second(leaf)]


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.ndim == 1


def _is_second(leaf: Leaf) -> bool:
    expert = split_expert(leaf.module)
    return expert is not None and expert[2] in SPELLINGS["down_proj"]
