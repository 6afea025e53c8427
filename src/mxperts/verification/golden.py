"""The golden bytes that come with mxperts: a SHA-256 for every file that ``write`` would write.

Numbers are little-endian, rows one after the other, without a header. Every NaN of a float is the one pattern that
``canonical`` gives it; a layer's zeros have no sign.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mxperts.errors import ArgumentError
from mxperts.verification.case import Case
from mxperts.verification.definition import Bits

DIGESTS = Path(__file__).with_name("golden.sha256")
"""Lines as ``sha256sum`` writes them: digest, two blanks, name."""
INDEX = "index.json"


@cache
def digests() -> Mapping[str, str]:
    """The digest of every golden file, by name."""
    lines = DIGESTS.read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def digest(data: Bits) -> str:
    """The SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()


def write(folder: Path, cases: Iterable[Case], progress: Callable[[str], None]) -> None:
    """Write inputs and answers of cases as raw bytes, with ``golden.sha256`` and the shapes in ``index.json``.

    Args:
        folder: a new folder; it gets its name when it is whole.
        cases: what to write.
        progress: called with the name of every case.

    Raises:
        ArgumentError: ``folder`` exists.
    """
    if folder.exists():
        raise ArgumentError(f"{folder} exists; name a folder that does not")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        _write(Path(temporary) / "golden", cases, progress)
        (Path(temporary) / "golden").rename(folder)


def _write(folder: Path, cases: Iterable[Case], progress: Callable[[str], None]) -> None:
    folder.mkdir()
    index: dict[str, dict[str, Any]] = {}
    for case in cases:
        progress(case.name)
        for name, data in (case.inputs() | case.answer_files()).items():
            if name not in index:
                index[name] = {"dtype": data.dtype.name, "shape": list(data.shape), "sha256": digest(data)}
                file = folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(np.ascontiguousarray(data).data)
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    lines = [f"{entry['sha256']}  {name}\n" for name, entry in index.items()]
    (folder / DIGESTS.name).write_text("".join(lines), encoding="ascii")
