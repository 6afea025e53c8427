"""Compiling: Numba functions, where their machine code is kept, and how many threads run them."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import torch
from numba.core import caching
from numba.core.ccallback import CFunc

logger = logging.getLogger("mxperts")

Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function) -> Function:
    """A function that others call while they are compiled; it is compiled into them and not kept by itself."""
    compiled: Function = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


def kernel(tag: str = "", *, parallel: bool = True) -> Callable[[Function], Function]:
    """For a function that Python calls: it may use ``prange``, releases the GIL, and its machine code is kept on disk.

    Args:
        tag: what tells functions that one factory makes apart.
        parallel: whether it uses ``prange`` itself.
    """

    def compile_on_demand(function: Function) -> Function:
        dispatcher = numba.njit(nogil=True, parallel=parallel, error_model="numpy")(function)
        dispatcher._cache = _cache(function, tag)
        compiled: Function = dispatcher
        return compiled

    return compile_on_demand


def native(arguments: int, tag: str) -> Callable[[Callable[..., None]], Any]:
    """For a function of 64-bit integers that kernels call by its address, so that it is compiled once for all of them.

    The result's ``address`` is that of the machine code; keep the result as long as it is in use.

    Args:
        arguments: how many it takes.
        tag: as in ``kernel``.
    """

    def compile_now(function: Callable[..., None]) -> Any:
        signature = numba.types.void(*[numba.types.int64] * arguments)
        options = {"nogil": True, "error_model": "numpy"}
        compiled: Any = CFunc(function, (signature.args, signature.return_type), locals={}, options=options)
        compiled._cache = _cache(function, tag)
        compiled.compile()
        return compiled

    return compile_now


def threads() -> int:
    """How many threads a kernel is to use: as many as PyTorch would."""
    threading_layer()
    most: int = numba.config.NUMBA_NUM_THREADS
    return min(torch.get_num_threads(), most)


def exclusive() -> AbstractContextManager[Any]:
    """Held while a kernel runs: Numba's own thread pool, the last resort, cannot be entered by two threads at once."""
    return nullcontext() if _reentrant() else _lock


_lock = threading.RLock()


@lru_cache
def threading_layer() -> str:
    """The thread pool that Numba uses: "omp" or "tbb", or "workqueue" where it finds neither library."""

    @numba.njit(parallel=True)  # type: ignore[untyped-decorator]
    def start(n: int) -> int:
        total = 0
        for i in numba.prange(n):
            total += i
        return total

    # Numba sets OpenMP's number of threads when it starts its own; where PyTorch uses the same library, PyTorch's too.
    before = torch.get_num_threads()
    start(2)
    torch.set_num_threads(before)
    layer: str = numba.threading_layer()
    return layer


@lru_cache
def _reentrant() -> bool:
    return threading_layer() != "workqueue"


@lru_cache
def cache_folder() -> Path | None:
    """Where machine code is kept, one folder for each state of this package's sources; None if it cannot be written."""
    try:
        folder = _user_cache() / "mxperts" / "cpu" / source_stamp()
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}-{threading.get_ident()}"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError):  # the latter where the user has no home
        return None
    return folder


def _user_cache() -> Path:
    """The user's folder for what can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@lru_cache
def source_stamp() -> str:
    """A name for the sources of this package, of the formats and the rotation they are made for, and Numba's version.

    Numba's own cache looks only at the file of the function itself, not at what is compiled into it.
    """
    digest = hashlib.sha256(f"{numba.__version__} {sys.version}".encode())
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    for file in sorted([*here.glob("*.py"), *(root / "formats").glob("*.py"), root / "rotation.py"]):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def _announce() -> None:
    folder = cache_folder()
    kept = f"kept in {folder}" if folder else "not kept: the user's cache folder cannot be written"
    logger.warning("mxperts: compiling CPU kernels for this machine, 10 to 20 seconds, once (%s)", kept)


class _Locator(caching._CacheLocator):  # type: ignore[misc]
    """Numba's question of where to keep a function's machine code, answered with ``cache_folder``."""

    def __init__(self, function: Any) -> None:
        self.line = function.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return source_stamp()

    def get_disambiguator(self) -> str:
        return str(self.line)

    @classmethod
    def from_function(cls, function: Any, file: str) -> _Locator:
        return cls(function)


class _CacheImpl(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [_Locator]  # noqa: RUF012 - the base class's form


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function. Nothing that goes wrong with its files stops the work."""

    _impl_class = _CacheImpl

    def __init__(self, function: Any, tag: str) -> None:
        super().__init__(function)
        self.tag = tag

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        # Numba would take the values of closure variables; what those are compiled to is in ``source_stamp``.
        return sig, codegen.magic_tuple(), self.tag

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:
            logger.info("compiled kernel in %s cannot be read (%s); compiling again", cache_folder(), error)
            found = None
        if found is None:
            _announce()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            try:
                super().save_overload(sig, data)
            except (EOFError, ValueError, pickle.UnpicklingError):  # the list of what is kept is damaged
                self._cache_file.flush()
                super().save_overload(sig, data)
        except OSError as error:
            logger.warning("mxperts: compiled kernels cannot be kept in %s (%s)", cache_folder(), error)


class _NoCache(caching.NullCache):  # type: ignore[misc]
    """Where machine code cannot be kept, all of it is compiled anew."""

    def load_overload(self, sig: Any, target_context: Any) -> None:
        _announce()


def _cache(function: Any, tag: str) -> Any:
    return _NoCache() if cache_folder() is None else _Cache(function, tag)
