"""Quark's configs: what amd-quark exported, what it could not mean, and what we write back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mxperts.checkpoint import Rule, is_mx, parse, quark
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import (
    BLOCK_FORMATS,
    FP8_DYNAMIC,
    FP8_STATIC,
    MXFP4,
    MXFP8_E4M3,
    ScaleRule,
    Scheme,
    all_schemes,
)

PLAIN = "quark-qwen3_moe-mxfp4"
EXPERT = "model.layers.0.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        (PLAIN, "w_mxfp4_a_mxfp4"),
        ("quark-qwen3_moe-mxfp4_weight_only", "w_mxfp4"),
        ("quark-qwen3_moe-mxfp6_e2m3", "w_mxfp6_e2m3_a_mxfp6_e2m3"),
        ("quark-qwen3_moe-mxfp6_e3m2", "w_mxfp6_e3m2_a_mxfp6_e3m2"),
        ("quark-qwen3_moe-mxfp4_mxfp6_e2m3", "w_mxfp4_a_mxfp6_e2m3"),
        ("quark-qwen3_moe-mxfp4_fp8", "w_mxfp4_a_fp8"),
        ("quark-qwen3_moe-mxfp8_block1x32-file", "w_mxfp8_e4m3_a_mxfp8_e4m3"),
    ],
)
def test_scheme_of_experts(quantization_config: Callable[[str], dict], name: str, scheme: str) -> None:
    found = parse(quantization_config(name))
    assert found is not None
    assert found.layout == "quark"
    assert found.scheme_of(EXPERT) == Scheme(scheme)
    assert found.scheme_of("lm_head") == Scheme("none")


def test_exclude_then_layer_then_type_then_global(quantization_config: Callable[[str], dict]) -> None:
    config = quantization_config(PLAIN)
    w6, w4a16 = (
        quantization_config(n)["global_quant_config"]
        for n in ("quark-qwen3_moe-mxfp6_e2m3", "quark-qwen3_moe-mxfp4_weight_only")
    )
    config |= {
        "exclude": ["a.b", "*.skipped", "re:x\\.[0-9]+$"],
        "layer_quant_config": {"a.*": w6, "x.*": w6},
        "layer_type_quant_config": {"Linear": w4a16},
    }
    found = parse(config)
    assert found is not None
    expected = {"a.b": "none", "a.c.skipped": "none", "x.7": "none", "a.c": "mxfp6_e2m3", "x.seven": "mxfp6_e2m3"}
    for name, scheme in expected.items():
        assert found.scheme_of(name) == Scheme(scheme), name
    assert found.scheme_of("other") == Scheme("w_mxfp4"), "layer type goes before global"
    assert found.scheme_of("unknown", "a.b") == Scheme("none"), "any spelling may match"


def test_block_rows(quantization_config: Callable[[str], dict]) -> None:
    found = parse(quantization_config("quark-qwen3_moe-mxfp8_block32x32-file"))
    assert found is not None
    assert found.rule_of(EXPERT).block_rows == 32
    assert found.rule_of("model.layers.0.self_attn.q_proj").block_rows == 1


def test_one_entry_lists(quantization_config: Callable[[str], dict]) -> None:
    config = quantization_config(PLAIN)
    group = config["global_quant_config"]
    config["global_quant_config"] = group | {"weight": [group["weight"]], "input_tensors": [group["input_tensors"]]}
    found = parse(config)
    assert found is not None
    assert found.scheme_of(EXPERT) == Scheme("w_mxfp4_a_mxfp4")


def fields(group: str, **changes: object) -> Callable[[dict], None]:
    def change(config: dict) -> None:
        part = config
        for key in group.split("."):
            part = part[key]
        part.update(changes)

    return change


WEIGHT = "global_quant_config.weight"
INPUT = "global_quant_config.input_tensors"
UNSUPPORTED = {
    "weight.group_size": fields(WEIGHT, group_size=16),
    "weight.scale_format": fields(WEIGHT, scale_format="e4m3"),
    "weight.dtype": fields(WEIGHT, dtype="fp5"),
    "weight.qscheme": fields(WEIGHT, qscheme="per_tensor"),
    "weight.is_dynamic": fields(WEIGHT, is_dynamic=True),
    "weight.ch_axis": fields(WEIGHT, ch_axis=0),
    "input_tensors.is_dynamic": fields(INPUT, is_dynamic=False),
    "input_tensors.scale_calculation_mode": fields(INPUT, scale_calculation_mode="floor"),
    "input_tensors.dtype": fields(INPUT, dtype="int4"),
    "output_tensors": fields("global_quant_config", output_tensors={"dtype": "fp8_e4m3"}),
    "global_quant_config.bias": fields("global_quant_config", bias={"dtype": "int8"}),
    "kv_cache_quant_config": lambda c: c.update(kv_cache_quant_config={"*k_proj": {}}),
    "softmax_quant_spec": lambda c: c.update(softmax_quant_spec={"dtype": "fp8_e4m3"}),
    "algo_config[0].name": lambda c: c.update(algo_config=[{"name": "rotation"}]),
    "export.weight_format": fields("export", weight_format="fake_quantized"),
    "exclude": lambda c: c.update(exclude="lm_head"),
    "has 're:('": lambda c: c.update(exclude=["re:("]),
    "layer_type_quant_config.Conv2d": lambda c: c.update(layer_type_quant_config={"Conv2d": c["global_quant_config"]}),
    "layer_quant_config.a.b.weight.qscheme": lambda c: c.update(
        layer_quant_config={"a.b": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}, "input_tensors": None}}
    ),
    "weight has 2 stages": lambda c: fields("global_quant_config", weight=[c["global_quant_config"]["weight"]] * 2)(c),
    "global_quant_config.input_tensors must be an object": fields("global_quant_config", input_tensors=7),
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_unsupported_is_refused_by_field(quantization_config: Callable[[str], dict], field: str) -> None:
    config = quantization_config(PLAIN)
    UNSUPPORTED[field](config)
    assert is_mx(config)
    with pytest.raises(CheckpointError, match="quantization_config") as caught:
        parse(config)
    assert field in str(caught.value)


@pytest.mark.parametrize("block_size", [None, [32, 16], [0, 32], [32], "32"])
def test_block_size(quantization_config: Callable[[str], dict], block_size: object) -> None:
    config = quantization_config("quark-qwen3_moe-mxfp8_block1x32-file")
    config["layer_quant_config"][EXPERT]["weight"]["block_size"] = block_size
    with pytest.raises(CheckpointError, match="block_size"):
        parse(config)


def test_quark_without_mx_is_for_other_loaders() -> None:
    fp8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "scale_format": None}
    nvfp4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "scale_format": None, "scale_type": "float32"}
    for weight in (fp8, [nvfp4, fp8], None, "odd"):
        config = {"quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": None}}
        assert not is_mx(config)
        assert parse(config) is None


@pytest.mark.parametrize(
    "scheme", [*all_schemes(), *(Scheme.of(None, f) for f in BLOCK_FORMATS), Scheme("none")], ids=str
)
def test_every_scheme_is_read_back(scheme: Scheme) -> None:
    rules = [
        Rule(pattern="lm_head", scheme=Scheme("none")),
        Rule(pattern="*layers.1.*", scheme=Scheme("mxfp6_e3m2")),
        Rule(pattern="*", scheme=scheme),
    ]
    written = json.loads(json.dumps(quark.write(rules)))
    found = parse({"model_type": "qwen3_moe", "quantization_config": written})
    assert found is not None
    assert list(found.rules) == rules
    assert found.config == written


def test_fp8_activations_as_quark_spells_them(quantization_config: Callable[[str], dict]) -> None:
    """Static: as exported. Dynamic: Quark's ``ptpc_fp8``, one scale a token."""
    theirs = quantization_config("quark-qwen3_moe-mxfp4_fp8")["global_quant_config"]["input_tensors"]
    ours = quark.write([Rule(pattern="*", scheme=Scheme.of(MXFP4, FP8_STATIC))])["global_quant_config"]["input_tensors"]
    assert ours.items() <= theirs.items()
    dynamic = quark.write([Rule(pattern="*", scheme=Scheme.of(MXFP4, FP8_DYNAMIC))])["global_quant_config"]
    assert (dynamic["input_tensors"]["qscheme"], dynamic["input_tensors"]["ch_axis"]) == ("per_channel", 1)


