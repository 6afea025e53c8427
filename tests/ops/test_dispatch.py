"""Which backend runs a problem, and what is said of those that do not."""

from __future__ import annotations

import pytest
import torch

import mxperts as mx
from mxperts.ops import dispatch
from mxperts.ops.dispatch import Backend, Problem, resolve

PROBLEM = Problem(op="fused_experts", device=torch.device("cpu"), dtype=torch.bfloat16, weight=mx.MXFP4)
REFUSING = Backend(name="cold", module="nowhere", refuses=lambda problem: "it is too cold", summary="a test")


def test_auto_takes_the_first_that_can_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", (REFUSING, *dispatch.BACKENDS))
    choice = mx.explain(weight="mxfp4")
    assert choice.backend.name == "cpu"
    assert choice.refused == (("cold", "it is too cold"),)
    assert str(choice).splitlines()[1] == "  not cold: it is too cold"
    assert mx.backends()["cold"] == "unavailable: it is too cold"


def test_a_named_backend_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("reference", PROBLEM).backend.name == "reference"
    with pytest.raises(mx.BackendUnavailable, match="'gpu' cannot run quantize here: the tensors are on cpu, not"):
        mx.quantize(torch.ones(32), mx.MXFP4, backend="gpu")
    monkeypatch.setattr(dispatch, "BACKENDS", (REFUSING, *dispatch.BACKENDS))
    with pytest.raises(mx.BackendUnavailable, match="'cold' cannot run fused_experts here: it is too cold"):
        resolve("cold", PROBLEM)


def test_unknown_names() -> None:
    with pytest.raises(mx.ArgumentError, match="unknown backend 'tpu'"):
        resolve("tpu", PROBLEM)
    with pytest.raises(mx.ArgumentError, match="unknown operation 'matmul'"):
        mx.explain("matmul")


def test_every_name_of_a_backend_is_listed() -> None:
    assert mx.backends().keys() == {"cpu", "gpu", "reference"}


def test_gpus_that_are_not_there_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(op="fused_experts", device=torch.device("cuda"), dtype=torch.bfloat16, weight=mx.MXFP4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve("auto", problem).backend.name == "reference"
    with pytest.raises(mx.BackendUnavailable, match="PyTorch finds no GPU"):
        resolve("gpu", problem)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(mx.BackendUnavailable, match=r"Triton is not installed; pip install mxperts\[gpu\]"):
        resolve("gpu", problem)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(mx.BackendUnavailable, match=r"Tesla T4 has compute capability 7.5, and 8.0 is needed"):
        resolve("gpu", problem)
    assert dict(resolve("auto", problem).refused)["gpu"].startswith("Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve("auto", problem).backend.name == "gpu"
    dense = Problem(op="fused_experts", device=torch.device("cuda"), dtype=torch.bfloat16)
    assert resolve("auto", dense).backend.name == "reference"
