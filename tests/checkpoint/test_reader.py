"""Opening checkpoints: everything that exporters wrote, and everything that may be wrong with a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mxperts as mx
from mxperts.checkpoint import Checkpoint
from mxperts.errors import CheckpointError

QUARK = "quark-qwen3_moe-mxfp4"
SHARDED = "gpt_oss-gpt_oss-mxfp4-sharded"
EXPERT = "model.layers.0.mlp.experts.1.up_proj"
REFUSED = {
    "llmcompressor-gpt_oss-mxfp4-file-unusable": "do not fit together",
    "compressed_tensors-qwen3_moe-mxfp4xfp8": "group_size",
}


def all_fixtures() -> list[str]:
    folder = Path(__file__).parent.parent / "fixtures" / "checkpoints"
    return sorted(f.parent.name for f in folder.glob("*/config.json"))


def sha256(values: Tensor) -> str:
    """As the exporters' ``expected.json`` has it: of bf16, -0 written as +0."""
    bf16 = (values.float() + 0.0).to(torch.bfloat16).contiguous()
    return hashlib.sha256(bf16.view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", [n for n in all_fixtures() if n not in REFUSED])
def test_decodes_as_the_exporter_does(fixtures: Path, name: str) -> None:
    checkpoint = Checkpoint.open(fixtures / name)
    found = {}
    for module, t in checkpoint.mx_tensors():
        values = mx.dequantize(t)
        if checkpoint.mx[module].blocked:  # gpt-oss: the model has experts transposed
            found[module] = sha256(values.transpose(1, 2))
        else:
            found[f"{module}.weight"] = sha256(values)
    expected = fixtures / name / "expected.json"
    assert found == (json.loads(expected.read_text()) if expected.exists() else {})


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_exports_are_refused(fixtures: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        Checkpoint.open(fixtures / name)


@pytest.mark.parametrize("name", ["bf16-qwen3_moe", SHARDED])
def test_tensors_and_headers(fixtures: Path, name: str) -> None:
    checkpoint = Checkpoint.open(fixtures / name)
    stored = {k: v for file in fixtures.glob(f"{name}/model*.safetensors") for k, v in load_file(file).items()}
    assert set(checkpoint.names) == set(stored)
    for key, value in stored.items():
        assert torch.equal(checkpoint.tensor(key), value)
        info = checkpoint.info(key)
        assert (info.shape, info.nbytes) == (tuple(value.shape), value.nbytes)
        assert info.file.parent == fixtures / name
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        checkpoint.info("nothing")
    with pytest.raises(CheckpointError, match="no quantised module nothing"):
        checkpoint.mx_tensor("nothing")


def test_tensors_are_mapped(fixtures: Path) -> None:
    checkpoint = Checkpoint.open(fixtures / QUARK)
    name = f"{EXPERT}.weight"
    assert checkpoint.tensor(name).data_ptr() == checkpoint.mx_tensor(EXPERT).packed.data_ptr()


def test_opening_reads_headers_only(copy: Callable[[str], Path]) -> None:
    """The data may as well be a hole in the file."""
    folder = copy(QUARK)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with file.open("rb+") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        f.truncate(8 + length)
        f.truncate(size)
    assert len(Checkpoint.open(folder).mx) == 12


def test_scales_of_several_rows(fixtures: Path) -> None:
    t = Checkpoint.open(fixtures / "quark-qwen3_moe-mxfp8_block32x32-file").mx_tensor(EXPERT)
    assert t.scales.shape == (64, 1)
    assert (t.scales[:32] == t.scales[0]).all()


def test_a_last_block_that_is_not_full(copy: Callable[[str], Path]) -> None:
    """As Quark writes 48 values: 24 bytes of codes, two scales."""
    folder = copy(QUARK)
    w = torch.randn(48, 32, dtype=torch.bfloat16), torch.randn(32, 48, dtype=torch.bfloat16)
    up, down = (mx.quantize(x, "mxfp4") for x in w)

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            t = down if ".down_proj" in name else up
            tensors[name] = (t.scales if name.endswith("_scale") else t.packed[:, : t.k // 2]).clone()

    edit(folder, narrow)
    assert torch.equal(
        mx.dequantize(Checkpoint.open(folder).mx_tensor(EXPERT.replace("up_", "down_"))), mx.dequantize(down)
    )


# --- damage


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def replace(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: value})


U8 = torch.uint8
DAMAGE = {
    "no scales": (drop(f"{EXPERT}.weight_scale"), [f"{EXPERT}.weight", "U8 [64, 16]", "no scales"]),
    "no codes": (drop(f"{EXPERT}.weight"), [f"{EXPERT}.weight_scale", "no file has their codes"]),
    "scales of wrong shape": (
        replace(f"{EXPERT}.weight_scale", torch.zeros(64, 2, dtype=U8)),
        [f"{EXPERT}.weight_scale", "U8 [64, 2]", "[64, 1]"],
    ),
    "scales of wrong dtype": (
        replace(f"{EXPERT}.weight_scale", torch.zeros(64, 1)),
        [f"{EXPERT}.weight_scale", "F32 [64, 1]", "U8 or F8_E8M0"],
    ),
    "codes of wrong dtype": (
        replace(f"{EXPERT}.weight", torch.zeros(64, 16, dtype=torch.bfloat16)),
        [f"{EXPERT}.weight", "BF16 [64, 16]", "U8"],
    ),
    "fp8 codes for fp4": (
        replace(f"{EXPERT}.weight", torch.zeros(64, 16).to(torch.float8_e4m3fn)),
        [f"{EXPERT}.weight", "F8_E4M3 [64, 16]"],
    ),
    "codes without dimensions": (replace(f"{EXPERT}.weight", torch.zeros(16, dtype=U8)), ["U8 [16]"]),
    "an expert of other shape": (
        lambda t: t.update(
            {f"{EXPERT}.weight": torch.zeros(32, 16, dtype=U8), f"{EXPERT}.weight_scale": torch.zeros(32, 1, dtype=U8)}
        ),
        ["expert 1 has", "up_proj [32, 32]"],
    ),
    "an unquantised expert": (
        lambda t: (t.pop(f"{EXPERT}.weight_scale"), t.update({f"{EXPERT}.weight": torch.zeros(64, 32)})),
        [f"{EXPERT}.weight", "F32 [64, 32]", "expected mxfp4"],
    ),
    "an expert without a projection": (
        lambda t: (t.pop(f"{EXPERT}.weight"), t.pop(f"{EXPERT}.weight_scale")),
        ["no file has the weight of", EXPERT],
    ),
    "the last expert missing": (
        lambda t: [t.pop(k) for k in list(t) if ".experts.3." in k],
        ["no file has the weight of", "experts.3."],
    ),
    "scales of a module that is not quantised": (
        replace("lm_head.weight_scale", torch.zeros(32, 1, dtype=U8)),
        ["lm_head.weight_scale", "lm_head is not quantised"],
    ),
    "fused experts that are not quantised": (
        replace("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(4, 32, 128)),
        ["experts.gate_up_proj is F32 [4, 32, 128]", "expected mxfp4"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors(copy: Callable[[str], Path], damage: str) -> None:
    folder = copy(QUARK)
    change, says = DAMAGE[damage]
    edit(folder, change)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    for text in says:
        assert text in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "value", "says"),
    [
        ("_blocks", torch.zeros(4, 128, 1, 15, dtype=U8), "last dimension to be 16"),
        ("_blocks", torch.zeros(4, 128, 2, 16, dtype=U8), r"expected U8 or F8_E8M0 \[4, 128, 2\]"),
        ("_scales", torch.zeros(4, 128, dtype=U8), r"\[4, 128\]"),
    ],
)
def test_damaged_gpt_oss(copy: Callable[[str], Path], suffix: str, value: Tensor, says: str) -> None:
    folder = copy("gpt_oss-gpt_oss-mxfp4")
    edit(folder, replace(f"model.layers.0.mlp.experts.gate_up_proj{suffix}", value))
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(f"{EXPERT}.input_scale"), "no file has .*input_scale"),
        (replace(f"{EXPERT}.input_scale", torch.zeros(2)), r"F32 \[2\]; expected one number"),
    ],
)
def test_damaged_input_scales(copy: Callable[[str], Path], change: Any, says: str) -> None:
    folder = copy("quark-qwen3_moe-mxfp4_fp8")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(folder)


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NAME = "model.norm.weight"
FILE_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "too short"),
    "truncated data": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "truncated"),
    "truncated header": (lambda f: f.write_bytes(f.read_bytes()[:100]), "truncated"),
    "too much data": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "damaged"),
    "absurd header length": (lambda f: f.write_bytes(b"\xff" * 8 + f.read_bytes()[8:]), "not a safetensors file"),
    "no JSON": (lambda f: f.write_bytes(f.read_bytes().replace(b"{", b"[", 1)), "not JSON"),
    "no UTF-8": (lambda f: f.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe{}"), "not JSON"),
    "no object": (lambda f: f.write_bytes(struct.pack("<Q", 2) + b"[]"), "no JSON object"),
    "unknown dtype": (lambda f: rewrite_header(f, lambda h: h[NAME].update(dtype="F5")), "has dtype 'F5'"),
    "negative shape": (lambda f: rewrite_header(f, lambda h: h[NAME].update(shape=[-32])), "header entry"),
    "no offsets": (lambda f: rewrite_header(f, lambda h: h[NAME].pop("data_offsets")), "header entry"),
    "shape beyond data": (lambda f: rewrite_header(f, lambda h: h[NAME].update(shape=[64])), "128 bytes, but has 64"),
    "overlap": (lambda f: rewrite_header(f, lambda h: h[NAME].update(data_offsets=[0, 64])), "begin at byte"),
    "hole": (lambda f: rewrite_header(f, lambda h: h.pop(NAME)), "begin at byte|damaged"),
    "missing": (lambda f: f.unlink(), "neither model.safetensors nor"),
}


