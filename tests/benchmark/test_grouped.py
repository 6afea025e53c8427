"""Dense experts by Triton, run by Triton's interpreter, in float32: it cannot multiply bf16."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxperts.benchmark import Problem, parse_shape
from mxperts.benchmark.check import Reference
from mxperts.benchmark.contenders.grouped import DequantizeFirstGrouped, GroupedDense
from mxperts.benchmark.contenders.grouped.experts import sum_pairs
from mxperts.benchmark.contenders.grouped.routing import blocks_of
from mxperts.benchmark.contenders.grouped.tiles import Tiles, candidates, fastest
from mxperts.benchmark.contenders.triton_kernels import interleaved
from mxperts.benchmark.device.read import Read
from mxperts.benchmark.inputs import make_inputs
from mxperts.formats import Scheme
from mxperts.ops.quantize import dequantize


def interpreting() -> bool:
    """Whether Triton interprets kernels; it is asked once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def interpreted() -> None:
    pytest.importorskip("triton")
    if not interpreting():
        pytest.skip("run in a process of its own")


@pytest.mark.skipif(interpreting(), reason="this is the process that Triton interprets kernels in")
def test_kernels_in_a_process_of_their_own():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert " 1 skipped" in done.stdout.splitlines()[-1]  # this test, and no other


def inputs_of(scheme="w_mxfp4", shape="4,2,96,64", tokens=5, **more):
    problem = Problem(shape=parse_shape(shape), tokens=tokens, scheme=Scheme(scheme), dtype=torch.float32, **more)
    return make_inputs(problem, copies=2, routings=3)


@pytest.mark.parametrize("contender", [GroupedDense, DequantizeFirstGrouped])
@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.parametrize("shape", ["4,2,96,64", "16,2,64,32"])  # pairs are sorted, or each has a block
@pytest.mark.parametrize("tokens", [1, 5])
@torch.no_grad()
def test_results_are_those_of_the_reference(interpreted, contender, activation, shape, tokens):
    inputs = inputs_of("w_mxfp4_a_mxfp8_e4m3", shape, tokens, activation=activation)
    c = contender("reference", stopwatch=None)
    run = c.load(inputs.problem, inputs.layers)(inputs)
    result = run(0).clone()
    assert Reference(inputs).error(result, c.activation(inputs.problem)) < 1e-4
    assert not torch.equal(run(1), result)
    assert torch.equal(run(6), result)  # layer 0 and routing 0 again
    assert c.how(inputs.problem) == "grouped products by Triton, tiles 16x64x128"


@pytest.mark.parametrize(
    "tiles", [Tiles(m=16, n=16, k=32, warps=4, stages=1, group=3), Tiles(m=16, n=64, k=128, warps=4, stages=1)]
)
@torch.no_grad()
def test_tiles_do_not_change_results(interpreted, monkeypatch, tiles):
    module = "mxperts.benchmark.contenders.grouped.experts.candidates"
    monkeypatch.setattr(module, lambda tokens, top_k, experts: [tiles])
    inputs = inputs_of(shape="3,2,96,80", tokens=40)
    run = GroupedDense("reference", stopwatch=None).load(inputs.problem, inputs.layers)(inputs)
    assert Reference(inputs).error(run(0), None) < 1e-5


def test_sums_with_router_weights(interpreted):
    y, weights, out = torch.randn(6, 40), torch.randn(3, 2), torch.empty(3, 40)
    sum_pairs(y, weights, out)
    torch.testing.assert_close(out, (y.view(3, 2, 40) * weights.unsqueeze(-1)).sum(1))


def test_reading_covers_the_buffer(interpreted, monkeypatch):
    monkeypatch.setattr("mxperts.benchmark.device.read.TILES", ((64, 2, 1), (32, 8, 1)))
    seconds = iter([1.0, 2.0])
    read = Read(4 << 10, "cpu", lambda go, times: [next(seconds)])
    assert read.amount == 4 << 10
    assert read.tiles == (64, 2, 1)
    read()
    blocks = read._buffer.view(-1, 2 * 64)
    expected = blocks[:, 0].clone()
    for column in blocks[:, 1:].unbind(1):
        expected ^= column
    assert torch.equal(read._out[: len(blocks)], expected)


@pytest.mark.parametrize("always_sort", [False, True])
@pytest.mark.parametrize(("tokens", "top_k", "experts", "rows"), [(1, 4, 128, 16), (9, 2, 4, 16), (40, 3, 5, 8)])
def test_blocks_hold_every_pair_once_with_its_expert(tokens, top_k, experts, rows, always_sort):
    ids = torch.rand(tokens, experts).topk(top_k).indices
    blocks = blocks_of(ids, rows, experts, always_sort=always_sort)
    pairs = blocks.pairs.view(-1, rows)
    assert len(pairs) == len(blocks.experts)
    real = pairs < tokens * top_k
    assert pairs[real].sort().values.tolist() == list(range(tokens * top_k))
    assert torch.equal(ids.flatten()[pairs[real].long()], blocks.experts.unsqueeze(1).expand_as(pairs)[real].long())
    assert bool(real[:, 0].all())
    if always_sort or 4 * tokens * top_k > experts:
        assert blocks.experts.tolist() == sorted(blocks.experts.tolist())
        counts = ids.flatten().bincount(minlength=experts)
        assert len(pairs) == int((-(-counts // rows)).sum())


@pytest.mark.parametrize("tokens", [1, 8, 64, 512, 4096])
@pytest.mark.parametrize("name", ["gpt-oss-120b", "qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3"])
def test_tiles_fit_into_shared_memory(name, tokens):
    shape = parse_shape(name)
    found = candidates(tokens, shape.top_k, shape.experts)
    assert 2 <= len(found) <= 4
    for tiles in found:
        assert (tiles.m + tiles.n) * tiles.k * 2 * tiles.stages <= 227 << 10  # bytes on a Hopper GPU
        assert all(size & (size - 1) == 0 and size >= 16 for size in (tiles.m, tiles.n, tiles.k))


def test_the_fastest_tiles_are_taken_and_those_that_fail_left_out():
    tiles = [Tiles(m=16, n=n, k=64, warps=4, stages=3) for n in (32, 64, 128)]
    seconds = {32: 3.0, 128: 2.0}

    def make(t):
        if t.n == 64:
            raise RuntimeError("out of resource: shared memory")
        return lambda: t.n

    assert fastest(tiles, make, lambda go, times: [seconds[go()]] * times) is tiles[2]
    assert fastest(tiles, make, None) is tiles[0]
    with pytest.raises(RuntimeError, match="out of resource"):
        fastest(tiles[1:2], make, lambda go, times: [0.0])


def test_interleaved_rows_are_gate_and_up_in_turn():
    weight = inputs_of(shape="2,1,64,32").layers[0].gate_up
    dense, turned = (dequantize(w, torch.float32, backend="reference") for w in (weight, interleaved(weight)))
    assert torch.equal(turned[:, 0::2], dense[:, :32])
    assert torch.equal(turned[:, 1::2], dense[:, 32:])


def test_without_a_backend_to_dequantise_with_they_say_so():
    assert "no backend 'none'" in GroupedDense("none").unavailable()
