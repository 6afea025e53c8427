"""Where a model's error comes from: each layer's output beside that of its base.

Errors are relative: sqrt(sum of (y - y0)² / sum of y0²) over all tokens and channels, y0 the base's output, y the
model's. Each is measured in two ways. A layer's own error is that of its output when it is given the base's input and,
if it is an experts layer, the base's routing: nothing that came before adds to it. The accumulated error is that of its
output in the model itself, where everything is quantised.

The parts are the whole decoder layers, their experts, both projections of the experts, and all linear layers that
either model has quantised. Projections are compared for each token and each of the base's experts, before router
weights; ``down_proj`` is given the base's activations. As the two models may send a token to different experts,
projections have no accumulated error.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxperts.errors import ArgumentError
from mxperts.evaluation.router import experts_modules
from mxperts.evaluation.windows import Windows

LAYER, EXPERTS = "whole layer", "experts"
"""What decoder layers and their experts are called as parts; projections and linear layers have names of their own."""


@dataclass(frozen=True, kw_only=True)
class PartError:
    """The error of one part of a model, see the top of this file.

    Attributes:
        module: its name in the model.
        layer: the number of its decoder layer; None outside of them.
        part: "whole layer", "experts", or what a projection or linear layer is called.
        own: relative error given the base's input; NaN where the base's output is 0 everywhere but the model's is not.
        accumulated: relative error in the model; None for experts' projections.
    """

    module: str
    layer: int | None
    part: str
    own: float
    accumulated: float | None


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """The errors of all parts of one model.

    Attributes:
        name: of the scheme or checkpoint.
        parts: in the order of the layers.
    """

    name: str
    parts: Sequence[PartError]


def layer_errors(
    base: nn.Module,
    model: nn.Module,
    windows: Windows,
    *,
    name: str = "model",
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LayerErrors:
    """Measure the error of every layer's output, and where in the layer it arises.

    Besides the two models this takes the memory of one batch's outputs of all parts but projections.

    Args:
        base: what to compare with.
        model: the same model, quantised, on the same device.
        windows: the text.
        name: for the report.
        batch_size: windows a forward pass.
        progress: called with windows done and in total; every window counts twice, as it is run twice.

    Raises:
        ArgumentError: the models do not have the same layers, or none to compare, or one is in training mode.
    """
    if base.training or model.training:
        raise ArgumentError("the model is in training mode, where dropout is random; call model.eval() first")
    parts = _parts(base, model)
    sums = {(module, part): _Sums() for module, part in parts}
    total, done = 2 * len(windows.ids), 0
    # Projections read weights as they are stored, whole layers have their backend lay them out: one after the other, or
    # weights would be laid out again and again.
    for run in (_projections, _layers):
        for ids in windows.batches(batch_size):
            with torch.inference_mode():
                run(base, model, ids.to(next(base.parameters()).device), sums)
            done += len(ids)
            progress(done, total)
    found = [
        PartError(module=module, layer=_number(module), part=part, own=own, accumulated=s.accumulated.error)
        for (module, part), s in sums.items()
        if (own := s.own.error) is not None  # else it was never run
    ]
    return LayerErrors(name=name, parts=found)


class _Error:
    """Sums of squares, of the base's outputs and of the differences from them."""

    def __init__(self) -> None:
        self.reference: float | None = None
        self.difference = 0.0

    def add(self, y0: Tensor, y: Tensor) -> None:
        reference = y0.to(torch.float32)
        self.reference = (self.reference or 0.0) + reference.square().sum(dtype=torch.float64).item()
        self.difference += (y.to(torch.float32) - reference).square().sum(dtype=torch.float64).item()

    @property
    def error(self) -> float | None:
        """The relative error; None if nothing was compared."""
        if self.reference == 0:
            return math.nan if self.difference else 0.0
        return None if self.reference is None else math.sqrt(self.difference / self.reference)


class _Sums:
    def __init__(self) -> None:
        self.own, self.accumulated = _Error(), _Error()


_Parts = dict[tuple[str, str], _Sums]


