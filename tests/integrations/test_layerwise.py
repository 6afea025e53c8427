"""A model of which one layer is in memory gives what the whole model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mxperts.checkpoint import Checkpoint
from mxperts.errors import BackendUnavailable, CheckpointError
from mxperts.integrations.transformers import layerwise
from mxperts.integrations.transformers.layerwise import LayerwiseModel

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"


def model_of(folder: Path) -> LayerwiseModel:
    return LayerwiseModel(folder, dtype=torch.bfloat16, device=torch.device("cpu"))


def by_layer(model: LayerwiseModel, checkpoint: Checkpoint) -> dict[int | None, dict[str, torch.Tensor]]:
    found: dict[int | None, dict[str, torch.Tensor]] = {}
    for name in checkpoint.names:
        found.setdefault(model.layer_of(name), {})[name] = checkpoint.tensor(name)
    return found


@pytest.mark.parametrize("family", ["qwen3_moe_2l", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe"])
@torch.no_grad()
def test_layer_by_layer_is_the_model(family: str) -> None:
    folder = FIXTURES / f"bf16-{family}"
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    expected: list[torch.Tensor] = []
    for layer in whole.get_decoder().layers:
        layer.register_forward_hook(lambda module, args, output: expected.append(output))
    ids = torch.arange(14).reshape(2, 7)
    whole(ids)
    model = model_of(folder)
    tensors = by_layer(model, Checkpoint.open(folder))
    model.load(tensors[None])
    states = model.run(ids, 0, lambda embedded, *args, **kwargs: embedded)
    for index, output in enumerate(expected):
        layer = model.load_layer(index, tensors[index])
        forward = type(layer).forward
        states = model.run(
            ids, index, lambda _, *args, h=states, f=forward, m=layer, **kwargs: f(m, h, *args, **kwargs)
        )
        assert torch.equal(states, output)
        model.drop_layer(index)
        assert not list(layer.parameters())
    assert len(expected) == len(model.layers)


def test_a_missing_tensor_is_named() -> None:
    folder = FIXTURES / "bf16-qwen3_moe"
    model = model_of(folder)
    tensors = by_layer(model, Checkpoint.open(folder))[0]
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.0\.self_attn\.q_proj\.weight"):
        model.load_layer(0, tensors)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = FIXTURES / "bf16-qwen3_moe"
    model = model_of(folder)
    tensors = by_layer(model, Checkpoint.open(folder))[0]
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:-1]
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is .* the model has"):
        model.load_layer(0, tensors)


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise.transformers, "__version__", "5.20.0")
    with pytest.raises(BackendUnavailable, match=r"calibration needs transformers >= 5\.23, not 5\.20\.0"):
        model_of(FIXTURES / "bf16-qwen3_moe")
