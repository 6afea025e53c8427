"""compressed-tensors' configs: what it and llm-compressor exported, and what we write back."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from mxperts.checkpoint import Rule, compressed_tensors, is_mx, parse
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, MXFP4, MXFP6_E2M3, MXFP8_E4M3, Scheme

PLAIN = "compressed_tensors-qwen3_moe-mxfp4"
EXPERT = "model.layers.0.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        (PLAIN, "w_mxfp4_a_mxfp4"),
        ("compressed_tensors-qwen3_moe-mxfp4a16", "w_mxfp4"),
        ("compressed_tensors-qwen3_moe-mxfp6a16", "w_mxfp6_e2m3"),
        ("compressed_tensors-qwen3_moe-mxfp6a8-experts_ignored", "w_mxfp6_e2m3_a_mxfp8_e4m3"),
        ("llmcompressor-qwen3_moe-mxfp4", "w_mxfp4_a_mxfp4"),
        ("llmcompressor-qwen3_moe-mxfp8", "w_mxfp8_e4m3_a_mxfp8_e4m3"),
        ("llmcompressor-qwen3_moe-mxfp8a16", "w_mxfp8_e4m3"),
        ("llmcompressor-qwen3_moe-mxfp4a16-file", "w_mxfp4"),
    ],
)
def test_scheme_of_experts(quantization_config: Callable[[str], dict], name: str, scheme: str) -> None:
    found = parse(quantization_config(name))
    assert found is not None
    assert found.layout == "compressed-tensors"
    assert found.scheme_of(EXPERT) == Scheme(scheme)
    for other in ("lm_head", "model.layers.0.mlp.gate", "model.layers.0.self_attn.q_proj"):
        assert found.scheme_of(other) == Scheme("none"), other


def test_name_then_regex_then_class(quantization_config: Callable[[str], dict]) -> None:
    config = quantization_config(PLAIN)
    by_name, by_regex = (json.loads(json.dumps(config["config_groups"]["group_0"])) for _ in range(2))
    by_name |= {"targets": ["a.b"], "input_activations": None}
    by_regex |= {"targets": ["re:a\\..*"]}
    by_regex["input_activations"] = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    config["config_groups"] |= {"group_1": by_regex, "group_2": by_name}
    found = parse(config)
    assert found is not None
    expected = {"a.b": "w_mxfp4", "a.c": "w_mxfp4_a_fp8_dynamic", "b": "w_mxfp4_a_mxfp4", "lm_head": "none"}
    assert {name: str(found.scheme_of(name)) for name in expected} == expected


UNSUPPORTED = {
    "config_groups.group_0.weights.group_size": {"weights": {"group_size": 16}},
    "config_groups.group_0.weights.num_bits": {"weights": {"num_bits": 6}},
    "config_groups.group_0.weights.symmetric": {"weights": {"symmetric": False}},
    "config_groups.group_0.weights.scale_dtype": {"weights": {"scale_dtype": "torch.float8_e4m3fn"}},
    "config_groups.group_0.weights.dynamic": {"weights": {"dynamic": True}},
    "config_groups.group_0.weights.actorder": {"weights": {"actorder": "group"}},
    "config_groups.group_0.input_activations.dynamic": {"input_activations": {"dynamic": False}},
    "config_groups.group_0.input_activations.group_size": {"input_activations": {"group_size": 128}},
    "config_groups.group_0.input_activations.type": {"input_activations": {"type": "int"}},
    "config_groups.group_0.input_activations.num_bits": {"input_activations": {"strategy": "token"}},
    "config_groups.group_0.output_activations": {"output_activations": {"num_bits": 8}},
    "config_groups.group_0.format": {"format": "nvfp4-pack-quantized"},
    "config_groups.group_0.targets": {"targets": ["Conv2d"]},
    "kv_cache_scheme": {"top": {"kv_cache_scheme": {"num_bits": 8}}},
    "transform_config": {"top": {"transform_config": {"config_groups": {"R1": {}}}}},
    "sparsity_config": {"top": {"sparsity_config": {"format": "sparse-24-bitmask"}}},
    "quantization_status": {"top": {"quantization_status": "frozen"}},
    "ignore": {"top": {"ignore": ["re:["]}},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_unsupported_is_refused_by_field(quantization_config: Callable[[str], dict], field: str) -> None:
    config = quantization_config(PLAIN)
    group = config["config_groups"]["group_0"]
    for key, change in UNSUPPORTED[field].items():
        if key == "top":
            config |= change
        elif isinstance(group[key], dict):
            group[key] |= change
        else:
            group[key] = change
    assert is_mx(config)
    with pytest.raises(CheckpointError) as caught:
        parse(config)
    assert f"quantization_config.{field} " in str(caught.value)


def test_activations_in_float_groups_of_128_are_refused(quantization_config: Callable[[str], dict]) -> None:
    with pytest.raises(CheckpointError, match=r"input_activations\.group_size is 128"):
        parse(quantization_config("compressed_tensors-qwen3_moe-mxfp4xfp8"))


def test_other_formats_are_for_other_loaders() -> None:
    for name in ("pack-quantized", "float-quantized", "nvfp4-pack-quantized", None):
        config = {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": {"format": name}}}
        assert not is_mx(config)
        assert parse(config) is None


@pytest.mark.parametrize("weight", [MXFP4, MXFP6_E2M3, MXFP8_E4M3], ids=str)
@pytest.mark.parametrize("activation", [None, MXFP4, MXFP6_E2M3, MXFP8_E4M3, FP8_DYNAMIC, FP8_STATIC], ids=str)
def test_written_configs_are_read_back(weight, activation) -> None:  # type: ignore[no-untyped-def]
    rules = [
        Rule(pattern="lm_head", scheme=Scheme("none")),
        Rule(pattern="re:.*layers\\.1\\..*", scheme=Scheme("mxfp4a16")),
        Rule(pattern="*", scheme=Scheme.of(weight, activation)),
    ]
    written = json.loads(json.dumps(compressed_tensors.write(rules)))
    found = parse(written)
    assert found is not None
    assert list(found.rules) == rules


def test_writes_what_compressed_tensors_writes(quantization_config: Callable[[str], dict]) -> None:
    theirs = quantization_config(PLAIN)
    rules = [Rule(pattern=name, scheme=Scheme("none")) for name in theirs["ignore"]]
    ours = compressed_tensors.write([*rules, Rule(pattern="*", scheme=Scheme("mxfp4"))])
    assert ours.items() <= theirs.items()


def test_globs_become_regular_expressions() -> None:
    written = compressed_tensors.write(
        [Rule(pattern="*.gate", scheme=Scheme("none")), Rule(pattern="*", scheme=Scheme("mxfp4"))]
    )
    found = parse(written)
    assert found is not None
    assert found.scheme_of("a.gate") == Scheme("none")
    assert found.scheme_of("a.gate_proj") == Scheme("mxfp4")


@pytest.mark.parametrize("scheme", ["w_mxfp6_e3m2", "w_mxint8", "w_mxfp4_a_mxfp6_e3m2", "a_mxfp4"])
def test_schemes_without_words(scheme: str) -> None:
    with pytest.raises(ArgumentError, match="compressed-tensors has no"):
        compressed_tensors.write([Rule(pattern="*", scheme=Scheme(scheme))])
