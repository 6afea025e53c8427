"""Smoothing changes no bit of the unquantised model, and is refused where it would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mxperts as mx
from mxperts.checkpoint import Checkpoint
from mxperts.errors import ArgumentError
from mxperts.quantization import quantize_checkpoint
from mxperts.quantization.calibration import Calibration
from mxperts.quantization.calibration import run as calibrated_run
from mxperts.quantization.calibration.source import SourceModel

FIXTURES = Path(__file__).parents[2] / "fixtures" / "checkpoints"


def uneven(folder: Path, family: str) -> Path:
    """The small model with channels of very different sizes."""
    source = FIXTURES / f"bf16-{family}"
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, t in tensors.items():
        if "layernorm" in name or "up_proj" in name or "w3" in name:
            factors = torch.exp2(2 * torch.randn(len(t), generator=generator)).to(t.dtype)
            tensors[name] = t * (factors if t.ndim == 1 else factors[:, None])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(folder: Path) -> Tensor:
    model: Any = mx.load(folder).eval()
    ids = torch.arange(48).reshape(2, 24) % 31
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("exclude", [None, ["lm_head"]], ids=["experts", "all"])
@pytest.mark.parametrize("family", ["qwen3_moe_2l", "deepseek_v3", "mixtral", "qwen2_moe"])
def test_the_unquantised_model_computes_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    exclude: list[str] | None,
    calibration: Calibration,
) -> None:
    source = uneven(tmp_path / "source", family)
    models: list[SourceModel] = []

    class Remembered(SourceModel):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            models.append(self)

    monkeypatch.setattr(calibrated_run, "SourceModel", Remembered)
    quantize_checkpoint(
        source, tmp_path / "dst", "w4a4", method="rtn", smooth=True, calibration=calibration, exclude=exclude
    )
    (model,) = models
    original, result = Checkpoint.open(source), Checkpoint.open(tmp_path / "dst")
    smoothed = {name: model.edits.tensor(name).contiguous() for name in original.names}
    changed = {name for name, t in smoothed.items() if not torch.equal(t, original.tensor(name))}
    assert any("up_proj" in name or "w3" in name for name in changed)
    assert any("layernorm" in name for name in changed)
    assert any(name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")) for name in changed)
    for name in changed:
        ratio = smoothed[name].float() / original.tensor(name).float()
        ratio = ratio[~ratio.isnan()]
        assert torch.equal(torch.frexp(ratio).mantissa, torch.full_like(ratio, 0.5)), name

    shutil.copytree(source, tmp_path / "smoothed")
    save_file(smoothed, tmp_path / "smoothed" / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(tmp_path / "smoothed"), logits(source))
    for name in set(result.names) & set(original.names):  # what is not quantised is written as it was smoothed
        if result.tensor(name).dtype == original.tensor(name).dtype:
            assert torch.equal(result.tensor(name), smoothed[name]), name
    for module, t in result.mx_tensors():
        if f"{module}.weight" in smoothed:
            assert torch.equal(t.packed, mx.quantize(smoothed[f"{module}.weight"], "mxfp4").packed), module


def test_smoothing_makes_uneven_channels_count_less(tmp_path: Path, calibration: Calibration) -> None:
    source = uneven(tmp_path / "source", "qwen3_moe_2l")
    exact = logits(source)
    for smooth in (False, True):
        dst = tmp_path / str(smooth)
        quantize_checkpoint(source, dst, "w4a4", method="rtn", smooth=smooth, calibration=calibration)
    plain, smoothed = ((logits(tmp_path / str(s)) - exact).square().mean() for s in (False, True))
    assert smoothed < plain


def test_an_activation_function_that_is_not_linear_in_up_is_refused(tmp_path: Path, calibration: Calibration) -> None:
    with pytest.raises(ArgumentError, match=r"down_proj: smoothing needs silu or gelu .* swigluoai and gate_up_proj"):
        quantize_checkpoint(
            FIXTURES / "bf16-gpt_oss", tmp_path / "dst", smooth=True, scheme="w4a4", calibration=calibration
        )


def test_a_norm_that_adds_to_its_weight_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: Calibration
) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    stock = Qwen3MoeRMSNorm.forward
    monkeypatch.setattr(Qwen3MoeRMSNorm, "forward", lambda self, x: stock(self, x) + x)
    source = uneven(tmp_path / "source", "qwen3_moe_2l")
    with pytest.raises(ArgumentError, match=r"decoder layer 0 .* does not compute the same with scales folded"):
        quantize_checkpoint(source, tmp_path / "dst", "w4a4", smooth=True, calibration=calibration)


def test_settings_of_smoothing_are_told_apart(tmp_path: Path, calibration: Calibration) -> None:
    source = FIXTURES / "bf16-qwen3_moe_2l"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "dst", "w4a4", smooth=True, calibration=calibration, progress=stop)
    manifest = json.loads((tmp_path / "dst.partial" / "mxperts-progress.json").read_text())
    assert manifest["settings"]["smooth"] is True
    with pytest.raises(mx.errors.CheckpointError, match="begun with another smooth"):
        quantize_checkpoint(source, tmp_path / "dst", "w4a4", smooth=False, calibration=calibration)
