"""Scaled rows and columns are read the same by tensor and by layer, in every way experts are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxperts.checkpoint import Checkpoint, quark
from mxperts.quantization.edits import EditedCheckpoint
from mxperts.quantization.leaves import BIAS, leaves

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_tensors_and_layers_agree(family: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / f"bf16-{family}")
    found = leaves(checkpoint, quark.NAMES)
    edits, generator = EditedCheckpoint(checkpoint, found), torch.Generator().manual_seed(0)
    scales: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for leaf in (leaf for group in found.values() for leaf in group if ".experts." in leaf.module):
        if leaf.part == BIAS:
            continue
        rows, columns = (torch.exp2(torch.randint(-3, 4, (n,), generator=generator)) for n in leaf.shape)
        scales[leaf.module] = rows, columns
        edits.scale_rows(leaf.module, rows)
        edits.scale_columns(leaf.module, columns / 2)
        edits.scale_columns(leaf.module, torch.full_like(columns, 2))
    norm = "model.layers.0.input_layernorm.weight"
    edits.scale_vector(norm, torch.full(checkpoint.info(norm).shape, 4.0))
    assert torch.equal(edits.tensor(norm), 4 * checkpoint.tensor(norm))
    assert scales
    for name, group in found.items():
        before = checkpoint.tensor(name).clone()
        tensor = edits.tensor(name)
        assert tensor.dtype == before.dtype
        for leaf in group:
            expected = leaf.view(before)
            if leaf.module in scales:
                rows, columns = scales[leaf.module]
                expected = expected * (rows if leaf.part == BIAS else rows[:, None] * columns).to(expected)
            assert torch.equal(leaf.view(tensor), expected)
            assert torch.equal(edits.leaf(leaf), expected)
        assert torch.equal(checkpoint.tensor(name), before)
