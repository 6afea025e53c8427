"""vLLM's description of a layer, by records with the fields that vLLM's own have."""

from types import SimpleNamespace

import pytest
import torch

import mxperts as mx
from mxperts.formats import FP8_DYNAMIC, FP8_STATIC
from mxperts.integrations.vllm.call import activation_arguments, is_supported_activation, scheme_of
from mxperts.ops.activation import bind_activation

GATED = ("silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "situ", "swigluoai_uninterleave", "swiglustep")
NAMES = (*GATED, "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul")
"""Every member of vLLM's ``MoEActivation``, 0.32 and 0.33."""


def moe(name, **constants):
    unset = dict.fromkeys(
        ("swiglu_limit", "swiglu_alpha", "swiglu_beta", "activation_situ_beta", "activation_situ_linear_beta")
    )
    return SimpleNamespace(activation=SimpleNamespace(value=name), **(unset | constants))


def quant(weight="mxfp4", activation=None, scale=None, **constants):
    unset = dict.fromkeys(("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"))
    return SimpleNamespace(weight_quant_dtype=weight, quant_dtype=activation, a1_scale=scale, **(unset | constants))


def bound(arguments):
    constants = {k.removeprefix("swiglu_"): v for k, v in arguments.items() if k.startswith("swiglu_")}
    return bind_activation(arguments["activation"], **constants)


@pytest.mark.parametrize(
    ("description", "scheme"),
    [
        (quant(), "w_mxfp4"),
        (quant("mxfp6_e3m2"), "w_mxfp6_e3m2"),
        (quant("mxfp4", "mxfp4"), "w_mxfp4_a_mxfp4"),
        (quant("mxfp4", "mxfp6_e2m3"), "w_mxfp4_a_mxfp6_e2m3"),
        (quant("mxfp6_e2m3", "mxfp6_e2m3"), "w_mxfp6_e2m3_a_mxfp6_e2m3"),
        (quant("mxfp4", "mxfp8_e4m3"), "w_mxfp4_a_mxfp8_e4m3"),
        (quant("mxfp6_e3m2", "fp8", torch.tensor(0.5)), "w_mxfp6_e3m2_a_fp8"),
        (quant("mxfp4", "fp8"), "w_mxfp4_a_fp8_dynamic"),
    ],
)
def test_schemes(description, scheme):
    assert scheme_of(description) == mx.Scheme(scheme)


def test_fp8_is_static_where_there_is_a_scale():
    assert scheme_of(quant("mxfp4", "fp8", torch.tensor(0.5))).activation == FP8_STATIC
    assert scheme_of(quant("mxfp4", "fp8")).activation == FP8_DYNAMIC


@pytest.mark.parametrize("name", NAMES)
def test_every_activation_of_vllm_is_one_of_ours(name):
    assert is_supported_activation(SimpleNamespace(value=name))
    constants = {"activation_situ_beta": 4.0} if name == "situ" else {}
    function = bound(activation_arguments(moe(name, **constants), quant()))
    assert function.gated == (name in GATED)
    assert function.name == ("swigluoai" if name == "swigluoai_uninterleave" else name)


def test_an_activation_that_vllm_may_get_one_day_is_not_supported():
    assert not is_supported_activation(SimpleNamespace(value="tanh"))


def test_rows_alternate_only_in_gpt_oss():
    assert [n for n in NAMES if activation_arguments(moe(n), quant())["interleaved"]] == ["swigluoai"]


def test_constants_come_from_the_quantisation_config_or_else_from_the_model():
    model = moe("swigluoai", swiglu_limit=5.0, swiglu_alpha=1.5, swiglu_beta=0.5)
    assert bound(activation_arguments(model, quant())) == bind_activation("swigluoai", limit=5.0, alpha=1.5, beta=0.5)
    own = quant(gemm1_clamp_limit=7.0, gemm1_alpha=1.25)
    assert bound(activation_arguments(model, own)) == bind_activation("swigluoai", limit=7.0, alpha=1.25, beta=0.5)


def test_gpt_oss_without_constants_has_those_of_vllms_kernel():
    assert bound(activation_arguments(moe("swigluoai"), quant())) == bind_activation(
        "swigluoai", limit=7.0, alpha=1.702, beta=1.0
    )


def test_packed_halves_have_other_defaults():
    halves = activation_arguments(moe("swigluoai_uninterleave", swiglu_limit=6.0), quant())
    assert bound(halves) == bind_activation("swigluoai", limit=6.0, alpha=1.0, beta=0.0)


def test_situ_takes_the_models_constants():
    model = moe("situ", activation_situ_beta=4.0, activation_situ_linear_beta=25.0)
    assert bound(activation_arguments(model, quant())) == bind_activation("situ", beta=4.0, linear_beta=25.0)


def test_functions_without_constants_are_given_none():
    model = moe("gelu", swiglu_limit=5.0)
    assert activation_arguments(model, quant()) == {"activation": "gelu", "interleaved": False}
