"""CUDA sources compiled by NVRTC when a kernel is first wanted, and their machine code kept on disk."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import threading
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from mxperts.errors import BackendUnavailable, MxpertsError

_OPTIONS = ("--std=c++17", "-default-device", "--extra-device-vectorization")

_lock = threading.RLock()


@lru_cache
def why_not() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError:
        return "the package cuda-bindings is not installed; pip install mxperts[gpu]"
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        return f"NVRTC is not there: {error}; pip install mxperts[gpu]"
    return None


class Kernel:
    """One compiled kernel, for one set of macros, on one device.

    From compute capability 9.0 on it may start while the kernel before it ends, for which it waits itself.

    Attributes:
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
    """

    def __init__(
        self,
        source: str,
        macros: Mapping[str, str],
        device: int,
        *,
        threads: int,
        shared_bytes: int = 0,
        name: str | None = None,
        cluster: int = 1,
    ) -> None:
        """Compile, or find compiled, and load.

        Args:
            source: of ``<source>.cu``.
            macros: what to define.
            device: index.
            threads, shared_bytes: see above.
            name: of the function, if it is not that of the source.
            cluster: blocks of a cluster, from compute capability 9.0 on.
        """
        from cuda.bindings import driver

        self.threads, self.shared_bytes = threads, shared_bytes
        self._driver = driver
        capability = torch.cuda.get_device_capability(device)
        code = machine_code(source, macros, capability)
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).synchronize()  # makes the context
            self._module = _checked(driver.cuModuleLoadData(code))
            self._function = _checked(driver.cuModuleGetFunction(self._module, (name or source).encode()))
            largest = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, largest, shared_bytes))
        self._config = driver.CUlaunchConfig()
        self._config.gridDimZ = self._config.blockDimY = self._config.blockDimZ = 1
        self._config.blockDimX = threads
        self._config.sharedMemBytes = shared_bytes
        if capability < (9, 0):
            return
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes = [attribute]
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attribute.value.clusterDim
            size.x, size.y, size.z = cluster, 1, 1
            attributes.append(attribute)
        self._config.attrs = attributes
        self._config.numAttrs = len(attributes)

    def __call__(self, blocks: int | tuple[int, int], arguments: ctypes.Structure, stream: int) -> None:
        """Launch.

        Args:
            blocks: of the grid.
            arguments: the kernel's only parameter.
            stream: handle of a CUDA stream.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        with _lock:  # the configuration is one for all threads
            self._config.gridDimX, self._config.gridDimY = (blocks, 1) if isinstance(blocks, int) else blocks
            self._config.hStream = stream
            _checked(self._driver.cuLaunchKernelEx(self._config, self._function, ctypes.addressof(pointers), 0))


def machine_code(name: str, macros: Mapping[str, str], capability: tuple[int, int]) -> bytes:
    """The cubin of ``<name>.cu`` with these macros, from disk if it was compiled before.

    Args:
        name: of a source file, without its ending.
        macros: what to define.
        capability: compute capability.

    Raises:
        BackendUnavailable: there is no NVRTC.
        MxpertsError: the source does not compile.
    """
    if reason := why_not():
        raise BackendUnavailable(reason)
    from cuda.bindings import nvrtc

    architecture = f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
    options = [*_OPTIONS, f"--gpu-architecture={architecture}", *(f"-D{k}={v}" for k, v in macros.items())]
    texts = _texts(name)
    version = nvrtc.nvrtcVersion()[1:]
    key = hashlib.sha256(repr((name, options, texts, version)).encode()).hexdigest()[:32]
    folder = cache_folder()
    kept = None if folder is None else folder / f"{name}-{key}.cubin"
    if kept is not None and kept.is_file():
        return kept.read_bytes()
    code = _compile(name, texts, options)
    if kept is not None:
        _keep(kept, code)
    return code


def _compile(name: str, texts: Mapping[str, str], options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    headers = [source for source in texts if source.endswith(".cuh")]
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            texts[f"{name}.cu"].encode(),
            f"{name}.cu".encode(),
            len(headers),
            [texts[h].encode() for h in headers],
            [h.encode() for h in headers],
        )
    )
    encoded = [o.encode() for o in options]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if int(result) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise MxpertsError(f"{name}.cu does not compile for {options[3]}: {log.decode(errors='replace')}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


@lru_cache
def _texts(name: str) -> dict[str, str]:
    """A source and all headers, by file name."""
    files = {file.name: file for file in resources.files(__package__).iterdir()}
    return {n: files[n].read_text() for n in sorted(files) if n == f"{name}.cu" or n.endswith(".cuh")}


@lru_cache
def cache_folder() -> Path | None:
    """Where machine code is kept; None if it cannot be written."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "mxperts" / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where the user has no home
        return None
    return folder if os.access(folder, os.W_OK) else None


def _keep(path: Path, code: bytes) -> None:
    """Whole or not at all; what cannot be kept is compiled again next time."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        return


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of CUDA returned besides its status."""
    status, *values = result
    if int(status) != 0:
        raise MxpertsError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else values
