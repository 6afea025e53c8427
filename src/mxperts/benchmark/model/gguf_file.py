"""A checkpoint with MXFP4 experts as a GGUF file, bit for bit, so that llama.cpp can run the same weights.

Source: llama.cpp, ``convert_hf_to_gguf.py``, ``Qwen3MoeModel`` and ``GptOssModel``; gguf 0.19, ``constants.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxperts.benchmark.contenders.ggml import to_blocks
from mxperts.checkpoint import Checkpoint
from mxperts.formats import MXFP4, Scheme
from mxperts.tensor import MXTensor

ARCHITECTURES = {"qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
"""What llama.cpp calls the models that are known here."""
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_LAYER_OF = {
    "qwen3_moe": {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
    },
    "gpt_oss": {"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
}


@dataclass(frozen=True, kw_only=True)
class _Output:
    """A tensor of the file: its name, ggml's name of its type, and its numbers, or bytes where it is quantised."""

    name: str
    type: str
    values: Tensor


def why_not(config: dict[str, Any], scheme: str) -> str:
    """Why a checkpoint cannot become a file that llama.cpp computes the same with; nothing if it can."""
    if config.get("model_type") not in ARCHITECTURES:
        return f"models of type {config.get('model_type')} are not converted, only {', '.join(ARCHITECTURES)}"
    if scheme != Scheme.of(MXFP4).name:
        return f"it has weight-only MXFP4 experts, not {scheme}"
    return ""


def write_gguf(folder: Path, file: Path) -> None:
    """Convert a checkpoint whose ``why_not`` is empty. Needs the package gguf."""
    from transformers import AutoConfig

    gguf = importlib.import_module("gguf")
    config = AutoConfig.from_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    writer = gguf.GGUFWriter(file, ARCHITECTURES[config.model_type])
    _write_settings(writer, config)
    for output in _outputs(checkpoint, config, shapes_only=True):
        kind = gguf.GGMLQuantizationType[output.type]
        values = output.values
        dtype = torch.empty(0, dtype=values.dtype).numpy().dtype
        writer.add_tensor_info(output.name, list(values.shape), dtype, values.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for output in _outputs(checkpoint, config, shapes_only=False):
        writer.write_tensor_data(output.values.numpy())
    writer.close()


def _write_settings(writer: Any, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(importlib.import_module("gguf").RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _outputs(checkpoint: Checkpoint, config: Any, *, shapes_only: bool) -> Iterator[_Output]:
    """Every tensor of the file in its order; without their contents if only shapes are asked for."""
    for target, source in _TOP.items():
        if source == "lm_head" and config.tie_word_embeddings:
            continue
        yield from _unquantised(checkpoint, target, source)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for target, source in (_LAYER | _LAYER_OF[config.model_type]).items():
            yield from _unquantised(checkpoint, f"blk.{layer}.{target}", f"{prefix}.{source}")
        if config.model_type == "gpt_oss":
            sinks = checkpoint.tensor(f"{prefix}.self_attn.sinks").float()
            yield _Output(name=f"blk.{layer}.attn_sinks.weight", type="F32", values=sinks)
        experts = _gpt_oss_experts if config.model_type == "gpt_oss" else _separate_experts
        for name, weight in experts(checkpoint, f"{prefix}.mlp.experts", config.num_local_experts, shapes_only):
            yield _Output(name=f"blk.{layer}.ffn_{name}_exps.weight", type="MXFP4", values=weight)
        if config.model_type == "gpt_oss":
            gate_up = checkpoint.tensor(f"{prefix}.mlp.experts.gate_up_proj_bias").float()
            down = checkpoint.tensor(f"{prefix}.mlp.experts.down_proj_bias").float()
            for name, bias in (("gate", gate_up[:, ::2]), ("up", gate_up[:, 1::2]), ("down", down)):
                yield _Output(name=f"blk.{layer}.ffn_{name}_exps.bias", type="F32", values=bias.contiguous())


def _unquantised(checkpoint: Checkpoint, target: str, source: str) -> Iterator[_Output]:
    """Weight and bias of a module: matrices as bf16, but routers and vectors as float32, as llama.cpp has them."""
    for kind in ("weight", "bias"):
        if f"{source}.{kind}" not in checkpoint.names:
            continue
        values = checkpoint.tensor(f"{source}.{kind}")
        if values.ndim == 1 or target.endswith("ffn_gate_inp"):
            yield _Output(name=f"{target}.{kind}", type="F32", values=values.float())
        else:
            as_bytes = values.to(torch.bfloat16).contiguous().view(torch.uint8)
            yield _Output(name=f"{target}.{kind}", type="BF16", values=as_bytes)


def _separate_experts(
    checkpoint: Checkpoint, prefix: str, experts: int, shapes_only: bool
) -> Iterator[tuple[str, Tensor]]:
    """Experts that are a module each."""
    for name in ("gate", "up", "down"):
        modules = (checkpoint.mx_tensor(f"{prefix}.{expert}.{name}_proj") for expert in range(experts))
        if shapes_only:
            first = next(modules)
            yield name, _as_rows(torch.empty(experts, *first.scales.shape, 17, dtype=torch.uint8))
        else:
            parts = [to_blocks(MXTensor(m.packed[None], m.scales[None], MXFP4, m.k)) for m in modules]
            yield name, _as_rows(torch.cat(parts))


def _gpt_oss_experts(
    checkpoint: Checkpoint, prefix: str, experts: int, shapes_only: bool
) -> Iterator[tuple[str, Tensor]]:
    """Experts in one tensor, gate and up rows alternating."""
    gate_up, down = (checkpoint.mx_tensor(f"{prefix}.{name}") for name in ("gate_up_proj", "down_proj"))
    for name, weight, rows in (
        ("gate", gate_up, slice(0, None, 2)),
        ("up", gate_up, slice(1, None, 2)),
        ("down", down, slice(None)),
    ):
        part = MXTensor(weight.packed[:, rows], weight.scales[:, rows], MXFP4, weight.k)
        blocks = torch.empty(*part.scales.shape, 17, dtype=torch.uint8) if shapes_only else to_blocks(part)
        yield name, _as_rows(blocks)


def _as_rows(blocks: Tensor) -> Tensor:
    """[..., K/32, 17] as rows of bytes."""
    return blocks.flatten(-2)
