"""Inputs that Triton's kernels rotate: the reference's bits; and the CUDA path, which is not to be taken for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rotated
import torch

import mxperts as mx
from mxperts.backend import gpu
from mxperts.backend.gpu import paths, prepared
from mxperts.backend.gpu.paths import CUDA, TRITON
from mxperts.backend.gpu.quantize import MOST_COLUMNS, qdq_input
from mxperts.errors import BackendUnavailable
from mxperts.ops import dispatch
from mxperts.ops.dispatch import Problem
from mxperts.ops.prepare import canonical_tensors, layout_of
from mxperts.rotation import rotate_input

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which the interpreter computes with
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def as_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``backend="portable"``."""
    backend = dispatch.Backend(
        name="portable", module="mxperts.backend.gpu.portable", refuses=lambda problem: None, summary=""
    )
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, backend))
    return


@pytest.fixture
def has_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if kernels in CUDA could run here."""
    monkeypatch.setattr(paths, "cuda_refuses", lambda device: None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", rotated.ACTIVATIONS)
def test_bits_are_the_reference_s(activation: str | None, dtype: torch.dtype, device: str) -> None:
    x = rotated.tokens(dtype, 6)
    expected = rotated.run(x, "mxfp8_e4m3", activation, "reference")
    rotated.assert_same(rotated.run(x, "mxfp8_e4m3", activation, "portable", device=device), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_alone(dtype: torch.dtype, device: str) -> None:
    x = rotated.tokens(dtype)
    found = qdq_input(x.to(device), None, rotated=True).cpu()
    rotated.assert_same(found, rotate_input(x).to(dtype))


def test_tokens_longer_than_a_program_keeps(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    k = 32 + MOST_COLUMNS
    x, weight = torch.randn(2, k, generator=g), mx.quantize(torch.eye(32, k), "mxfp4")
    found, expected = (
        mx.mx_linear(x.to(where), weight.to(where), activation="fp8_dynamic", rotation="hadamard32", backend=backend)
        for where, backend in ((device, "portable"), ("cpu", "reference"))
    )
    assert torch.equal(found.cpu(), expected)


@pytest.mark.usefixtures("has_cuda_kernels")
def test_the_cuda_path_is_not_taken() -> None:
    device = torch.device("cuda")
    assert paths.choose(device) is CUDA
    assert paths.choose(device, "hadamard32") is TRITON
    problem = {"op": "fused_experts", "device": device, "dtype": torch.bfloat16, "weight": mx.MXFP4}
    assert gpu.describe(Problem(**problem)).startswith("path cuda")
    said = gpu.describe(Problem(**problem, rotation="hadamard32"))
    assert said.startswith("path triton")
    assert "not path cuda: it does not rotate inputs, as 'hadamard32' asks" in said
    weights = rotated.identity("mxfp4"), rotated.identity("mxfp4")
    tensors = canonical_tensors(*weights)
    layout = layout_of(*weights, interleaved=False, rotation="hadamard32")
    assert list(prepared.prepare(tensors, layout)) == tensors
    with paths.use_path("cuda"), pytest.raises(BackendUnavailable, match=r"path 'cuda' cannot run this.*not rotate"):
        prepared.prepare(tensors, layout)
