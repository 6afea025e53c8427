"""What the tests of the CPU backend share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mxperts.backend.cpu.paths import PATHS, use_path


@pytest.fixture
def forced(path: str) -> Iterator[None]:
    """Everything on the path that the test is parametrised with; skips where this CPU does not have it."""
    (missing,) = (p.missing() for p in PATHS if p.name == path)
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    with use_path(path):
        yield
