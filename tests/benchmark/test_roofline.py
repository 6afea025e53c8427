import pytest
import torch

from mxperts.benchmark import Problem, parse_shape
from mxperts.benchmark.inputs import Call
from mxperts.benchmark.machine import available_memory, last_level_cache, peak_memory
from mxperts.benchmark.roofline import STREAM_FACTOR, Limits, Matmul, Stream, Work, work
from mxperts.formats import Scheme


def test_work_counts_different_experts_and_all_products():
    problem = Problem(shape=parse_shape("4,2,64,32"), tokens=2, scheme=Scheme("w_mxfp4"))
    states = torch.zeros(2, 64, dtype=torch.bfloat16)
    calls = [
        Call(hidden_states=states, top_k_index=torch.tensor(ids), top_k_weights=torch.full((2, 2), 0.5))
        for ids in ([[0, 1], [1, 2]], [[0, 1], [1, 0]])
    ]
    found = work(problem, calls)
    assert found.active_experts == 2.5
    # an expert has 3 * 64 * 32 = 6144 weights in 3264 bytes; states are 2 * 64 values of 2 bytes, in and out
    assert found.bytes == 2.5 * 3264 + 2 * 2 * 64 * 2
    assert found.flops == 2 * (2 * 2) * 6144


@pytest.mark.parametrize(("bytes_", "flops", "seconds"), [(100, 10, 50.0), (100, 4000, 400.0)])
def test_the_bound_is_the_larger_of_both(bytes_, flops, seconds):
    assert Limits(stream=2.0, matmul=10.0).bound(Work(active_experts=1, bytes=bytes_, flops=flops)) == seconds


def test_stream_reads_more_than_the_cache():
    stream = Stream(cache=1 << 18)
    assert stream.amount == STREAM_FACTOR << 18
    stream()


def test_matmul_counts_its_operations():
    matmul = Matmul(size=16)
    matmul()
    assert matmul.amount == 2 * 16**3


def test_the_machine_is_described_where_the_system_tells():
    assert last_level_cache() >= 1 << 16
    for found in (available_memory(), peak_memory()):
        assert found is None or found > 1 << 20
