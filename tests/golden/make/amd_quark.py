"""What AMD Quark makes of the blocks of ``tests/oracles/blocks.py``: writes ``tests/golden/amd_quark.npz``.

    pip install torch==2.13.0 numpy
    pip install amd-quark==0.13
    pip install -e .
    PYTHONPATH=tests/oracles python tests/golden/make/amd_quark.py

The first run compiles Quark's C++ operators, which takes a C++ compiler and a minute. ``--check`` compares with the
file instead of writing it.
"""

from __future__ import annotations

import itertools
from typing import Any

import store
from blocks import BF16, FP16, FP32, golden_blocks
from torch import Tensor

from mxperts.formats import BLOCK_FORMATS, MXFP4, MXFP6_E2M3, MXFP6_E3M2, BlockFormat
from mxperts.packing import unpack


def quantizer(fmt: BlockFormat, is_dynamic: bool) -> Any:
    """Quark's own quantiser of an OCP MX format, with every setting as Quark has it by default."""
    from quark.torch.quantization.config import config
    from quark.torch.quantization.tensor_quantize import FakeQuantizeBase

    spec = {
        "mxfp4": config.OCP_MXFP4Spec,
        "mxfp6_e2m3": config.OCP_MXFP6E2M3Spec,
        "mxfp6_e3m2": config.OCP_MXFP6E3M2Spec,
        "mxfp8_e4m3": config.OCP_MXFP8E4M3Spec,
        "mxfp8_e5m2": config.OCP_MXFP8E5M2Spec,
        "mxint8": config.OCP_MXINT8Spec,
    }[fmt.name]
    return FakeQuantizeBase.get_fake_quantize(spec(ch_axis=-1, is_dynamic=is_dynamic).to_quantization_spec())


def weight(x: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes [n, 32] and scale bytes [n, 1] of MXFP4 or MXFP6 weights as Quark exports them.

    Observer, real quantisation, packing, scale bytes: the steps of ``file2file_quantization``. Quark 0.13 has no such
    path for MXFP8 and MXINT8.
    """
    import quark.torch.kernel
    from quark.torch.utils.numerics import to_e8m0_uint8
    from quark.torch.utils.pack import create_pack_method

    observer = quantizer(fmt, is_dynamic=False)
    observer.enable_observer()
    observer.disable_fake_quant()
    observer(x)
    spec = observer.quant_spec
    real = quark.torch.kernel.scaled_real_quantize(
        spec.dtype.value,
        x,
        observer.scale,
        observer.zero_point,
        spec.ch_axis,
        spec.group_size,
        observer.quant_min,
        observer.quant_max,
        spec.round_method.value,
        spec.qscheme.value,
    )
    packed = create_pack_method(qscheme=spec.qscheme.value, dtype=spec.dtype.value).pack(real, False)
    return unpack(packed, fmt), to_e8m0_uint8(observer.scale)


def activation(x: Tensor, fmt: BlockFormat) -> Tensor:
    """Values [n, 32], in the dtype of ``x``, of activations that are not MXFP4, after Quark's fake quantisation.

    Quark quantises MXFP4 activations in a CUDA or HIP kernel.
    """
    values: Tensor = quantizer(fmt, is_dynamic=True)(x)
    return values


def compute() -> dict[str, Tensor]:
    """Every array of the file by name."""
    arrays: dict[str, Tensor] = {}
    for fmt, dtype in itertools.product(BLOCK_FORMATS, (FP32, BF16, FP16)):
        name = f"{fmt.name}/{dtype}"
        x = arrays[f"{name}/x"] = golden_blocks(fmt, dtype)
        if fmt in (MXFP4, MXFP6_E2M3, MXFP6_E3M2):
            arrays[f"{name}/weight/codes"], arrays[f"{name}/weight/scales"] = weight(x, fmt)
        if fmt is not MXFP4:
            finite = x[x.isfinite().all(-1)]  # Quark refuses to return NaN
            arrays[f"{name}/activation/values"] = activation(finite, fmt)
    return arrays


if __name__ == "__main__":
    store.main("amd_quark", compute())
