"""amd-quark 0.13 opens what ``convert_checkpoint`` writes in its layout, decodes the same weights and runs the model.

It needs transformers < 5.17 and compiles its operators when it is first imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mxperts as mx
from mxperts.checkpoint import Checkpoint, convert_checkpoint
from mxperts.formats import FP8_STATIC, BlockFormat

quark = pytest.importorskip("quark.torch")

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
CONVERTED = [
    "compressed_tensors-qwen3_moe-mxfp4a16",
    "compressed_tensors-qwen3_moe-mxfp6a16",
    "compressed_tensors-qwen3_moe-mxfp6a8-experts_ignored",
    "gpt_oss-gpt_oss-mxfp4-sharded",
    "llmcompressor-deepseek_v3-mxfp4",
    "llmcompressor-gpt_oss-mxfp4",
    "llmcompressor-mixtral-mxfp4",
    "llmcompressor-mixtral-mxfp4-file",
    "llmcompressor-olmoe-mxfp4",
    "llmcompressor-qwen2_moe-mxfp4",
    "llmcompressor-qwen3_moe-mxfp4-attention",
    "llmcompressor-qwen3_moe-mxfp4-experts_ignored",
    "llmcompressor-qwen3_moe-mxfp8",
    "llmcompressor-qwen3_moe-mxfp8a16",
]
BACK = [
    "quark-gpt_oss-mxfp4_fp8",
    "quark-mixtral-mxfp4",
    "quark-qwen3_moe-mxfp4_mxfp6_e2m3",
    "quark-qwen3_moe-mxfp8_block1x32-file",
    "quark-qwen3_moe_2l-mxfp4-mixed_experts",
    "quark-qwen3_moe_2l-mxfp4-mixed_layers",
]
"""To compressed-tensors and back."""
DTYPES = {"mxfp4": "fp4", "mxfp6_e2m3": "fp6_e2m3", "mxfp8_e4m3": "fp8_e4m3"}


@pytest.mark.parametrize("name", [*CONVERTED, *BACK])
def test_opened(tmp_path: Path, name: str) -> None:
    src = FIXTURES / name
    if name in BACK:
        src = tmp_path / "there"
        convert_checkpoint(FIXTURES / name, src, "compressed-tensors")
    convert_checkpoint(src, tmp_path / "dst", "quark")
    checkpoint = Checkpoint.open(tmp_path / "dst")
    model = quark.import_model_from_safetensors(None, str(checkpoint.path), device="cpu")
    quantized = {name: module for name, module in model.named_modules() if hasattr(module, "weight_quantizer")}
    assert quantized.keys() == checkpoint.mx.keys()
    for module, t in checkpoint.mx_tensors():
        linear = quantized[module]
        assert torch.equal(linear.weight_quantizer(linear.weight).float(), mx.dequantize(t, torch.float32)), module
        check_inputs(checkpoint, module, linear.input_quantizer)
    logits = run(model)
    assert logits.isfinite().all()
    if all(module.scheme.activation is None for module in checkpoint.mx.values()):
        expected = mx.load(checkpoint.path, dtype=torch.float32)(IDS).logits
        # both sum in float32, in another order
        assert (logits - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * expected.abs().max()


IDS = torch.arange(24).view(2, 12) % 32


def run(model: Any) -> torch.Tensor:
    """Quark's own forward pass in float32."""
    model = model.float()
    for module in model.modules():
        if hasattr(module, "float_dtype"):
            module.float_dtype = torch.float32
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def check_inputs(checkpoint: Checkpoint, module: str, quantizer: Any) -> None:
    """What Quark makes of the config for one layer's input."""
    activation = checkpoint.mx[module].scheme.activation
    assert (quantizer is None) == (activation is None), module
    if isinstance(activation, BlockFormat):
        assert (quantizer.qspec.dtype.value, quantizer.qspec.group_size) == (DTYPES[activation.name], 32)
    elif activation == FP8_STATIC:
        assert (quantizer.qspec.dtype.value, quantizer.qspec.qscheme.value) == ("fp8_e4m3", "per_tensor")
        assert torch.equal(quantizer.scale.float(), checkpoint.tensor(f"{module}.input_scale").float())
