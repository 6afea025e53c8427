"""Which model a checkpoint is, told without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mxperts.checkpoint import Checkpoint
from mxperts.checkpoint.reader import CONFIG, INDEX

SAMPLES, SAMPLE = 256, 4096
"""How many pieces of every file are looked at, and their bytes."""


def model_digest(path_or_id: str | Path) -> str:
    """SHA-256 of a checkpoint: its config, and of every safetensors file the name, size, header and evenly spread
    samples, one MiB in all; files of up to that size are read whole.

    Args:
        path_or_id: a folder, or the id of a model on the hub, which is downloaded if it is not in the cache.

    Raises:
        CheckpointError: the folder is no checkpoint.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(path_or_id), allow_patterns=[CONFIG, "*.safetensors", INDEX]))
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for file in sorted(Checkpoint.open(folder).files):
        size = file.stat().st_size
        digest.update(f"\n{file.name} {size}\n".encode())
        with file.open("rb") as f:
            if size <= SAMPLES * SAMPLE:
                digest.update(f.read())
                continue
            start = f.read(8)
            digest.update(start + f.read(int.from_bytes(start, "little")))
            for i in range(SAMPLES):
                f.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(f.read(SAMPLE))
    return digest.hexdigest()
