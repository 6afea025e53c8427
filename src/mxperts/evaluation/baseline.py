"""What the base model says about a text, kept so that every other model can be compared with it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.evaluation.router import Choices
from mxperts.evaluation.size import Size

MEMORY_LIMIT = 4 * 2**30
"""Bytes of logits that are kept in memory; more go to a temporary file."""


class LogitStore:
    """Logits of all scored tokens, in the dtype in which the model gives them: nothing is lost.

    They are kept in memory up to ``MEMORY_LIMIT`` and else mapped from a file in the temporary folder, which is deleted
    with the store.

    Args:
        rows: scored tokens.
        vocabulary: logits a token.
        dtype: of the logits.
        memory_limit: bytes, instead of ``MEMORY_LIMIT``.

    Raises:
        ArgumentError: the temporary folder has too little room.
    """

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype, *, memory_limit: int = MEMORY_LIMIT) -> None:
        nbytes = rows * vocabulary * dtype.itemsize
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if nbytes <= memory_limit:
            self._logits = torch.empty(rows, vocabulary, dtype=dtype)
            return
        self._folder = tempfile.TemporaryDirectory(prefix="mxperts-logits-", ignore_cleanup_errors=True)
        free = shutil.disk_usage(self._folder.name).free
        if nbytes > free:
            raise ArgumentError(
                f"the base's logits take {nbytes / 2**30:.1f} GiB but {tempfile.gettempdir()} has "
                f"{free / 2**30:.1f} GiB free; evaluate fewer tokens (max_tokens), or set TMPDIR to a larger disk"
            )
        file = str(Path(self._folder.name) / "logits")
        self._logits = torch.from_file(file, shared=True, size=rows * vocabulary, dtype=dtype).view(rows, vocabulary)

    @property
    def in_memory(self) -> bool:
        """Whether the logits are in memory rather than in a file."""
        return self._folder is None

    def __getitem__(self, rows: slice) -> Tensor:
        return self._logits[rows]

    def __setitem__(self, rows: slice, logits: Tensor) -> None:
        self._logits[rows] = logits


@dataclass(frozen=True, eq=False, kw_only=True)
class Baseline:
    """The base model's answers on one text.

    Attributes:
        text_hash: of the windows it was run on.
        logits: of every scored token.
        choices: of every router, for every token.
        values: number of weights, in the experts and in the whole model.
    """

    text_hash: str
    logits: LogitStore
    choices: Choices = field(repr=False)
    values: Size
