"""Checkpoints with rotated weights: their config, what is stored, and who refuses them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mxperts as mx
from mxperts.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    convert_checkpoint,
    inspect_checkpoint,
    is_mx,
    parse,
    quark,
    rotated,
)
from mxperts.checkpoint.layout import Rule
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import BLOCK_FORMATS, Scheme
from mxperts.quantization import quantize_checkpoint
from mxperts.rotation import rotate_weight
from mxperts.verification.checkpoint import verify_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
SOURCE = FIXTURES / "bf16-qwen3_moe"
EXPERT = "model.layers.0.mlp.experts.3.up_proj"
RULES = [Rule(pattern="lm_head", scheme=Scheme("none")), Rule(pattern="*", scheme=Scheme("w_mxfp4_a_mxfp4"))]


def config(**changes: Any) -> dict[str, Any]:
    return rotated.write(RULES, rotation="hadamard32") | changes


def test_what_is_written_is_read() -> None:
    written = json.loads(json.dumps(config()))
    assert is_mx(written)
    found = parse({"quantization_config": written})
    assert found is not None
    assert (found.layout, found.rotation, found.config) == ("mxperts", "hadamard32", written)
    assert found.scheme_of(EXPERT) == Scheme("w_mxfp4_a_mxfp4")
    assert found.scheme_of("lm_head") == Scheme("none")
    assert written["config"] == quark.write(RULES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": "hadamard64"}, "quantization_config.rotation is 'hadamard64'; mxperts supports 'hadamard32'"),
        ({"rotation": None}, "quantization_config.rotation is null"),
        ({"signs": [1]}, "quantization_config.signs is unknown to this version"),
        ({"config": None}, "quantization_config.config must be an object, not None"),
        ({"config": {"quant_method": "awq"}}, "quantization_config.config.quant_method is 'awq'; mxperts supports"),
    ],
)
def test_what_is_not_understood_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        parse(config(**changes))


def test_a_field_of_the_inner_config_is_named_with_its_place() -> None:
    changed = copy.deepcopy(config())
    changed["config"]["global_quant_config"]["input_tensors"]["is_dynamic"] = False
    with pytest.raises(
        CheckpointError, match=r"quantization_config\.config\.global_quant_config\.input_tensors\.is_dyn"
    ):
        parse(changed)


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_weights_are_rotated_in_float32_and_then_quantised(fmt: mx.BlockFormat, tmp_path: Path) -> None:
    source = Checkpoint.open(SOURCE)
    quantize_checkpoint(SOURCE, tmp_path / "a", Scheme.of(fmt), rotation="hadamard32")
    found = Checkpoint.open(tmp_path / "a")
    assert found.scheme is not None
    assert found.scheme.rotation == "hadamard32"
    codes = found.info(f"{EXPERT}.weight")
    assert codes.shape == (64, 1, fmt.block_bytes)  # in no shape that a weight has
    dense = source.tensor(f"{EXPERT}.weight")
    stored, expected = found.mx_tensor(EXPERT), mx.quantize(rotate_weight(dense), fmt)
    assert torch.equal(stored.packed, expected.packed)
    assert torch.equal(stored.scales, expected.scales)
    assert not torch.equal(stored.packed, mx.quantize(dense, fmt).packed)


def test_rows_that_cannot_be_rotated_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    shapes = json.loads((SOURCE / "config.json").read_text()) | {"moe_intermediate_size": 48}
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shapes))
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 96, 32),
        "model.layers.0.mlp.experts.down_proj": torch.ones(4, 32, 48),
    }
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArgumentError, match=r"experts\.0\.down_proj has 48 values in a row"):
        quantize_checkpoint(folder, tmp_path / "dst", "w_mxfp4", rotation="hadamard32")
    assert not list(tmp_path.glob("dst*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": "hadamard"}, "unknown rotation 'hadamard'"),
        (
            {"rotation": "hadamard32", "format": "compressed-tensors"},
            "compressed-tensors layout has no words for rotat",
        ),
        ({"rotation": "hadamard32", "format": "gpt-oss"}, "gpt-oss layout has no words for rotated"),
        ({"format": "mxperts"}, "name a rotation instead"),
    ],
)
def test_layouts_without_words_for_it_are_refused(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        quantize_checkpoint(SOURCE, tmp_path / "dst", "w_mxfp4", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rotated") / "model"
    quantize_checkpoint(SOURCE, folder, "w_mxfp4_a_mxfp4", rotation="hadamard32")
    return folder


@pytest.mark.parametrize("format", ["quark", "compressed-tensors", "gpt-oss"])
def test_conversion_is_refused_by_name(checkpoint: Path, format: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"rotated by 'hadamard32'.*the {format} layout has no words"):
        convert_checkpoint(checkpoint, tmp_path / "dst", format)
    with pytest.raises(ArgumentError, match="nothing is converted to the layout 'mxperts'"):
        convert_checkpoint(checkpoint, tmp_path / "dst", "mxperts")


def test_inspection_and_verification_know_it(checkpoint: Path) -> None:
    found = inspect_checkpoint(checkpoint, check=True)
    assert (found.layout, found.rotation, found.anomalies) == ("mxperts", "hadamard32", ())
    assert found.bits_per_value("experts") == 4.25
    verified = verify_checkpoint(checkpoint, source=SOURCE, presets=["quark"], required=True)
    assert not verified.failed
    (match,) = verified.matches
    assert (match.differing, match.tensors) == (0, 12)


def test_interrupted_work_is_not_resumed_with_another_rotation(tmp_path: Path) -> None:
    settings = {"source": {}, "rotation": None}
    CheckpointWriter(tmp_path / "dst", settings)
    with pytest.raises(CheckpointError, match=r"begun with another .*rotation"):
        quantize_checkpoint(SOURCE, tmp_path / "dst", "w_mxfp4", rotation="hadamard32")
