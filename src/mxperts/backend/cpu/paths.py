"""Which instructions run a problem: the paths, what each needs, and which one is taken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding as llvm
import numba

from mxperts.backend.cpu.decode import Integers
from mxperts.errors import ArgumentError, BackendUnavailable
from mxperts.formats import Activation, BlockFormat
from mxperts.formats.naming import suggest


@dataclass(frozen=True, kw_only=True)
class Path:
    """One way to multiply.

    Attributes:
        name: what ``use_path`` calls it.
        features: what the CPU must have, in LLVM's names.
        integers: whether it takes only weights and inputs that are 8-bit integers times a power of two.
        summary: one line for people.
    """

    name: str
    features: tuple[str, ...]
    integers: bool = False
    summary: str

    def missing(self) -> tuple[str, ...]:
        """Features that this CPU lacks."""
        return tuple(f for f in self.features if f not in cpu_features())

    def refuses(self, weight: BlockFormat | None, activation: Activation, accumulation: str) -> str | None:
        """Why it cannot run a problem, or None if it can."""
        if self.missing():
            return f"this CPU lacks {', '.join(self.missing())}"
        if not self.integers:
            return None
        for what, fmt in (("weights", weight), ("inputs", activation)):
            if not isinstance(fmt, BlockFormat) or Integers.of(fmt.element) is None:
                return f"{what} in {fmt or 'no MX format'} are not 8-bit integers"
        return "accumulation='exact' asks for float32 throughout" if accumulation == "exact" else None


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512vbmi")
AVX512_VNNI = Path(
    name="avx512_vnni",
    features=(*_AVX512, "avx512vnni"),
    integers=True,
    summary="exact 8-bit integer products, weights decoded by permutes",
)
AVX512_BF16 = Path(
    name="avx512_bf16", features=(*_AVX512, "avx512bf16"), summary="bf16 products, weights decoded by permutes"
)
AVX2 = Path(name="avx2", features=("avx2", "fma"), summary="float32 products, 8 lanes")
PORTABLE = Path(name="portable", features=(), summary="float32 products, 4 lanes, any CPU")

PATHS = (AVX512_VNNI, AVX512_BF16, AVX2, PORTABLE)
"""The best first."""


@lru_cache
def cpu_features() -> frozenset[str]:
    """What this CPU has, or what Numba is told to compile for, in LLVM's names."""
    if numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None:
        told = (numba.config.CPU_FEATURES or "").split(",")
        return frozenset(feature[1:] for feature in told if feature.startswith("+"))
    try:
        return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)
    except RuntimeError:  # LLVM does not know this CPU
        return frozenset()


class _Forced(threading.local):
    path: Path | None = None


_forced = _Forced()


@contextmanager
def use_path(name: str) -> Iterator[None]:
    """Within the ``with`` block this thread's calls take one path, or raise ``BackendUnavailable``.

    Raises:
        ArgumentError: no path has this name.
        BackendUnavailable: the CPU lacks what the path needs.
    """
    named = {path.name: path for path in PATHS}
    if name not in named:
        raise ArgumentError(f"unknown path {name!r}; {suggest(name, named)}")
    if named[name].missing():
        raise BackendUnavailable(f"path {name!r}: this CPU lacks {', '.join(named[name].missing())}")
    before, _forced.path = _forced.path, named[name]
    try:
        yield
    finally:
        _forced.path = before


def choose(weight: BlockFormat | None, activation: Activation, accumulation: str) -> Path:
    """The path that runs a problem.

    Raises:
        BackendUnavailable: the path that ``use_path`` asks for cannot run it.
    """
    if _forced.path is None:
        return _best(weight, activation, accumulation)
    why = _forced.path.refuses(weight, activation, accumulation)
    if why is not None:
        raise BackendUnavailable(f"path {_forced.path.name!r} cannot run this: {why}")
    return _forced.path


@lru_cache
def _best(weight: BlockFormat | None, activation: Activation, accumulation: str) -> Path:
    return next(path for path in PATHS if path.refuses(weight, activation, accumulation) is None)


def careful_path() -> Path:
    """The best path whose kernels handle numbers of any size."""
    return PORTABLE if AVX2.missing() else AVX2


def available() -> str:
    """The paths that this CPU has, for people."""
    return ", ".join(path.name for path in PATHS if not path.missing())
