"""Checkpoint folders are written whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mxperts.checkpoint import Checkpoint, CheckpointWriter
from mxperts.checkpoint.safetensors_file import Entry
from mxperts.errors import CheckpointError

SETTINGS = {"scheme": "w_mxfp4", "source": {"a": [1, 2]}}
CONFIG = {"model_type": "test"}


def entry(name: str) -> Entry:
    return Entry(name=name, dtype=torch.float32, shape=(3,))


def write(writer: CheckpointWriter, shard: str) -> None:
    writer.write_shard(f"{shard}.safetensors", [entry(shard)], [torch.full((3,), float(ord(shard)))])


def test_writes_shards_index_config_and_files(tmp_path: Path) -> None:
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    dst = tmp_path / "deep" / "dst"
    writer = CheckpointWriter(dst, SETTINGS)
    write(writer, "a")
    write(writer, "b")
    assert not dst.exists()
    checkpoint = writer.finish(CONFIG, [extra])
    assert sorted(p.name for p in dst.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert not writer.partial.exists()
    assert checkpoint.config == CONFIG
    assert checkpoint.tensor("b").tolist() == [98.0] * 3
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 24},
        "weight_map": {"a": "a.safetensors", "b": "b.safetensors"},
    }


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "dst", SETTINGS)
    writer.write_shard("model.safetensors", [entry("a")], [torch.zeros(3)])
    writer.finish(CONFIG)
    assert sorted(p.name for p in (tmp_path / "dst").iterdir()) == ["config.json", "model.safetensors"]


def test_goes_on_from_finished_shards(tmp_path: Path) -> None:
    write(CheckpointWriter(tmp_path / "dst", SETTINGS), "a")
    again = CheckpointWriter(tmp_path / "dst", SETTINGS)
    assert again.finished == {"a.safetensors"}
    (again.partial / "a.safetensors").write_bytes(b"short")
    assert CheckpointWriter(tmp_path / "dst", SETTINGS).finished == frozenset()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path / "dst", SETTINGS)
    with pytest.raises(CheckpointError, match="another scheme; run with the same again to go on, or delete"):
        CheckpointWriter(tmp_path / "dst", SETTINGS | {"scheme": "w_mxfp6_e2m3"})
    with pytest.raises(CheckpointError, match="another extra, source"):
        CheckpointWriter(tmp_path / "dst", SETTINGS | {"source": {"a": [1, 3]}, "extra": 1})


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"settings": 1, "shards": {}}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, manifest: str | None) -> None:
    writer = CheckpointWriter(tmp_path / "dst", SETTINGS)
    (file,) = writer.partial.iterdir()
    write(writer, "a")
    file.unlink() if manifest is None else file.write_text(manifest)
    with pytest.raises(CheckpointError, match="delete the folder and run again"):
        CheckpointWriter(tmp_path / "dst", SETTINGS)


def test_dst_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    with pytest.raises(CheckpointError, match="exists; name another folder"):
        CheckpointWriter(tmp_path / "dst", SETTINGS)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists"):
        CheckpointWriter(tmp_path / "link", SETTINGS)
    writer = CheckpointWriter(tmp_path / "late", SETTINGS)
    write(writer, "a")
    (tmp_path / "late").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        writer.finish(CONFIG)


def test_an_invalid_result_gets_no_name(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "dst", SETTINGS)
    write(writer, "a")
    with pytest.raises(CheckpointError, match="modules_to_not_convert"):
        writer.finish({"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": 1}})
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interruption_leaves_finished_shards_only(tmp_path: Path, error: BaseException) -> None:
    def tensors() -> Iterator[Tensor]:
        yield torch.zeros(3)
        raise error

    writer = CheckpointWriter(tmp_path / "dst", SETTINGS)
    write(writer, "a")
    with pytest.raises((KeyboardInterrupt, CheckpointError), match=r"no space left|^$"):
        writer.write_shard("b.safetensors", [entry("b"), entry("c")], tensors())
    assert not (tmp_path / "dst").exists()
    assert {p.suffix for p in writer.partial.iterdir()} == {".safetensors", ".json"}
    again = CheckpointWriter(tmp_path / "dst", SETTINGS)
    assert again.finished == {"a.safetensors"}
    write(again, "b")
    again.finish(CONFIG)
    assert set(Checkpoint.open(tmp_path / "dst").names) == {"a", "b"}


def test_other_errors_of_the_disk_are_not_renamed(tmp_path: Path) -> None:
    def tensors() -> Iterator[Tensor]:
        raise OSError(errno.EIO, "Input/output error")
        yield

    with pytest.raises(OSError, match="Input/output error"):
        CheckpointWriter(tmp_path / "dst", SETTINGS).write_shard("a.safetensors", [entry("a")], tensors())
