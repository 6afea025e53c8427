"""The two ways to run a layer on a GPU: what each needs, and which one is taken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from mxperts.backend.gpu.cuda import compiler
from mxperts.errors import ArgumentError, BackendUnavailable
from mxperts.formats.naming import suggest


@dataclass(frozen=True, kw_only=True)
class Path:
    """One way to run ``fused_experts``.

    Attributes:
        name: what ``use_path`` calls it.
        summary: one line for people.
    """

    name: str
    summary: str


CUDA = Path(name="cuda", summary="CUDA kernels on prepared weights, bf16 matrix units, sums in float32")
TRITON = Path(name="triton", summary="Triton kernels on weights as checkpoints have them, sums in float32")
PATHS = (CUDA, TRITON)
"""The better first."""


@lru_cache
def cuda_refuses(device: torch.device) -> str | None:
    """Why kernels in CUDA cannot run on a device; None if they can."""
    if torch.version.hip is not None:
        return "this is not an NVIDIA GPU"
    return compiler.why_not()


class _Forced(threading.local):
    path: Path | None = None
    invariant: bool = False


_forced = _Forced()


@contextmanager
def use_path(name: str) -> Iterator[None]:
    """Within the ``with`` block this thread prepares weights for, and runs calls on, one path, or raises.

    Raises:
        ArgumentError: no path has this name.
    """
    named = {path.name: path for path in PATHS}
    if name not in named:
        raise ArgumentError(f"unknown path {name!r}; {suggest(name, named)}")
    before, _forced.path = _forced.path, named[name]
    try:
        yield
    finally:
        _forced.path = before


def forced() -> Path | None:
    """The path that ``use_path`` asks for."""
    return _forced.path


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Within the ``with`` block a token's result does not depend on the batch it is in, in this thread.

    The same kernels then run, with the same steps along K, however many tokens there are: slower for few of them.
    """
    before, _forced.invariant = _forced.invariant, True
    try:
        yield
    finally:
        _forced.invariant = before


def is_batch_invariant() -> bool:
    """Whether ``batch_invariant`` is asked for."""
    return _forced.invariant


def refuses(device: torch.device, rotation: str | None) -> str | None:
    """Why kernels in CUDA cannot run a problem; None if they can."""
    return cuda_refuses(device) if rotation is None else f"it does not rotate inputs, as {rotation!r} asks"


def choose(device: torch.device, rotation: str | None = None) -> Path:
    """The path that weights on a device are prepared for.

    Args:
        device: where they are.
        rotation: by what they are rotated.

    Raises:
        BackendUnavailable: the path that ``use_path`` asks for cannot run there, or not such weights.
    """
    why = refuses(device, rotation)
    if _forced.path is CUDA and why is not None:
        raise BackendUnavailable(f"path 'cuda' cannot run this on {device}: {why}")
    return _forced.path or (TRITON if why is not None else CUDA)
