"""MX checkpoints in Transformers: real exporters' files load, stay packed, and give the numbers of the contract."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import mxperts as mx
from mxperts.checkpoint import Checkpoint
from mxperts.checkpoint.names import split_expert
from mxperts.formats import FP8_STATIC
from mxperts.integrations.transformers import MXConfig, mx_experts, quantizer
from mxperts.integrations.transformers.experts import Apart, Stacked, mx_weight
from mxperts.integrations.transformers.gate import recognize
from mxperts.integrations.transformers.linear import StoredLinear
from mxperts.quantization import quantize_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
REFUSED = {
    "compressed_tensors-qwen3_moe-mxfp4xfp8": "input_activations.group_size is 128",
    "llmcompressor-gpt_oss-mxfp4-file-unusable": "the projections do not fit together",
}
"""Checkpoints that nobody can run as their config says, and what is said of them."""
LOADABLE = [
    path.name
    for path in sorted(FIXTURES.iterdir())
    if path.is_dir() and not path.name.startswith("bf16-") and path.name not in REFUSED
]
OTHER_ACTIVATIONS = {
    # Quark runs each linear layer with its own input scale; the contract, like vLLM, takes the largest of all experts.
    "quark-gpt_oss-mxfp4_fp8",
    "quark-qwen3_moe-mxfp4_fp8",
    # Quark quantises these inputs with float scales, although the weights' are E8M0; the contract has MXFP8.
    "quark-qwen3_moe-mxfp8_block1x32-file",
    "quark-qwen3_moe-mxfp8_block32x32-file",
}
"""Checkpoints whose activations the exporter's own forward pass quantises in another way."""
ROUNDINGS = 16
"""A float32 forward pass of two layers in another order of summation differs by this many roundings, at most."""


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bytes_of(a), bytes_of(b))


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("either_layout")
@pytest.mark.parametrize("name", LOADABLE)
def test_loads_packed_and_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    model, info = mx.load(FIXTURES / name, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info

    stored = Checkpoint.open(FIXTURES / name)
    packed = dict(mx_experts(model))
    assert packed
    for module in packed.values():
        assert not hasattr(module, "gate_up_proj") or module.gate_up_proj.element_size() == 1
    experts = sum(p.nbytes for m in packed.values() for n, p in m.named_parameters() if "bias" not in n)
    on_disk = sum(
        stored.info(t).nbytes
        for t in stored.names
        if "experts" in t
        and "shared_experts" not in t
        and not t.endswith("bias")
        and any(p.removeprefix("model.") in stored_path(t) for p in packed)
    )
    assert experts == on_disk

    model.save_pretrained(tmp_path)
    before, after = stored_tensors(FIXTURES / name), stored_tensors(tmp_path)
    assert before.keys() == after.keys()
    assert all(same_bytes(before[t], after[t]) for t in before)
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (FIXTURES / name, tmp_path)]
    assert configs[0] == configs[1]


def stored_path(tensor: str) -> str:
    """The tensor's name as the models spell it."""
    return tensor.replace("block_sparse_moe", "mlp")


def has_logits(name: str) -> bool:
    """Whether the exporter's software could run it."""
    file = FIXTURES / name / "expected.safetensors"
    return file.exists() and "logits" in load_file(file)


@pytest.mark.parametrize("name", [n for n in LOADABLE if has_logits(n) and n not in OTHER_ACTIVATIONS])
def test_logits_are_those_of_the_exporter(name: str) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = mx.load(FIXTURES / name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    bound = ROUNDINGS * torch.finfo(torch.float32).eps * expected["logits"].abs().max()
    assert (logits - expected["logits"]).abs().max() <= bound


@pytest.mark.usefixtures("either_layout")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in LOADABLE]
    + [(f"quark-{family}-mxfp4", torch.bfloat16) for family in ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")],
)
def test_experts_are_bit_equal_to_the_operation_on_the_stored_bytes(name: str, dtype: torch.dtype) -> None:
    """What reaches and leaves every experts module, against ``fused_experts`` on weights read another way."""
    model = mx.load(FIXTURES / name, dtype=dtype)
    seen: dict[str, tuple[Any, ...]] = {}
    for path, module in mx_experts(model):
        module.register_forward_hook(lambda m, args, out, path=path: seen.__setitem__(path, (*args, out)))
    with torch.no_grad():
        model(tokens())
    stored = Checkpoint.open(FIXTURES / name)
    for path, module in mx_experts(model):
        if isinstance(module.mxperts, Apart) or module.mxperts.activation == FP8_STATIC:
            continue
        x, ids, weights, out = seen[path]
        up, down = independent_weights(stored, path, module)
        packed: Stacked = module.mxperts
        assert packed.gate is not None
        expected = mx.fused_experts(
            x,
            up,
            down,
            ids,
            weights,
            activation=packed.gate.name,
            activation_format=packed.activation,
            gate_up_bias=getattr(module, "gate_up_proj_bias", None),
            down_bias=getattr(module, "down_proj_bias", None),
            interleaved=packed.interleaved,
            backend="reference",
            **packed.gate.constants,
        )
        assert torch.equal(bytes_of(out), bytes_of(expected))


