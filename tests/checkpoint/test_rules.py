"""Rules made of what every module has give it back, in every layout, in the order of that layout's own precedence."""

from __future__ import annotations

import pytest

from mxperts.checkpoint import ModelScheme, Rule, compressed_tensors, parse, quark
from mxperts.checkpoint.rules import check_expressible, rules_of
from mxperts.errors import ArgumentError
from mxperts.formats import Scheme

A, B, NONE = Scheme("w_mxfp4_a_mxfp4"), Scheme("w_mxfp6_e2m3"), Scheme("none")
EXPERTS = [f"model.layers.{layer}.mlp.experts" for layer in (1, 10, 11)]
SCHEMES = {
    **{f"{EXPERTS[0]}.{e}.up_proj": B for e in range(4)},
    **{f"{EXPERTS[1]}.{e}.up_proj": A for e in range(4)},
    f"{EXPERTS[1]}.2.down_proj": B,
    **{f"{EXPERTS[2]}.{e}.up_proj": A if e % 2 else NONE for e in range(4)},
    "model.layers.1.self_attn.q_proj": B,
    "model.layers.10.self_attn.q_proj": A,
    "lm_head": NONE,
}


def test_few_and_exact() -> None:
    assert [(rule.pattern, rule.scheme) for rule in rules_of(SCHEMES)] == [
        (f"{EXPERTS[2]}.0.up_proj", NONE),
        (f"{EXPERTS[2]}.2.up_proj", NONE),
        ("lm_head", NONE),
        (f"{EXPERTS[0]}*", B),
        (f"{EXPERTS[1]}.2.down_proj", B),
        ("model.layers.1.self_attn.q_proj", B),
        ("*", A),
    ]


def test_an_output_layer_without_a_tensor_is_not_quantised() -> None:
    named = [rule.pattern for rule in rules_of({"a.up_proj": A, "a.down_proj": NONE})]
    assert named == ["a.down_proj", "lm_head", "*"]
    assert [rule.pattern for rule in rules_of({"a.up_proj": A, "model.lm_head": A})] == ["*"]


@pytest.mark.parametrize("default", [None, A, B, Scheme("w_mxfp8_e4m3")])
@pytest.mark.parametrize("layout", [quark, compressed_tensors])
def test_every_module_has_its_scheme_again(layout: object, default: Scheme | None) -> None:
    found = parse(layout.write(rules_of(SCHEMES, default)))  # type: ignore[attr-defined]
    assert isinstance(found, ModelScheme)
    assert {module: found.scheme_of(module) for module in SCHEMES} == SCHEMES
    assert found.rules[-1] == Rule(pattern="*", scheme=B if default == B else A)


def test_the_first_module_without_words_is_named() -> None:
    modules = [Rule(pattern=m, scheme=Scheme(s)) for m, s in (("a", "none"), ("b", "w_mxfp4"), ("c", "w_mxint8"))]
    check_expressible("quark", modules, "qwen3_moe")
    with pytest.raises(ArgumentError, match=r"^c cannot be written in the compressed-tensors layout: .* mxint8"):
        check_expressible("compressed-tensors", modules, "qwen3_moe")
    with pytest.raises(ArgumentError, match=r"^b cannot be written in the gpt-oss layout: .* nothing else quantised"):
        check_expressible("gpt-oss", modules, "gpt_oss")
