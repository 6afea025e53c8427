"""Mixed formats: which layer gets which, by measured error, within the bits that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mxperts as mx
from mxperts.checkpoint import Checkpoint
from mxperts.errors import ArgumentError
from mxperts.formats import Scheme
from mxperts.integrations.transformers import mx_experts
from mxperts.quantization import quantize_checkpoint
from mxperts.quantization.calibration import Calibration, sensitivity

FIXTURES = Path(__file__).parents[2] / "fixtures" / "checkpoints"


def bits_of(folder: Path) -> float:
    modules = Checkpoint.open(folder).mx.values()
    return 8 * sum(m.codes.nbytes + m.scales.nbytes for m in modules) / sum(m.values for m in modules)


@pytest.mark.parametrize(
    ("family", "scheme"), [("qwen3_moe_2l", "w4a16"), ("deepseek_v3", "w4a4"), ("gpt_oss", "w4a6"), ("mixtral", "w4a4")]
)
def test_formats_are_mixed_and_the_model_loads(
    tmp_path: Path, family: str, scheme: str, calibration: Calibration
) -> None:
    source = FIXTURES / f"bf16-{family}"
    quantize_checkpoint(
        source, tmp_path / "dst", scheme, method="rtn", bits=5.5, exclude=["lm_head"], calibration=calibration
    )
    result = Checkpoint.open(tmp_path / "dst")
    assert 4.25 < bits_of(tmp_path / "dst") <= 5.5
    assert {m.scheme.activation for m in result.mx.values()} == {Scheme(scheme).activation}
    formats: dict[str, set[str]] = {}
    for name, module in result.mx.items():
        group = name.split(".experts.")[0] if ".experts." in name else name
        formats.setdefault(group, set()).add(str(module.format))
    assert len({fmt for found in formats.values() for fmt in found}) > 1
    assert all(len(found) == 1 for found in formats.values())  # all experts of a layer have one format
    for prefix in {name.rpartition(".")[0] for name in result.mx if name.endswith((".q_proj", ".k_proj"))}:
        assert len({str(result.mx[f"{prefix}.{p}"].format) for p in ("q_proj", "k_proj", "v_proj")}) == 1
    model: Any = mx.load(tmp_path / "dst").eval()
    for name, module in mx_experts(model):
        stored = next(
            m
            for n, m in result.mx.items()
            if ".experts." in n and n.split(".layers.")[1][0] == name.split(".layers.")[1][0]
        )
        assert module.mxperts.up.format == module.mxperts.down.format == stored.format
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_what_is_measured_is_the_error_of_rounding(tmp_path: Path, calibration: Calibration) -> None:
    """More bits go where rounding does more harm: a layer whose weights are made exact in MXFP4 needs none."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(FIXTURES / "bf16-qwen3_moe_2l", tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    for name, t in tensors.items():
        if "layers.0.mlp.experts" in name:
            tensors[name] = mx.dequantize(mx.quantize(t, "mxfp4"), t.dtype)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(tmp_path / "source", tmp_path / "dst", "w4a16", bits=5.5, calibration=calibration)
    found = {name.split(".")[2]: str(m.format) for name, m in Checkpoint.open(tmp_path / "dst").mx.items()}
    assert found == {"0": "mxfp4", "1": "mxfp6_e2m3"}


def test_layers_that_are_told_apart_keep_their_scheme(tmp_path: Path, calibration: Calibration) -> None:
    quantize_checkpoint(
        FIXTURES / "bf16-qwen3_moe_2l",
        tmp_path / "dst",
        "w4a16",
        bits=6.25,
        layer_schemes={"*layers.0.mlp.experts*": "w_mxfp6_e3m2"},
        calibration=calibration,
    )
    found = {name.split(".")[2]: str(m.format) for name, m in Checkpoint.open(tmp_path / "dst").mx.items()}
    assert found == {"0": "mxfp6_e3m2", "1": "mxfp6_e2m3"}


def test_an_interrupted_measurement_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: Calibration
) -> None:
    source, options = FIXTURES / "bf16-qwen3_moe_2l", {"bits": 5.5, "calibration": calibration}
    quantize_checkpoint(source, tmp_path / "whole", "w4a4", **options)  # type: ignore[arg-type]
    measure = sensitivity.Sensitivity._layer
    layers: list[int] = []

    def counted(self: Any, index: int, texts: Any) -> Any:
        layers.append(index)
        if layers == [0, 1]:
            raise KeyboardInterrupt
        return measure(self, index, texts)

    monkeypatch.setattr(sensitivity.Sensitivity, "_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "dst", "w4a4", **options)  # type: ignore[arg-type]
    quantize_checkpoint(source, tmp_path / "dst", "w4a4", **options)  # type: ignore[arg-type]
    assert layers == [0, 1, 1]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "dst" / file.name).read_bytes()


@pytest.mark.parametrize("bits", [4.2, 8.5, -1, float("nan")])
def test_bits_that_no_choice_has(tmp_path: Path, bits: float, calibration: Calibration) -> None:
    with pytest.raises(ArgumentError, match=r"bits must be between 4\.25 and 8\.25"):
        quantize_checkpoint(
            FIXTURES / "bf16-qwen3_moe_2l", tmp_path / "dst", "w4a4", bits=bits, calibration=calibration
        )
    assert not list(tmp_path.glob("dst*"))


def test_layouts_that_cannot_hold_a_candidate(tmp_path: Path, calibration: Calibration) -> None:
    with pytest.raises(ArgumentError, match="cannot be written in the gpt-oss layout"):
        quantize_checkpoint(
            FIXTURES / "bf16-gpt_oss", tmp_path / "dst", "w4a16", format="gpt-oss", bits=5, calibration=calibration
        )
    assert not list(tmp_path.glob("dst*"))


def test_a_dry_run_cannot_know(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="dry run"):
        quantize_checkpoint(FIXTURES / "bf16-qwen3_moe_2l", tmp_path / "dst", "w4a4", bits=5, dry_run=True)
