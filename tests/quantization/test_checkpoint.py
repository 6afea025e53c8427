"""quantize_checkpoint: the bytes amd-quark exports, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mxperts as mx
from mxperts.checkpoint import Checkpoint, convert_checkpoint, quark, safetensors_file
from mxperts.errors import ArgumentError, CheckpointError, FormatError
from mxperts.formats import BLOCK_FORMATS, Scheme
from mxperts.quantization import Summary, quantize_checkpoint

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
QWEN = FIXTURES / "bf16-qwen3_moe"
EXPERT = "model.layers.0.mlp.experts.3.up_proj"


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors; in bytes, as equality of NaN and of float8 would be another matter."""
    found = {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}
    return {k: v.reshape(-1).view(torch.uint8).reshape(*v.shape, -1) for k, v in found.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def sharded(folder: Path, shards: int = 3) -> Path:
    """The bf16 Qwen3-MoE with two layers, in several files."""
    folder.mkdir()
    tensors = load_file(FIXTURES / "bf16-qwen3_moe_2l" / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(FIXTURES / "bf16-qwen3_moe_2l" / "config.json", folder)
    return folder


@pytest.mark.parametrize(
    ("model", "scheme", "theirs"),
    [
        ("qwen3_moe", "w_mxfp4_a_mxfp4", "quark-qwen3_moe-mxfp4"),
        ("qwen3_moe", "mxfp6_e2m3", "quark-qwen3_moe-mxfp6_e2m3"),
        ("qwen3_moe", "mxfp6_e3m2", "quark-qwen3_moe-mxfp6_e3m2"),
        ("qwen3_moe", "w_mxfp4_a_mxfp6_e2m3", "quark-qwen3_moe-mxfp4_mxfp6_e2m3"),
        ("qwen2_moe", "mxfp4", "quark-qwen2_moe-mxfp4"),
        ("olmoe", "mxfp4", "quark-olmoe-mxfp4"),
        ("mixtral", "mxfp4", "quark-mixtral-mxfp4-file"),
        ("gpt_oss", "mxfp4", "quark-gpt_oss-mxfp4"),
        ("gpt_oss", "mxfp6_e2m3", "quark-gpt_oss-mxfp6_e2m3"),
    ],
)
def test_same_bytes_as_amd_quark(tmp_path: Path, model: str, scheme: str, theirs: str) -> None:
    quantize_checkpoint(FIXTURES / f"bf16-{model}", tmp_path / "dst", scheme, preset="quark")
    ours, expected = stored(tmp_path / "dst"), stored(FIXTURES / theirs)
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    a, b = (Checkpoint.open(f) for f in (tmp_path / "dst", FIXTURES / theirs))
    assert {m.name: m.scheme for m in a.mx.values()} == {m.name: m.scheme for m in b.mx.values()}
    assert set(b.config["quantization_config"]["exclude"]) <= set(a.config["quantization_config"]["exclude"])


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_same_bytes_as_quantize(tmp_path: Path, fmt: mx.BlockFormat) -> None:
    scheme = Scheme.of(fmt, fmt)
    summary = quantize_checkpoint(QWEN, tmp_path / "dst", scheme)
    source, result = Checkpoint.open(QWEN), Checkpoint.open(tmp_path / "dst")
    assert len(result.mx) == summary.modules == 12
    for module, t in result.mx_tensors():
        expected = mx.quantize(source.tensor(f"{module}.weight"), fmt)
        assert result.mx[module].scheme == scheme
        assert torch.equal(t.packed, expected.packed)
        assert torch.equal(t.scales, expected.scales)
    for name in set(result.names) & set(source.names) - {m.codes.name for m in result.mx.values()}:
        assert torch.equal(result.tensor(name), source.tensor(name)), name


def test_choices_are_those_of_quantize(tmp_path: Path) -> None:
    quantize_checkpoint(QWEN, tmp_path / "dst", "mxfp4", preset="ocp", scale_rule="ceil")
    result = Checkpoint.open(tmp_path / "dst")
    weight = Checkpoint.open(QWEN).tensor(f"{EXPERT}.weight")
    assert torch.equal(
        result.mx_tensor(EXPERT).scales, mx.quantize(weight, "mxfp4", preset="ocp", scale_rule="ceil").scales
    )
    assert result.config["quantization_config"]["global_quant_config"]["weight"]["scale_calculation_mode"] == "ceil"


def test_large_weights_are_quantised_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_checkpoint(QWEN, tmp_path / "whole", "mxfp6_e2m3")
    monkeypatch.setattr("mxperts.quantization.plan._CHUNK", 100)
    quantize_checkpoint(QWEN, tmp_path / "parts", "mxfp6_e2m3")
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_exclude_and_layer_schemes(tmp_path: Path) -> None:
    summary = quantize_checkpoint(
        FIXTURES / "bf16-qwen3_moe_2l",
        tmp_path / "dst",
        "mxfp4",
        exclude=["lm_head", "*self_attn.[kv]_proj", "re:.*layers\\.0\\.mlp\\.experts\\.[02]\\."],
        layer_schemes={"*layers.1.mlp.experts*": "mxfp6_e2m3", "*q_proj": Scheme("none")},
    )
    result = Checkpoint.open(tmp_path / "dst")
    found = {name: str(module.scheme) for name, module in result.mx.items()}
    assert "model.layers.0.mlp.experts.0.up_proj" not in found
    assert found["model.layers.0.mlp.experts.1.up_proj"] == "w_mxfp4_a_mxfp4"
    assert found["model.layers.1.mlp.experts.0.up_proj"] == "w_mxfp6_e2m3_a_mxfp6_e2m3"
    assert found["model.layers.1.self_attn.o_proj"] == "w_mxfp4_a_mxfp4"
    config = result.config["quantization_config"]
    assert list(config["layer_quant_config"]) == ["model.layers.1.mlp.experts*"]
    unquantized = {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.self_attn.q_proj"}
    assert unquantized <= set(config["exclude"]) == set(summary.excluded)


def test_only_some_layers(tmp_path: Path) -> None:
    quantize_checkpoint(QWEN, tmp_path / "dst", "none", layer_schemes={"*experts.1.*": "mxfp4"})
    result = Checkpoint.open(tmp_path / "dst")
    assert {name.rpartition(".")[0] for name in result.mx} == {"model.layers.0.mlp.experts.1"}


def test_gpt_oss_experts_of_one_layer_may_differ(tmp_path: Path) -> None:
    source = FIXTURES / "bf16-gpt_oss"
    quantize_checkpoint(source, tmp_path / "dst", "mxfp4", exclude=["*self_attn*", "lm_head", "*experts.1.*"])
    result, fused = Checkpoint.open(tmp_path / "dst"), Checkpoint.open(source)
    experts = "model.layers.0.mlp.experts"
    assert f"{experts}.0.down_proj" in result.mx
    assert torch.equal(result.tensor(f"{experts}.1.down_proj.weight"), fused.tensor(f"{experts}.down_proj")[1].T)
    assert torch.equal(result.tensor(f"{experts}.1.down_proj.bias"), fused.tensor(f"{experts}.down_proj_bias")[1])


def test_experts_that_stay_are_not_split(tmp_path: Path) -> None:
    source = FIXTURES / "bf16-gpt_oss"
    quantize_checkpoint(source, tmp_path / "dst", "mxfp4", exclude=["*experts*", "lm_head"])
    result = Checkpoint.open(tmp_path / "dst")
    assert {n for n in result.names if "experts" in n} == {n for n in Checkpoint.open(source).names if "experts" in n}
    assert "model.layers.0.self_attn.q_proj" in result.mx


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_with_gate_and_up_in_halves(tmp_path: Path, transposed: bool) -> None:
    gate_up, down = torch.randn(2, 96, 64).bfloat16(), torch.randn(2, 64, 48).bfloat16()
    write_source(
        tmp_path / "src",
        {
            "layers.0.mlp.experts.gate_up_proj": gate_up.mT.contiguous() if transposed else gate_up,
            "layers.0.mlp.experts.down_proj": down.mT.contiguous() if transposed else down,
        },
        {"text_config": {"hidden_size": 64, "model_type": "qwen3_5_moe_text"}},
    )
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", "mxfp4")
    result = Checkpoint.open(tmp_path / "dst")
    expected = {"gate_proj": gate_up[1, :48], "up_proj": gate_up[1, 48:], "down_proj": down[1]}
    for projection, weight in expected.items():
        t = result.mx_tensor(f"layers.0.mlp.experts.1.{projection}")
        assert torch.equal(mx.dequantize(t), mx.dequantize(mx.quantize(weight, "mxfp4"))), projection
    assert result.tensor("layers.0.mlp.experts.1.down_proj.weight").shape == (64, 24), "without padding, as Quark"


def test_fused_experts_of_unknown_orientation(tmp_path: Path) -> None:
    tensors = {"experts.gate_up_proj": torch.randn(2, 96, 64), "experts.down_proj": torch.randn(2, 48, 48)}
    write_source(tmp_path / "src", tensors, {"hidden_size": 64})
    with pytest.raises(CheckpointError, match=r"expected \[E, 2I, H\]"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", "mxfp4")


def write_source(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_dtypes_of_the_source(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 32).to(dtype)
    write_source(tmp_path / "src", {"mlp.up_proj.weight": weight, "norm.weight": torch.randn(8).to(dtype)}, {})
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", "mxfp4")
    result = Checkpoint.open(tmp_path / "dst")
    assert torch.equal(result.mx_tensor("mlp.up_proj").packed, mx.quantize(weight, "mxfp4").packed)
    assert result.tensor("norm.weight").dtype is dtype


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.zeros(8, 32).to(torch.float8_e4m3fn), "is F8_E4M3"),
        (torch.zeros(8, 33), "does not fill whole bytes in mxfp4"),
    ],
)
def test_weights_that_cannot_be_quantised(tmp_path: Path, weight: Tensor, says: str) -> None:
    write_source(tmp_path / "src", {"mlp.up_proj.weight": weight}, {})
    with pytest.raises(CheckpointError, match=says):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", "mxfp4")
    assert not (tmp_path / "dst.partial").exists()


def test_static_fp8_needs_scales(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"measured on sample text.*fp8_dynamic"):
        quantize_checkpoint(QWEN, tmp_path / "dst", "w_mxfp4_a_fp8")
    modules = list(Checkpoint.open(FIXTURES / "quark-qwen3_moe-mxfp4").mx)
    scales = {m: 0.01 * (i + 1) for i, m in enumerate(modules)}
    quantize_checkpoint(QWEN, tmp_path / "dst", "w_mxfp4_a_fp8", input_scales=scales)
    result = Checkpoint.open(tmp_path / "dst")
    for module, scale in scales.items():
        assert result.tensor(f"{module}.input_scale").item() == torch.tensor(scale).item()


def test_files_that_are_carried_along(tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(QWEN, src)
    for name in ("tokenizer.json", "chat_template.jinja", "pytorch_model.bin", "x.pt", "model.safetensors.index.json"):
        (src / name).write_text("{}" if name != "model.safetensors.index.json" else json.dumps({"weight_map": {}}))
    (src / "original").mkdir()
    names = Checkpoint.open(QWEN).names
    (src / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    quantize_checkpoint(src, tmp_path / "dst", "mxfp4")
    assert sorted(files(tmp_path / "dst")) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    config, old = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "dst", src))
    assert quark.parse(config.pop("quantization_config")).layout == "quark"
    assert config == old


def test_dry_run(tmp_path: Path) -> None:
    summary = quantize_checkpoint(QWEN, tmp_path / "dst", "mxfp4", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    real = quantize_checkpoint(QWEN, tmp_path / "dst", "mxfp4")
    assert summary == Summary(**{f: getattr(real, f) for f in Summary.__dataclass_fields__} | {"dst": None})
    data = {name: value.numel() for name, value in stored(tmp_path / "dst").items()}
    assert sum(real.bytes_after.values()) == sum(data.values())
    assert sum(real.bytes_before.values()) == sum(v.numel() for v in stored(QWEN).values())


def test_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    quantize_checkpoint(sharded(tmp_path / "src"), tmp_path / "dst", "mxfp4", progress=lambda *c: calls.append(c))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1] == sum(v.numel() for v in stored(tmp_path / "src").values())


# --- other layouts


@pytest.mark.parametrize(
    ("model", "scheme", "format"),
    [
        ("qwen3_moe", "w_mxfp4_a_mxfp4", "compressed-tensors"),
        ("qwen3_moe", "w_mxfp6_e2m3_a_fp8_dynamic", "compressed-tensors"),
        ("qwen3_moe_2l", "w_mxfp8_e4m3", "compressed-tensors"),
        ("mixtral", "w_mxfp4_a_mxfp6_e2m3", "compressed-tensors"),
        ("gpt_oss", "w_mxfp4_a_mxfp4", "compressed-tensors"),
        ("gpt_oss", "w_mxfp4", "gpt-oss"),
    ],
)
def test_other_layouts_hold_what_a_conversion_gives(tmp_path: Path, model: str, scheme: str, format: str) -> None:
    source = FIXTURES / f"bf16-{model}"
    summary = quantize_checkpoint(source, tmp_path / "dst", scheme, format=format)
    quantize_checkpoint(source, tmp_path / "quark", scheme)
    convert_checkpoint(tmp_path / "quark", tmp_path / "converted", format)
    ours, converted = stored(tmp_path / "dst"), stored(tmp_path / "converted")
    assert ours.keys() == converted.keys()
    for name, value in converted.items():
        assert torch.equal(ours[name], value), name
    a, b = (Checkpoint.open(tmp_path / f) for f in ("dst", "converted"))
    assert {m.name: (m.scheme, m.codes.dtype) for m in a.mx.values()} == {
        m.name: (m.scheme, m.codes.dtype) for m in b.mx.values()
    }
    assert a.config == b.config
    assert sum(summary.bytes_after.values()) == sum(value.numel() for value in ours.values())
    assert sum(summary.bytes_before.values()) == sum(value.numel() for value in stored(source).values())


@pytest.mark.parametrize(
    ("model", "scheme", "theirs"),
    [
        ("gpt_oss", "w_mxfp4", "gpt_oss-gpt_oss-mxfp4"),
        ("gpt_oss", "w_mxfp4_a_mxfp4", "llmcompressor-gpt_oss-mxfp4"),
        ("mixtral", "w_mxfp4_a_mxfp4", "llmcompressor-mixtral-mxfp4-file"),
        ("qwen3_moe", "w_mxfp8_e4m3_a_mxfp8_e4m3", "llmcompressor-qwen3_moe-mxfp8"),
    ],
)
def test_names_and_shapes_of_other_layouts(tmp_path: Path, model: str, scheme: str, theirs: str) -> None:
    format = "gpt-oss" if theirs.startswith("gpt_oss") else "compressed-tensors"
    quantize_checkpoint(FIXTURES / f"bf16-{model}", tmp_path / "dst", scheme, format=format)
    ours, expected = (Checkpoint.open(f).tensors for f in (tmp_path / "dst", FIXTURES / theirs))
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in expected.items()}


def test_static_fp8_in_compressed_tensors(tmp_path: Path) -> None:
    modules = [f"model.layers.0.mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")]
    scales = dict.fromkeys(modules, 0.25)
    quantize_checkpoint(QWEN, tmp_path / "dst", "w_mxfp4_a_fp8", format="compressed-tensors", input_scales=scales)
    found = Checkpoint.open(tmp_path / "dst").tensor(f"{EXPERT}.input_scale")
    assert (found.shape, found.dtype, found.item()) == ((1,), torch.float32, 0.25)


