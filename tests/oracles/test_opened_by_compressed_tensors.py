"""compressed-tensors 0.20 opens what ``convert_checkpoint`` and ``quantize_checkpoint`` write in its layout.

Its own classes read the config, give linear layers the parameters that the checkpoint must have by name, shape and
dtype, and decode the weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import mxperts as mx
from mxperts.checkpoint import Checkpoint, convert_checkpoint
from mxperts.formats import FP8_STATIC, BlockFormat
from mxperts.quantization import quantize_checkpoint

compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
CONVERTED = [
    "quark-qwen3_moe-mxfp4-attention",
    "quark-qwen3_moe-mxfp4_weight_only",
    "quark-qwen3_moe-mxfp4_fp8",
    "quark-qwen3_moe-mxfp4_mxfp6_e2m3",
    "quark-qwen3_moe-mxfp6_e2m3",
    "quark-qwen3_moe-mxfp8_block1x32-file",
    "quark-qwen3_moe_2l-mxfp4-experts_excluded",
    "quark-qwen3_moe_2l-mxfp4-file-sharded",
    "quark-qwen3_moe_2l-mxfp4-mixed_experts",
    "quark-qwen3_moe_2l-mxfp4-mixed_layers",
    "quark-deepseek_v3-mxfp4",
    "quark-qwen2_moe-mxfp4",
    "quark-mixtral-mxfp4",
    "quark-gpt_oss-mxfp4_fp8",
    "gpt_oss-gpt_oss-mxfp4-sharded",
]


def linears(checkpoint: Checkpoint) -> nn.Module:
    """A linear layer for every matrix of a checkpoint but the embedding, by its name; for routers too."""
    shapes = {name: module.shape for name, module in checkpoint.mx.items()}
    for name, info in checkpoint.tensors.items():
        if name.endswith(".weight") and len(info.shape) == 2 and "embed" not in name:
            shapes.setdefault(name.removesuffix(".weight"), info.shape)
    root = nn.Module()
    for name, (n, k) in shapes.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        bias = f"{name}.bias" in checkpoint.tensors
        parent.add_module(last, nn.Linear(k, n, bias=bias, dtype=torch.bfloat16))
    return root


def check_opened(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    model = linears(checkpoint)
    config = quantization.QuantizationConfig(**checkpoint.config["quantization_config"])
    quantization.apply_quantization_config(model, config, show_progress=False)
    compressor = compressors.ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    expected = model.state_dict()
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names if name.rpartition(".")[0] in layers}
    tensors = {name: t for name, t in tensors.items() if not name.endswith("e_score_correction_bias")}  # no linear's
    assert {name: t.dtype for name, t in tensors.items()} == {name: t.dtype for name, t in expected.items()}
    model.load_state_dict(tensors, strict=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            check_scheme(checkpoint, name, getattr(module, "quantization_scheme", None))
    compressor.decompress_model(model)
    for name, t in checkpoint.mx_tensors():
        assert torch.equal(model.get_submodule(name).weight, mx.dequantize(t, torch.bfloat16)), name


def check_scheme(checkpoint: Checkpoint, name: str, found: object) -> None:
    """What compressed-tensors makes of the config for one layer."""
    module = checkpoint.mx.get(name)
    assert (found is None) == (module is None), name
    if module is None or found is None:
        return
    activation, inputs = module.scheme.activation, found.input_activations  # type: ignore[attr-defined]
    assert (inputs is None) == (activation is None)
    if isinstance(activation, BlockFormat):
        bits = activation.element.bits
        assert (inputs.num_bits, inputs.group_size, inputs.dynamic) == (bits, 32, True)
        assert inputs.scale_dtype is torch.uint8
    elif activation is not None:
        strategy = ("tensor", False) if activation == FP8_STATIC else ("token", True)
        assert (inputs.num_bits, inputs.strategy, inputs.dynamic) == (8, *strategy)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted(tmp_path: Path, name: str) -> None:
    convert_checkpoint(FIXTURES / name, tmp_path / "dst", "compressed-tensors")
    check_opened(tmp_path / "dst")


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("qwen3_moe", "w_mxfp4_a_fp8_dynamic"),
        ("qwen3_moe", "w_mxfp6_e2m3_a_mxfp8_e4m3"),
        ("mixtral", "w_mxfp8_e4m3_a_mxfp8_e4m3"),
        ("gpt_oss", "w_mxfp4_a_mxfp4"),
    ],
)
def test_quantized(tmp_path: Path, model: str, scheme: str) -> None:
    source = FIXTURES / f"bf16-{model}"
    layers = {"*experts.1.*": "w_mxfp4", "*layers.0.*experts.*": scheme}
    quantize_checkpoint(source, tmp_path / "dst", scheme, format="compressed-tensors", layer_schemes=layers)
    check_opened(tmp_path / "dst")
