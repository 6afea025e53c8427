"""convert_checkpoint: other names and another config, the same bytes, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mxperts as mx
from mxperts.checkpoint import Checkpoint, Conversion, convert_checkpoint
from mxperts.checkpoint.names import split_expert
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.quantization import quantize_checkpoint

QUARK, CT, GPT_OSS = LAYOUTS = ("quark", "compressed-tensors", "gpt-oss")
NOT_READ = ("compressed_tensors-qwen3_moe-mxfp4xfp8", "llmcompressor-gpt_oss-mxfp4-file-unusable")
NO_WORDS = ("mxfp6_e3m2", "block32x32", "quark-qwen3_moe_2l-mxfp4-file-mixed_layers")
"""In compressed-tensors there are none for these."""
FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
NAMES = sorted(f.parent.name for f in FIXTURES.glob("[!b]*/config.json") if f.parent.name not in NOT_READ)
FROM_QUARK = [n for n in NAMES if n.startswith("quark") and not any(no in n for no in NO_WORDS)]
FROM_CT = [n for n in NAMES if n.startswith(("llmcompressor", "compressed_tensors"))]
FROM_GPT_OSS = [n for n in NAMES if n.startswith("gpt_oss")]
CONVERSIONS = [
    *((name, CT) for name in FROM_QUARK),
    *((name, QUARK) for name in FROM_CT),
    *((name, layout) for name in FROM_GPT_OSS for layout in (QUARK, CT)),
]


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors, by their names."""
    return {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}


def raw(t: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Path, b: Path) -> bool:
    """The same tensors: names, dtypes, shapes and bytes."""
    return {k: raw(v) for k, v in stored(a).items()} == {k: raw(v) for k, v in stored(b).items()}


PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
ROLES = {
    "weight": "codes",
    "weight_packed": "codes",
    "blocks": "codes",
    "weight_scale": "scales",
    "scales": "scales",
    "bias": "bias",
    "input_scale": "input_scale",
}


