import pytest
import torch

from mxperts.errors import ArgumentError
from mxperts.evaluation import router


def test_every_layer_is_recorded(base_model):
    ids = torch.arange(12).view(2, 6)
    with router.recording(base_model) as seen, torch.inference_mode():
        base_model(input_ids=ids)
        base_model(input_ids=ids[:1])
    found = router.choices(seen)
    assert list(found) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert all(t.shape == (12 + 6, 2) for t in found.values())


def test_recorded_choices_are_the_routers_own(base_model):
    ids = torch.arange(10).view(1, 10)
    expected = {}
    gate = base_model.model.layers[1].mlp.gate
    handle = gate.register_forward_hook(lambda module, args, output: expected.update(index=output[2]))
    with router.recording(base_model) as seen, torch.inference_mode():
        base_model(input_ids=ids)
    handle.remove()
    torch.testing.assert_close(
        router.choices(seen)["model.layers.1.mlp.experts"].long(), expected["index"], atol=0, rtol=0
    )


def test_hooks_are_removed(base_model):
    with router.recording(base_model):
        pass
    assert not any(module._forward_pre_hooks for module in router.experts_modules(base_model).values())


def test_agreement_counts_common_experts_in_any_order():
    base = {"a": torch.tensor([[0, 1], [2, 3], [4, 5]])}
    ours = {"a": torch.tensor([[1, 0], [3, 7], [6, 7]])}  # 2, 1 and 0 of 2
    assert router.agreement(ours, base) == {"a": 0.5}
    assert router.agreement(base, base) == {"a": 1.0}


def test_other_layers_cannot_be_compared():
    with pytest.raises(ArgumentError, match="same MoE layers"):
        router.agreement({"a": torch.zeros(3, 2)}, {"b": torch.zeros(3, 2)})


def test_load_counts_the_tokens_of_every_expert():
    found = router.load({"a": torch.tensor([[0, 1], [1, 3], [1, 0]], dtype=torch.int16)}, {"a": 5})
    assert found == {"a": [2, 3, 0, 1, 0]}
