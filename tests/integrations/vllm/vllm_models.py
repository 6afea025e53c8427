"""Small checkpoints that vLLM takes: its attention on CPU wants heads of 32 and more.

Made by ``quantize_checkpoint`` from the model that comes with mxperts, or from random weights, and then, where mxperts
does not write it, brought to what other software writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mxperts as mx
from mxperts import models
from mxperts.formats import FP8_STATIC
from mxperts.quantization import quantize_checkpoint

COMMON = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralConfig",
        {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **{"intermediate_size": 96, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2},
            **{"n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
            **{"topk_method": "noaux_tc", "q_lora_rank": 32, "kv_lora_rank": 512},
            **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64},
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **{"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64},
            **{"sliding_window": 16, "max_position_embeddings": 131072},
        },
    ),
}


def random_model(name: str, folder: Path) -> Path:
    """An unquantised checkpoint with random weights of one of ``CONFIGS``."""
    import transformers

    torch.manual_seed(20)
    config, sizes = CONFIGS[name]
    settings = getattr(transformers, config)(**{**COMMON, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in key or key.endswith("sinks"):
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
            elif key.endswith(("gate.weight", "router.weight")):
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
    model.save_pretrained(folder)
    return folder


def quantized(
    scheme: str,
    folder: Path,
    *,
    source: Path | None = None,
    exclude: list[str] | None = None,
    rotation: str | None = None,
) -> Path:
    """A checkpoint in AMD Quark's layout, or rotated in ours; by default of the model that comes with mxperts."""
    source = source or models.shipped()
    static = mx.Scheme(scheme).activation == FP8_STATIC
    scales = {name: 0.05 if "down" in name else 0.02 for name in _linears(source)} if static else None
    quantize_checkpoint(source, folder, scheme, exclude=exclude, input_scales=scales, rotation=rotation)
    return folder


def _linears(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return [name.removesuffix(".weight") for name in file.keys() if name.endswith("_proj.weight")]  # noqa: SIM118


def as_compressed_tensors(folder: Path) -> Path:
    """A Quark checkpoint in MXFP4 becomes one of compressed-tensors; the bytes are the same."""

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        quantised = {name for name in tensors if f"{name}_scale" in tensors}
        return {f"{name}_packed" if name in quantised else name: t for name, t in tensors.items()}

    def state(config: dict[str, Any]) -> None:
        inputs = config["global_quant_config"]["input_tensors"]
        common = {
            **{"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True},
            **{"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
        }
        group = {
            "targets": ["Linear"],
            "format": "mxfp4-pack-quantized",
            "weights": {**common, "dynamic": False},
            "input_activations": None if inputs is None else {**common, "dynamic": True},
            "output_activations": None,
        }
        config.clear()
        config.update(
            quant_method="compressed-tensors",
            format="mxfp4-pack-quantized",
            quantization_status="compressed",
            config_groups={"group_0": group},
            ignore=["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
            sparsity_config={},
            transform_config={},
        )

    return _rewrite(folder, rename, state)


def gpt_oss_as_published(folder: Path) -> Path:
    """gpt-oss with MXFP4 experts in its own layout: ``*_blocks`` and ``*_scales``."""
    random_model("gpt_oss", folder)

    def quantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, t in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                found[name] = t
                continue
            weight = mx.quantize(t.transpose(1, 2).contiguous(), mx.MXFP4)  # [E, in, out] in the model
            found[f"{name}_blocks"], found[f"{name}_scales"] = weight.packed.unflatten(-1, (-1, 16)), weight.scales
        return found

    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _rewrite(folder, quantise, lambda c: c.update(quant_method="mxfp4", modules_to_not_convert=kept))


def _rewrite(
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    state: Callable[[dict[str, Any]], None],
) -> Path:
    """Change a checkpoint's tensors and its ``quantization_config``."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    changed = tensors(load_file(file))
    save_file({name: t.contiguous() for name, t in changed.items()}, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    state(config.setdefault("quantization_config", {}))
    config_file.write_text(json.dumps(config, indent=2))
    return folder
