"""Golden files: torch tensors of any dtype by name in one compressed npz."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.uint8: torch.uint8}


def save(name: str, arrays: dict[str, Tensor]) -> Path:
    """Write ``tests/golden/<name>.npz``; the dtype is part of each array's name."""
    path = FOLDER / f"{name}.npz"
    bits = {f"{n}:{str(t.dtype).removeprefix('torch.')}": t.view(_BITS[t.dtype]).numpy() for n, t in arrays.items()}
    np.savez_compressed(path, **bits)
    return path


def load(name: str) -> dict[str, Tensor]:
    """The tensors of a golden file by name."""
    with np.load(FOLDER / f"{name}.npz") as file:
        found = {}
        for full in file.files:
            short, dtype = full.rsplit(":", 1)
            found[short] = torch.from_numpy(file[full]).view(_DTYPES[dtype])
        return found


def main(name: str, arrays: dict[str, Tensor]) -> None:
    """Write the file or, with ``--check``, compare with it bit for bit."""
    if "--check" not in sys.argv[1:]:
        path = save(name, arrays)
        print(f"{path}: {len(arrays)} arrays, {path.stat().st_size} bytes")
        return
    stored = load(name)
    different = [
        n
        for n, t in arrays.items()
        if n not in stored or not torch.equal(*(v.view(_BITS[v.dtype]) for v in (t, stored[n])))
    ]
    print(f"{len(arrays) - len(different)} of {len(arrays)} arrays are equal", *different, sep="\n  ")
    sys.exit(bool(different))
