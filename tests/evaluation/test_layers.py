import copy
import math

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

import mxperts as mx
from mxperts.errors import ArgumentError
from mxperts.evaluation import layer_errors
from mxperts.evaluation.router import experts_modules

PROJECTIONS = {("experts", "gate_up_proj"), ("experts", "down_proj")}


@pytest.fixture(scope="module")
def errors(base_model, other_model, windows):
    return layer_errors(base_model, other_model, windows, name="w_mxfp4", batch_size=3)


def relative(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """sqrt(sum of (y - y0)² / sum of y0²), in float64."""
    difference = sum((y.double() - y0.double()).square().sum().item() for y0, y in pairs)
    return math.sqrt(difference / sum(y0.double().square().sum().item() for y0, _ in pairs))


class Tape:
    """What modules were given and returned, by name, written down by hooks of its own."""

    def __init__(self, model: nn.Module, names: list[str], windows) -> None:
        self.calls: dict[str, list[tuple]] = {name: [] for name in names}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda module, args, kwargs, output, name=name: self.calls[name].append((args, kwargs, output)),
                with_kwargs=True,
            )
            for name in names
        ]
        with torch.inference_mode():
            for ids in windows.batches(3):
                model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()


def tensor(output):
    return output[0] if isinstance(output, tuple) else output


def test_parts_are_in_the_order_of_the_layers(errors):
    assert errors.name == "w_mxfp4"
    assert [(p.layer, p.part) for p in errors.parts] == [
        (layer, part) for layer in (0, 1) for part in ("gate_up_proj", "down_proj", "experts", "whole layer")
    ]


def test_errors_of_whole_modules_are_what_hooks_see(errors, base_model, other_model, windows):
    names = [p.module for p in errors.parts if p.part in ("experts", "whole layer")]
    base, other = Tape(base_model, names, windows), Tape(other_model, names, windows)
    for part in errors.parts:
        if part.part not in ("experts", "whole layer"):
            assert part.accumulated is None
            continue
        module, calls = other_model.get_submodule(part.module), base.calls[part.module]
        with torch.inference_mode():
            own = [(tensor(y), tensor(module(*args, **kwargs))) for args, kwargs, y in calls]
        accumulated = [(tensor(c[2]), tensor(d[2])) for c, d in zip(calls, other.calls[part.module], strict=True)]
        assert part.own == pytest.approx(relative(own), rel=1e-5)
        assert part.accumulated == pytest.approx(relative(accumulated), rel=1e-5)
    first = [p for p in errors.parts if p.layer == 0 and p.part == "experts"]
    assert first[0].own == first[0].accumulated > 0  # nothing comes before it that is quantised


def test_errors_of_projections_are_their_definition(errors, base_model, other_model, windows):
    names = list(experts_modules(base_model))
    tape = Tape(base_model, names, windows)
    for name in names:
        base, other = base_model.get_submodule(name), other_model.get_submodule(name)
        up, down = [], []
        for args, kwargs, _ in tape.calls[name]:
            x, index = (*args, *kwargs.values())[:2]
            for token in range(len(x)):
                for expert in index[token].tolist():
                    h = [(m.gate_up_proj[expert].double() @ x[token].double()).bfloat16() for m in (base, other)]
                    gate, value = h[0].float().chunk(2)
                    a = (torch.nn.functional.silu(gate) * value).bfloat16()
                    up.append((h[0], h[1]))
                    down.append(tuple(m.down_proj[expert].double() @ a.double() for m in (base, other)))
        found = {p.part: p.own for p in errors.parts if p.module == name}
        assert found["gate_up_proj"] == pytest.approx(relative(up), rel=1e-4)
        # the stock module rounds silu before it multiplies: up to 2^-8 of a, which both models share
        assert found["down_proj"] == pytest.approx(relative(down), rel=1e-2)


def test_a_model_has_no_error_against_itself(base_model, windows):
    found = layer_errors(base_model, copy.deepcopy(base_model), windows)
    assert {p.own for p in found.parts} == {0.0}
    assert {p.accumulated for p in found.parts} == {0.0, None}


