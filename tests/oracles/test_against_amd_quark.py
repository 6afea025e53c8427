"""AMD Quark 0.13: golden files always; Quark itself, on fresh blocks, where it is installed."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import store
import torch
from blocks import BF16, EXTREME, FP16, FP32, ORDINARY, make
from compare import assert_differ_exactly_at, differing, exact_amax, rounds_up_to
from torch import Tensor

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS, MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXINT8, BlockFormat

DTYPES = (FP32, BF16, FP16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_weight_format = pytest.mark.parametrize("fmt", [MXFP4, MXFP6_E2M3, MXFP6_E3M2], ids=str)
each_activation_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS[1:], ids=str)
EVEN_BITS = {f: f.element.mantissa_bits for f in BLOCK_FORMATS} | {MXINT8: 8}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return store.load("amd_quark")


@pytest.fixture(scope="module")
def live() -> Iterator[object]:
    """The script that makes the golden file, and with it Quark."""
    pytest.importorskip("quark")
    path = Path(__file__).parents[1] / "golden" / "make" / "amd_quark.py"
    spec = importlib.util.spec_from_file_location("make_amd_quark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_weights(fmt: BlockFormat, x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Equal on every finite block but for one fault, which shows in every block that has its cause.

    A float scale of 2^-127 is written as byte 1, which is 2^-126: the block decodes to twice its value.
    """
    ours = mx.quantize(x, fmt, preset="quark")
    scales = scales.reshape(-1)
    special = ~x.isfinite().all(-1)
    off_by_one = (ours.scales[:, 0] == 0) & ~special
    overflows = rounds_up_to(x, 128, EVEN_BITS[fmt]) & ~special
    assert_differ_exactly_at(differing(ours, codes, scales) & ~special, off_by_one, x, "Quark weights")
    assert (scales[off_by_one] == 1).all()
    assert (scales[overflows] == 254).all()
    assert torch.equal(ours.codes()[off_by_one], codes[off_by_one]), "the codes are those of 2^-127"
    assert (ours.scales[special] == 255).all()
    laundered = x.isnan().any(-1)
    assert (scales[laundered] == 127).all(), "Quark gives a block with NaN the scale 1"
    assert (scales[special & ~laundered] == 254).all()


def check_activations(fmt: BlockFormat, x: Tensor, values: Tensor) -> None:
    """Equal in value and in sign of zero on every finite block, but for MXINT8 blocks so small that Quark's 1 / scale
    meets its lower bound of 2^-126 for the scale."""
    ours = mx.fake_quantize(x, fmt, preset="quark")
    found = ((ours != values) | (ours.signbit() != values.signbit())).any(-1)
    exempt = torch.zeros_like(found)
    if fmt is MXINT8:
        exempt |= exact_amax(x) < 2.0**-119
    assert_differ_exactly_at(found & ~exempt, torch.zeros_like(found), x, "Quark activations")


@each_weight_format
@each_dtype
def test_golden_weights(golden: dict[str, Tensor], fmt: BlockFormat, dtype: torch.dtype) -> None:
    name = f"{fmt.name}/{dtype}"
    check_weights(fmt, golden[f"{name}/x"], golden[f"{name}/weight/codes"], golden[f"{name}/weight/scales"])


@each_activation_format
@each_dtype
def test_golden_activations(golden: dict[str, Tensor], fmt: BlockFormat, dtype: torch.dtype) -> None:
    x = golden[f"{fmt.name}/{dtype}/x"]
    check_activations(fmt, x[x.isfinite().all(-1)], golden[f"{fmt.name}/{dtype}/activation/values"])


@each_weight_format
@each_dtype
def test_live_weights(live: object, fmt: BlockFormat, dtype: torch.dtype) -> None:
    x = torch.cat([make(category, fmt, dtype, 63) for category in ORDINARY + EXTREME])
    check_weights(fmt, x, *live.weight(x, fmt))


@each_activation_format
@each_dtype
def test_live_activations(live: object, fmt: BlockFormat, dtype: torch.dtype) -> None:
    x = torch.cat([make(category, fmt, dtype, 63) for category in ORDINARY + EXTREME])
    check_activations(fmt, x, live.activation(x, fmt))


@each_dtype
def test_the_default_preset_decodes_as_quarks_weights_do(golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Byte for byte but for blocks of zeros, which Quark gives scale byte 1; those decode to the same zeros."""
    for fmt in (MXFP4, MXFP6_E2M3, MXFP6_E3M2):
        x = golden[f"{fmt.name}/{dtype}/x"]
        default, quark = mx.quantize(x, fmt), mx.quantize(x, fmt, preset="quark")
        assert torch.equal(default.packed, quark.packed)
        other = default.scales != quark.scales
        assert torch.equal(other[:, 0], exact_amax(x) == 0)
