"""What the CUDA path launches, seen by a kernel that only takes notes; nothing here needs a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import mxperts as mx
from mxperts.backend.gpu.cuda import fold, folded, grouped, single
from mxperts.backend.gpu.cuda.layout import Tiles
from mxperts.backend.gpu.experts import choose_kernel
from mxperts.backend.gpu.paths import batch_invariant
from mxperts.backend.gpu.prepared import projections
from mxperts.formats import BLOCK_FORMATS, FP8_DYNAMIC, parse_activation
from mxperts.ops.activation import bind_activation
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

H200 = SimpleNamespace(
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    major=9,
    minor=0,
)
HOPPER = grouped.Device(132, 227 << 10, 228 << 10, wgmma=True)
AMPERE = grouped.Device(108, 163 << 10, 164 << 10, wgmma=False)
SMALLEST = grouped.Device(46, 99 << 10, 100 << 10, wgmma=False)
TILES = (Tiles(format=mx.MXFP4, rows=192, k=128, gated=True), Tiles(format=mx.MXFP4, rows=128, k=96))
LAUNCHED: list[tuple[str, Any, Any]] = []
"""Names of kernels, their grids, and copies of their arguments."""


class Notes:
    """In place of ``Kernel``."""

    def __init__(self, source: str, macros: dict[str, str], device: int, **options: Any) -> None:
        self.name, self.threads = options.get("name") or source, options["threads"]
        assert options.get("shared_bytes", 0) <= H200.shared_memory_per_block_optin
        assert self.threads <= 1024

    def __call__(self, blocks: Any, arguments: Any, stream: int) -> None:
        LAUNCHED.append((self.name, blocks, type(arguments).from_buffer_copy(arguments)))


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    LAUNCHED.clear()
    for module in (grouped, single, folded):
        monkeypatch.setattr(module, "Kernel", Notes)
        module._kernels.cache_clear()
    grouped.device_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    yield
    grouped.device_of.cache_clear()
    for module in (grouped, single, folded):
        module._kernels.cache_clear()


def call(tokens: int, k: int = 2, experts: int = 8, **changes: Any) -> ExpertsCall:
    layout = ExpertsLayout(weight=mx.MXFP4, experts=experts, hidden=128, intermediate=96, gated=True, interleaved=False)
    weights = [torch.zeros(experts, t.units, t.steps, t.slice_bytes, dtype=torch.uint8) for t in projections(layout)]
    arguments: dict[str, Any] = {
        "hidden_states": torch.zeros(tokens, 128, dtype=torch.bfloat16),
        "weights": weights,
        "layout": layout,
        "top_k_index": torch.zeros(tokens, k, dtype=torch.int64),
        "top_k_weights": torch.ones(tokens, k),
        "activation": bind_activation("silu"),
        "activation_format": None,
        "gate_up_bias": None,
        "down_bias": None,
        "input_scales": None,
        "expert_map": None,
        "router_weight_on_input": False,
        "accumulation": "auto",
        "prepared": True,
    }
    return ExpertsCall(**{**arguments, **changes})


def launch(module: ModuleType, c: ExpertsCall) -> list[tuple[str, Any, Any]]:
    out = torch.empty_like(c.hidden_states)
    module.fused_experts(c, out, *projections(c.layout))
    assert all(arguments.out == out.data_ptr() for _, _, arguments in LAUNCHED)
    return LAUNCHED


def test_hidden_states_are_read_where_they_are() -> None:
    c = call(3)
    for module in (single, grouped):
        LAUNCHED.clear()
        for _, _, arguments in launch(module, c):
            assert (arguments.x, arguments.direct, arguments.x_stride) == (c.hidden_states.data_ptr(), 1, 128)
            assert (arguments.T, arguments.k, arguments.E, arguments.H, arguments.I) == (3, 2, 8, 128, 96)
            assert (arguments.ids64, arguments.routing_dtype, arguments.bias1, arguments.map) == (1, 2, None, None)
            assert arguments.limit != arguments.limit


def test_numbers_of_any_dtype_and_strides() -> None:
    bias = torch.zeros(8, 192, dtype=torch.float64), torch.zeros(128, 8, dtype=torch.float16).T
    c = call(3, gate_up_bias=bias[0], down_bias=bias[1], top_k_weights=torch.ones(2, 3, dtype=torch.float64).T)
    for module in (single, grouped):
        LAUNCHED.clear()
        for _, _, arguments in launch(module, c):
            assert (arguments.bias1_dtype, arguments.bias2_dtype, arguments.routing_dtype) == (2, 1, 2)
            assert arguments.bias2 != bias[1].data_ptr()


@pytest.mark.parametrize("change", ["format", "dtype", "on_input", "stride", "odd"])
def test_inputs_are_written_anew_where_they_must_be(change: str) -> None:
    changes: dict[str, Any] = {
        "format": {"activation_format": parse_activation("mxfp4")},
        "dtype": {"hidden_states": torch.zeros(3, 128)},
        "on_input": {"router_weight_on_input": True},
        "stride": {"hidden_states": torch.zeros(3, 130, dtype=torch.bfloat16)[:, :128]},
        "odd": {"hidden_states": torch.zeros(385, dtype=torch.bfloat16)[1:].view(3, 128)},
    }[change]
    launched = launch(single, call(3, **changes))
    assert [name for name, *_ in launched] == ["inputs", "first", "second"]
    assert not launched[0][2].direct


def test_one_token_is_two_launches() -> None:
    assert [(name, blocks) for name, blocks, _ in launch(single, call(1))] == [("first", (6, 2)), ("second", (8, 1))]
    LAUNCHED.clear()
    quantised = call(1, activation_format=parse_activation("mxfp4"))
    assert [(n, b) for n, b, _ in launch(single, quantised)] == [("inputs", 1), ("first", (3, 2)), ("second", (8, 1))]
    LAUNCHED.clear()
    by_row = call(1, activation_format=FP8_DYNAMIC)
    assert [name for name, *_ in launch(single, by_row)] == ["inputs", "first", "middle", "second"]


@pytest.mark.parametrize("activation_format", [None, "mxfp6_e2m3", "fp8_dynamic"])
@pytest.mark.parametrize(("tokens", "product"), [(30, "narrow"), (300, "wide")])
def test_more_tokens_are_six_launches(tokens: int, product: str, activation_format: str | None) -> None:
    launched = launch(grouped, call(tokens, activation_format=parse_activation(activation_format)))
    names = ["sort", "inputs", product, "inputs", product, "combine"]
    seconds = [0, 0, 0, 1, 1, 1]
    if product == "narrow" and activation_format is None:  # which reads the hidden states where they are
        del names[1], seconds[1]
    assert [name for name, *_ in launched] == names
    assert [arguments.second for _, _, arguments in launched] == seconds


def test_very_many_tokens_go_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "MOST_PAIRS", 200)
    c = call(250)
    out = torch.empty_like(c.hidden_states)
    grouped.fused_experts(c, out, *projections(c.layout))
    firsts = [arguments for name, _, arguments in LAUNCHED if name == "sort"]
    assert [a.T for a in firsts] == [100, 100, 50]
    assert [a.out - out.data_ptr() for a in firsts] == [0, 100 * 256, 200 * 256]
    assert [a.x - c.hidden_states.data_ptr() for a in firsts] == [0, 100 * 256, 200 * 256]


def test_one_kernel_for_any_number_of_tokens_where_batches_must_not_matter() -> None:
    with batch_invariant():
        assert {choose_kernel(call(tokens)) for tokens in (1, 8, 100, 1000)} == {grouped}
    assert choose_kernel(call(1)) is single


def test_the_kernel_follows_the_number_of_pairs() -> None:
    """From one token to thousands, at the experts of large models."""

    def kernel(tokens: int, k: int, experts: int) -> str:
        if choose_kernel(call(tokens, k, experts)) is single:
            return "single"
        return "wide" if grouped.choose_product(tokens * k, experts, TILES, 1, HOPPER).is_wide else "narrow"

    for experts, k, expected in (
        (128, 4, {1: "single", 8: "single", 16: "single", 64: "narrow", 512: "wide", 4096: "wide"}),
        (8, 2, {1: "single", 8: "narrow", 64: "wide", 512: "wide"}),
        (256, 8, {1: "single", 8: "single", 64: "narrow", 512: "wide", 4096: "wide"}),
    ):
        assert {tokens: kernel(tokens, k, experts) for tokens in expected} == expected


def test_inputs_that_shared_memory_does_not_hold_are_grouped() -> None:
    c = call(1, 8)
    wide = replace(c.layout, intermediate=1 << 16)
    assert choose_kernel(replace(c, layout=replace(c.layout, intermediate=1 << 12))) is single
    assert choose_kernel(replace(c, layout=wide)) is grouped
    assert choose_kernel(replace(c, layout=wide, top_k_index=c.top_k_index[:, :1])) is grouped


def test_without_wgmma_every_product_is_narrow() -> None:
    for pairs, invariant in itertools.product((8, 100, 10000), (False, True)):
        product = grouped.choose_product(pairs, 8, TILES, 3, AMPERE, invariant=invariant)
        assert not product.is_wide
        assert product.shares == (1, 1) or not invariant


def test_exact_sums_are_not_left_to_wgmma() -> None:
    product = grouped.choose_product(10000, 8, TILES, 3, HOPPER, exact=True)
    assert not product.is_wide
    assert product.exact
    assert not grouped.choose_product(8, 8, TILES, 3, HOPPER).exact


@pytest.mark.parametrize("device", [HOPPER, AMPERE, SMALLEST])
@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_blocks_fit(fmt: mx.BlockFormat, device: grouped.Device) -> None:
    tiles = (Tiles(format=fmt, rows=5760, k=2880, gated=True), Tiles(format=fmt, rows=2880, k=2880))
    for planes, pairs, experts in itertools.product((1, 2, 3), (1, 30, 300, 3000), (8, 128)):
        product = grouped.narrow(pairs, pairs / grouped.active_experts(pairs, experts), tiles, planes, device)
        sizes = [grouped.narrow_bytes(product.tile, n, planes, tiles[0].slice_bytes) for n in product.shares]
        assert max(sizes) < device.shared_bytes
        assert product.blocks * max(sizes) < device.shared_bytes_together
    with pytest.raises(mx.BackendUnavailable, match="too few"):
        grouped.narrow(8, 1.0, tiles, 1, grouped.Device(46, 30 << 10, 30 << 10, wgmma=False))


def test_warps_share_units_where_there_are_few() -> None:
    assert grouped.share(20000, 45, 528) == 1
    assert grouped.share(896, 224, 528) == 4
    for units, steps in itertools.product((90, 720, 5220, 20000), (12, 45, 224)):
        rounds = [-(-units * n // (8 * 528)) * -(-steps // n) for n in (1, grouped.share(units, steps, 528))]
        assert rounds[1] <= rounds[0]


def test_many_tokens_of_quantised_inputs_are_computed_in_fp8() -> None:
    """Where weights are prepared for it, inputs have binades to spare, and sums need not be exact."""
    up, down = (torch.zeros(8, *shape, dtype=torch.uint8) for shape in ((192, 64), (128, 48)))
    scales = [torch.full((8, rows, blocks), 120, dtype=torch.uint8) for rows, blocks in ((192, 4), (128, 3))]
    c = call(400, activation_format=mx.MXFP4)
    known = fold.exponents([up, scales[0], down, scales[1]], projections(c.layout))
    c = replace(c, weights=[*c.weights, known])
    assert choose_kernel(c) is folded
    for change in (
        {"activation_format": None},
        {"activation_format": mx.MXINT8},
        {"accumulation": "exact"},
        {"hidden_states": c.hidden_states.half()},
        {"weights": c.weights[:2]},
        {"top_k_index": c.top_k_index[:100], "hidden_states": c.hidden_states[:100]},
    ):
        assert choose_kernel(replace(c, **change)) is not folded
    with batch_invariant():
        assert choose_kernel(c) is grouped

    folded.fused_experts(c, torch.empty(400, 128, dtype=torch.bfloat16), *projections(c.layout))
    assert [name for name, *_ in LAUNCHED] == ["sort", *["fold", "folded", "wide"] * 2, "combine"]
    assert [a.second for _, _, a in LAUNCHED[1:-1]] == [0, 0, 0, 1, 1, 1]
    assert LAUNCHED[0][1] % folded._SORTING == 0
    assert LAUNCHED[2][1] % folded._CLUSTER == 0
    assert LAUNCHED[0][2].positions % 8 == 0
    assert LAUNCHED[0][2].positions >= 800 + 7 * 8 + folded.tile_of(800, 8)
