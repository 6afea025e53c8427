"""What commands that write a checkpoint say while they work, and when they are interrupted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from mxperts.checkpoint.writer import partial_folder
from mxperts.cli.output import say

EVERY = 2.0
"""Seconds between two lines of progress."""


class Progress:
    """Says on stderr, now and then, how far the work is and how long the rest will take."""

    def __init__(self) -> None:
        self.start = self.said = time.monotonic()
        self.begun_at: int | None = None
        self.total = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.begun_at is None or total != self.total:  # or it is another step of the work
            self.begun_at, self.start, self.total = done, now, total
        if now - self.said >= EVERY and done > self.begun_at:
            self.said = now
            left = (now - self.start) * (total - done) / (done - self.begun_at)
            say(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, about {left:.0f} s left")


@contextlib.contextmanager
def resumable(dst: Path, *, dry_run: bool) -> Iterator[None]:
    """Says that the work on ``dst`` goes on from an earlier run, and when it is interrupted, that it can."""
    partial = partial_folder(dst)
    if partial.exists() and not dry_run:
        say(f"going on from {partial}, which an interrupted run left")
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from {partial}")
        raise
