"""Routing against the routers of Transformers, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV4Config,
    GptOssConfig,
    Llama4TextConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import mxperts as mx

E, H, T, K = 16, 24, 33, 4
SMALL = {"hidden_size": H, "num_experts_per_tok": K}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}


def run(router: torch.nn.Module, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and ids of a router with random parameters and biases."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in (*router.parameters(), *(b for b in router.buffers() if b.is_floating_point())):
            p.normal_()
        logits, weights, ids = router(torch.randn(T, H), *args)
    return logits, weights, ids


def assert_same(ours: tuple[Tensor, Tensor], weights: Tensor, ids: Tensor) -> None:
    """The same weight for each expert, in whatever order the experts come."""
    top_k_weights, top_k_index = ours
    assert top_k_weights.dtype is torch.float32
    assert top_k_index.dtype is torch.int64
    spread = torch.zeros(T, E).scatter(1, top_k_index, top_k_weights)
    torch.testing.assert_close(spread, torch.zeros(T, E).scatter(1, ids, weights), rtol=2e-6, atol=1e-7)
    assert torch.equal(top_k_index.sort(1).values, ids.sort(1).values)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("router", "config"), [(Qwen3MoeTopKRouter, Qwen3MoeConfig), (OlmoeTopKRouter, OlmoeConfig)])
def test_softmax_topk(router: Any, config: Any, renormalize: bool) -> None:
    logits, weights, ids = run(router(config(**SMALL, num_experts=E, norm_topk_prob=renormalize)))
    assert_same(mx.routing.softmax_topk(logits, K, renormalize=renormalize), weights, ids)


def test_mixtral() -> None:
    logits, weights, ids = run(MixtralTopKRouter(MixtralConfig(**SMALL, num_local_experts=E)))
    assert_same(mx.routing.softmax_topk(logits, K, renormalize=True), weights, ids)
    assert_same(mx.routing.topk_softmax(logits, K), weights, ids)


def test_gpt_oss() -> None:
    logits, weights, ids = run(GptOssTopKRouter(GptOssConfig(**SMALL, num_local_experts=E)))
    assert_same(mx.routing.topk_softmax(logits, K), weights, ids)


@pytest.mark.parametrize("top_k", [1, 3])
def test_llama4(top_k: int) -> None:
    config = Llama4TextConfig(hidden_size=H, num_experts_per_tok=top_k, num_local_experts=E)
    torch.manual_seed(0)
    scores, logits = Llama4Router(config)(torch.randn(T, H))
    weights, ids = mx.routing.llama4(logits, top_k)
    torch.testing.assert_close(torch.zeros(T, E).scatter(1, ids, weights), scores)


@pytest.mark.parametrize("renormalize", [False, True])
def test_deepseek_v3(renormalize: bool) -> None:
    config = DeepseekV3Config(**SMALL, **GROUPS, n_routed_experts=E, norm_topk_prob=renormalize)
    router = DeepseekV3TopkRouter(config)
    logits, weights, ids = run(router)
    ours = mx.routing.grouped_topk(
        logits,
        K,
        num_groups=4,
        top_k_groups=2,
        bias=router.e_score_correction_bias,
        renormalize=renormalize,
        scaling_factor=2.5,
    )
    assert_same(ours, weights, ids)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2(method: str) -> None:
    logits, weights, ids = run(
        DeepseekV2TopkRouter(
            DeepseekV2Config(**SMALL, **GROUPS, n_routed_experts=E, topk_method=method, num_attention_heads=2)
        )
    )
    groups = (4, 2) if method == "group_limited_greedy" else (1, 1)
    ours = mx.routing.grouped_topk(
        logits,
        K,
        num_groups=groups[0],
        top_k_groups=groups[1],
        scoring="softmax",
        renormalize=False,
        scaling_factor=2.5,
    )
    assert_same(ours, weights, ids)


def test_minimax2() -> None:
    bias = torch.randn(E, generator=torch.Generator().manual_seed(1))
    logits, weights, ids = run(MiniMaxM2TopKRouter(MiniMaxM2Config(**SMALL, num_local_experts=E)), bias)
    assert_same(mx.routing.minimax2(logits, K, bias=bias), weights, ids)
    weights3, _ = mx.routing.minimax2(logits, K, bias=bias, scaling_factor=3.0)
    torch.testing.assert_close(weights3.sum(1), torch.full((T,), 3.0))


def v4_config() -> DeepseekV4Config:
    return DeepseekV4Config(**SMALL, n_routed_experts=E, routed_scaling_factor=1.5, vocab_size=50)


def test_deepseek_v4() -> None:
    router = DeepseekV4TopKRouter(v4_config())
    logits, weights, ids = run(router)
    assert_same(
        mx.routing.deepseek_v4(logits, K, bias=router.e_score_correction_bias, scaling_factor=1.5), weights, ids
    )


def test_deepseek_v4_hash_routing() -> None:
    router = DeepseekV4HashRouter(v4_config())
    router.tid2eid.copy_(torch.stack([torch.randperm(E)[:K] for _ in range(50)]))
    tokens = torch.randint(50, (T,))
    logits, weights, ids = run(router, tokens)
    assert_same(mx.routing.deepseek_v4(logits, K, top_k_index=router.tid2eid[tokens], scaling_factor=1.5), weights, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_topk_and_sigmoid(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0], [-3.0, 0.0, -2.0]], dtype=dtype)
    index = torch.tensor([[2, 0], [1, 2]])
    values = torch.tensor([[2.0, 0.5], [0.0, -2.0]])
    sigmoid = 1 / (1 + torch.exp(-values))
    expected = {
        mx.routing.topk: values,
        mx.routing.sigmoid_topk: sigmoid,
        lambda x, k: mx.routing.sigmoid_topk(x, k, renormalize=True): sigmoid / sigmoid.sum(1, keepdim=True),
    }
    for method, weights in expected.items():
        ours = method(logits, 2)
        torch.testing.assert_close(ours[0], weights)
        assert torch.equal(ours[1], index)


def test_group_score_without_bias_is_the_maximum() -> None:
    """Group 0 has the largest score, group 1 the largest sum of two."""
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]])
    choose = {"num_groups": 2, "top_k_groups": 1}
    assert mx.routing.grouped_topk(logits, 1, **choose)[1].tolist() == [[0]]
    assert mx.routing.grouped_topk(logits, 1, **choose, bias=torch.zeros(4))[1].tolist() == [[2]]


def test_groups_of_one_expert() -> None:
    logits = torch.tensor([[3.0, -9.0, 2.0, 1.0]])
    ours = mx.routing.grouped_topk(logits, 2, num_groups=4, top_k_groups=2, bias=torch.zeros(4))
    assert ours[1].tolist() == [[0, 2]]


def test_no_tokens() -> None:
    weights, ids = mx.routing.grouped_topk(torch.empty(0, E), K, num_groups=4, top_k_groups=2)
    assert weights.shape == ids.shape == (0, K)


def test_scores_that_all_underflow() -> None:
    weights, _ = mx.routing.sigmoid_topk(torch.full((1, 4), -500.0), 2, renormalize=True)
    assert torch.equal(weights, torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("softmax_topk", {"router_logits": torch.zeros(E)}, r"float tensor \[T, E\]"),
        ("topk_softmax", {"router_logits": torch.zeros(1, E).long()}, "not torch.int64"),
        ("topk", {"top_k": E + 1}, "top_k must lie in 1..16, the number of experts, not be 17"),
        ("sigmoid_topk", {"top_k": 0}, "not be 0"),
        ("grouped_topk", {"num_groups": 3, "top_k_groups": 1}, "num_groups must divide the 16 experts, not be 3"),
        ("grouped_topk", {"num_groups": 8, "top_k_groups": 1}, "give top_k = 4 experts to choose from, 2 a group"),
        ("grouped_topk", {"num_groups": 4, "top_k_groups": 5}, r"must lie in 1\.\.4"),
        ("grouped_topk", {"num_groups": 4, "top_k_groups": 2, "scoring": "sigmoit"}, "did you mean sigmoid"),
        ("minimax2", {"bias": torch.zeros(3)}, r"bias must have shape \(16,\)"),
        ("deepseek_v4", {"top_k_index": torch.zeros(2, 3).long()}, r"top_k_index must have shape \(1, 4\)"),
        ("deepseek_v4", {"top_k_index": torch.zeros(1, 4).long(), "bias": torch.zeros(E)}, "leave one out"),
    ],
)
def test_errors(method: str, options: dict[str, Any], message: str) -> None:
    arguments = {"router_logits": torch.zeros(1, E), "top_k": K, **options}
    with pytest.raises(mx.ArgumentError, match=message):
        getattr(mx.routing, method)(**arguments)
