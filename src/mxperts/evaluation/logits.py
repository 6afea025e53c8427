"""Logits of the base, every one of them: in memory, or mapped from a temporary file where there are too many."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.evaluation.divergence import TokenMetrics, log_softmax

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

    Attributes:
        logits: [rows, vocabulary].

    Raises:
        ArgumentError: the temporary folder has too little room.
    """

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype, *, memory_limit: int = MEMORY_LIMIT) -> None:
        nbytes = rows * vocabulary * dtype.itemsize
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if nbytes <= memory_limit:
            self.logits = torch.empty(rows, vocabulary, dtype=dtype)
            return
        self._folder = tempfile.TemporaryDirectory(prefix="mxperts-logits-", ignore_cleanup_errors=True)
        free = shutil.disk_usage(self._folder.name).free
        if nbytes > free:
            raise ArgumentError(
                f"the base's logits take {nbytes / 2**30:.1f} GiB but {tempfile.gettempdir()} has "
                f"{free / 2**30:.1f} GiB free; evaluate fewer tokens (max_tokens), keep the most likely tokens only "
                "(top_k), or set TMPDIR to a larger disk"
            )
        file = str(Path(self._folder.name) / "logits")
        self.logits = torch.from_file(file, shared=True, size=rows * vocabulary, dtype=dtype).view(rows, vocabulary)

    @classmethod
    def of(cls, logits: Tensor) -> LogitStore:
        """A store of these logits [rows, vocabulary], which are not copied."""
        store = cls(0, logits.shape[1], logits.dtype)
        store.logits = logits
        return store

    @property
    def in_memory(self) -> bool:
        """Whether the logits are in memory rather than in a temporary file."""
        return self._folder is None

    @property
    def vocabulary(self) -> int:
        """Logits a token."""
        return self.logits.shape[1]

    def keep(self, rows: slice, logits: Tensor, targets: Tensor) -> None:
        """Take the logits [n, vocabulary] of some rows; what really comes does not matter here."""
        self.logits[rows] = logits.cpu()

    def compare(self, rows: slice, logits: Tensor, targets: Tensor) -> TokenMetrics:
        """The metrics of another model's logits [n, vocabulary] of some rows; see ``TokenMetrics.of``."""
        return TokenMetrics.of(logits, self.logits[rows].to(logits.device), targets)

    def most_likely(self, row: int, count: int) -> list[tuple[int, float]]:
        """The base's most likely tokens in one row, and their probabilities."""
        return most_likely(log_softmax(self.logits[row]), count)


def most_likely(log_probabilities: Tensor, count: int) -> list[tuple[int, float]]:
    """The tokens of the largest log-probabilities [vocabulary] and their probabilities; equals by number."""
    values, ids = log_probabilities.sort(descending=True, stable=True)
    return list(zip(ids[:count].tolist(), values[:count].exp().tolist(), strict=True))
