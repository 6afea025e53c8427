"""A backend with a weight layout of its own, which runs everything."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mxperts.ops import dispatch

FOLDER = Path(__file__).parents[1] / "nn"


@pytest.fixture
def reversing(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``reversing_backend``, which "auto" now takes, and its records."""
    monkeypatch.syspath_prepend(FOLDER)
    name = "reversing_backend"
    backend = dispatch.Backend(name="reversing", module=name, refuses=lambda problem: None, summary="for tests")
    monkeypatch.setattr(dispatch, "BACKENDS", (backend, *dispatch.BACKENDS))
    module = importlib.import_module(name)
    module.reset()
    yield module
    module.reset()


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Now "auto" takes the reference, which takes weights as they are."""
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(b for b in dispatch.BACKENDS if b.name == "reference"))


@pytest.fixture(params=["reference", "reversing"])
def either_layout(request: pytest.FixtureRequest) -> None:
    """Run a test with a backend that takes weights as they are, and with one that has a layout of its own."""
    request.getfixturevalue(request.param)
