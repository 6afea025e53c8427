"""Making one checkpoint of another, step by step, with one step's tensors in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mxperts.checkpoint.inspect import KINDS
from mxperts.checkpoint.reader import CONFIG, PICKLES, Checkpoint
from mxperts.checkpoint.safetensors_file import Entry
from mxperts.checkpoint.writer import CheckpointWriter
from mxperts.errors import CheckpointError

_NOT_CARRIED = (*PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf")
_LARGEST_CARRIED = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step: a part of the source and what becomes of it.

    Attributes:
        outputs: headers of what is written.
        make: gives the tensors of ``outputs``, one after the other.
        nbytes: bytes of the part.
        kind: see ``mxperts.checkpoint.inspect.KINDS``.
    """

    outputs: tuple[Entry, ...]
    make: Callable[[], Iterable[Tensor]]
    nbytes: int
    kind: str

    @property
    def size(self) -> int:
        """Bytes of ``outputs``."""
        return sum(entry.nbytes for entry in self.outputs)


def sizes(shards: Mapping[str, Sequence[Job]]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the source and of the result, by kind."""
    before, after = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for job in (job for jobs in shards.values() for job in jobs):
        before[job.kind] += job.nbytes
        after[job.kind] += job.size
    return before, after


def rewrite(
    checkpoint: Checkpoint,
    dst: Path,
    config: Mapping[str, Any],
    shards: Mapping[str, Sequence[Job]],
    settings: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Run all steps; ``<dst>.partial`` holds the work until all is there, and an interrupted run goes on from it.

    Args:
        checkpoint: the source; its tokenizer and other small files are copied.
        dst: folder to write; must not exist.
        config: the result's config.json.
        shards: the steps by file.
        settings: what, besides the source, determines every byte of the result; see ``CheckpointWriter``.
        progress: called with bytes of the source done and in total.

    Returns:
        How many files an earlier, interrupted run had finished.

    Raises:
        CheckpointError: ``dst`` exists, ``<dst>.partial`` was begun with other settings, or the disk is too small.
    """
    writer = CheckpointWriter(dst, {"source": state(checkpoint)} | dict(settings))
    resumed = writer.finished
    check_space(writer, shards)
    done, total = 0, sum(job.nbytes for jobs in shards.values() for job in jobs)
    progress = progress or (lambda done, total: None)

    def advance(job: Job) -> None:
        nonlocal done
        done += job.nbytes
        progress(done, total)

    for shard, jobs in shards.items():
        if shard in resumed:
            done += sum(job.nbytes for job in jobs)
            progress(done, total)
        else:
            write_jobs(writer, shard, jobs, advance)
            checkpoint.close()  # or the mapped pages of all files would count as this process's memory
    writer.finish(config, carried(checkpoint.path))
    return len(resumed)


def write_jobs(
    writer: CheckpointWriter, shard: str, jobs: Sequence[Job], advance: Callable[[Job], None] = lambda job: None
) -> None:
    """Write one file; ``advance`` is called after every step."""
    # largest items first, so that all tensors are aligned; the items of one step are alike
    aligned = sorted(jobs, key=lambda job: -job.outputs[0].dtype.itemsize)

    def tensors() -> Iterator[Tensor]:
        for job in aligned:
            yield from job.make()
            advance(job)

    writer.write_shard(shard, [entry for job in aligned for entry in job.outputs], tensors())


def state(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of the source's files, by which it is known again."""
    stats = {file.name: file.stat() for file in [checkpoint.path / CONFIG, *checkpoint.files]}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def check_space(writer: CheckpointWriter, shards: Mapping[str, Sequence[Job]]) -> None:
    """So that a run does not fail after hours on what could be known before."""
    needed = sum(job.size for shard, jobs in shards.items() if shard not in writer.finished for job in jobs)
    free = shutil.disk_usage(writer.partial).free
    if needed > free:
        raise CheckpointError(
            f"{writer.dst} still needs {needed / 1e6:.1f} MB, but the disk has {free / 1e6:.1f} MB free"
        )


def carried(folder: Path) -> list[Path]:
    """The tokenizer and what else is small and no weights."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and file.name != CONFIG
        and not file.name.endswith(".index.json")
        and file.suffix not in _NOT_CARRIED
        and file.stat().st_size <= _LARGEST_CARRIED
    ]
