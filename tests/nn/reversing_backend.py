"""A backend for tests whose own layout is every byte in reverse order, and which keeps account of the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mxperts.backend import reference
from mxperts.backend.reference import dequantize, describe, fake_quantize, mx_linear, quantize
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

__all__ = ["dequantize", "describe", "fake_quantize", "fused_experts", "mx_linear", "prepare", "quantize", "unprepare"]

layers: list[tuple[list[StorageWeakRef], list[StorageWeakRef]]] = []
"""Of every ``prepare`` the storages that it was given and those that it returned."""
copies: list[int] = []
"""How many layers took memory in both layouts at the time of every ``prepare``."""
unprepared: list[ExpertsLayout] = []
"""Of every ``unprepare`` the layout."""
canonical_calls: list[ExpertsCall] = []
"""Calls of ``fused_experts`` with weights that were not prepared."""
errors: dict[int, BaseException] = {}
"""What the n-th ``prepare`` raises."""


def reset() -> None:
    for record in (layers, copies, unprepared, canonical_calls, errors):
        record.clear()


def in_two_copies() -> int:
    """How many layers take memory in both layouts now."""
    return sum(not any(ref.expired() for ref in (*given, *returned)) for given, returned in layers)


def prepare(weights: Sequence[Tensor], layout: ExpertsLayout) -> list[Tensor]:
    copies.append(in_two_copies())
    if len(layers) in errors:
        raise errors[len(layers)]
    reversed_ = [reverse(t) for t in weights]
    layers.append(tuple([StorageWeakRef(t.untyped_storage()) for t in group] for group in (weights, reversed_)))
    return reversed_


def unprepare(weights: Sequence[Tensor], layout: ExpertsLayout) -> list[Tensor]:
    unprepared.append(layout)
    return [reverse(t) for t in weights]


def fused_experts(call: ExpertsCall, out: Tensor) -> None:
    if call.prepared:
        call = dataclasses.replace(call, weights=[reverse(t) for t in call.weights], prepared=False)
    else:
        canonical_calls.append(call)
    reference.fused_experts(call, out)


def reverse(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8).flip(0).view(t.dtype).view(t.shape)