def canonical(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor, of experts one projection of one expert at a time, under names that no layout has.

    Written out for the fixtures' names; nothing of the package is used but the model's type.
    """
    alternating = json.loads((folder / "config.json").read_text())["model_type"] == "gpt_oss"
    found: dict[str, bytes] = {}
    for name, t in stored(folder).items():
        short = name.replace("block_sparse_moe", "mlp")
        layer, experts, rest = short.partition(".mlp.experts.")
        if not experts:
            plain = name in ("lm_head.weight", "model.embed_tokens.weight") or "norm" in name or "bias" in name
            found[short if plain else short.replace(".weight_packed", ".weight")] = raw(t)[2]
            continue
        if rest[0].isdigit():
            number, projection, role = rest.split(".")
            items = [(int(number), projection, role, t)]
        else:
            projection, _, role = rest.rpartition("_")
            items = [(e, projection, role, t[e]) for e in range(len(t))]
        for e, projection, role, part in items:
            halves = {PARTS.get(projection, ""): part}
            if projection == "gate_up_proj":
                assert alternating
                halves = {"gate": part[0::2], "up": part[1::2]} if part.ndim else {"gate": part, "up": part}
            for half, values in halves.items():
                found[f"{layer}.{e}.{half}.{ROLES[role]}"] = raw(values)[2]
    return found


@pytest.mark.parametrize(("name", "layout"), CONVERSIONS)
def test_every_tensor_keeps_its_bytes(tmp_path: Path, name: str, layout: str) -> None:
    src, dst = FIXTURES / name, tmp_path / "dst"
    done = convert_checkpoint(src, dst, layout)
    assert canonical(dst) == canonical(src)
    assert sum(done.schemes.values()) == len(Checkpoint.open(dst).mx)
    assert Checkpoint.open(dst).scheme.layout == done.format == layout


@pytest.mark.parametrize(("name", "layout"), CONVERSIONS)
def test_every_module_keeps_its_scheme(tmp_path: Path, name: str, layout: str) -> None:
    """By the names of the source: ``spellings`` and gate and up in one are what a reader has to know."""
    convert_checkpoint(FIXTURES / name, tmp_path / "dst", layout)
    src, dst = Checkpoint.open(FIXTURES / name), Checkpoint.open(tmp_path / "dst")
    assert {m.scheme for m in src.mx.values()} == {m.scheme for m in dst.mx.values()}
    for module, found in dst.mx.items():
        expert = split_expert(module)
        known = [module]
        if expert is not None:
            known = [m for m in src.mx if (split_expert(m) or (0, expert[1]))[1] == expert[1] and same_layer(m, module)]
        assert {src.mx[m].scheme for m in known} == {found.scheme}, module
    for linear in (
        n.removesuffix(".weight") for n, i in dst.tensors.items() if n.endswith(".weight") and len(i.shape) == 2
    ):
        if linear not in dst.mx:
            assert str(dst.scheme.scheme_of(linear)) == "none", linear


def same_layer(a: str, b: str) -> bool:
    """Whether two names are of the same layer's experts."""
    return "experts" in a.split(".") and a.split(".")[:3] == b.split(".")[:3]


@pytest.mark.parametrize("name", [n for n in FROM_QUARK if n != "quark-mixtral-mxfp4-file"])
def test_quark_and_back(tmp_path: Path, name: str) -> None:
    convert_checkpoint(FIXTURES / name, tmp_path / "there", CT)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", QUARK)
    assert same(tmp_path / "back", FIXTURES / name)


@pytest.mark.parametrize("name", [n for n in FROM_CT if n != "llmcompressor-mixtral-mxfp4"])
def test_compressed_tensors_and_back(tmp_path: Path, name: str) -> None:
    convert_checkpoint(FIXTURES / name, tmp_path / "there", QUARK)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", CT)
    assert same(tmp_path / "back", FIXTURES / name)


@pytest.mark.parametrize("layout", [QUARK, CT])
@pytest.mark.parametrize("name", FROM_GPT_OSS)
def test_gpt_oss_and_back(tmp_path: Path, name: str, layout: str) -> None:
    convert_checkpoint(FIXTURES / name, tmp_path / "there", layout)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", GPT_OSS)
    assert same(tmp_path / "back", FIXTURES / name)
    convert_checkpoint(tmp_path / "there", tmp_path / "aside", CT if layout == QUARK else QUARK)
    assert canonical(tmp_path / "aside") == canonical(FIXTURES / name)


@pytest.mark.parametrize(("name", "spelled"), [(QUARK, "mlp.experts.2.up_proj"), (CT, "block_sparse_moe.experts.2.w3")])
def test_mixtral_is_spelled_as_the_layouts_software_wants_it(tmp_path: Path, name: str, spelled: str) -> None:
    for folder in ("quark-mixtral-mxfp4", "quark-mixtral-mxfp4-file", "llmcompressor-mixtral-mxfp4"):
        dst = tmp_path / folder
        src = FIXTURES / folder
        if folder.startswith("quark") == (name == QUARK):
            src = tmp_path / f"{folder}-there"
            convert_checkpoint(FIXTURES / folder, src, CT if name == QUARK else QUARK)
        convert_checkpoint(src, dst, name)
        assert f"model.layers.0.{spelled}" in Checkpoint.open(dst).mx
        assert f"model.layers.0.{spelled.split('.')[0]}.gate.weight" in Checkpoint.open(dst).names
        assert canonical(dst) == canonical(FIXTURES / folder)


LOADED = [
    ("quark-qwen3_moe-mxfp4-attention", CT),
    ("quark-qwen3_moe-mxfp4_fp8", CT),
    ("quark-qwen3_moe-mxfp8_block1x32-file", CT),
    ("quark-qwen3_moe_2l-mxfp4-mixed_experts", CT),
    ("quark-qwen3_moe_2l-mxfp4-mixed_layers", CT),
    ("quark-deepseek_v3-mxfp6_e2m3", CT),
    ("quark-mixtral-mxfp4", CT),
    ("quark-gpt_oss-mxfp4_fp8", CT),
    ("llmcompressor-mixtral-mxfp4", QUARK),
    ("llmcompressor-gpt_oss-mxfp4", QUARK),
    ("llmcompressor-qwen3_moe-mxfp8", QUARK),
    ("llmcompressor-qwen3_moe-mxfp4-experts_ignored", QUARK),
    ("gpt_oss-gpt_oss-mxfp4-sharded", QUARK),
    ("gpt_oss-gpt_oss-mxfp4-sharded", CT),
]


@pytest.mark.parametrize(("name", "layout"), LOADED)
def test_the_model_computes_the_same_bits(tmp_path: Path, name: str, layout: str) -> None:
    convert_checkpoint(FIXTURES / name, tmp_path / "dst", layout)
    ids = torch.arange(24).view(2, 12) % 32
    with torch.no_grad():
        before, after = (mx.load(f, dtype=torch.float32)(ids).logits for f in (FIXTURES / name, tmp_path / "dst"))
    assert torch.equal(before, after)


# --- what is not tensors


def test_config_and_files(copy: Callable[[str], Path], tmp_path: Path) -> None:
    src = copy("quark-qwen3_moe_2l-mxfp4-file-sharded")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "pytorch_model.bin"):
        (src / name).write_text("{}")
    convert_checkpoint(src, tmp_path / "dst", CT)
    carried = ["chat_template.jinja", "config.json", "expected.json", "generation_config.json", "model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "dst").iterdir()) == [*carried, "tokenizer.json"]
    before, after = (json.loads((f / "config.json").read_text()) for f in (src, tmp_path / "dst"))
    assert before.pop("quantization_config")["quant_method"] == "quark"
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert list(before.items()) == list(after.items())
    header = (tmp_path / "dst" / "model.safetensors").read_bytes()[8:200]
    assert b'"__metadata__":{"format":"pt"}' in header


def test_a_config_within_a_text_config_stays_there(copy: Callable[[str], Path], tmp_path: Path) -> None:
    src = copy("quark-qwen3_moe-mxfp4")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({"model_type": "outer", "text_config": config}))
    convert_checkpoint(src, tmp_path / "dst", CT)
    after = Checkpoint.open(tmp_path / "dst").config
    assert "quantization_config" not in after
    assert after["text_config"]["quantization_config"]["quant_method"] == "compressed-tensors"
    assert after["text_config"].items() >= {k: v for k, v in config.items() if k != "quantization_config"}.items()