def independent_weights(stored: Checkpoint, path: str, module: Any) -> tuple[mx.MXTensor, mx.MXTensor]:
    """The two projections of one layer, read tensor by tensor with the checkpoint reader."""
    layer = path.removeprefix("model.").split(".mlp")[0].split(".block_sparse_moe")[0]
    found: dict[str, list[tuple[int, mx.MXTensor]]] = {"gate": [], "up": [], "both": [], "down": []}
    roles = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "gate_up_proj": "both"}
    for name in stored.mx:
        if f"{layer}." not in name or "shared" in name or ".experts" not in name:
            continue
        expert = split_expert(name)
        if expert is None:  # gpt-oss: all experts in one
            role = "down" if name.endswith("down_proj") else "both"
            found[role] = [(e, stored.mx_tensor(name)[e]) for e in range(module.num_experts)]
        else:
            found[roles.get(expert[2], "down")].append((expert[1], stored.mx_tensor(name)))

    def stack(*groups: list[tuple[int, mx.MXTensor]]) -> mx.MXTensor:
        """One tensor of all experts, the rows of several projections one after the other."""
        rows = [
            (torch.cat([t.codes() for t in parts]), torch.cat([t.scales for t in parts]))
            for e in range(module.num_experts)
            for parts in [[t for group in groups for index, t in group if index == e]]
        ]
        fmt = next(t.format for group in groups for _, t in group)
        return mx.MXTensor.from_codes(torch.stack([c for c, _ in rows]), torch.stack([s for _, s in rows]), fmt)

    return stack(found["gate"], found["up"], found["both"]), stack(found["down"])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_checkpoints_that_cannot_be_run_are_refused(name: str) -> None:
    with pytest.raises(mx.CheckpointError, match=REFUSED[name]):
        mx.load(FIXTURES / name)


def test_bytes_of_mxfp4_experts() -> None:
    model = mx.load(FIXTURES / "quark-qwen3_moe-mxfp4")
    dense = mx.load(FIXTURES / "bf16-qwen3_moe")
    packed = sum(mx_weight(m, p).nbytes for _, m in mx_experts(model) for p in (m.mxperts.up, m.mxperts.down))
    expanded = sum(p.nbytes for n, p in dense.named_parameters() if ".experts." in n)
    assert packed / expanded <= 0.28


@pytest.mark.usefixtures("either_layout")
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "olmoe"])
def test_quantising_while_loading_equals_the_exporter(family: str, tmp_path: Path) -> None:
    """The same bf16 model through amd-quark, and quantised here while it loads: bytes, logits, and again from disk."""
    offline = mx.load(FIXTURES / f"quark-{family}-mxfp4", dtype=torch.float32)
    exclude = offline.config.quantization_config.to_dict()["exclude"]
    model = mx.load(FIXTURES / f"bf16-{family}", scheme="w_mxfp4_a_mxfp4", exclude=exclude, dtype=torch.float32)
    for (_, ours), (_, theirs) in zip(mx_experts(model), mx_experts(offline), strict=True):
        for projection in ("up", "down"):
            a, b = (mx_weight(m, getattr(m.mxperts, projection)) for m in (ours, theirs))
            assert torch.equal(a.packed, b.packed)
            assert torch.equal(a.scales, b.scales)
    with torch.no_grad():
        logits = model(tokens()).logits
        assert torch.equal(logits, offline(tokens()).logits)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits, mx.load(tmp_path, dtype=torch.float32)(tokens()).logits)


SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
}


