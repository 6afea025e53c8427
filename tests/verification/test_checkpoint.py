"""Verifying checkpoints: sound ones have no errors, and everything that may be wrong with one is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxperts.verification.checkpoint import Finding, Severity, verify_checkpoint

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
QUARK, STATIC, GPT_OSS = "quark-qwen3_moe-mxfp4", "quark-qwen3_moe-mxfp4_fp8", "gpt_oss-gpt_oss-mxfp4"
SHARDED = "quark-qwen3_moe_2l-mxfp4-file-sharded"
EXPERT = "model.layers.0.mlp.experts.1.up_proj"

Damage = Callable[..., list[Finding]]


@pytest.fixture
def damaged(tmp_path: Path) -> Damage:
    """The findings, without notes, in a copy of a checkpoint whose tensors or config were changed."""

    def verify(
        name: str,
        tensors: Callable[[dict[str, Tensor]], object] | None = None,
        config: dict[str, object] | None = None,
        notes: bool = False,
    ) -> list[Finding]:
        folder = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
        if tensors is not None:
            stored = load_file(folder / "model.safetensors")
            tensors(stored)
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            said = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(said | config))
        found = verify_checkpoint(folder).findings
        return [f for f in found if notes or f.severity is not Severity.NOTE]

    return verify


@pytest.mark.parametrize(
    "name",
    [
        QUARK,
        STATIC,
        GPT_OSS,
        SHARDED,
        "bf16-qwen3_moe",
        "quark-deepseek_v3-mxfp6_e2m3",
        "quark-qwen3_moe-mxfp8_block32x32-file",
        "quark-qwen3_moe-mxfp6_e3m2-file-router",
        "quark-qwen3_moe_2l-mxfp4-mixed_experts",
        "llmcompressor-mixtral-mxfp4",
        "llmcompressor-gpt_oss-mxfp4",
    ],
)
def test_sound_checkpoints_have_no_errors(name: str) -> None:
    steps: list[tuple[int, int]] = []
    found = verify_checkpoint(FIXTURES / name, progress=lambda *step: steps.append(step))
    assert [f for f in found.findings if f.severity is not Severity.NOTE] == []
    assert not found.failed
    assert steps[-1][0] == steps[-1][1] > 0


def test_what_does_not_open_is_one_error() -> None:
    (finding,) = verify_checkpoint(FIXTURES / "compressed_tensors-qwen3_moe-mxfp4xfp8").findings
    assert finding.severity is Severity.ERROR
    assert "group_size" in finding.found
    (finding,) = verify_checkpoint(FIXTURES / "nothing").findings
    assert "is no folder" in finding.found


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / QUARK, tmp_path / QUARK))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (finding,) = verify_checkpoint(folder).findings
    assert "truncated or damaged" in finding.found


def test_all_wrong_tensors_are_named_not_only_the_first(damaged: Damage) -> None:
    def break_three(t: dict[str, Tensor]) -> None:
        del t["model.layers.0.mlp.experts.0.gate_proj.weight_scale"]
        t[f"{EXPERT}.weight"] = t[f"{EXPERT}.weight"].to(torch.int32)
        t["model.layers.0.mlp.experts.3.down_proj.weight_scale"] = torch.zeros(32, 3, dtype=torch.uint8)

    found = damaged(QUARK, break_three, notes=True)
    errors = {f.tensor: f for f in found if f.severity is Severity.ERROR}
    assert "there are no scales" in errors["model.layers.0.mlp.experts.0.gate_proj.weight"].found
    assert errors[f"{EXPERT}.weight_scale"].expected.startswith("U8 with at least two dimensions")
    assert "U8 [32, 3]" in errors["model.layers.0.mlp.experts.3.down_proj.weight_scale"].found
    assert any("not compared with the model" in f.found for f in found)


def test_a_format_that_the_config_does_not_declare_is_an_error(damaged: Damage) -> None:
    declared = json.loads((FIXTURES / "quark-qwen3_moe-mxfp6_e2m3" / "config.json").read_text())["quantization_config"]
    found = damaged(QUARK, config={"quantization_config": declared})
    assert len(found) >= 12
    assert all(f.severity is Severity.ERROR for f in found)


def test_nan_blocks_are_counted_and_located(damaged: Damage) -> None:
    def poison(t: dict[str, Tensor]) -> None:
        t[f"{EXPERT}.weight_scale"][3, 0] = t[f"{EXPERT}.weight_scale"][5, 0] = 255

    (finding,) = damaged(QUARK, poison)
    assert finding.severity is Severity.ERROR
    assert finding.tensor == "model.layers.*.mlp.experts.*.up_proj"
    expected = f"2 blocks with scale 0xFF, which are NaN in 1 tensors; the first: {EXPERT}, row 3, block 0"
    assert finding.found == expected


def test_scales_at_the_ends(damaged: Damage) -> None:
    def stretch(t: dict[str, Tensor]) -> None:
        t[f"{EXPERT}.weight_scale"][0, 0], t[f"{EXPERT}.weight_scale"][1, 0] = 254, 0

    found = [f for f in damaged(QUARK, stretch, notes=True) if "the first" in f.found]
    assert [(f.severity.value, f.found.partition(" in ")[0]) for f in found] == [
        ("warning", "1 scales beyond 2^±64"),
        ("note", "1 scales 0x00 of blocks that are not zeros"),
    ]


def test_nan_codes_are_errors(damaged: Damage) -> None:
    def poison(t: dict[str, Tensor]) -> None:
        t[f"{EXPERT}.weight"].view(torch.uint8)[7, 9] = 0x7F

    (finding,) = damaged("llmcompressor-qwen3_moe-mxfp8", poison)
    assert "1 codes that are NaN" in finding.found
    assert finding.found.endswith(f"{EXPERT}, row 7, value 9")


def test_negative_zeros_are_a_note_that_names_who_never_writes_them() -> None:
    found = verify_checkpoint(FIXTURES / "compressed_tensors-qwen3_moe-mxfp4").findings
    (note,) = (f for f in found if f.tensor.endswith("up_proj"))
    assert note.severity is Severity.NOTE
    assert note.expected == "none from the presets default, quark, ggml"
    assert "416 codes that are -0 in 4 tensors" in note.found
    assert not any("-0" in f.found for f in verify_checkpoint(FIXTURES / QUARK).findings)


def test_values_that_are_no_numbers(damaged: Damage) -> None:
    def poison(t: dict[str, Tensor]) -> None:
        t["lm_head.weight"][0, 0] = torch.nan

    (finding,) = damaged(QUARK, poison)
    assert (finding.tensor, finding.found) == ("lm_head.weight", "1 values that are NaN")


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_input_scales_are_above_zero(damaged: Damage, value: float) -> None:
    def change(t: dict[str, Tensor]) -> None:
        t[f"{EXPERT}.input_scale"].fill_(value)

    (finding,) = damaged(STATIC, change)
    assert (finding.tensor, finding.expected) == (f"{EXPERT}.input_scale", "a scale above 0")


def test_a_missing_input_scale(damaged: Damage) -> None:
    (finding,) = damaged(STATIC, lambda t: t.pop(f"{EXPERT}.input_scale"))
    assert finding.tensor == f"{EXPERT}.input_scale"
    assert "the static scale of the input that the config calls for" in finding.found


def test_tensors_that_the_model_needs_and_those_that_are_left_over(damaged: Damage) -> None:
    (finding,) = damaged(QUARK, lambda t: t.pop("model.norm.weight"))
    assert finding.severity is Severity.ERROR
    assert "no tensor for model.norm.weight" in finding.found


def test_tensors_that_are_left_over(damaged: Damage) -> None:
    (finding,) = damaged(QUARK, lambda t: t.update({"model.foo.weight": torch.zeros(3)}))
    assert (finding.severity, finding.tensor) == (Severity.WARNING, "model.foo.weight")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": 64}, "the model has one of shape [64, 64]"),
        ({"moe_intermediate_size": 32}, "the model has one of shape [32, 32]"),
        ({"num_hidden_layers": 2}, "no tensor for model.layers.1."),
        ({"num_experts": 3}, "expert 3"),
        ({"num_experts": 5}, "no file has the weight of model.layers.0.mlp.experts.4.down_proj"),
    ],
)
def test_sizes_that_the_config_does_not_have(damaged: Damage, config: dict[str, object], words: str) -> None:
    found = damaged(QUARK, config=config)
    assert found
    assert all(f.severity is Severity.ERROR for f in found)
    assert any(words in f.found for f in found)


def test_experts_in_one_tensor_are_counted(damaged: Damage) -> None:
    found = damaged(GPT_OSS, config={"num_local_experts": 5})
    assert {f.tensor.rpartition("_")[2] for f in found} == {"blocks", "scales", "bias"}
    assert all(f.expected == "5 experts, as config.json says" for f in found)


def test_a_model_that_transformers_does_not_know_is_a_warning(damaged: Damage) -> None:
    (finding,) = damaged(QUARK, config={"model_type": "foo"})
    assert finding.severity is Severity.WARNING
    assert finding.found.startswith("names and shapes are not compared with a model")


def test_index_and_files(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / SHARDED, tmp_path / SHARDED))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(n for n in index["weight_map"] if n.endswith("norm.weight"))
    file = folder / index["weight_map"][name]
    stored = load_file(file)
    save_file(stored | {"more": torch.zeros(2)}, file, metadata={"format": "pt"})
    index["metadata"] = {"total_size": 1}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    found = {f.found: f for f in verify_checkpoint(folder).findings}
    assert any(f.tensor == "more" and f.severity is Severity.WARNING for f in found.values())
    assert "total_size" in found["1"].expected
    assert any("other.safetensors" in text for text in found)