@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_damaged_file(copy: Callable[[str], Path], damage: str) -> None:
    folder = copy("bf16-qwen3_moe")
    change, says = FILE_DAMAGE[damage]
    change(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(folder)


def reindex(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index = change(index) or index
    file.write_text(json.dumps(index))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "..",
        "",
        "x.bin",
    ],
)
def test_an_index_names_files_beside_it(copy: Callable[[str], Path], file: str) -> None:
    folder = copy(SHARDED)
    save_file({"x": torch.zeros(1)}, folder.parent / "x.safetensors")
    reindex(folder, lambda i: i["weight_map"].update({"x": file}))
    with pytest.raises(CheckpointError, match="names the file"):
        Checkpoint.open(folder)


def test_damaged_index(copy: Callable[[str], Path]) -> None:
    folder = copy(SHARDED)
    reindex(folder, lambda i: i["weight_map"].update({"x": shards(folder)[0].name}))
    with pytest.raises(CheckpointError, match="says that x is in"):
        Checkpoint.open(folder)
    reindex(folder, lambda i: {"weight_map": ["x"]})
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint.open(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        Checkpoint.open(folder)


def test_missing_shard(copy: Callable[[str], Path]) -> None:
    folder = copy(SHARDED)
    gone = shards(folder)[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"names {gone.name}, which is missing"):
        Checkpoint.open(folder)


def test_a_single_file_beside_shards_is_ambiguous(copy: Callable[[str], Path]) -> None:
    folder = copy(SHARDED)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="remove one of them"):
        Checkpoint.open(folder)


