"""The backend's own layout of weights: there and back, what is kept of it and for how long."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import mxperts as mx
from mxperts.backend.cpu import prepared
from mxperts.backend.cpu.layout import STRIP, Projection
from mxperts.backend.cpu.prepared import need_care
from mxperts.formats import BLOCK_FORMATS, BlockFormat, Encoding

each_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)

E = 3


def random_bytes(fmt: BlockFormat, *shape: int, seed: int = 0) -> mx.MXTensor:
    """Every code and every scale byte."""
    g = torch.Generator().manual_seed(seed)
    *rows, k = shape
    codes = torch.randint(1 << fmt.element.bits, shape, generator=g, dtype=torch.uint8)
    return mx.MXTensor.from_codes(codes, torch.randint(256, (*rows, fmt.blocks(k)), generator=g).byte(), fmt)


def weights(
    fmt: BlockFormat | str, hidden: int = 40, inner: int = 72, *, gated: bool = True, seed: int = 0
) -> list[mx.MXTensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (E, inner * (2 if gated else 1), hidden), (E, hidden, inner)
    return [mx.quantize(torch.randn(shape, generator=g) * 0.2, fmt) for shape in shapes]


def call(gate_up: Any, down: Any, **kwargs: Any) -> Tensor:
    g = torch.Generator().manual_seed(1)
    hidden = gate_up.layout.hidden if isinstance(gate_up, mx.PreparedExperts) else gate_up.k
    ids = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 1]])
    x = torch.randn(4, hidden, generator=g).bfloat16()
    return mx.fused_experts(x, gate_up, down, ids, torch.rand(4, 2, generator=g), backend="cpu", **kwargs)


# There and back


@each_format
@pytest.mark.parametrize(("gated", "interleaved"), [(True, False), (True, True), (False, False)])
def test_unprepare_gives_every_bit_back(fmt: BlockFormat, gated: bool, interleaved: bool) -> None:
    for hidden, inner in ((1, 1), (31, 33), (64, 32), (70, 129), (96, 64)):
        gate_up = random_bytes(fmt, E, inner * (2 if gated else 1), hidden)
        down = random_bytes(fmt, E, hidden, inner, seed=1)
        experts = mx.prepare(gate_up, down, interleaved=interleaved, backend="cpu")
        assert experts.backend == "cpu"
        for given, back in zip((gate_up, down), experts.unprepare(), strict=True):
            assert isinstance(back, mx.MXTensor)
            assert (back.format, back.k) == (given.format, given.k)
            assert torch.equal(back.packed, given.packed)
            assert torch.equal(back.scales, given.scales)


def test_weights_beyond_a_huge_page() -> None:
    gate_up, down = random_bytes(mx.MXFP8_E4M3, E, 2 * 512, 1024), random_bytes(mx.MXFP8_E4M3, E, 1024, 512)
    experts = mx.prepare(gate_up, down, backend="cpu")
    for given, back in zip((gate_up, down), experts.unprepare(), strict=True):
        assert torch.equal(back.packed, given.packed)
        assert torch.equal(back.scales, given.scales)


def test_the_number_of_threads_does_not_matter() -> None:
    gate_up, down = random_bytes(mx.MXFP6_E3M2, E, 2 * 200, 70), random_bytes(mx.MXFP6_E3M2, E, 70, 200)
    expected = mx.prepare(gate_up, down, backend="cpu").weights
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = mx.prepare(gate_up, down, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(found.weights, expected, strict=True))
        assert torch.equal(found.unprepare()[0].packed, gate_up.packed)
    finally:
        torch.set_num_threads(before)


def test_weights_of_any_strides() -> None:
    gate_up, down = weights("mxfp4", 64, 96)
    expected = mx.prepare(gate_up, down, backend="cpu").weights
    views = [
        mx.MXTensor(w.packed.mT.contiguous().mT, w.scales.mT.contiguous().mT, w.format, w.k) for w in (gate_up, down)
    ]
    found = mx.prepare(*views, backend="cpu").weights
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(call(*views), call(gate_up, down))


@each_format
def test_tiles_are_whole_and_what_is_beyond_the_weight_is_zero(fmt: BlockFormat) -> None:
    shape = Projection(format=fmt, rows=70, k=40)
    w = random_bytes(fmt, 1, 70, 40)
    tiles = shape.to_tiles(w.packed, w.scales)
    assert tiles.shape == (1, 2, 2, STRIP * (1 + fmt.block_bytes))
    assert set(tiles[0, 1, :, 6:STRIP].flatten().tolist()) == {127}
    codes = tiles[0, 1, :, STRIP:].view(2, 4, -1)  # quarters of 16 rows
    assert not codes[:, 1:].any()
    assert codes[:, 0].any()


@each_format
def test_padding_that_is_not_zero_is_not_used(fmt: BlockFormat) -> None:
    gate_up, down = weights(fmt)
    expected = call(gate_up, down)
    for w in (gate_up, down):
        last = w.packed[..., -fmt.block_bytes :]
        last[..., -(32 - w.k % 32) * fmt.element.bits // 8 :] = 0x7F if fmt.element.bits == 8 else 0xFF
    assert torch.equal(call(gate_up, down), expected)
    assert torch.equal(call(mx.prepare(gate_up, down, backend="cpu"), None), expected)


@each_format
@pytest.mark.parametrize(("name", "interleaved"), [("silu", False), ("silu", True), ("relu2_no_mul", False)])
def test_prepared_results_are_those_of_canonical_weights(fmt: BlockFormat, name: str, interleaved: bool) -> None:
    gate_up, down = weights(fmt, gated=not name.endswith("_no_mul"))
    options: Any = {"activation": name, "interleaved": interleaved}
    experts = mx.prepare(gate_up, down, interleaved=interleaved, backend="cpu")
    assert torch.equal(call(experts, None, **options), call(gate_up, down, **options))


# Which experts need care


@each_format
def test_experts_need_care_where_a_dtype_rounds_their_values(fmt: BlockFormat) -> None:
    """Each scale byte in an expert of its own, with all codes that are finite, or with zeros only."""
    count, last = 1 << fmt.element.bits, len(fmt.element.magnitudes) - 1
    codes = (torch.arange(max(32, count)) % count).to(torch.uint8)
    if fmt.element.encoding is not Encoding.TWOS_COMPLEMENT:
        codes[(codes & (fmt.element.sign_bit - 1)) > last] = 0
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).expand(256, 1, len(codes) // 32)
    w = mx.MXTensor.from_codes(codes.expand(256, 1, -1), scales, fmt)
    care = need_care(w.packed, w.scales, fmt)
    exact = mx.dequantize(w, torch.float64)
    for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        inexact = (mx.dequantize(w, dtype, backend="reference").double() != exact).flatten(1).any(1)
        inexact |= torch.arange(256) > 160
        inexact[255] = False
        assert torch.equal(care[i].bool(), inexact), dtype
    zeros = mx.MXTensor.from_codes(torch.zeros_like(codes).expand(256, 1, -1), scales, fmt)
    assert not need_care(zeros.packed, zeros.scales, fmt).any()


# What is kept


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each preparation of weights that were not prepared; nothing is kept from before."""
    gc.collect()
    made: list[object] = []
    monkeypatch.setattr(prepared, "_kept", {})
    to_tiles = Projection.to_tiles

    def spy(self: Projection, *args: Any) -> Tensor:
        made.append(self)
        return to_tiles(self, *args)

    monkeypatch.setattr(Projection, "to_tiles", spy)
    return made


