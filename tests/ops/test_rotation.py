"""Operations with a rotation: the reference against a dense computation, kernels against the reference."""

from __future__ import annotations

from typing import Any

import dense
import pytest
import rotated
import torch

import mxperts as mx
from mxperts.errors import ArgumentError, BackendUnavailable
from mxperts.formats import BLOCK_FORMATS
from mxperts.rotation import rotate_input, rotate_weight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = [f.name for f in BLOCK_FORMATS]
E, H, I = 3, 64, 32  # noqa: E741

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def experts(fmt: str | None, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    gate_up, down = torch.randn(E, 2 * I, H, generator=g) / 8, torch.randn(E, H, I, generator=g) / 8
    weights = [w if fmt is None else mx.quantize(rotate_weight(w), fmt) for w in (gate_up, down)]
    return {
        "x": torch.randn(4, H, generator=g).to(dtype),
        "gate_up_proj": weights[0],
        "down_proj": weights[1],
        "top_k_index": torch.tensor([[0, 1], [2, -1], [1, 1], [0, 2]]),
        "top_k_weights": torch.rand(4, 2, generator=g),
    }


@each_dtype
@pytest.mark.parametrize("activation", rotated.ACTIVATIONS)
@pytest.mark.parametrize("fmt", [*FORMATS, None])
def test_reference_equals_dense_computation(fmt: str | None, activation: str | None, dtype: torch.dtype) -> None:
    given = experts(fmt, dtype)
    static = activation == "fp8_static"
    scales = ([0.013] * E, [0.02] * E) if static else None
    found = mx.fused_experts(
        given["x"],
        *list(given.values())[1:],
        activation="relu2",
        activation_format=activation,
        input_scales=(0.013, 0.02) if static else None,
        rotation="hadamard32",
        backend="reference",
    )
    expected = dense.experts(
        **given, activation="relu2", activation_format=activation, input_scales=scales, rotated=True
    )
    dense.assert_within(found, expected)
    linear = mx.mx_linear(
        given["x"],
        given["gate_up_proj"][0],
        activation=activation,
        input_scale=0.013 if static else None,
        rotation="hadamard32",
        backend="reference",
    )
    dense.assert_within(
        linear, dense.linear(given["x"], given["gate_up_proj"][0], None, activation, 0.013, rotated=True)
    )


@each_dtype
@pytest.mark.parametrize("activation", rotated.ACTIVATIONS)
def test_inputs_of_kernels_are_the_reference_s(activation: str | None, dtype: torch.dtype) -> None:
    x = rotated.tokens(dtype)
    expected = rotated.run(x, "mxfp8_e4m3", activation, "reference")
    rotated.assert_same(rotated.run(x, "mxfp8_e4m3", activation, "cpu"), expected)
    plain = rotated.run(x, "mxfp8_e4m3", activation, "cpu", rotation=None)
    assert not torch.equal(plain.nan_to_num(), expected.nan_to_num())
    on_input = {"apply_router_weight_on_input": True}
    rotated.assert_same(
        rotated.run(x, "mxfp8_e4m3", activation, "cpu", **on_input),
        rotated.run(x, "mxfp8_e4m3", activation, "reference", **on_input),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_router_weight_comes_before_the_rotation(backend: str) -> None:
    """In bf16 the weighted input is rounded before it is rotated."""
    x, weight = rotated.tokens(torch.bfloat16)[:1], torch.tensor([[0.7]])
    given = (rotated.identity("mxfp8_e4m3"), rotated.identity("mxfp8_e4m3"), torch.zeros(1, 1, dtype=torch.int64))
    found = mx.fused_experts(
        x, *given, weight, activation="relu2_no_mul", rotation="hadamard32", apply_router_weight_on_input=True,
        backend=backend,
    )  # fmt: skip
    first = rotate_input((x.float() * weight).bfloat16()).bfloat16()
    a = (first.float().clamp(min=0) ** 2).bfloat16()
    assert torch.equal(found, rotate_input(a).bfloat16())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_rotated_twice_is_what_it_was(backend: str) -> None:
    """With weights that lose nothing, a rotated layer is the layer: float32 sums apart."""
    g = torch.Generator().manual_seed(1)
    w = torch.randint(-1, 2, (40, 64), generator=g) / 4.0
    rotated_w = mx.quantize(rotate_weight(w), "mxint8", backend="reference")
    assert torch.equal(mx.dequantize(rotated_w, torch.float32), rotate_weight(w))
    x = torch.randint(-9, 10, (5, 64), generator=g).float()
    assert torch.equal(mx.mx_linear(x, rotated_w, rotation="hadamard32", backend=backend), x @ w.T)


def test_float32_sums_are_within_the_contract() -> None:
    """accumulation="exact": rms error 1e-6 of the results; nothing is quantised but weights, so no rounding is open."""
    g = torch.Generator().manual_seed(2)
    gate_up, down = torch.randn(E, 2 * 96, 128, generator=g) / 11, torch.randn(E, 128, 96, generator=g) / 10
    given = (
        torch.randn(9, 128, generator=g),
        *(mx.quantize(rotate_weight(w), "mxfp6_e3m2") for w in (gate_up, down)),
        torch.randint(0, E, (9, 2), generator=g),
        torch.rand(9, 2, generator=g),
    )
    y, expected = (mx.fused_experts(*given, rotation="hadamard32", backend=b) for b in ("cpu", "reference"))
    assert (y - expected).norm() <= 1e-6 * expected.norm()


def test_prepared_experts_know_their_rotation() -> None:
    given = experts("mxfp4", torch.bfloat16)
    x, gate_up, down, *routing = given.values()
    expected = mx.fused_experts(x, gate_up, down, *routing, rotation="hadamard32")
    prepared = mx.prepare(gate_up, down, rotation="hadamard32")
    assert prepared.layout.rotation == "hadamard32"
    assert torch.equal(mx.fused_experts(x, prepared, None, *routing, rotation="hadamard32"), expected)
    with pytest.raises(ArgumentError, match="prepared with rotation='hadamard32', not None"):
        mx.fused_experts(x, prepared, None, *routing)
    with pytest.raises(ArgumentError, match="prepared with rotation=None, not 'hadamard32'"):
        mx.fused_experts(x, mx.prepare(gate_up, down), None, *routing, rotation="hadamard32")


def test_refusals() -> None:
    x, w = torch.ones(2, 40), mx.quantize(torch.ones(8, 40), "mxfp4")
    with pytest.raises(ArgumentError, match="whole blocks of 32, but weight has 40 values in a row"):
        mx.mx_linear(x, w, rotation="hadamard32")
    given = experts("mxfp4", torch.bfloat16)
    routing = (given["top_k_index"], given["top_k_weights"])
    for h, i, name in ((40, 32, "gate_up_proj"), (32, 40, "down_proj")):
        weights = mx.quantize(torch.ones(E, 2 * i, h), "mxfp4"), mx.quantize(torch.ones(E, h, i), "mxfp4")
        with pytest.raises(ArgumentError, match=f"{name} has 40 values in a row"):
            mx.fused_experts(torch.ones(4, h), *weights, *routing, rotation="hadamard32")
        with pytest.raises(ArgumentError, match=f"{name} has 40 values in a row"):
            mx.prepare(*weights, rotation="hadamard32")
    for refused in (
        lambda: mx.mx_linear(torch.ones(2, 64), given["gate_up_proj"][0], rotation="hadamard"),
        lambda: mx.explain(rotation="hadamard"),
        lambda: mx.MXLinear(64, 32, rotation="hadamard"),
    ):
        with pytest.raises(ArgumentError, match="unknown rotation 'hadamard'"):
            refused()


def test_explain_says_what_runs_it() -> None:
    choice = mx.explain(weight="mxfp4", activation="mxfp4", rotation="hadamard32", device="cpu")
    assert choice.backend.name == "cpu"
    with pytest.raises(BackendUnavailable):
        mx.explain(weight="mxfp4", rotation="hadamard32", backend="gpu", device="cpu")


def test_compiled_equals_eager() -> None:
    given = experts("mxfp4", torch.bfloat16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = mx.fused_experts(x, *list(given.values())[1:], activation_format="mxfp4", rotation="hadamard32")
        return mx.mx_linear(y, given["gate_up_proj"][1], rotation="hadamard32") * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given["x"]), layer(given["x"]))
    assert not torch.equal(layer(given["x"]), layer(given["x"] * 0))


def test_linear_registration() -> None:
    from mxperts.ops.linear import _mx_linear_op

    w = experts("mxfp4", torch.bfloat16)["gate_up_proj"][0]
    arguments = (torch.ones(2, H), [w.packed, w.scales], "mxfp4", None, "mxfp4", None, "hadamard32", torch.float32)
    torch.library.opcheck(_mx_linear_op, (*arguments, "auto"))