def test_writes_what_quark_writes(quantization_config: Callable[[str], dict]) -> None:
    theirs = quantization_config(PLAIN)
    rules = [Rule(pattern=name, scheme=Scheme("none")) for name in theirs["exclude"]]
    ours = quark.write([*rules, Rule(pattern="*", scheme=Scheme("mxfp4"))])
    for part in ("weight", "input_tensors"):
        assert ours["global_quant_config"][part].items() <= theirs["global_quant_config"][part].items()
    assert {k: v for k, v in ours.items() if k != "global_quant_config"} == {
        k: v for k, v in theirs.items() if k != "global_quant_config"
    }


def test_the_scale_rule_of_weights_is_written() -> None:
    rules = [Rule(pattern="*", scheme=Scheme("mxfp4"))]
    for rule, written in [(ScaleRule.FLOOR, "floor"), (ScaleRule.RCEIL, None)]:
        group = quark.write(rules, lambda fmt, rule=rule: rule)["global_quant_config"]
        assert group["weight"]["scale_calculation_mode"] == written
        assert group["input_tensors"]["scale_calculation_mode"] == "even"


def test_mxfp8_as_quark_spells_it(quantization_config: Callable[[str], dict]) -> None:
    theirs = quantization_config("quark-qwen3_moe-mxfp8_block1x32-file")["layer_quant_config"]
    (expected, *_) = theirs.values()
    for activation in (MXFP8_E4M3, FP8_STATIC, FP8_DYNAMIC, None):
        rules = [Rule(pattern="*", scheme=Scheme.of(MXFP8_E4M3, activation))]
        written = json.loads(json.dumps(quark.write(rules, per_block=True)))
        found = parse(written)
        assert found is not None
        assert list(found.rules) == rules
        group = written["global_quant_config"]
        assert group["weight"].items() <= expected["weight"].items()
        if activation == MXFP8_E4M3:
            assert group["input_tensors"].items() <= expected["input_tensors"].items()


