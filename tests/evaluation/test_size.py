"""Bytes of a model: what each value takes, whether or not a backend holds the weights in a layout of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import mxperts as mx
from mxperts.evaluation import Size
from mxperts.nn.prepared import PreparedParameter

LAYERS, EXPERTS, VALUES = 2, 8, 2 * 32 * 64 + 64 * 32
"""Of the tiny model: layers, experts, and values of one expert's gate, up and down."""
PACKED = LAYERS * EXPERTS * VALUES * 17 // 32
"""Bytes of its experts in MXFP4: half a byte a value and one for each 32."""


def prepared_parameters(model: nn.Module) -> int:
    return sum(type(p) is PreparedParameter for p in model.parameters())


def test_prepared_weights_count_as_what_they_stand_for_and_stay_prepared(
    make_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path)
    model = mx.load(tmp_path, scheme="w_mxfp4", backend="cpu").eval()
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    before = prepared_parameters(model)
    assert before == 4 * LAYERS
    size = Size.of(model)
    assert size.experts == PACKED
    assert size.model == Size.of(mx.load(tmp_path)).model - 2 * LAYERS * EXPERTS * VALUES + PACKED
    assert prepared_parameters(model) == before
    unprepared = mx.load(tmp_path, scheme="w_mxfp4", backend="reference")
    assert prepared_parameters(unprepared) == 0
    assert Size.of(unprepared) == size


def test_what_is_tied_counts_once(make_model: Callable[..., nn.Module]) -> None:
    tied, apart = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert Size.of(apart).model - Size.of(tied).model == 97 * 64 * 2
    first, second = (layer.mlp.experts for layer in tied.model.layers)
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    assert Size.of(tied).experts == EXPERTS * VALUES * 2


def test_empty_tensors_count_nothing() -> None:
    module = nn.ParameterList([torch.zeros(0, 3)])
    module.register_buffer("scale", torch.zeros(2, 3, dtype=torch.float16))
    assert Size.of(module) == Size(experts=0, model=12)
