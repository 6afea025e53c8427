"""Which backend runs a problem: the one place where operations reach backends."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from mxperts.errors import ArgumentError, BackendUnavailable
from mxperts.formats import MXFP4, Activation, BlockFormat, parse_activation
from mxperts.formats import format as lookup
from mxperts.formats.naming import suggest
from mxperts.rotation import check_rotation

OPERATIONS = ("quantize", "dequantize", "fake_quantize", "mx_linear", "fused_experts")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a backend must know to say whether it can run an operation.

    Attributes:
        op: one of ``OPERATIONS``.
        device: where the tensors are.
        dtype: of the hidden states, or of the tensor to be quantised.
        weight: format of the weights; None where there are none or they are unquantised.
        activation: format that the input is quantised to, as ``Scheme.activation``.
        rotation: by what inputs are rotated before that; None for nothing.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    weight: BlockFormat | None = None
    activation: Activation = None
    rotation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of the operations.

    Attributes:
        name: what ``backend=`` calls it.
        module: the package to import; it has one function for each operation it implements, and ``describe``, which
            says in a few words how it runs a problem on this machine, or, for None, what it can use here.
        refuses: why it cannot run a problem, as a phrase, or None if it can. Must not import the package.
        summary: one line for people.
        device: the type of device that it is for; None for any.
    """

    name: str
    module: str
    refuses: Callable[[Problem], str | None]
    summary: str
    device: str | None = None

    def load(self, op: str) -> Callable[..., Any]:
        """The backend's function of this name, such as that for an operation."""
        function: Callable[..., Any] = getattr(_package(self.module), op)
        return function

    @property
    def sums(self) -> torch.dtype:
        """In what it sums up each token's experts; for ``sum_slots``."""
        dtype: torch.dtype = _package(self.module).SUMS
        return dtype


_package = lru_cache(importlib.import_module)


def _cpu_refuses(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}, not on a CPU"
    if problem.weight is None and problem.op in ("mx_linear", "fused_experts"):
        return "its weights are packed; these are dense"
    return None


def _gpu_refuses(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"the tensors are on {problem.device}, not on a GPU"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU; it may be a build for CPUs, or the driver is missing"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install mxperts[gpu]"
    capability = torch.cuda.get_device_capability(problem.device)
    if torch.version.hip is None and capability < _OLDEST_GPU:
        return "{} has compute capability {}.{}, and {}.{} is needed".format(
            torch.cuda.get_device_name(problem.device), *capability, *_OLDEST_GPU
        )
    if problem.weight is None and problem.op in ("mx_linear", "fused_experts"):
        return "its weights are packed; these are dense"
    return None


_OLDEST_GPU = (8, 0)

BACKENDS = (
    Backend(
        name="cpu",
        module="mxperts.backend.cpu",
        refuses=_cpu_refuses,
        summary="packed weights, kernels compiled by Numba on first use",
        device="cpu",
    ),
    Backend(
        name="gpu",
        module="mxperts.backend.gpu",
        refuses=_gpu_refuses,
        summary="packed weights, Triton kernels and CUDA kernels that are compiled on first use",
        device="cuda",
    ),
    Backend(
        name="reference",
        module="mxperts.backend.reference",
        refuses=lambda problem: None,
        summary="plain PyTorch on any device; defines every result, not built for speed",
    ),
)
"""In the order in which "auto" asks them."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The answer to "which backend?".

    Attributes:
        backend: the one that runs the problem.
        reason: why.
        refused: name and reason of every backend that was asked before and cannot.
        how: which instructions it will use and how it accumulates; only ``explain`` asks for it.
    """

    backend: Backend
    reason: str
    refused: tuple[tuple[str, str], ...] = ()
    how: str = ""

    def __str__(self) -> str:
        lines = [f"{self.backend.name}: {self.reason}", *(f"  not {name}: {why}" for name, why in self.refused)]
        return "\n".join([*lines, f"  how: {self.how}"] if self.how else lines)


def resolve(backend: str, problem: Problem) -> Choice:
    """The backend that runs a problem.

    Args:
        backend: a backend's name, which then runs the problem or raises; or "auto", which takes the first that can.

    Raises:
        ArgumentError: no backend has this name.
        BackendUnavailable: the named backend cannot run this problem; the message says why.
    """
    named = {b.name: b for b in BACKENDS}
    if backend == "auto":
        refused: list[tuple[str, str]] = []
        for candidate in BACKENDS:
            why = candidate.refuses(problem)
            if why is None:
                return Choice(
                    backend=candidate, reason=f"the first that can run it; {candidate.summary}", refused=tuple(refused)
                )
            refused.append((candidate.name, why))
        raise BackendUnavailable(f"no backend can run {problem}: {refused}")
    if backend not in named:
        raise ArgumentError(f"unknown backend {backend!r}; {suggest(str(backend), ['auto', *named])}")
    why = named[backend].refuses(problem)
    if why is not None:
        raise BackendUnavailable(f"backend {backend!r} cannot run {problem.op} here: {why}")
    return Choice(backend=named[backend], reason="named by the caller")


def run(backend: str, problem: Problem, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the backend that ``resolve`` gives."""
    return resolve(backend, problem).backend.load(problem.op)(*args, **kwargs)


def explain(
    op: str = "fused_experts",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    weight: BlockFormat | str | None = None,
    activation: Activation = None,
    rotation: str | None = None,
    backend: str = "auto",
) -> Choice:
    """Which backend would run a problem, and why; ``print`` it.

    Args:
        op: one of "quantize", "dequantize", "fake_quantize", "mx_linear", "fused_experts".
        device, dtype: of the hidden states, or of the tensor to be quantised.
        weight: weight format or its name; None for unquantised weights.
        activation: activation format or its name; None for unquantised activations.
        rotation: as in ``fused_experts``.
        backend: "auto" or a backend's name.

    Raises:
        ArgumentError, BackendUnavailable: as the operation itself would raise them.
        FormatError: an unknown format.
    """
    if op not in OPERATIONS:
        raise ArgumentError(f"unknown operation {op!r}; {suggest(op, OPERATIONS)}")
    check_rotation(rotation)
    problem = Problem(
        op=op,
        device=torch.device(device),
        dtype=dtype,
        weight=None if weight is None else lookup(weight),
        activation=parse_activation(activation),
        rotation=rotation,
    )
    choice = resolve(backend, problem)
    return replace(choice, how=choice.backend.load("describe")(problem))


def backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Every backend with what it is, or with why it cannot run packed experts on ``device``."""
    problem = Problem(op="fused_experts", device=torch.device(device), dtype=torch.bfloat16, weight=MXFP4)
    found: dict[str, str] = {}
    for b in BACKENDS:
        why = b.refuses(problem)
        found[b.name] = f"{b.summary}; {b.load('describe')(None)}" if why is None else f"unavailable: {why}"
    return found
