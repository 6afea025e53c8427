from __future__ import annotations

from mxperts.checkpoint.names import spellings, split_expert, split_fused


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