@pytest.mark.parametrize(
    ("model", "scheme", "format", "exclude", "says"),
    [
        ("qwen3_moe", "w_mxfp6_e3m2", "compressed-tensors", None, "has no weights in mxfp6_e3m2"),
        ("qwen3_moe", "w_mxfp4", "gpt-oss", None, "that of gpt_oss models and not of qwen3_moe"),
        ("gpt_oss", "w_mxfp4_a_mxfp4", "gpt-oss", None, "no words for activation formats"),
        ("gpt_oss", "w_mxfp4", "gpt-oss", ["lm_head"], "nothing else quantised"),
        ("gpt_oss", "w_mxfp4", "gpt-oss", ["*self_attn*", "lm_head", "*experts.1.*"], r"experts\.1\.\w+ cannot"),
        ("gpt_oss", "w_mxfp4", "gguf", None, "unknown layout 'gguf'"),
    ],
)
def test_what_a_layout_cannot_hold(
    tmp_path: Path, model: str, scheme: str, format: str, exclude: list[str] | None, says: str
) -> None:
    with pytest.raises(ArgumentError, match=says):
        quantize_checkpoint(FIXTURES / f"bf16-{model}", tmp_path / "dst", scheme, format=format, exclude=exclude)
    assert list(tmp_path.iterdir()) == []


