"""What every test runs under: memory that nothing has written holds poison instead of, by luck, zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# The same examples in every run; --hypothesis-profile=default draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# Tensors here are small, and test processes run side by side: threads would only wait for each other.
torch.set_num_threads(1)

# torch looks up once which functions "with torch.device" is about; it must not find the poisoned ones.
with torch.device("meta"):
    torch.ones(1)


def poison(t: Tensor) -> Tensor:
    """Fill with NaN, or with the largest integer: as a scale byte that is NaN, as an index it is out of range."""
    if t.layout is torch.strided and not t.is_meta:
        with torch.no_grad():
            if t.is_floating_point() or t.is_complex():
                t.fill_(torch.nan)
            else:
                t.fill_(True if t.dtype is torch.bool else torch.iinfo(t.dtype).max)
    return t


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The allocator with its result poisoned."""

    def allocate_poisoned(*args: object, **kwargs: object) -> Tensor:
        return poison(allocate(*args, **kwargs))

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison what ``torch.empty``, ``torch.empty_like`` and ``Tensor.new_empty`` return."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
