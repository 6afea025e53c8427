"""Schemes: names of vLLM, AMD Quark and compressed-tensors."""

import pytest

import mxperts as mx
from mxperts.errors import FormatError
from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Activation, BlockFormat, Scheme, all_schemes, parse_activation
from mxperts.formats import scheme as scheme_module

FP4, E2M3, E3M2, E4M3 = mx.MXFP4, mx.MXFP6_E2M3, mx.MXFP6_E3M2, mx.MXFP8_E4M3

VLLM = {
    "w_mxfp4": (FP4, None),
    "w_mxfp4_a_mxfp4": (FP4, FP4),
    "w_mxfp4_a_mxfp6_e3m2": (FP4, E3M2),
    "w_mxfp4_a_mxfp6_e2m3": (FP4, E2M3),
    "w_mxfp4_a_fp8": (FP4, FP8_STATIC),
    "w_mxfp6_e3m2": (E3M2, None),
    "w_mxfp6_e3m2_a_mxfp6_e3m2": (E3M2, E3M2),
    "w_mxfp6_e3m2_a_fp8": (E3M2, FP8_STATIC),
    "w_mxfp6_e2m3": (E2M3, None),
    "w_mxfp6_e2m3_a_mxfp6_e2m3": (E2M3, E2M3),
    "w_mxfp6_e2m3_a_fp8": (E2M3, FP8_STATIC),
}
"""``OCP_MX_Scheme`` of vLLM 0.33, all members."""


@pytest.mark.parametrize("name", VLLM)
def test_vllms_names(name: str) -> None:
    found = Scheme(name)
    assert (found.weight, found.activation) == VLLM[name]
    assert found.name == str(found) == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("mxfp4", "w_mxfp4_a_mxfp4"),
        ("mxfp4_weight_only", "w_mxfp4"),
        ("mxfp6_e2m3", "w_mxfp6_e2m3_a_mxfp6_e2m3"),
        ("mxfp6_e3m2", "w_mxfp6_e3m2_a_mxfp6_e3m2"),
        ("mxfp4_mxfp6_e2m3", "w_mxfp4_a_mxfp6_e2m3"),
        ("mxfp4_mxfp6_e3m2", "w_mxfp4_a_mxfp6_e3m2"),
        ("mxfp4_fp8", "w_mxfp4_a_fp8"),
        ("mxfp8", "w_mxfp8_e4m3_a_mxfp8_e4m3"),
        ("MXFP4A16", "w_mxfp4"),
        ("MXFP4xFP8", "w_mxfp4_a_fp8_dynamic"),
        ("MXFP6A16", "w_mxfp6_e2m3"),
        ("MXFP6A8", "w_mxfp6_e2m3_a_mxfp8_e4m3"),
        ("MXFP8A16", "w_mxfp8_e4m3"),
        ("W4A16", "w_mxfp4"),
        ("w4a4", "w_mxfp4_a_mxfp4"),
        ("w4a6", "w_mxfp4_a_mxfp6_e2m3"),
        ("w4a8", "w_mxfp4_a_mxfp8_e4m3"),
        ("w6a16", "w_mxfp6_e2m3"),
        ("w6a6", "w_mxfp6_e2m3_a_mxfp6_e2m3"),
        ("w6a8", "w_mxfp6_e2m3_a_mxfp8_e4m3"),
        ("w8a16", "w_mxfp8_e4m3"),
        ("w8a8", "w_mxfp8_e4m3_a_mxfp8_e4m3"),
        ("bf16", "none"),
        ("none", "none"),
        ("w-mxfp4-a-mxfp4", "w_mxfp4_a_mxfp4"),
        ("w_mxfp8", "w_mxfp8_e4m3"),
        ("w_mxfp4_a_fp8_static", "w_mxfp4_a_fp8"),
        ("w_mxfp4_a_fp8_dynamic", "w_mxfp4_a_fp8_dynamic"),
        ("a_mxfp8", "a_mxfp8_e4m3"),
        ("a_fp8", "a_fp8"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert Scheme(alias).name == name
    assert Scheme(alias) == Scheme(name)


def test_every_alias_is_tested_or_a_member_of_all_schemes() -> None:
    known = {s.name for s in all_schemes()} | {"none"}
    assert {Scheme(alias).name for alias in scheme_module._ALIASES} <= known


def test_all_schemes_print_and_parse_back() -> None:
    schemes = all_schemes()
    assert len(schemes) == len({s.name for s in schemes}) == 6 * (1 + 2 + 6)
    for s in schemes:
        assert Scheme(s.name) == Scheme(s) == Scheme.of(s.weight, s.activation) == s
        assert hash(Scheme(s.name)) == hash(s)
    assert [Scheme(name) for name in VLLM if Scheme(name) not in schemes] == []


def test_schemes_of_formats_given_by_name() -> None:
    assert Scheme.of("mxfp4", "mxfp6-e2m3") == Scheme("w_mxfp4_a_mxfp6_e2m3")
    assert Scheme.of(None, mx.MXFP4).name == "a_mxfp4"
    assert Scheme.of(None) == Scheme("none")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (FP4, FP4),
        ("mxfp4", FP4),
        ("fp8", FP8_STATIC),
        ("FP8-static", FP8_STATIC),
        ("fp8_dynamic", FP8_DYNAMIC),
    ],
)
def test_activations_by_name(given: Activation, expected: BlockFormat | str | None) -> None:
    assert parse_activation(given) == expected


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("w_mxfp4_a_mxfp5", "w_mxfp4_a_mxfp4"),
        ("w_mxfp6_a_mxfp4", "w_mxfp6_e2m3_a_mxfp4"),
        ("w_mxfp6", "w_mxfp6_e2m3"),
        ("wmxfp4", "w_mxfp4"),
        ("w4a5", "w4a4"),
        ("w_mxfp4_a_", "w_mxfp4_a_mxfp4"),
    ],
)
def test_an_unknown_scheme_is_refused_with_near_names(name: str, suggestion: str) -> None:
    with pytest.raises(FormatError, match=rf"^unknown scheme '{name}'; did you mean .*\b{suggestion}\b") as error:
        Scheme(name)
    assert error.value.__suppress_context__


@pytest.mark.parametrize("name", ["ternary", ""])
def test_an_outlandish_scheme_says_how_names_are_made(name: str) -> None:
    expected = rf"^unknown scheme '{name}'; expected w_<format>, w_<format>_a_<format> or one of mxfp4, "
    with pytest.raises(FormatError, match=expected):
        Scheme(name)


@pytest.mark.parametrize("name", [None, 4, mx.MXFP4])
def test_a_scheme_is_named_by_a_string(name: object) -> None:
    with pytest.raises(FormatError, match=r"^a scheme is named by a string such as 'w_mxfp4_a_mxfp4', not "):
        Scheme(name)