# --- refusals


def test_refusals(tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    with pytest.raises(CheckpointError, match="already quantised"):
        quantize_checkpoint(FIXTURES / "quark-qwen3_moe-mxfp4", dst, "mxfp4")
    with pytest.raises(ArgumentError, match=r"nothing in .* is left to quantise"):
        quantize_checkpoint(QWEN, dst, "mxfp4", exclude=["*"])
    with pytest.raises(ArgumentError, match="nothing in"):
        quantize_checkpoint(QWEN, dst, "none")
    with pytest.raises(ArgumentError, match=r"'\*experts\.9\.\*' of layer_schemes matches no layer"):
        quantize_checkpoint(QWEN, dst, "mxfp4", layer_schemes={"*experts.9.*": "mxfp6_e2m3"})
    for bad in ({"scheme": "mxfp5"}, {"preset": "quirk"}, {"scale_rule": "evn"}, {"layer_schemes": {"*": "mxfp5"}}):
        with pytest.raises(FormatError, match="unknown"):
            quantize_checkpoint(QWEN, dst, **({"scheme": "mxfp4"} | bad))
    dst.mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        quantize_checkpoint(QWEN, dst, "mxfp4")
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_a_disk_that_is_too_small_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(CheckpointError, match="still needs"):
        quantize_checkpoint(QWEN, tmp_path / "dst", "mxfp4")
    assert not (tmp_path / "dst").exists()


# --- interruption


class Stop:
    """Lets ``os.fsync`` succeed a number of times, as if the run was stopped in the middle of a later file."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.left, self.error, self.real = after, error, os.fsync

    def __call__(self, fd: int) -> None:
        if self.left == 0:
            raise self.error
        self.left -= 1
        self.real(fd)


@pytest.mark.parametrize("after", range(7))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=["interrupt", "full disk"])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException
) -> None:
    """At every point where something is made durable: manifest, then a file and the manifest for each of three."""
    src, dst = sharded(tmp_path / "src"), tmp_path / "dst"
    quantize_checkpoint(src, tmp_path / "uninterrupted", "mxfp4")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", Stop(after, error))
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            quantize_checkpoint(src, dst, "mxfp4")
    assert not dst.exists()

    written: list[str] = []
    real = safetensors_file.write_file

    def spy(file: Path, *args: Any) -> None:
        written.append(file.name)
        real(file, *args)

    monkeypatch.setattr("mxperts.checkpoint.writer.write_file", spy)
    summary = quantize_checkpoint(src, dst, "mxfp4")
    assert files(dst) == files(tmp_path / "uninterrupted")
    assert summary.resumed == max(0, after - 1) // 2
    assert len(written) == 3 - summary.resumed
    assert not (tmp_path / "dst.partial").exists()


def test_another_scheme_or_source_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = sharded(tmp_path / "src"), tmp_path / "dst"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", Stop(3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(src, dst, "mxfp4")
    for changed, what in (
        ({"scheme": "mxfp6_e2m3"}, "scheme"),
        ({"preset": "ocp"}, "preset"),
        ({"scale_rule": "floor"}, "scale_rule"),
        ({"exclude": ["lm_head"]}, "exclude or layer_schemes"),
    ):
        with pytest.raises(CheckpointError, match=f"another {what};"):
            quantize_checkpoint(src, dst, **({"scheme": "mxfp4"} | changed))
    (src / "config.json").touch()
    with pytest.raises(CheckpointError, match="another source;"):
        quantize_checkpoint(src, dst, "mxfp4")
