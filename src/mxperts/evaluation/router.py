"""Which experts the routers choose, and how often two models choose the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxperts.errors import ArgumentError

Choices = dict[str, Tensor]
"""The experts of every token, by name of the experts module: int16 [tokens, k]."""


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """The modules on Transformers' experts interface, by name, in the order of the layers."""
    from mxperts.integrations.transformers import is_experts  # takes seconds, which `mxperts --help` need not wait for

    return {name: module for name, module in model.named_modules() if is_experts(module)}


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record what every experts module is told to run, while the context is open.

    What is recorded is the module's own input ``top_k_index``, whatever router made it, one tensor a forward pass.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in experts_modules(model).items():
        hook = partial(_record, seen.setdefault(name, []))
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _record(calls: list[Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    index = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_floating_point())
    calls.append(index.to("cpu", torch.int16))  # [tokens, k]


def choices(seen: Mapping[str, list[Tensor]]) -> Choices:
    """The recorded choices of all forward passes, one tensor a layer. A layer that was never run is left out."""
    return {name: torch.cat(calls) for name, calls in seen.items() if calls}


def agreement(ours: Choices, base: Choices) -> dict[str, float]:
    """By layer, the mean over tokens of the share of the base's k experts that are chosen too; 1 if all are the same.

    The order of the k experts does not matter. All tokens of all windows count, scored or not.

    Raises:
        ArgumentError: the two models do not have the same layers, tokens and k.
    """
    if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in base.items()}:
        raise ArgumentError(
            "router choices can be compared only between models with the same MoE layers, on the same windows; "
            f"the base has {len(base)} layers, this model {len(ours)}"
        )
    return {
        name: (base[name].unsqueeze(-1) == ours[name].unsqueeze(-2)).any(-1).to(torch.float64).mean().item()
        for name in base
    }


def load(ours: Choices, experts: Mapping[str, int]) -> dict[str, list[int]]:
    """By layer, how many tokens each of its experts gets; all tokens of all windows count, scored or not.

    Args:
        ours: the choices.
        experts: number of experts in each layer.
    """
    return {
        name: torch.bincount(index.flatten().to(torch.int64), minlength=experts[name]).tolist()
        for name, index in ours.items()
    }