def test_a_tensor_that_the_index_does_not_name_is_no_part(copy: Callable[[str], Path]) -> None:
    folder = copy(SHARDED)
    reindex(folder, lambda i: i["weight_map"].pop(NAME) and None)
    assert NAME not in Checkpoint.open(folder).names


def test_files_may_be_links(copy: Callable[[str], Path]) -> None:
    """The hub's cache is made of them."""
    folder = copy(SHARDED)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for i, shard in enumerate(shards(folder)):
        shard.rename(blobs / str(i))
        shard.symlink_to(blobs / str(i))
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.mx) == 2
    checkpoint.mx_tensor("model.layers.0.mlp.experts.down_proj")


def test_folders_without_a_checkpoint(tmp_path: Path, fixtures: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot read"):
        Checkpoint.open(tmp_path)
    shutil.copy(fixtures / "bf16-qwen3_moe" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin may hold pickled code"):
        Checkpoint.open(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            Checkpoint.open(tmp_path)


def test_what_safetensors_writes_we_read(tmp_path: Path, fixtures: Path) -> None:
    shutil.copy(fixtures / "bf16-qwen3_moe" / "config.json", tmp_path)
    tensors = {
        "a": torch.zeros(0, 3),
        "b": torch.tensor(1.0),
        "c": torch.ones(3, dtype=torch.bool),
        "d": torch.ones(2, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, value in tensors.items():
        assert torch.equal(checkpoint.tensor(name), value)


def test_what_we_write_safetensors_reads(tmp_path: Path) -> None:
    from mxperts.checkpoint.safetensors_file import Entry, write_file

    tensors = {
        "f32": torch.tensor(1.0),
        "bf16": torch.randn(3, 5).to(torch.bfloat16).T,
        "e4m3": torch.randn(3).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 2, dtype=torch.uint8),
    }
    entries = [Entry(name=n, dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items()]
    write_file(tmp_path / "x.safetensors", entries, iter(tensors.values()))
    with safe_open(tmp_path / "x.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
        for name, value in tensors.items():
            assert torch.equal(f.get_tensor(name).float(), value.float())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