@pytest.mark.usefixtures("either_layout")
@pytest.mark.parametrize(
    ("family", "gate"),
    [
        ("glm4_moe", "silu"),
        ("minimax_m2", "silu"),  # saved under Mixtral's names
        ("granitemoe", "silu"),  # its checkpoints name experts in a way of their own
        ("aria_text", "silu"),  # weights transposed, all experts in one tensor
        ("nemotron_h", "relu2_no_mul"),  # no gate
    ],
)
def test_other_models_on_the_experts_interface(family: str, gate: str, tmp_path: Path) -> None:
    """Quantised to 8 bits while loading, close to the model itself; saved, loaded again, and equal."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES)
    dense = transformers.AutoModelForCausalLM.from_config(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    model = mx.load(tmp_path / "dense", scheme="w_mxint8", dtype=torch.float32)
    assert {m.mxperts.gate.name for _, m in mx_experts(model)} == {gate}
    with torch.no_grad():
        logits, expected = model(tokens()).logits, dense(tokens()).logits
        # an element of MXINT8 is off by at most 1/127 of its block's largest, and errors do not add up in one direction
        assert (logits - expected).norm() <= expected.norm() * 2 / 127
        model.save_pretrained(tmp_path / "packed")
        assert torch.equal(logits, mx.load(tmp_path / "packed", dtype=torch.float32)(tokens()).logits)


def test_default_exclude_is_that_of_quantize_checkpoint() -> None:
    model = mx.load(FIXTURES / "bf16-qwen2_moe", scheme="w_mxfp6_e2m3")
    kinds = (StoredLinear, nn.Linear)
    linear = {path: type(module) for path, module in model.named_modules() if isinstance(module, kinds)}
    assert {path.rpartition(".")[2] for path, kind in linear.items() if kind is StoredLinear} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert all(kind is nn.Linear for path, kind in linear.items() if "self_attn" in path or "lm_head" in path)


@pytest.mark.usefixtures("either_layout")
@pytest.mark.parametrize("name", ["quark-qwen3_moe-mxfp4", "llmcompressor-mixtral-mxfp4-file", "gpt_oss-gpt_oss-mxfp4"])
def test_install_makes_from_pretrained_load_packed(name: str, restore_transformers: None) -> None:
    mx.install()
    mx.install()
    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32)
    assert [type(m.mxperts) for _, m in mx_experts(model)] == [Stacked]
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, mx.load(FIXTURES / name, dtype=torch.float32)(tokens()).logits)


def test_install_leaves_other_formats_to_transformers(restore_transformers: None) -> None:
    from transformers.quantizers.auto import AutoQuantizationConfig

    mx.install()
    integers = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
        },
    }
    pytest.importorskip("compressed_tensors")  # Transformers' own class wants it
    assert not isinstance(AutoQuantizationConfig.from_dict(integers), MXConfig)


@pytest.fixture
def restore_transformers() -> Any:
    from transformers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    yield
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.clear()
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.update(before)


@pytest.mark.usefixtures("either_layout")
def test_generate() -> None:
    model = mx.load(FIXTURES / "quark-qwen3_moe-mxfp4_mxfp6_e2m3")
    out = model.generate(tokens()[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 18)


def test_arguments_that_do_not_go_together() -> None:
    with pytest.raises(mx.ArgumentError, match="quantised already"):
        mx.load(FIXTURES / "quark-qwen3_moe-mxfp4", scheme="w_mxfp4")
    with pytest.raises(mx.ArgumentError, match="only with scheme"):
        mx.load(FIXTURES / "quark-qwen3_moe-mxfp4", exclude=["lm_head"])
    with pytest.raises(mx.ArgumentError, match="fp8_dynamic"):
        mx.load(FIXTURES / "bf16-qwen3_moe", scheme="w_mxfp4_a_fp8")
    with pytest.raises(mx.FormatError, match="did you mean"):
        mx.load(FIXTURES / "bf16-qwen3_moe", scheme="w_mxpf4")
    with pytest.raises(mx.ArgumentError, match="unknown backend"):
        mx.load(FIXTURES / "quark-qwen3_moe-mxfp4", backend="tpu")


def test_quantising_while_loading_needs_a_transformers_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer.transformers, "__version__", "5.22.2")
    with pytest.raises(mx.BackendUnavailable, match=r"needs transformers >= 5\.23, not 5\.22\.2"):
        mx.load(FIXTURES / "bf16-qwen3_moe", scheme="w_mxfp4")


def test_a_missing_tensor_is_named_not_initialised(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = FIXTURES / "quark-qwen3_moe-mxfp4"
    tensors = stored_tensors(source)
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(mx.CheckpointError, match=r"experts\.2\.up_proj"):
        mx.load(tmp_path)


@pytest.mark.parametrize("name", ["mlp.gate.weight", "self_attn.q_proj.weight", "input_layernorm.weight"])
@pytest.mark.parametrize("source", ["quark-qwen3_moe-mxfp4", "bf16-qwen3_moe"])
def test_nothing_is_initialised_at_random(source: str, name: str, tmp_path: Path) -> None:
    tensors = stored_tensors(FIXTURES / source)
    del tensors[f"model.layers.0.{name}"]
    write(tmp_path, tensors, FIXTURES / source)
    with pytest.raises(mx.CheckpointError, match=f"has no tensor for model.layers.0.{name}"):
        mx.load(tmp_path)


def test_packed_weights_without_their_config_are_refused(tmp_path: Path) -> None:
    source = FIXTURES / "compressed_tensors-qwen3_moe-mxfp4"
    write(tmp_path, stored_tensors(source), source, quantization_config=None)
    with pytest.raises(mx.CheckpointError, match="has no tensor for"):
        mx.load(tmp_path)


def test_an_unknown_quant_method_is_refused(tmp_path: Path) -> None:
    source = FIXTURES / "quark-qwen3_moe-mxfp4"
    write(tmp_path, stored_tensors(source), source, quantization_config={"quant_method": "quirk"})
    with pytest.raises(mx.CheckpointError, match="unknown quant_method 'quirk'"):
        mx.load(tmp_path)


def test_an_index_may_not_leave_the_folder(tmp_path: Path, restore_transformers: None) -> None:
    source, folder = FIXTURES / "quark-qwen3_moe-mxfp4", tmp_path / "checkpoint"
    folder.mkdir()
    tensors = stored_tensors(source)
    write(folder, tensors, source)
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../x.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    mx.install()
    for load in (mx.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(mx.CheckpointError, match=r"\.\./x\.safetensors"):
            load(folder)


def write(folder: Path, tensors: dict[str, torch.Tensor], source: Path, **config: Any) -> None:
    """A checkpoint with these tensors and the config of another, with some entries replaced."""
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_activations_alone_are_refused() -> None:
    with pytest.raises(mx.ArgumentError, match="a_mxfp4 quantises no weights"):
        mx.load(FIXTURES / "bf16-qwen3_moe", scheme="a_mxfp4")


@pytest.mark.usefixtures("either_layout")
def test_the_default_dtype_changes_nothing() -> None:
    expected = logits_of(mx.load(FIXTURES / "quark-gpt_oss-mxfp4", dtype=torch.float32))
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = mx.load(FIXTURES / "quark-gpt_oss-mxfp4", dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits_of(model), expected)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens()).logits
    return logits


@pytest.mark.usefixtures("either_layout")
@pytest.mark.parametrize(
    "name", ["llmcompressor-qwen3_moe-mxfp8", "quark-qwen3_moe-mxfp8_block32x32-file", "quark-qwen3_moe-mxfp4_fp8"]
)
def test_converting_a_model_does_not_touch_codes_and_scales(name: str) -> None:
    model = mx.load(FIXTURES / name, dtype=torch.float32)
    before = {n: t.clone() for n, t in model.state_dict().items() if t.element_size() == 1}
    static = [m.mxperts.input_scales for _, m in mx_experts(model)]
    model.to(torch.float16)
    after = model.state_dict()
    assert all(same_bytes(after[n], t) for n, t in before.items())
    assert [m.mxperts.input_scales for _, m in mx_experts(model)] == static
    model.load_state_dict(after)
    assert all(same_bytes(model.state_dict()[n], t) for n, t in before.items())
    assert logits_of(model).isfinite().all()


def test_a_quantised_router_is_loaded_and_copied_like_others() -> None:
    model = mx.load(FIXTURES / "quark-qwen3_moe-mxfp6_e3m2-file-router", dtype=torch.float32)
    expected, state = logits_of(model), {n: t.clone() for n, t in model.state_dict().items()}
    assert state["model.layers.0.mlp.gate.weight"].dtype is torch.uint8
    twin = copy.deepcopy(model)
    model.model.layers[0].mlp.gate.weight.data.zero_()
    model.load_state_dict(state)
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(twin), expected)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["nonsense"], "'nonsense' matches no module"),
        ("*", "left to quantise"),
        ("re:(", "no regular expression"),
    ],
)
def test_patterns_that_cannot_be_meant(exclude: str | list[str], message: str) -> None:
    with pytest.raises(mx.MxpertsError, match=message):
        mx.load(FIXTURES / "bf16-qwen3_moe", scheme="w_mxfp4", exclude=exclude)


@pytest.mark.parametrize("name", ["config", "experts_implementation", "quantization_config", "torch_dtype"])
def test_arguments_that_load_decides_itself(name: str) -> None:
    with pytest.raises(mx.ArgumentError, match=f"takes no {name}"):
        mx.load(FIXTURES / "bf16-qwen3_moe", **{name: "eager"})


def tiny_llama(folder: Path, **config: Any) -> None:
    torch.manual_seed(0)
    values = {**SIZES, "hidden_size": 64, "intermediate_size": 96, **config}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).save_pretrained(folder)


def test_tied_embeddings_stay_as_they_are(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "dense", tie_word_embeddings=True)
    model = mx.load(tmp_path / "dense", scheme="w_mxfp8", exclude=[], dtype=torch.float32)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits_of(model), logits_of(mx.load(tmp_path / "packed", dtype=torch.float32)))


def test_static_fp8_in_linear_layers(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "dense")
    modules = [f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")]
    scales = {module: 0.01 + 0.001 * i for i, module in enumerate(modules)}
    quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", "w_mxfp4_a_fp8", input_scales=scales)
    model = mx.load(tmp_path / "packed", dtype=torch.float32)
    assert [m.static_scale for m in model.modules() if isinstance(m, StoredLinear)] == [
        torch.tensor(s, dtype=torch.float32).item() for s in scales.values()
    ]
    assert logits_of(model).isfinite().all()


def experts_module(**attributes: Any) -> Any:
    defaults = {"has_gate": True, "is_concatenated": True, "act_fn": nn.SiLU()}
    module = SimpleNamespace(**{**defaults, **attributes})
    if not hasattr(module, "_apply_gate"):
        module._apply_gate = lambda h: module.act_fn(h.chunk(2, dim=-1)[0]) * h.chunk(2, dim=-1)[1]
    return module


def clamped_silu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return nn.functional.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


def far_clamped_silu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return nn.functional.silu(gate.clamp(max=50.0)) * up.clamp(-50.0, 50.0)


def swiglu_oai(h: torch.Tensor) -> torch.Tensor:
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@pytest.mark.parametrize(
    ("module", "name", "constants"),
    [
        (experts_module(), "silu", {}),
        (experts_module(act_fn=nn.GELU()), "gelu", {}),
        (experts_module(act_fn=nn.GELU(approximate="tanh")), "gelu_tanh", {}),
        (experts_module(_apply_gate=clamped_silu, limit=10.0), "silu", {"swiglu_limit": 10.0}),
        (experts_module(_apply_gate=far_clamped_silu, limit=50.0), "silu", {"swiglu_limit": 50.0}),
        (
            experts_module(_apply_gate=swiglu_oai, limit=7.0, alpha=1.702, is_concatenated=False),
            "swigluoai",
            {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
        ),
        (experts_module(has_gate=False, act_fn=lambda x: torch.relu(x) ** 2), "relu2_no_mul", {}),
    ],
)
def test_gates_are_recognised_by_what_they_compute(module: Any, name: str, constants: dict[str, float]) -> None:
    gate = recognize(module)
    assert gate is not None
    assert (gate.name, gate.constants) == (name, constants)


def test_an_unknown_gate_is_left_to_the_module() -> None:
    assert recognize(experts_module(act_fn=nn.Softplus())) is None


@pytest.mark.usefixtures("either_layout")
@pytest.mark.parametrize("name", ["quark-qwen3_moe-mxfp4", "quark-gpt_oss-mxfp4", "llmcompressor-gpt_oss-mxfp4"])
def test_expert_by_expert_equals_fused(name: str) -> None:
    """The path for gates that only the module can compute, on gates that both can."""
    model = mx.load(FIXTURES / name, dtype=torch.float32)
    with torch.no_grad():
        fused = model(tokens()).logits
        for _, module in mx_experts(model):
            module.mxperts.gate = None
        apart = model(tokens()).logits
    bound = ROUNDINGS * torch.finfo(torch.float32).eps * fused.abs().max()
    assert (fused - apart).abs().max() <= bound
