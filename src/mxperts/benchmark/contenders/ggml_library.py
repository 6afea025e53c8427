"""The parts of ggml's C interface that a layer of experts needs, by ctypes, from the libraries of llama-cpp-python.

Source: ggml 0.25 (llama.cpp), ``ggml.h``, ``ggml-alloc.h``, ``ggml-backend.h``, ``ggml-cpu.h``.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from mxperts.benchmark.contenders.installed import package_folder

TYPE_F32, TYPE_I32, TYPE_MXFP4 = 0, 26, 39
CONTEXT_BYTES = 1 << 20
"""For the descriptions of the tensors and the graph of one layer, not for their data."""

_BASE = {
    "ggml_init": (c_void_p, None),
    "ggml_free": (None, [c_void_p]),
    "ggml_version": (c_char_p, []),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
    "ggml_mul_mat_id": (c_void_p, [c_void_p] * 4),
    "ggml_swiglu_split": (c_void_p, [c_void_p] * 3),
    "ggml_swiglu_oai": (c_void_p, [c_void_p] * 3 + [c_float, c_float]),
    "ggml_mul": (c_void_p, [c_void_p] * 3),
    "ggml_add": (c_void_p, [c_void_p] * 3),
    "ggml_cont": (c_void_p, [c_void_p] * 2),
    "ggml_view_2d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t]),
    "ggml_set_input": (None, [c_void_p]),
    "ggml_set_output": (None, [c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_gallocr_new": (c_void_p, [c_void_p]),
    "ggml_gallocr_alloc_graph": (c_bool, [c_void_p] * 2),
    "ggml_gallocr_free": (None, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p] * 2),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p] * 2),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
}
_CPU = {
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}


_SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)


class InitParams(ctypes.Structure):
    """``ggml_init_params``."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class TensorHead(ctypes.Structure):
    """The first fields of ``ggml_tensor``."""

    _fields_ = [("type", c_int), ("buffer", c_void_p)]


class Ggml:
    """ggml's functions, and what a CPU backend needs."""

    def __init__(self, folder: Path) -> None:
        base, cpu = (_open(folder, name) for name in ("ggml-base", "ggml-cpu"))
        for library, functions in ((base, _BASE), (cpu, _CPU)):
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype = result
                function.argtypes = [InitParams] if arguments is None else arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.log_set(_SILENT, None)
        registry = self.backend_cpu_reg()
        self.device = self.backend_reg_dev_get(registry, 0)
        self.host_buffers = self.backend_dev_buffer_type(self.device)
        self._registry = registry

    def __getattr__(self, name: str) -> Any:  # for type checkers: functions are set by the constructor
        raise AttributeError(name)

    def context(self) -> int:
        """A context that holds descriptions only."""
        found: int = self.init(InitParams(CONTEXT_BYTES, None, True))
        return found

    def weight_buffers(self) -> int:
        """The type of buffer that llama.cpp would put MXFP4 experts into: one that repacks them, if there is one."""
        address = self.backend_reg_get_proc_address(self._registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device) if address else None
        context = self.context()
        weight = self.new_tensor_3d(context, TYPE_MXFP4, 256, 256, 2)
        x, ids = self.new_tensor_3d(context, TYPE_F32, 256, 1, 1), self.new_tensor_2d(context, TYPE_I32, 1, 1)
        product = self.mul_mat_id(context, weight, x, ids)
        chosen: int = self.host_buffers
        for i in range(16):
            if not extra or not extra[i]:
                break
            buffer = self.backend_buft_alloc_buffer(extra[i], 0)
            TensorHead.from_address(weight).buffer = buffer
            suits = self.backend_dev_supports_op(self.device, product)
            self.backend_buffer_free(buffer)
            if suits:
                chosen = extra[i]
                break
        self.free(context)
        return chosen


@cache
def load_ggml() -> Ggml | str:
    """ggml, or why it is not there."""
    folder = package_folder("llama_cpp")
    if folder is None:
        return "not installed: pip install llama-cpp-python"
    try:
        return Ggml(folder / "lib")
    except (OSError, AttributeError) as error:
        return f"the libraries in {folder / 'lib'} do not load: {error}"


def _open(folder: Path, name: str) -> ctypes.CDLL:
    files = [*folder.glob(f"lib{name}.so"), *folder.glob(f"lib{name}.dylib"), *folder.glob(f"{name}.dll")]
    if not files:
        raise OSError(f"there is no lib{name}")
    return ctypes.CDLL(str(files[0]), mode=ctypes.RTLD_GLOBAL)
