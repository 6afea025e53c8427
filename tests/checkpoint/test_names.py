from __future__ import annotations

import pytest

from mxperts.checkpoint.names import respell, spellings, split_expert, split_fused


def test_spellings() -> None:
    assert set(spellings("model.layers.0.block_sparse_moe.experts.3.w1")) >= {
        "model.layers.0.block_sparse_moe.experts.3.w1",
        "model.layers.0.block_sparse_moe.experts.3.gate_proj",
        "model.layers.0.mlp.experts.3.gate_proj",
    }
    assert "model.layers.0.mlp.gate" in spellings("model.layers.0.block_sparse_moe.gate")
    assert spellings("lm_head") == ["lm_head"]


def test_splitting() -> None:
    assert split_expert("a.experts.12.w2") == ("a.experts", 12, "w2")
    assert split_expert("a.shared_experts.up_proj") is None
    assert split_expert("a.experts.down_proj") is None
    assert split_fused("a.experts.down_proj") == ("a.experts", "down_proj")
    assert split_fused("a.experts.3.down_proj") is None
    assert split_fused("a.experts.down_proj_bias") is None


@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
@pytest.mark.parametrize(("gate", "up", "down"), [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_mixtral_has_a_spelling_in_every_layout(block: str, gate: str, up: str, down: str) -> None:
    for projection, quark, others in ((gate, "gate_proj", "w1"), (up, "up_proj", "w3"), (down, "down_proj", "w2")):
        name = f"model.layers.0.{block}.experts.3.{projection}"
        assert respell(name, "mixtral", "quark") == f"model.layers.0.mlp.experts.3.{quark}"
        spelled = respell(name, "mixtral", "compressed-tensors")
        assert spelled == f"model.layers.0.block_sparse_moe.experts.3.{others}"
        assert respell(name, "qwen3_moe", "quark") == name
    assert respell(f"model.layers.0.{block}.gate", "mixtral", "quark") == "model.layers.0.mlp.gate"
    assert respell("lm_head", "mixtral", "quark") == "lm_head"