def test_gpt_oss_config_is_what_is_published(tmp_path: Path, quantization_config: Callable[[str], dict]) -> None:
    convert_checkpoint(FIXTURES / FROM_GPT_OSS[0], tmp_path / "there", CT)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", GPT_OSS)
    theirs = quantization_config(FROM_GPT_OSS[0])
    ours = Checkpoint.open(tmp_path / "back").config["quantization_config"]
    assert ours.keys() == theirs.keys()
    attention = [f"model.layers.*.self_attn.{p}_proj" for p in "kqvo"]
    rest = [name for name in theirs["modules_to_not_convert"] if "self_attn" not in name]
    assert sorted(ours["modules_to_not_convert"]) == sorted([*attention, *rest])


def test_files_are_bounded(tmp_path: Path) -> None:
    name = "quark-qwen3_moe_2l-mxfp4-mixed_layers"
    done = convert_checkpoint(FIXTURES / name, tmp_path / "dst", CT, max_shard_size="20KB")
    shards = sorted((tmp_path / "dst").glob("*.safetensors"))
    assert [s.name for s in shards] == [f"model-{i + 1:05d}-of-{done.files:05d}.safetensors" for i in range(done.files)]
    assert done.files == 3
    assert all(sum(t.nbytes for t in load_file(s).values()) <= 20_000 for s in shards)
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {k: s.name for s in shards for k in load_file(s)}
    assert index["metadata"]["total_size"] == sum(done.bytes_after.values())
    assert canonical(tmp_path / "dst") == canonical(FIXTURES / name)


def test_dry_run(tmp_path: Path) -> None:
    src = FIXTURES / "quark-gpt_oss-mxfp4_fp8"
    summary = convert_checkpoint(src, tmp_path / "dst", CT, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    real = convert_checkpoint(src, tmp_path / "dst", CT)
    assert summary == Conversion(**vars(real) | {"dst": None})
    assert sum(real.bytes_before.values()) == sum(t.nbytes for t in stored(src).values())
    assert sum(real.bytes_after.values()) == sum(t.nbytes for t in stored(tmp_path / "dst").values())


def test_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    src = FIXTURES / FROM_GPT_OSS[1]
    convert_checkpoint(src, tmp_path / "dst", QUARK, progress=lambda *c: calls.append(c), max_shard_size=9000)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1] == sum(t.nbytes for t in stored(src).values())