def test_weights_are_prepared_once_and_forgotten_with_them(preparations: list[object]) -> None:
    gate_up, down = weights("mxfp4")
    linear = mx.quantize(torch.randn(70, 40), "mxfp4")
    for _ in range(3):
        call(gate_up, down)
        mx.mx_linear(torch.randn(2, 40), linear, backend="cpu")
    assert len(preparations) == 3
    assert len(prepared._kept) == 2
    del gate_up
    gc.collect()
    assert len(prepared._kept) == 1
    del linear, down
    gc.collect()
    assert not prepared._kept


def test_views_of_the_same_codes_are_prepared_once(preparations: list[object]) -> None:
    gate_up, down = weights("mxfp4")
    stack = mx.quantize(torch.randn(E, 70, 40), "mxfp4")
    x = torch.randn(2, 40)
    for _ in range(3):
        call(gate_up[:], down[:])
        for e in range(E):
            mx.mx_linear(x, stack[e], backend="cpu")
    assert len(preparations) == 2 + E
    assert len(prepared._kept) == 1 + E


def test_prepared_experts_are_not_kept_beside(preparations: list[object]) -> None:
    experts = mx.prepare(*weights("mxfp4"), backend="cpu")
    call(experts, None)
    assert not prepared._kept


def rewrite(t: Tensor, other: Tensor, how: str) -> None:
    match how:
        case "copy_":
            t.copy_(other)
        case "index":
            for e in range(E):
                t[e] = other[e]
        case "view":
            t.view(-1)[:].copy_(other.view(-1))
        case "chunk":
            for part, new in zip(t.chunk(2, 1), other.chunk(2, 1), strict=True):
                part.copy_(new)
        case "no_grad":
            with torch.no_grad():
                t.copy_(other)
        case "inference_mode":
            with torch.inference_mode():
                t.copy_(other)
        case "set_":
            t.set_(other.clone())
        case "data":
            t.data = other.clone()


