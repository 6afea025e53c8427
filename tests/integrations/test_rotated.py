"""Checkpoints with rotated weights in Transformers: loaded, saved, quantised while loading, and refused without us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import mxperts as mx
from mxperts.checkpoint import Checkpoint
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import Scheme
from mxperts.integrations.transformers import mx_experts
from mxperts.integrations.transformers.linear import StoredLinear
from mxperts.quantization import quantize_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
SCHEMES = ("w_mxfp4_a_mxfp4", "w_mxfp6_e2m3_a_fp8_dynamic", "w_mxfp8_e4m3", "w_mxint8_a_mxint8")
EVERYTHING = ("lm_head",)
"""What is excluded where attention is to be quantised too."""


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def tokens() -> torch.Tensor:
    return torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))


def made(folder: Path, scheme: str, model: str = "qwen3_moe", **options: Any) -> Path:
    quantize_checkpoint(FIXTURES / f"bf16-{model}", folder, scheme, rotation="hadamard32", **options)
    return folder


def stored(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(folder)
    return {
        name: bytes(checkpoint.tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy())
        for name in checkpoint.names
    }


@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loads_rotated_and_is_saved_as_it_was(scheme: str, model: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "a", scheme, model, exclude=EVERYTHING)
    loaded, info = mx.load(folder, output_loading_info=True)  # type: ignore[misc]
    assert not any(info.values()), info
    linears = [m for m in loaded.modules() if isinstance(m, StoredLinear)]
    experts = [m for _, m in mx_experts(loaded)]
    assert experts
    assert len(linears) >= 4
    assert {m.rotation for m in linears} == {m.mxperts.rotation for m in experts} == {"hadamard32"}
    loaded.save_pretrained(tmp_path / "b")
    assert stored(tmp_path / "b") == stored(folder)
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path / "b")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_run_with_their_inputs_rotated(scheme: str, tmp_path: Path) -> None:
    """Each layer is the public operation with the checkpoint's own tensors."""
    folder = made(tmp_path / "a", scheme)
    model = mx.load(folder)
    (experts,) = (module for _, module in mx_experts(model))
    checkpoint = Checkpoint.open(folder)

    def weight(*projections: str) -> mx.MXTensor:
        parts = [[checkpoint.mx_tensor(f"model.layers.0.mlp.experts.{e}.{p}") for p in projections] for e in range(4)]
        packed = torch.stack([torch.cat([t.packed for t in expert]) for expert in parts])
        scales = torch.stack([torch.cat([t.scales for t in expert]) for expert in parts])
        return mx.MXTensor.from_packed(packed, scales, parts[0][0].format)

    g = torch.Generator().manual_seed(1)
    x, ids, routing = torch.randn(6, 32, generator=g).bfloat16(), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    given = (x, weight("gate_proj", "up_proj"), weight("down_proj"), ids, routing)
    activation = Scheme(scheme).activation
    found = experts(x, ids, routing)
    assert torch.equal(found, mx.fused_experts(*given, activation_format=activation, rotation="hadamard32"))
    assert not torch.equal(found, mx.fused_experts(*given, activation_format=activation))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_while_loading_it_is_the_same(scheme: str, tmp_path: Path) -> None:
    source = FIXTURES / "bf16-qwen3_moe"
    folder = made(tmp_path / "a", scheme)
    loaded = mx.load(source, scheme=scheme, rotation="hadamard32")
    logits = loaded(tokens()).logits
    assert torch.equal(logits, mx.load(folder)(tokens()).logits)
    assert not torch.equal(logits, mx.load(source, scheme=scheme)(tokens()).logits)
    loaded.save_pretrained(tmp_path / "b")
    assert stored(tmp_path / "b") == stored(folder)
    assert torch.equal(mx.load(tmp_path / "b")(tokens()).logits, logits)


def test_the_model_stays_what_it_is(tmp_path: Path) -> None:
    """Its error is of the size that the scheme has without a rotation; without rotated inputs it is another model."""
    source = FIXTURES / "bf16-qwen3_moe"
    exact = mx.load(source, dtype=torch.float32)(tokens()).logits

    def error(model: Any) -> float:
        return float((model(tokens()).logits - exact).detach().norm() / exact.detach().norm())

    quantize_checkpoint(source, tmp_path / "plain", "w_mxint8", exclude=EVERYTHING)
    plain = error(mx.load(tmp_path / "plain", dtype=torch.float32))
    model = mx.load(made(tmp_path / "a", "w_mxint8", exclude=EVERYTHING), dtype=torch.float32)
    assert error(model) < 2 * plain < 0.1
    for module in model.modules():
        if isinstance(module, StoredLinear):
            module.rotation = None
    assert error(model) > 0.2


def test_plain_from_pretrained_loads_it_where_mxperts_is_installed(tmp_path: Path) -> None:
    mx.install()
    folder = made(tmp_path / "a", "w_mxfp4_a_mxfp4")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(tokens()).logits, mx.load(folder)(tokens()).logits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_alone_refuses_it(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it does not know the method and goes on without; no tensor then has the shape of a weight."""
    folder = made(tmp_path / "a", scheme)
    table = {k: v for k, v in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.items() if k != "mxperts"}
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", table)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_refusals(tmp_path: Path) -> None:
    source = FIXTURES / "bf16-qwen3_moe"
    with pytest.raises(ArgumentError, match="rotation is of use only with scheme"):
        mx.load(source, rotation="hadamard32")
    with pytest.raises(ArgumentError, match="unknown rotation 'hadamard'"):
        mx.load(source, scheme="w_mxfp4", rotation="hadamard")
    folder = made(tmp_path / "a", "w_mxfp4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["rotation"] = "hadamard128"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rotation is 'hadamard128'; mxperts supports"):
        mx.load(folder)