def test_packed_models_are_measured_as_what_they_stand_for(errors, base_model, windows, tmp_path):
    base_model.save_pretrained(tmp_path)
    packed = mx.load(tmp_path, scheme="w_mxfp4").eval()
    steps = []
    found = layer_errors(base_model, packed, windows, progress=lambda done, total: steps.append((done, total)))
    for part, expected in zip(found.parts, errors.parts, strict=True):
        assert (part.module, part.part) == (expected.module, expected.part)
        # bf16 results, rounded otherwise: 2^-9 of an output beside errors of a tenth
        assert part.own == pytest.approx(expected.own, rel=2e-2)
    assert steps == [(8, 16), (16, 16)]
    quantised = layer_errors(base_model, mx.load(tmp_path, scheme="w_mxfp4_a_mxfp4").eval(), windows)
    for part, weights_alone in zip(quantised.parts, found.parts, strict=True):
        assert part.own > weights_alone.own


def test_quantised_linear_layers_are_parts_of_their_own(base_model, windows, tmp_path):
    base_model.save_pretrained(tmp_path)
    packed = mx.load(tmp_path, scheme="w_mxfp4", exclude=["lm_head"]).eval()
    found = layer_errors(base_model, packed, windows, batch_size=3)
    name = "model.layers.1.self_attn.q_proj"
    assert [p.part for p in found.parts if p.layer == 1] == [
        *(f"{letter}_proj" for letter in "qkvo"),
        *("gate_up_proj", "down_proj", "experts", "whole layer"),
    ]
    weight = mx.fake_quantize(base_model.get_submodule(name).weight.detach(), "mxfp4", role="weight")
    calls = Tape(base_model, [name], windows).calls[name]
    expected = relative([(y, (args[0].double() @ weight.double().T).bfloat16()) for args, _, y in calls])
    (part,) = (p for p in found.parts if p.module == name)
    assert part.own == pytest.approx(expected, rel=1e-3)
    assert part.accumulated > part.own


def test_transposed_weights_and_biases_count(windows, tmp_path):
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = GptOssConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2)
    base = GptOssForCausalLM(config).to(torch.bfloat16).eval()
    (name,) = experts_modules(base)
    module = base.get_submodule(name)
    for bias in (module.gate_up_proj_bias, module.down_proj_bias):
        torch.nn.init.normal_(bias)
    base.save_pretrained(tmp_path)
    packed = mx.load(tmp_path, scheme="w_mxfp4").eval()
    (found,) = (p.own for p in layer_errors(base, packed, windows, batch_size=3).parts if p.part == "gate_up_proj")
    weight = module.gate_up_proj.detach()  # [E, H, 2I]
    rounded = mx.fake_quantize(weight.mT.contiguous(), "mxfp4", role="weight").mT
    pairs = []
    for args, kwargs, _ in Tape(base, [name], windows).calls[name]:
        x, index = (*args, *kwargs.values())[:2]
        for token in range(len(x)):
            for expert in index[token].tolist():
                bias = module.gate_up_proj_bias[expert].double()
                pairs.append([(x[token].double() @ w[expert].double() + bias).bfloat16() for w in (weight, rounded)])
    assert found == pytest.approx(relative(pairs), rel=1e-4)
    assert {p.own for p in layer_errors(packed, copy.deepcopy(packed), windows).parts} == {0.0}


def test_hooks_are_removed(base_model, other_model, errors):
    for model in (base_model, other_model):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_layers_and_training_are_refused(base_model, make_model, windows):
    with pytest.raises(ArgumentError, match="same MoE layers; the base has 2, this model 1"):
        layer_errors(base_model, make_model(num_hidden_layers=1), windows)
    with pytest.raises(ArgumentError, match="training mode"):
        layer_errors(base_model, copy.deepcopy(base_model).train(), windows)
    dense = nn.Module()  # without experts, and nothing packed
    with pytest.raises(ArgumentError, match="no layers to compare"):
        layer_errors(dense.eval(), copy.deepcopy(dense), windows)
