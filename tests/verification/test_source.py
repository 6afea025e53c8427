"""Which preset a checkpoint's codes come from, told from the weights that it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mxperts as mx
from mxperts.errors import CheckpointError
from mxperts.formats import PRESETS
from mxperts.quantization import quantize_checkpoint
from mxperts.verification import source
from mxperts.verification.checkpoint import Severity, Verification, verify_checkpoint

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
EXPERT = "model.layers.0.mlp.experts.1.up_proj"


def matching(found: Verification) -> set[str]:
    return {m.preset for m in found.matches if m.differing == 0}


@pytest.mark.parametrize(
    ("name", "model", "presets"),
    [
        ("quark-qwen3_moe-mxfp4", "qwen3_moe", {"default", "quark"}),
        ("quark-mixtral-mxfp6_e3m2", "mixtral", {"default", "quark", "vllm"}),
        ("quark-mixtral-mxfp4-file", "mixtral", {"default", "quark"}),
        ("quark-gpt_oss-mxfp4", "gpt_oss", {"default", "quark"}),
        ("compressed_tensors-qwen3_moe-mxfp4", "qwen3_moe", {"vllm", "compressed_tensors"}),
        ("llmcompressor-gpt_oss-mxfp4", "gpt_oss", {"vllm", "compressed_tensors"}),
        ("llmcompressor-deepseek_v3-mxfp4", "deepseek_v3", {"vllm", "compressed_tensors"}),
    ],
)
def test_exporters_are_recognised_by_their_codes(name: str, model: str, presets: set[str]) -> None:
    found = verify_checkpoint(FIXTURES / name, source=FIXTURES / f"bf16-{model}")
    assert matching(found) == presets
    assert {m.preset for m in found.matches} == set(PRESETS)
    assert not found.failed
    said = [f for f in found.findings if f.expected.startswith("what preset")]
    assert [f.found.startswith("exactly that") for f in said] == [True] * len(presets) + [False] * (8 - len(presets))


@pytest.mark.parametrize("preset", ["ocp", "ggml", "quark"])
def test_our_own_checkpoints_are_what_their_preset_gives(tmp_path: Path, preset: str) -> None:
    bf16 = FIXTURES / "bf16-qwen3_moe"
    quantize_checkpoint(bf16, tmp_path / "made", "w_mxfp8_e4m3" if preset == "ocp" else "w_mxfp4", preset=preset)
    found = verify_checkpoint(tmp_path / "made", source=bf16, presets=[preset], required=True)
    (match,) = found.matches
    assert (match.differing, match.tensors) == (0, 12)
    assert not found.failed


def test_the_first_difference_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_CHUNK", 32 * 4)  # rows are compared in parts
    folder = Path(shutil.copytree(FIXTURES / "quark-qwen3_moe-mxfp4", tmp_path / "changed"))
    stored = load_file(folder / "model.safetensors")
    codes, scales = stored[f"{EXPERT}.weight"], stored[f"{EXPERT}.weight_scale"]
    before = int(codes[17, 3])
    codes[17, 3] = before ^ 0x50
    scales[40, 0] += 1
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    found = verify_checkpoint(folder, source=FIXTURES / "bf16-qwen3_moe", presets=["quark"], required=True)
    (match,) = found.matches
    assert (match.differing, match.differing_tensors, match.blocks) == (2, 1, 768)
    scale = int(scales[17, 0])
    assert match.first == (
        f"{EXPERT}, row 17, block 0: scale {scale} expected, {scale} found; "
        f"its value 7: code 0x{before >> 4:x} expected, 0x{(before ^ 0x50) >> 4:x} found"
    )
    (error,) = (f for f in found.findings if f.severity is Severity.ERROR)
    assert error.expected == "what preset quark gives in mxfp4"
    assert error.found.startswith("2 of 768 blocks (0.26 %), in 1 of 12 tensors, are others; the first: ")


def test_a_mismatch_is_an_error_only_if_the_preset_was_required() -> None:
    given = {"source": FIXTURES / "bf16-qwen3_moe", "presets": ["ocp"]}
    assert not verify_checkpoint(FIXTURES / "quark-qwen3_moe-mxfp4", **given).failed
    assert verify_checkpoint(FIXTURES / "quark-qwen3_moe-mxfp4", required=True, **given).failed


def test_weights_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    bf16 = Path(shutil.copytree(FIXTURES / "bf16-qwen3_moe", tmp_path / "bf16"))
    stored = load_file(bf16 / "model.safetensors")
    del stored[f"{EXPERT}.weight"]
    name = "model.layers.0.mlp.experts.2.down_proj"
    stored[f"{name}.weight"] = torch.zeros(8, 8)
    save_file(stored, bf16 / "model.safetensors", metadata={"format": "pt"})
    found = verify_checkpoint(FIXTURES / "quark-qwen3_moe-mxfp4", source=bf16)
    warnings = {f.tensor: f.found for f in found.findings if f.severity is Severity.WARNING}
    assert set(warnings) == {EXPERT, name}
    assert "has no weight of" in warnings[EXPERT]
    assert "torch.float32 [8, 8], not a float matrix of shape [32, 64]" in warnings[name]
    assert {m.tensors for m in found.matches} == {10}
    required = verify_checkpoint(FIXTURES / "quark-qwen3_moe-mxfp4", source=bf16, presets=["quark"], required=True)
    assert required.failed


def test_shared_scales_are_not_compared() -> None:
    name = "quark-qwen3_moe-mxfp8_block32x32-file"
    found = verify_checkpoint(FIXTURES / name, source=FIXTURES / "bf16-qwen3_moe")
    assert any("32 rows share their scales" in f.found for f in found.findings)


def test_a_source_must_be_unquantised_and_the_checkpoint_quantised() -> None:
    bf16, quark = FIXTURES / "bf16-qwen3_moe", FIXTURES / "quark-qwen3_moe-mxfp4"
    with pytest.raises(CheckpointError, match="is quantised itself"):
        verify_checkpoint(quark, source=quark)
    with pytest.raises(CheckpointError, match="no quantised weights to compare"):
        verify_checkpoint(bf16, source=bf16)


def test_the_comparison_is_that_of_quantize() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    stored = mx.quantize(weight, "mxfp4", preset="ocp")
    results = {p: n for p, n, _ in source._compare(weight, stored, list(PRESETS), None, "reference", "cpu")}
    for preset in PRESETS:
        other = mx.quantize(weight, "mxfp4", preset=preset)
        same = torch.equal(other.packed, stored.packed) and torch.equal(other.scales, stored.scales)
        assert (results[preset] == 0) == same
