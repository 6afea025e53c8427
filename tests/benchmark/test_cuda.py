"""The CUDA device as far as it can be seen without one: a GPU whose graphs are loops and whose events are a clock."""

import time

import pytest
import torch

from mxperts.benchmark import Plan, Problem, Status, bench_layer, choose, parse_shape, report
from mxperts.benchmark.contenders.packed import Packed
from mxperts.benchmark.device import cuda
from mxperts.benchmark.device.cuda import Cuda, calls_of, routings
from mxperts.benchmark.device.replay import one_by_one
from mxperts.benchmark.inputs import make_inputs
from mxperts.benchmark.roofline import Matmul, Stream
from mxperts.errors import ArgumentError
from mxperts.formats import Scheme

from .conftest import Broken


class FakeCuda(Cuda):
    """On the processor."""

    slice = 0.001

    def cache(self):
        return 1 << 14

    def free_memory(self):
        return 1 << 30

    def stream(self, cache):
        return Stream(cache)

    def matmul(self):
        return Matmul(size=64)

    def results(self, run):
        yield run(0)
        yield run(0).clone()

    def finish(self):
        pass

    def release(self):
        pass


class Failing(Broken):
    """Runs out of something."""

    name = "failing"

    def load(self, problem, layers):
        raise RuntimeError("out of memory\nand more about it")


@pytest.fixture
def fake(monkeypatch):
    def seconds(go, times):
        taken = []
        for _ in range(times):
            before = time.perf_counter()
            go()
            taken.append(time.perf_counter() - before)
        return taken

    def record_graph(run, calls):
        if run(0).shape[0] == 3:
            raise RuntimeError("cannot be captured")
        return one_by_one(run, calls)

    monkeypatch.setattr(cuda, "event_seconds", seconds)
    monkeypatch.setattr(cuda, "record_graph", record_graph)
    monkeypatch.setattr("mxperts.benchmark.layer.device_of", lambda name: FakeCuda("cpu"))


def bench(contenders, tokens):
    shape, plan = parse_shape("4,2,64,32"), Plan(rounds=2, slice=0.001, time_budget=1)
    return [r for rows in bench_layer([shape], [Scheme("w_mxfp4")], tokens, contenders, plan=plan) for r in rows]


def test_rows_say_how_they_were_timed(fake):
    captured, eager = bench([Packed("reference")], [1, 3])
    for row in (captured, eager):
        assert row.status is Status.OK
        assert set(row.details) == set(Cuda.details)
        assert row.details["eager_ms"] > 0
        rate = row.details["matmul_fraction"] * row.measured.matmul_gflop_s
        assert rate == pytest.approx(row.measured.gflop_s)
    assert captured.note == ""
    assert captured.details["captured"] is True
    assert captured.details["replay_calls"] % 16 == 0  # 8 routings, 11 copies of the layer
    assert eager.details["captured"] is False
    assert "no CUDA graph can be made of it (RuntimeError: cannot be captured)" in eager.note
    assert captured.record().keys() == eager.record().keys() > set(Cuda.details)
    assert eager.note in report.table([captured, eager])[2]


def test_a_contender_that_fails_ends_alone(fake):
    failing, fine = bench([Failing(), Packed("reference")], [1])
    assert failing.status is Status.FAILED
    assert failing.note == "failed in loading: RuntimeError: out of memory"
    assert failing.record()["captured"] is None
    assert fine.status is Status.OK
    assert report.table([failing, fine])[1][0][4] == "failed"


def test_routings_are_fewer_the_more_of_the_layer_each_takes():
    assert [routings(tokens) for tokens in (1, 8, 64, 512, 4096)] == [8, 4, 2, 1, 1]


def problem(shape="128,8,64,32", tokens=1):
    return Problem(shape=parse_shape(shape), tokens=tokens, scheme=Scheme("w_mxfp4"))


def test_one_token_hits_other_experts_in_every_call_while_there_are_any():
    ids = torch.cat([c.top_k_index for c in make_inputs(problem(), routings=16, disjoint=True).calls])
    assert ids.unique().numel() == 128
    few = torch.cat([c.top_k_index for c in make_inputs(problem("8,3,64,32"), routings=5, disjoint=True).calls])
    assert few.shape == (5, 3)
    assert few[:2].unique().numel() == few[2:4].unique().numel() == 6


def test_calls_take_every_routing_and_every_copy():
    assert calls_of(make_inputs(problem("4,2,64,32"), copies=1, routings=8)) == 8
    assert calls_of(make_inputs(problem("4,2,64,32"), copies=11, routings=8)) == 16
    assert calls_of(make_inputs(problem("4,2,64,32", tokens=9), copies=2, routings=1)) == 2


def test_who_takes_part_on_cuda(monkeypatch):
    monkeypatch.setattr("mxperts.benchmark.contenders.default_backends", lambda device: ["reference"])
    names = [c.name for c in choose(None, ["installed"], device="cuda")]
    assert names[:3] == ["dequantise-first", "mxperts reference", "bf16"]
    assert set(names[3:]) == {"humming", "humming-fp8", "humming-fp8-32", "triton-kernels"}


def test_peers_of_the_other_device_are_refused():
    with pytest.raises(ArgumentError, match="does not run on 'cuda'"):
        choose(["reference"], ["ggml"], device="cuda")
    with pytest.raises(ArgumentError, match="does not run on 'cpu'"):
        choose(["reference"], ["humming"])


def test_microseconds_have_decimals_on_an_accelerator():
    assert report.milliseconds(0.02274, 4) == "0.0227"
    assert report.milliseconds(12.34567, 4) == "12.346"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_layer_on_the_device():
    contenders = choose(["reference"], ["bf16"], device="cuda")
    rows = next(
        bench_layer([parse_shape("small")], [Scheme("w_mxfp4")], [1], contenders, device="cuda", plan=Plan(rounds=2))
    )
    assert [(row.contender, row.status) for row in rows] == [(c.name, Status.OK) for c in contenders]
    assert [row.details["captured"] for row in rows] == [True, False, True]
    assert rows[0].measured.stream_gb_s > 100
