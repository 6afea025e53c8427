"""Verifying a backend: right ones pass, and every kind of wrong one is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mxperts.backend import cpu
from mxperts.errors import ArgumentError, BackendUnavailable, MxpertsError
from mxperts.formats import MXFP4, MXFP6_E3M2, MXINT8, BlockFormat
from mxperts.verification import cases, exact
from mxperts.verification.exact import Check, Place, named_formats, named_presets, places, verify

CPU = Place(backend="cpu", device="cpu")


def run(
    monkeypatch: pytest.MonkeyPatch, kind: type[cases.Case], place: Place = CPU, fmt: BlockFormat = MXFP4
) -> list[Check]:
    """Only the cases of one kind, of one preset."""
    everything = cases.cases
    monkeypatch.setattr(exact, "cases", lambda *a: [c for c in everything(*a) if isinstance(c, kind)])
    return verify(place, formats=[fmt], presets=["vllm"])


@pytest.mark.parametrize("fmt", [MXFP4, MXFP6_E3M2, MXINT8], ids=str)
def test_the_cpu_backend_is_exact(fmt: BlockFormat) -> None:
    steps: list[tuple[int, int]] = []
    checks = verify(CPU, formats=[fmt], presets=["default"], progress=lambda *step: steps.append(step))
    assert [c for c in checks if c.wrong] == []
    assert {c.operation for c in checks} == {
        "quantize", "fake_quantize", "dequantize", "packing", "mx_linear", "fused_experts", "fused_experts, prepared"
    }  # fmt: skip
    assert sum(c.numbers for c in checks) > 4_000_000
    assert len({c.activation for c in checks if c.operation == "fused_experts"}) == 9
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1] - 1


@pytest.mark.parametrize("kind", [cases.Dequantize, cases.Packing, cases.Linear, cases.Experts])
def test_the_reference_is_exact(monkeypatch: pytest.MonkeyPatch, kind: type[cases.Case]) -> None:
    checks = run(monkeypatch, kind, Place(backend="reference", device="cpu"))
    assert checks
    assert [c for c in checks if c.wrong] == []


def wrong(monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[Any], Any]) -> None:
    """Have the CPU backend give another result."""
    right = getattr(cpu, op)
    monkeypatch.setattr(cpu, op, lambda *a, **k: change(right(*a, **k)))


def test_one_wrong_code_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(found: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scales = found
        if len(packed) == 1 << 15:
            packed[0x3F80, 4] ^= 0x10
        return packed, scales

    wrong(monkeypatch, "quantize", flip)
    (check,) = (c for c in run(monkeypatch, cases.Quantize) if c.operation == "quantize")
    assert check.wrong == 2  # one in bfloat16, one in float16
    assert check.first.startswith("every.bfloat16 row 16256, value 9: 0x")
    assert "in a block whose largest magnitude is 0x3f80 (1)" in check.first
    assert check.first.endswith("found 0x01") or ": expected 0x" in check.first


def test_one_wrong_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_scale(found: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scales = found
        if scales.shape[1] == 3:
            scales[2, 1] += 1
        return packed, scales

    wrong(monkeypatch, "quantize", raise_scale)
    (check,) = (c for c in run(monkeypatch, cases.Quantize) if c.operation == "quantize")
    assert check.wrong == 1
    assert check.first.startswith("tail95.bfloat16 row 2, scale 1 of a block")


def test_a_lost_sign_of_zero_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "fake_quantize", lambda y: y + 0.0)
    (check,) = (c for c in run(monkeypatch, cases.Quantize) if c.operation == "fake_quantize")
    assert check.wrong > 1000
    assert "expected 0x8000 (-0), found 0x0000 (0)" in check.first


def test_a_wrong_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_is_inf(values: torch.Tensor) -> torch.Tensor:
        return values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)

    wrong(monkeypatch, "dequantize", nan_is_inf)
    (check,) = run(monkeypatch, cases.Dequantize)
    assert check.wrong == 3 * 32
    assert check.first == "code 0x00 under scale 0xff: expected 0x7fc0 (NaN), found 0x7f80 (Inf)"


def test_a_wrong_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.fused_experts

    def drop_a_token(call: Any, out: torch.Tensor) -> None:
        right(call, out)
        out[37:38] = 0

    monkeypatch.setattr(cpu, "fused_experts", drop_a_token)
    checks = run(monkeypatch, cases.Experts)
    assert {c.operation for c in checks} == {"fused_experts", "fused_experts, prepared"}
    assert all(c.wrong > 0 and "token 37 of 72 in experts [" in c.first for c in checks)


def test_a_wrong_linear_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "mx_linear", lambda y: y.roll(1, -1))
    checks = run(monkeypatch, cases.Linear)
    assert len(checks) == 9
    assert all(c.wrong > 0 and "w_mxfp4" in c.first and "7 times code 0x" in c.first for c in checks)


def test_another_shape_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "dequantize", lambda values: values[:-1])
    (check,) = run(monkeypatch, cases.Dequantize)
    assert check.wrong == 3 * 256 * 32
    assert check.first == "mxfp4/dequantize/bfloat16: shape (256, 32) expected, (255, 32) found"


def test_a_kernel_that_fails_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*a: Any) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(cpu, "dequantize", fail)
    (check,) = run(monkeypatch, cases.Dequantize)
    assert check.wrong == check.numbers > 0
    assert check.first == "mxfp4/dequantize/bfloat16: RuntimeError: illegal instruction"


def test_bits_that_change_from_run_to_run_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in cases.cases([MXFP4], ["default"]) if isinstance(c, cases.Packing))
    (check,) = run(monkeypatch, cases.Packing)
    assert check.wrong == 0
    found = dict(case.answer())
    assert exact._compare(case, found).first == "mxfp4/packing: other bits from run to run"


def test_a_definition_that_is_not_the_shipped_one_is_no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "dequantize", lambda values: -values)
    monkeypatch.setattr(
        cases.Dequantize, "answer", lambda self: dict(self.run("reference", "cpu")) | {"values": self._codes}
    )
    with pytest.raises(MxpertsError, match="does not give the golden bytes"):
        run(monkeypatch, cases.Dequantize)


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places("cpu") == [CPU]
    assert places("auto", "cpu") == [CPU]
    assert places("reference", "cpu") == [Place(backend="reference", device="cpu")]
    assert places("all", "cpu") == [CPU, Place(backend="reference", device="cpu")]
    with pytest.raises(ArgumentError, match="unknown backend 'cup'"):
        places("cup", "cpu")
    with pytest.raises(ArgumentError, match="unknown device 'toaster'"):
        places("cpu", "toaster")
    with pytest.raises(BackendUnavailable, match="cannot run fused_experts here: the tensors are on cpu"):
        places("gpu", "cpu")
    with pytest.raises(BackendUnavailable):
        places("cpu", "meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert places() == [CPU]
    assert [p.device for p in places("all")] == ["cpu", "cpu"]
    with pytest.raises(BackendUnavailable, match="PyTorch cannot use cuda here"):
        places("gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_gpu_backend_is_exact() -> None:
    checks = [c for place in places("gpu") for c in verify(place, formats=[MXFP4], presets=["default"])]
    assert [c for c in checks if c.wrong] == []


def test_names() -> None:
    assert named_formats("all")[0] is MXFP4
    assert named_formats("MXINT8") == [MXINT8]
    assert named_presets("Triton-Kernels") == ["triton_kernels"]
    with pytest.raises(ArgumentError, match="unknown preset 'qark'; did you mean quark"):
        named_presets("qark")