@pytest.mark.parametrize(
    "scheme", ["w_mxfp4_a_mxfp8_e4m3", "w_mxfp8_e4m3_a_mxfp4", "w_mxfp8_e5m2", "w_mxfp6_e2m3_a_fp8"]
)
def test_per_block_is_for_mxfp8_alone(scheme: str) -> None:
    rules = [Rule(pattern="*", scheme=Scheme(scheme))]
    assert quark.write(rules, per_block=True) == quark.write(rules)


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [Rule(pattern="a", scheme=Scheme("mxfp4"))],
        [
            Rule(pattern="a", scheme=Scheme("mxfp4")),
            Rule(pattern="b", scheme=Scheme("none")),
            Rule(pattern="*", scheme=Scheme("mxfp4")),
        ],
        [Rule(pattern="*", scheme=Scheme("mxfp8"), block_rows=32)],
    ],
)
def test_rules_that_quark_has_no_words_for(rules: list[Rule]) -> None:
    with pytest.raises(ArgumentError, match="Quark's config"):
        quark.write(rules)


def all_configs(fixtures: Path) -> Iterator[tuple[str, dict]]:
    for file in sorted(fixtures.glob("*/config.json")):
        yield file.parent.name, json.loads(file.read_text())


def test_every_fixture_parses(fixtures: Path) -> None:
    refused = {"compressed_tensors-qwen3_moe-mxfp4xfp8"}  # activations in groups of 128 with float scales
    seen = set()
    for name, config in all_configs(fixtures):
        if name in refused:
            continue
        found = parse(config)
        assert (found is None) == name.startswith("bf16-"), name
        seen.add(found.layout if found else None)
    assert seen == {None, "quark", "compressed-tensors", "gpt-oss"}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "mxfp8"}},
        {"quant_method": "gptq"},
    ],
)
def test_other_loaders_configs(config: dict) -> None:
    assert not is_mx(config)
    assert parse(config) is None


def test_a_config_that_is_no_object() -> None:
    with pytest.raises(CheckpointError, match="must be an object"):
        parse({"quantization_config": "mxfp4"})


def test_config_of_a_composite_model(quantization_config: Callable[[str], dict]) -> None:
    config = {"model_type": "vlm", "text_config": {"quantization_config": quantization_config(PLAIN)}}
    assert is_mx(config)
