"""gpt-oss's config: experts only, MXFP4 only."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mxperts.checkpoint import Rule, gpt_oss, parse
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import Scheme


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        ("model.layers.0.mlp.experts", True),
        ("model.layers.0.mlp.experts.gate_up_proj", True),
        ("model.layers.10.mlp.experts.down_proj", True),
        ("model.layers.0.mlp.experts.3.gate_up_proj", True),
        ("experts.3.up_proj", True),
        ("model.layers.0.mlp.router", False),
        ("model.layers.0.self_attn.q_proj", False),
        ("model.layers.0.mlp.experts.down_proj_bias", False),
        ("model.layers.0.mlp.my_experts", False),
        ("lm_head", False),
    ],
)
def test_only_experts(quantization_config: Callable[[str], dict], name: str, quantized: bool) -> None:
    found = parse(quantization_config("gpt_oss-gpt_oss-mxfp4"))
    assert found is not None
    assert found.scheme_of(name) == Scheme("w_mxfp4" if quantized else "none")


def test_layers_may_be_left_out() -> None:
    found = parse({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.1.mlp"]})
    assert found is not None
    assert found.scheme_of("model.layers.1.mlp.experts.down_proj") == Scheme("none")
    assert found.scheme_of("model.layers.11.mlp.experts.down_proj") == Scheme("w_mxfp4")


@pytest.mark.parametrize("value", ["lm_head", ["("], [1]])
def test_modules_to_not_convert(value: object) -> None:
    with pytest.raises(CheckpointError, match="modules_to_not_convert"):
        parse({"quant_method": "mxfp4", "modules_to_not_convert": value})


def test_write(quantization_config: Callable[[str], dict]) -> None:
    theirs = quantization_config("gpt_oss-gpt_oss-mxfp4")
    rules = [Rule(pattern=name.replace("*", "3"), scheme=Scheme("none")) for name in theirs["modules_to_not_convert"]]
    assert gpt_oss.write([*rules, Rule(pattern="*", scheme=Scheme("w_mxfp4"))]) == theirs
    for pattern, scheme in (("model.layers.1.mlp.experts", "none"), ("*", "w_mxfp4_a_mxfp4"), ("*", "w_mxfp6_e2m3")):
        with pytest.raises(ArgumentError, match=f"cannot be {scheme}: in the gpt-oss layout experts are w_mxfp4"):
            gpt_oss.write([Rule(pattern=pattern, scheme=Scheme(scheme))])
