from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import mxperts as mx
from mxperts.evaluation import Windows
from mxperts.evaluation.router import experts_modules


def tiny_model(**changes: object) -> Qwen3MoeForCausalLM:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | changes)).to(torch.bfloat16).eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Qwen3MoeForCausalLM]:
    """Makes a tiny random model; keyword arguments change its configuration."""
    return tiny_model


@pytest.fixture(scope="session")
def base_model() -> Qwen3MoeForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def other_model(base_model: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    """The base with its expert weights rounded to MXFP4."""
    model = copy.deepcopy(base_model)
    for module in experts_modules(model).values():
        for p in module.parameters():
            p.data = mx.fake_quantize(p.data, "mxfp4", role="weight")
    return model


@pytest.fixture(scope="session")
def windows() -> Windows:
    tokens = torch.randint(0, 97, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    return Windows.of(tokens, context=24)
