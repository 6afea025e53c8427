"""What vLLM's own quantisers make of the blocks of ``tests/oracles/blocks.py``: writes ``tests/golden/vllm.npz``.

    pip install torch==2.13.0 triton==3.6.0 numpy
    pip install -e .
    pip download --no-deps vllm==0.33.0
    unzip vllm-0.33.0-*.whl 'vllm/model_executor/layers/quantization/utils/*' 'vllm/third_party/*' -d vllm-0.33.0
    TRITON_INTERPRET=1 PYTHONPATH=tests/oracles python tests/golden/make/vllm.py vllm-0.33.0

No GPU and no installed vLLM are needed: the Triton kernels run in Triton's interpreter, and the modules that only say
where vLLM runs are stood in for. ``--check`` compares with the file instead of writing it.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import store
import torch
import triton
import triton.language as tl
from blocks import BF16, FP16, FP32, golden_blocks
from torch import Tensor
from triton.runtime.interpreter import interpreter_semantic

from mxperts.formats import MXFP4, MXFP8_E4M3, MXFP8_E5M2
from mxperts.packing import unpack


def complete_the_interpreter() -> None:
    """Triton's interpreter replaces ``tl.sub`` and ``tl.floor``, but not the same functions under their other names."""
    original = tl.core.sub

    def sub(a: Any, b: Any, sanitize_overflow: bool = True, _semantic: Any = None) -> Any:
        return original(a, b, sanitize_overflow, _semantic=_semantic or interpreter_semantic)

    tl.core.sub = sub
    tl.tensor.floor = lambda x, **_: tl.floor(x)


def vllm_module(wheel: Path, name: str) -> Any:
    """One file of vLLM's quantisation utilities, with stand-ins for the rest of vLLM."""
    for stand_in in (
        "vllm",
        "vllm.logger",
        "vllm.platforms",
        "vllm.utils",
        "vllm.utils.import_utils",
        "vllm.utils.torch_utils",
    ):
        sys.modules.setdefault(stand_in, MagicMock())
    sys.modules["vllm.triton_utils"] = types.SimpleNamespace(tl=tl, triton=triton)  # type: ignore[assignment]
    for operator in ("dequant_mxfp4", "quant_dequant_mxfp4"):  # looked up, not called
        if not hasattr(torch.ops.vllm, operator):
            torch.library.define(f"vllm::{operator}", "() -> ()")
    path = wheel / "vllm/model_executor/layers/quantization/utils" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def triton_kernels_module(wheel: Path) -> Any:
    """``triton_kernels.numerics_details.mxfp`` as vLLM ships it, without running the package's own import."""
    package = types.ModuleType("triton_kernels")
    package.__path__ = [str(wheel / "vllm/third_party/triton_kernels")]
    sys.modules["triton_kernels"] = package
    module = importlib.import_module("triton_kernels.numerics_details.mxfp")
    downcast = importlib.import_module("triton_kernels.numerics_details.mxfp_details._downcast_to_mxfp")
    downcast.MXFP_BLOCK_SIZE = 32  # the interpreter hands plain integers to kernels, which `%` does not mix with
    return module


def compute(wheel: Path) -> dict[str, Tensor]:
    """Every array of the file by name."""
    complete_the_interpreter()
    mxfp4, mxfp8 = vllm_module(wheel, "mxfp4_utils"), vllm_module(wheel, "mxfp8_utils")
    kernels = triton_kernels_module(wheel)
    stored = {MXFP4: torch.uint8, MXFP8_E4M3: torch.float8_e4m3fn, MXFP8_E5M2: torch.float8_e5m2}
    arrays: dict[str, Tensor] = {}
    for fmt, dtype in itertools.product(stored, (FP32, BF16, FP16)):
        name = f"{fmt.name}/{dtype}"
        x = arrays[f"{name}/x"] = golden_blocks(fmt, dtype)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if fmt is MXFP4 and dtype is not FP32:  # the kernel takes no float32
            found["vllm"] = mxfp4.downcast_to_mxfp(x, axis=-1)[:2]
        if fmt is MXFP8_E4M3:
            found["vllm"] = mxfp8._mxfp8_e4m3_quantize_torch(x)
        for mode in kernels.DequantScaleRoundingMode:
            found[f"triton_kernels/{mode.name}"] = kernels.downcast_to_mxfp_torch(x, stored[fmt], -1, mode)
            if fmt is MXFP4:
                kernel = kernels.downcast_to_mxfp(x, stored[fmt], -1, mode)
                found[f"triton_kernels_kernel/{mode.name}"] = kernel
        for peer, (codes, scales) in found.items():
            arrays[f"{name}/{peer}/codes"] = unpack(codes.view(torch.uint8), fmt)
            arrays[f"{name}/{peer}/scales"] = scales
    return arrays


if __name__ == "__main__":
    store.main("vllm", compute(Path(sys.argv[1])))
