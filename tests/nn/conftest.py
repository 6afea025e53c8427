"""A backend with a weight layout of its own, which runs everything."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import mxperts as mx
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


@pytest.fixture
def cpu() -> None:
    """What "auto" takes on a CPU as it is."""
    assert mx.explain(weight="mxfp4").backend.name == "cpu"


@pytest.fixture(params=["reference", "reversing", "cpu"])
def either_layout(request: pytest.FixtureRequest) -> None:
    """Run a test with a backend that takes weights as they are, and with two that have layouts of their own."""
    request.getfixturevalue(request.param)
