"""The exchange within one process, which all others of its steps can be seen in; several: tests/integrations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mxperts as mx
from mxperts.distributed import Exchange, Wire, traffic
from mxperts.distributed.exchange import gather_shares, own_share
from mxperts.formats import parse_activation
from mxperts.ops.dispatch import Problem, resolve

E, H, INTERMEDIATE, K = 6, 96, 64, 3


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    transport = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(transport, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def exchanged(
    group: Any,
    x: torch.Tensor,
    ids: torch.Tensor,
    w: torch.Tensor,
    experts: dict[str, Any],
    activation: str | None,
    name: str,
) -> torch.Tensor:
    """A layer by the exchange, with the backend ``name``."""
    parsed = parse_activation(activation)
    problem = Problem(op="fused_experts", device=x.device, dtype=x.dtype, weight=mx.MXFP4, activation=parsed)
    backend = resolve(name, problem).backend
    wire = Wire(hidden=H, dtype=x.dtype, activation=parsed, backend=name)
    exchange = Exchange(group=group, experts=E, wire=wire, sums=backend.sums)

    def run(rows: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(len(rows), 1, device=x.device)
        options = {"activation_format": parsed, "out_dtype": exchange.sums, "backend": name}
        return mx.fused_experts(rows, top_k_index=expert.unsqueeze(1), top_k_weights=ones, **experts, **options)

    return exchange(x, ids, w, run, backend.load("sum_slots"))


def make(
    tokens: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, H, generator=generator).to(dtype)
    ids = torch.rand(tokens, E, generator=generator).topk(K).indices
    w = torch.randn(tokens, K, generator=generator).softmax(-1)
    up, down = (torch.randn(E, *shape, generator=generator) / 8 for shape in ((2 * INTERMEDIATE, H), (H, INTERMEDIATE)))
    bias = torch.randn(E, H, generator=generator).to(device)
    experts = {"gate_up_proj": mx.quantize(up, "mxfp4").to(device), "down_proj": mx.quantize(down, "mxfp4").to(device)}
    return x.to(device), ids.to(device), w.to(device), experts | {"down_bias": bias}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", [None, "mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8", "fp8_dynamic"])
def test_bits_are_those_of_the_operation(group: Any, activation: str | None, dtype: torch.dtype, backend: str) -> None:
    x, ids, w, experts = make(37, dtype)
    ids[3, 1], ids[4] = -1, -1
    found = exchanged(group, x, ids, w, experts, activation, backend)
    options = {"activation_format": activation, "backend": backend}
    assert torch.equal(found, mx.fused_experts(x, top_k_index=ids, top_k_weights=w, **experts, **options))
    assert not found[4].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", [None, "mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "fp8_dynamic"])
def test_bits_are_those_of_the_operation_on_gpu(
    group: Any, activation: str | None, dtype: torch.dtype, prepared: bool
) -> None:
    from mxperts.backend.gpu.paths import batch_invariant

    for tokens in (1, 5, 300):
        x, ids, w, experts = make(tokens, dtype, "cuda")
        options = {"activation_format": activation, "backend": "gpu"}
        if prepared:
            weights = experts["gate_up_proj"], experts["down_proj"]
            experts["gate_up_proj"] = mx.prepare(*weights, dtype=dtype, **options)
            experts["down_proj"] = None
        with batch_invariant():
            found = exchanged(group, x, ids, w, experts, activation, "gpu")
            assert torch.equal(found, mx.fused_experts(x, top_k_index=ids, top_k_weights=w, **experts, **options))


@pytest.mark.parametrize("activation", [None, "mxfp4"])
def test_no_tokens(group: Any, activation: str | None) -> None:
    x, ids, w, experts = make(4, torch.bfloat16)
    assert exchanged(group, x[:0], ids[:0], w[:0], experts, activation, "cpu").shape == (0, H)


def test_what_stays_is_not_counted(group: Any) -> None:
    traffic.reset()
    exchanged(group, *make(5, torch.bfloat16), "mxfp4", "cpu")
    assert traffic.record() == {**dict.fromkeys(traffic.record(), 0), "exchanges": 1}


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 8])
def test_shares_are_the_whole_batch_once(tokens: int) -> None:
    class Of4:
        def __init__(self, rank: int) -> None:
            self.rank, self.size = lambda: rank, lambda: 4

    shares = [range(tokens)[own_share(Of4(rank), tokens)] for rank in range(4)]  # type: ignore[arg-type]
    assert [token for share in shares for token in share] == list(range(tokens))


def test_a_gathered_batch_is_the_whole(group: Any) -> None:
    x = torch.randn(5, H)
    assert torch.equal(gather_shares(group, x, 5), x)
    assert gather_shares(group, x[:0], 0).shape == (0, H)