def _parts(base: nn.Module, model: nn.Module) -> list[tuple[str, str]]:
    """Module and part of everything that is compared, in the order of the layers."""
    from mxperts.integrations.transformers.experts import up_projection

    experts, theirs = experts_modules(base), experts_modules(model)
    if experts.keys() != theirs.keys():
        raise ArgumentError(
            f"layers can be compared only between models with the same MoE layers; the base has {len(experts)}, this "
            f"model {len(theirs)}"
        )
    inside = tuple(f"{name}." for name in experts)
    linears = [n for n in {**_stored_linears(base), **_stored_linears(model)} if not n.startswith(inside)]
    lists = dict.fromkeys(m[1] for name in (*experts, *linears) if (m := _NUMBERED.match(name)))
    decoder_layers = [
        f"{prefix}.{child}" for prefix in lists for child, _ in base.get_submodule(prefix).named_children()
    ]
    found = [(name, name.rpartition(".")[2]) for name in linears]
    found += [(name, part) for name, module in experts.items() for part in (up_projection(module), "down_proj")]
    found += [(name, EXPERTS) for name in experts] + [(name, LAYER) for name in decoder_layers]
    if not found:
        raise ArgumentError("neither model has experts or quantised linear layers, so there are no layers to compare")
    return sorted(found, key=lambda part: (_number(part[0]) is None, _number(part[0]) or 0))


_NUMBERED = re.compile(r"(.+?)\.(\d+)(?:\.|$)")


def _number(module: str) -> int | None:
    match = _NUMBERED.match(module)
    return int(match[2]) if match else None


def _stored_linears(model: nn.Module) -> dict[str, nn.Module]:
    from mxperts.integrations.transformers.linear import StoredLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, StoredLinear)}


def _projections(base: nn.Module, model: nn.Module, ids: Tensor, sums: _Parts) -> None:
    """Compare the experts' projections, each given what the base's is given, while the base runs."""
    theirs = experts_modules(model)
    with ExitStack() as hooks:
        for name, module in experts_modules(base).items():
            hook = partial(_compare_projections, name, theirs[name], sums)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        base(input_ids=ids, use_cache=False)


def _compare_projections(
    name: str, model: nn.Module, sums: _Parts, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    from mxperts.integrations.transformers.experts import apply_activation, expert_projections, up_projection

    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    x = next(t for t in tensors if t.is_floating_point()).flatten(0, -2)  # [T, H]
    index = next(t for t in tensors if not t.is_floating_point())  # [T, k]
    up_error, down_error = sums[name, up_projection(base)].own, sums[name, "down_proj"].own
    for expert in index.unique().tolist():
        token = (index == expert).any(-1).nonzero().squeeze(-1)
        (up0, down0), (up, down) = expert_projections(base, expert), expert_projections(model, expert)
        h0 = up0(x[token], x.dtype)
        up_error.add(h0, up(x[token], x.dtype))
        a0 = apply_activation(base, h0)
        down_error.add(down0(a0, torch.float32), down(a0, torch.float32))


def _layers(base: nn.Module, model: nn.Module, ids: Tensor, sums: _Parts) -> None:
    """Compare whole modules, given the base's inputs while the base runs, then with the base's outputs in the model."""
    compared = {name: s for (name, part), s in sums.items() if not _is_projection(base, name, part)}
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    with ExitStack() as hooks:
        for name, found in compared.items():
            hook = partial(_compare_own, model.get_submodule(name), found.own, outputs[name])
            handle = base.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        base(input_ids=ids, use_cache=False)
    with ExitStack() as hooks:
        for name, found in compared.items():
            hook = partial(_compare_accumulated, found.accumulated, outputs[name])
            hooks.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        model(input_ids=ids, use_cache=False)


def _is_projection(base: nn.Module, name: str, part: str) -> bool:
    return part not in (LAYER, EXPERTS) and name in experts_modules(base)


def _compare_own(
    module: nn.Module,
    error: _Error,
    outputs: list[Tensor],
    base: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    y0 = _first(output)
    error.add(y0, _first(module(*args, **kwargs)))
    outputs.append(y0)


def _compare_accumulated(error: _Error, outputs: list[Tensor], module: nn.Module, args: Any, output: Any) -> None:
    error.add(outputs.pop(0), _first(output))


def _first(output: Any) -> Tensor:
    """The hidden states among what a module returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
