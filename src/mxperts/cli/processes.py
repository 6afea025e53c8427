"""A command in several processes, which torchrun starts: one speaks for all, and all end alike."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mxperts.cli.output import say


def count() -> int:
    """How many processes run this command: 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_available() and dist.is_torchelastic_launched() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


@contextmanager
def together() -> Iterator[None]:
    """Run a command: only the first process prints, and none waits for one that failed.

    torchrun ends all processes when one ends with an error. A failed process must therefore end at once, without the
    farewell to the others that a process group's end is.
    """
    if count() == 1:
        yield
        return
    mine = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        if number() > 0:
            sys.stdout = sys.stderr = nowhere
        try:
            yield
            leave(0)
        except SystemExit as end:
            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
            raise
        finally:
            sys.stdout, sys.stderr = mine


def leave(code: int) -> None:
    """End this process' part in the group, if there is one; with an error, end the process."""
    if not dist.is_initialized():
        return
    if code == 0:
        dist.destroy_process_group()
        return
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
    os._exit(code)


def complain(message: str) -> None:
    """Tell a person of an error. Before processes have met, all fail alike and the first says it; later each does."""
    if number() == 0:
        say(message)
    elif dist.is_initialized():
        print(f"process {number()} of {count()}: {message}", file=sys.__stderr__, flush=True)


def distributed_config() -> dict[str, Any] | None:
    """How Transformers is to spread a model: experts over all processes, the rest and the batch in each of them."""
    n = count()
    return None if n == 1 else {"tp_size": n, "ep_size": n, "tp_plan": {}}


class SameLogits:
    """A logits processor by which all processes choose their next token from the first one's numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The first process' ``scores`` [batch, vocabulary]."""
        scores = scores.contiguous()
        torch.distributed.broadcast(scores, 0)
        return scores