# --- numbers that are easily touched


def test_codes_and_scales_of_every_value(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """-0, NaN scales, float8 NaN: what a computation would change is not computed with."""
    for name, layout in (
        ("llmcompressor-qwen3_moe-mxfp8", QUARK),
        ("gpt_oss-gpt_oss-mxfp4", CT),
        ("quark-qwen3_moe-mxfp4", CT),
    ):
        src = copy(name)
        tensors = load_file(src / "model.safetensors")
        for key, t in tensors.items():
            if t.element_size() == 1:
                values = (torch.arange(t.numel()) * 7 + 128).to(torch.uint8).reshape(t.shape)
                tensors[key] = values.view(t.dtype)
        save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
        convert_checkpoint(src, tmp_path / f"{name}-dst", layout)
        assert canonical(tmp_path / f"{name}-dst") == canonical(src)


def test_static_scales_have_the_layouts_shape(tmp_path: Path) -> None:
    src = FIXTURES / "quark-gpt_oss-mxfp4_fp8"
    convert_checkpoint(src, tmp_path / "there", CT)
    there = stored(tmp_path / "there")
    experts = "model.layers.0.mlp.experts.3"
    scale = stored(src)[f"{experts}.gate_up_proj.input_scale"]
    for half in ("gate_proj", "up_proj"):
        assert torch.equal(there[f"{experts}.{half}.input_scale"], scale.reshape(1))
    there[f"{experts}.up_proj.input_scale"] *= 2
    save_file(there, tmp_path / "there" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.3\.gate_up_proj: the inputs of gate and up have scales"):
        convert_checkpoint(tmp_path / "there", tmp_path / "back", QUARK)


def test_experts_of_gpt_oss_that_differ(tmp_path: Path) -> None:
    """One expert unquantised, which only Quark's and compressed-tensors' layouts can say."""
    exclude = ["*self_attn*", "lm_head", "*experts.1.*"]
    quantize_checkpoint(FIXTURES / "bf16-gpt_oss", tmp_path / "src", "w_mxfp4", exclude=exclude)
    convert_checkpoint(tmp_path / "src", tmp_path / "there", CT)
    assert canonical(tmp_path / "there") == canonical(tmp_path / "src")
    convert_checkpoint(tmp_path / "there", tmp_path / "back", QUARK)
    assert same(tmp_path / "back", tmp_path / "src")
    with pytest.raises(ArgumentError, match=r"experts\.1\..* cannot be written in the gpt-oss layout.* this is none"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", GPT_OSS)


def test_gate_and_up_that_cannot_be_one(copy: Callable[[str], Path], tmp_path: Path) -> None:
    src = copy("llmcompressor-gpt_oss-mxfp4")
    config = json.loads((src / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    config["quantization_config"]["config_groups"]["group_1"] = group | {
        "targets": ["re:.*experts.2.up_proj"],
        "input_activations": None,
    }
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts\.2\.gate_up_proj: gate and up are to be one.*w_mxfp4$"):
        convert_checkpoint(src, tmp_path / "dst", QUARK)


# --- refusals


@pytest.mark.parametrize(
    ("name", "layout", "says"),
    [
        (
            "quark-mixtral-mxfp6_e3m2",
            CT,
            r"experts\.0\.down_proj cannot .* no weights in mxfp6_e3m2, only in mxfp4, mxfp6_e2m3",
        ),
        ("quark-qwen3_moe-mxfp8_block32x32-file", CT, "no scales that 32 rows share"),
        ("quark-qwen3_moe-mxfp4_weight_only", GPT_OSS, "that of gpt_oss models and not of qwen3_moe"),
        ("quark-gpt_oss-mxfp4", GPT_OSS, "no words for activation formats, and this is w_mxfp4_a_mxfp4"),
        ("quark-gpt_oss-mxfp4_fp8", GPT_OSS, "no words for activation formats, and this is w_mxfp4_a_fp8"),
        ("quark-gpt_oss-mxfp6_e2m3", GPT_OSS, "experts in w_mxfp4 .* this is w_mxfp6_e2m3_a_mxfp6_e2m3"),
    ],
)
def test_no_words(tmp_path: Path, name: str, layout: str, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        convert_checkpoint(FIXTURES / name, tmp_path / "dst", layout)
    assert list(tmp_path.iterdir()) == []


def test_activations_without_words(tmp_path: Path) -> None:
    quantize_checkpoint(FIXTURES / "bf16-qwen3_moe", tmp_path / "src", "w_mxfp4_a_mxfp6_e3m2")
    with pytest.raises(ArgumentError, match="no activations in mxfp6_e3m2"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", CT)


def test_attention_in_gpt_oss(tmp_path: Path) -> None:
    quantize_checkpoint(FIXTURES / "bf16-gpt_oss", tmp_path / "src", "w_mxfp4", exclude=["lm_head"])
    with pytest.raises(
        ArgumentError, match=r"self_attn\.\w_proj cannot .* nothing else quantised, and this is w_mxfp4"
    ):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", GPT_OSS)


def test_refusals(tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    quark = FIXTURES / "quark-qwen3_moe-mxfp4"
    with pytest.raises(ArgumentError, match="unknown layout 'gguf'; expected quark, compressed-tensors, gpt-oss"):
        convert_checkpoint(quark, dst, "gguf")
    with pytest.raises(ArgumentError, match="max_shard_size 'big'"):
        convert_checkpoint(quark, dst, CT, max_shard_size="big")
    with pytest.raises(CheckpointError, match="is in the quark layout already"):
        convert_checkpoint(quark, dst, QUARK)
    with pytest.raises(CheckpointError, match=r"no weights in MX formats.*mxperts quantize --format gpt-oss"):
        convert_checkpoint(FIXTURES / "bf16-gpt_oss", dst, GPT_OSS)
    assert list(tmp_path.iterdir()) == []
    dst.mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        convert_checkpoint(quark, dst, CT)


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """They have a place in two of the layouts; gpt-oss's has a dimension of blocks."""
    src = tmp_path / "src"
    src.mkdir()
    experts, config = "model.layers.0.mlp.experts", {"model_type": "gpt_oss", "hidden_size": 64}
    tensors = {f"{experts}.gate_up_proj": torch.randn(2, 64, 96), f"{experts}.down_proj": torch.randn(2, 48, 64)}
    save_file(tensors, src / "model.safetensors")
    (src / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(src, tmp_path / "quark", "w_mxfp4")
    convert_checkpoint(tmp_path / "quark", tmp_path / "ct", CT)
    assert canonical(tmp_path / "ct") == canonical(tmp_path / "quark")
    with pytest.raises(CheckpointError, match=r"down_proj: rows of 24 bytes are no whole number of blocks"):
        convert_checkpoint(tmp_path / "quark", tmp_path / "dst", GPT_OSS)


def test_a_disk_that_is_too_small_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(CheckpointError, match="still needs"):
        convert_checkpoint(FIXTURES / "quark-qwen3_moe-mxfp4", tmp_path / "dst", CT)
    assert not (tmp_path / "dst").exists()


# --- interruption


@pytest.mark.parametrize("after", range(7))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=["interrupt", "full disk"])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException
) -> None:
    """At every point where something is made durable: manifest, then a file and the manifest for each of three."""
    src, dst, size = FIXTURES / FROM_GPT_OSS[1], tmp_path / "dst", 10_000
    convert_checkpoint(src, tmp_path / "uninterrupted", QUARK, max_shard_size=size)
    real, left = os.fsync, after

    def fsync(fd: int) -> None:
        nonlocal left
        if left == 0:
            raise error
        left -= 1
        real(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            convert_checkpoint(src, dst, QUARK, max_shard_size=size)
    assert not dst.exists()
    done = convert_checkpoint(src, dst, QUARK, max_shard_size=size)
    assert (done.files, done.resumed) == (3, max(0, after - 1) // 2)
    assert {p.name: p.read_bytes() for p in dst.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "uninterrupted").iterdir()
    }
    assert not (tmp_path / "dst.partial").exists()


def test_another_layout_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    src, dst = FIXTURES / FROM_GPT_OSS[0], tmp_path / "dst"
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(src, dst, QUARK, progress=interrupt)
    for changed, what in (({"format": CT}, "format"), ({"max_shard_size": 10_000}, "shards")):
        with pytest.raises(CheckpointError, match=f"another .*{what}"):
            convert_checkpoint(src, dst, **({"format": QUARK} | changed))
