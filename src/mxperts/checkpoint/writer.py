"""Writing a checkpoint folder whole or not at all, shard by shard, so that an interrupted run can go on."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mxperts.checkpoint.reader import CONFIG, INDEX, SINGLE, Checkpoint
from mxperts.checkpoint.safetensors_file import Entry, read_header, replacing, write_file
from mxperts.errors import CheckpointError

_MANIFEST = "mxperts-progress.json"


class CheckpointWriter:
    """A checkpoint in the making: ``<dst>.partial`` until ``finish`` renames it to ``<dst>``.

    Args:
        dst: the folder to be.
        settings: what determines every byte of the result, as JSON; a ``.partial`` folder is resumed only if it was
            begun with the same.

    Attributes:
        finished: the shards that an earlier run wrote.

    Raises:
        CheckpointError: ``dst`` exists, or ``<dst>.partial`` was begun with other settings.
    """

    def __init__(self, dst: str | Path, settings: Mapping[str, Any]) -> None:
        self.dst = Path(dst)
        self.partial = partial_folder(self.dst)
        check_absent(self.dst)
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._sizes: dict[str, int] = {}
        if self.partial.exists() and any(self.partial.iterdir()):
            self._resume()
        else:
            with self._disk():
                self.partial.mkdir(parents=True, exist_ok=True)
                self._save_manifest()

    @property
    def finished(self) -> frozenset[str]:
        """The shards that are written."""
        return frozenset(self._sizes)

    def write_shard(self, file: str, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> None:
        """Write one shard.

        Args:
            file: its name.
            entries: what it holds.
            tensors: the tensors of ``entries``, in this order; each is asked for when the one before is written.

        Raises:
            CheckpointError: the disk is full.
        """
        with self._disk():
            write_file(self.partial / file, entries, tensors)
            self._sizes[file] = (self.partial / file).stat().st_size
            self._save_manifest()

    def finish(self, config: Mapping[str, Any], files: Iterable[Path] = ()) -> Checkpoint:
        """Write config and index, copy ``files`` into the folder, check the whole and give it its name.

        Raises:
            CheckpointError: the disk is full, the result is no valid checkpoint, or ``dst`` has come to exist.
        """
        shards = sorted(self._sizes)
        with self._disk():
            for file in files:
                shutil.copyfile(file, self.partial / file.name)
            if shards != [SINGLE]:
                headers = {shard: read_header(self.partial / shard) for shard in shards}
                size = sum(info.nbytes for header in headers.values() for info in header.values())
                weight_map = {name: shard for shard, header in headers.items() for name in header}
                index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
                _write_json(self.partial / INDEX, index)
            _write_json(self.partial / CONFIG, config)
        Checkpoint.open(self.partial)
        check_absent(self.dst)
        self.partial.rename(self.dst)
        (self.dst / _MANIFEST).unlink()
        return Checkpoint.open(self.dst)

    def _resume(self) -> None:
        manifest = self.partial / _MANIFEST
        try:
            found = json.loads(manifest.read_bytes())
            settings, sizes = dict(found["settings"]), dict(found["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{self.partial} exists, but its {_MANIFEST} is missing or damaged; delete the folder and run again"
            ) from None
        if settings != self._settings:
            keys = settings.keys() | self._settings.keys()
            changed = ", ".join(sorted(k for k in keys if settings.get(k) != self._settings.get(k)))
            raise CheckpointError(
                f"{self.partial} was begun with another {changed}; run with the same again to go on, or delete the "
                "folder to start over"
            )
        for shard, size in sizes.items():
            file = self.partial / shard
            if file.exists() and file.stat().st_size == size:
                self._sizes[shard] = size

    def _save_manifest(self) -> None:
        _write_json(self.partial / _MANIFEST, {"settings": self._settings, "shards": self._sizes})

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CheckpointError(
                f"no space left for {self.dst}: free some and run the same again, which goes on from {self.partial}"
            ) from error


def partial_folder(dst: Path) -> Path:
    """Where the work on ``dst`` is until it is finished."""
    return dst.with_name(dst.name + ".partial")


def check_absent(dst: Path) -> None:
    """Check that a folder to be written is not there yet.

    Raises:
        CheckpointError: it is.
    """
    if dst.exists() or dst.is_symlink():
        raise CheckpointError(f"{dst} exists; name another folder or delete it")


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    with replacing(file) as f:
        f.write((json.dumps(value, indent=2) + "\n").encode())
