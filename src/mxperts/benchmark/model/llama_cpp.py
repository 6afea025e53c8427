"""llama.cpp through llama-cpp-python, on a GGUF file made of the same weights."""

from __future__ import annotations

import ctypes
import importlib
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxperts.benchmark.contenders.installed import package_folder, version_of
from mxperts.benchmark.model.contenders import LoadedModel, ModelContender
from mxperts.benchmark.model.gguf_file import why_not, write_gguf
from mxperts.benchmark.model.subject import Subject
from mxperts.checkpoint import Checkpoint
from mxperts.errors import MxpertsError

NAME = "llama.cpp"
CONTEXT = 4096
"""Tokens that it makes room for, at most."""
Q8_ERROR_LIMIT = 0.3
"""Of logits: activations are rounded to 8 bits, and so routers choose other experts more often."""


def llama_cpp(subject: Subject) -> ModelContender:
    """The contender."""
    missing = [name for module, name in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")) if not _has(module)]
    if missing:
        reason = f"not installed: pip install {' '.join(missing)}"
    elif subject.on_the_fly is not None:
        reason = "it runs checkpoints that have MXFP4 experts already"
    else:
        reason = why_not(dict(Checkpoint.open(subject.path).config), subject.scheme)
    converted = _Converted(subject)
    return ModelContender(
        name=NAME,
        prepare=converted.write,
        load=lambda: LlamaCppModel(subject, converted),
        version=version_of("llama_cpp_python"),
        why_not=reason,
        error_limit=Q8_ERROR_LIMIT,
    )


def _has(module: str) -> bool:
    return package_folder(module) is not None


class _Converted:
    """The model as a file of llama.cpp's, for as long as somebody needs it."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def write(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mxperts-bench-")
        write_gguf(self._subject.path, self.file)

    @property
    def file(self) -> Path:
        assert self._folder is not None, "not written"
        return Path(self._folder.name) / "model.gguf"

    def remove(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


class LlamaCppModel(LoadedModel):
    """A model in llama.cpp, with its default settings but for the number of threads."""

    def __init__(self, subject: Subject, converted: _Converted) -> None:
        self._lib = lib = importlib.import_module("llama_cpp")
        self._vocabulary = subject.vocabulary
        lib.llama_log_set(_SILENT, None)
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(str(converted.file).encode(), lib.llama_model_default_params())
        if not model:
            raise MxpertsError(f"llama.cpp does not load {subject.name}, converted to GGUF")
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = min(subject.context, CONTEXT)
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = lib.llama_init_from_model(model, settings)
        weakref.finalize(self, _free, lib, self._context, model, converted)

    def logits(self, tokens: Tensor) -> Tensor:
        self._clear()
        rows = []
        for token in tokens.tolist():
            self._decode([token])
            found = self._lib.llama_get_logits_ith(self._context, -1)
            rows.append(np.ctypeslib.as_array(found, shape=(self._vocabulary,)).copy())
        return torch.from_numpy(np.stack(rows))

    def prefill(self, tokens: Tensor) -> None:
        self._clear()
        self._decode(tokens.tolist())

    def decode(self, tokens: Tensor, until: float) -> int:
        self._clear()
        for done, token in enumerate(tokens.tolist(), start=1):
            self._decode([token])
            if time.perf_counter() > until:
                return done
        return len(tokens)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[int]) -> None:
        array = (self._lib.llama_token * len(tokens))(*tokens)
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(tokens)))
        if status:
            raise MxpertsError(f"llama_decode gave {status}")


def _free(lib: Any, context: Any, model: Any, converted: _Converted) -> None:
    lib.llama_free(context)
    lib.llama_model_free(model)
    converted.remove()


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
