"""Methods by layer, in both ways of quantising."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mxperts as mx
from mxperts.checkpoint import Checkpoint
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.quantization import quantize_checkpoint
from mxperts.quantization.choice import Methods
from mxperts.quantization.methods import METHODS, Problem

SOURCE = Path(__file__).parents[1] / "fixtures" / "checkpoints" / "bf16-qwen3_moe_2l"


def test_the_first_pattern_counts() -> None:
    methods = Methods(default="scale-search", layers={"*layers.0.*": "rtn", "*": "gptq"})
    assert methods.of("model.layers.0.mlp.up_proj") is METHODS["rtn"]
    assert methods.of("model.layers.1.mlp.up_proj") is METHODS["gptq"]
    assert methods.rounds("model.layers.0.mlp.up_proj")
    assert not methods.rounds("model.layers.1.mlp.up_proj")
    assert methods.need_text
    assert not Methods(default="scale-search").need_text
    assert Methods().rounds("anything")


def test_unknown_names() -> None:
    with pytest.raises(ArgumentError, match="unknown method 'gtpq'; did you mean gptq"):
        Methods(default="gtpq")
    with pytest.raises(ArgumentError, match="unknown method 'best'; known: rtn, scale-search, gptq"):
        Methods(layers={"*": "best"})
    with pytest.raises(CheckpointError, match="layer_methods has 're:\\(', which is no regular expression"):
        Methods(layers={"re:(": "rtn"})
    with pytest.raises(ArgumentError, match=r"the pattern 'model\.layers\.7\.\*' of layer_methods matches no layer"):
        Methods(layers={"model.layers.7.*": "rtn"}).check_layers(["model.layers.0.mlp.up_proj"])


def test_methods_by_layer_without_text(tmp_path: Path) -> None:
    methods: dict[str, Any] = {"method": "scale-search", "layer_methods": {"*layers.0.*": "rtn"}}
    quantize_checkpoint(SOURCE, tmp_path / "dst", "w4a4", **methods)
    source, result = Checkpoint.open(SOURCE), Checkpoint.open(tmp_path / "dst")
    differ = 0
    for module, t in result.mx_tensors():
        weight = source.tensor(f"{module}.weight")
        rounded = mx.quantize(weight, "mxfp4")
        expected = (
            rounded if ".layers.0." in module else METHODS["scale-search"](Problem(weight=weight, format=t.format))
        )
        assert torch.equal(t.packed, expected.packed)
        assert torch.equal(t.scales, expected.scales)
        differ += not torch.equal(t.packed, rounded.packed)
    assert differ


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="layer_methods matches no layer"):
        quantize_checkpoint(SOURCE, tmp_path / "dst", "w4a4", layer_methods={"*layers.9.*": "rtn"})
    assert not list(tmp_path.iterdir())