@pytest.mark.parametrize("how", ["copy_", "index", "view", "chunk", "no_grad", "inference_mode", "set_", "data"])
def test_results_follow_changes_in_place(how: str) -> None:
    for i in range(4):
        mine, other = weights("mxfp4"), weights("mxfp4", seed=1)
        tensors = [t for w in mine for t in (w.packed, w.scales)]
        before = call(*mine)
        rewrite(tensors[i], [t for w in other for t in (w.packed, w.scales)][i].clone(), how)
        fresh = [mx.MXTensor(w.packed.clone(), w.scales.clone(), w.format, w.k) for w in mine]
        expected = call(*fresh)
        assert not torch.equal(expected, before)
        assert torch.equal(call(*mine), expected)


def test_results_follow_changes_of_inference_tensors() -> None:
    """They have no version that tells of changes."""
    with torch.inference_mode():
        mine, other = weights("mxfp4"), weights("mxfp4", seed=1)
        call(*mine)
        mine[0].packed.copy_(other[0].packed)
        assert torch.equal(call(*mine), call(mx.MXTensor(other[0].packed, mine[0].scales, mx.MXFP4, 40), mine[1]))


def test_results_of_filled_weights() -> None:
    gate_up, down = weights("mxfp4")
    assert call(gate_up, down).any()
    down.packed.fill_(0)
    assert not call(gate_up, down).any()
    down.scales.fill_(255)
    assert call(gate_up, down).isnan().all()


def test_memory_that_is_used_again_is_not_taken_for_what_it_was() -> None:
    seen = set()
    for seed in range(20):
        gate_up, down = weights("mxfp4", seed=seed)
        seen.add(gate_up.packed.data_ptr())
        expected = mx.prepare(gate_up, down, backend="cpu")
        assert torch.equal(call(gate_up, down), call(expected, None))
        del gate_up, down
    assert len(seen) < 20


def test_freed_memory_of_a_storage_that_lives_on_is_not_taken_for_what_it_was() -> None:
    x, met = torch.randn(2, 64), 0
    for seed in range(50):
        old, new = (
            mx.quantize(torch.randn(64, 64, generator=torch.Generator().manual_seed(s)), "mxfp4") for s in (seed, 99)
        )
        old = mx.MXTensor(old.packed.clone(), old.scales.clone(), old.format, 64)
        mx.mx_linear(x, old, backend="cpu")
        places = [t.data_ptr() for t in (old.packed, old.scales)]
        for t in (old.packed, old.scales):
            t.untyped_storage().resize_(0)
        again = mx.MXTensor(new.packed.clone(), new.scales.clone(), new.format, 64)
        met += places == [t.data_ptr() for t in (again.packed, again.scales)]
        assert torch.equal(mx.mx_linear(x, again, backend="cpu"), mx.mx_linear(x, new, backend="cpu"))
    if not met:
        pytest.skip("the memory was not used again")


def test_formats_and_shapes_of_the_same_bytes_are_kept_apart() -> None:
    codes = torch.randint(256, (E, 64, 32), generator=torch.Generator().manual_seed(0)).byte()
    codes &= 0x3B  # no NaN in any format
    scales = torch.full((E, 64, 1), 120, dtype=torch.uint8)
    x = torch.randn(3, 32).bfloat16()
    for fmt, k in itertools.product(("mxfp8_e4m3", "mxfp8_e5m2", "mxint8"), (32, 17)):
        w = mx.MXTensor(codes[0], scales[0], mx.format(fmt), k)
        y = mx.mx_linear(x[:, :k], w, out_dtype=torch.float32, backend="cpu")
        torch.testing.assert_close(
            y, mx.mx_linear(x[:, :k], w, out_dtype=torch.float32, backend="reference"), rtol=1e-5, atol=1e-4
        )
