"""Models of random weights with the layers of real ones, few of them: something to time without a download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxperts.benchmark.inputs import random_weight
from mxperts.checkpoint import CheckpointWriter, Rule, gpt_oss, quark
from mxperts.checkpoint.safetensors_file import Entry
from mxperts.errors import ArgumentError
from mxperts.formats import FP8_STATIC, MXFP4, BlockFormat, Scheme
from mxperts.formats.naming import suggest

STD = 0.02
"""Of unquantised weights, as models are initialised."""
NOT_EXPERTS = (r"re:.*\.(self_attn|router|gate|embed_tokens|lm_head)(\..*)?$", "lm_head")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model whose layers can be had with random weights.

    Attributes:
        model_type: what Transformers calls it.
        layers, vocabulary: of the real model.
        config: the rest that differs from the defaults of Transformers' config.
        experts, intermediate: names of these sizes in the config.
        fused: whether experts are stored in gpt-oss's layout; otherwise in AMD Quark's.
    """

    model_type: str
    layers: int
    vocabulary: int
    config: Mapping[str, Any]
    experts: str
    intermediate: str
    fused: bool


ARCHITECTURES = {
    "gpt-oss-20b": Architecture(
        model_type="gpt_oss",
        layers=24,
        vocabulary=201088,
        config={"num_local_experts": 32, "num_experts_per_tok": 4, "hidden_size": 2880, "intermediate_size": 2880},
        experts="num_local_experts",
        intermediate="intermediate_size",
        fused=True,
    ),
    "qwen3-30b-a3b": Architecture(
        model_type="qwen3_moe",
        layers=48,
        vocabulary=151936,
        config={
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
            "rope_theta": 1000000.0,
        },
        experts="num_experts",
        intermediate="moe_intermediate_size",
        fused=False,
    ),
}
"""By the names that they have as shapes of layers."""


def write_random_model(
    name: str, folder: Path, *, layers: int, scheme: Scheme | str | None = "w_mxfp4", seed: int = 0, **sizes: int
) -> None:
    """Write a checkpoint with random packed experts and random bf16 weights elsewhere.

    Embeddings have as large a share of the bytes as in the real model: the vocabulary shrinks with the layers.

    Args:
        name: of ``ARCHITECTURES``.
        folder: to be made.
        layers: how many.
        scheme: of the experts; gpt-oss's layout has ``w_mxfp4`` only. None: unquantised, in bf16, which it has not.
        seed: of the weights.
        **sizes: other sizes than the real model's, by their names in its config.

    Raises:
        ArgumentError: unknown name, or a scheme that the layout does not have.
    """
    if name not in ARCHITECTURES:
        raise ArgumentError(f"unknown model {name!r}; {suggest(name, ARCHITECTURES)}")
    if layers < 1:
        raise ArgumentError(f"a model has at least one layer, not {layers}")
    architecture, dense = ARCHITECTURES[name], scheme is None
    scheme = Scheme("none" if scheme is None else scheme)
    if (scheme.weight is None and not dense) or (architecture.fused and scheme != Scheme.of(MXFP4)):
        raise ArgumentError(f"experts of {name} are stored as w_mxfp4, not as {scheme}")
    if scheme.activation == FP8_STATIC:
        raise ArgumentError("static fp8 needs calibrated scales, which random models do not have; take fp8_dynamic")
    config = _config(architecture, layers, sizes)
    generator = torch.Generator().manual_seed(seed)
    writer = CheckpointWriter(folder, {"name": name, "layers": layers, "seed": seed, "sizes": sizes})
    shapes = _unquantised_shapes(config)
    for layer in [None, *range(layers)]:
        prefix = f"model.layers.{layer}."
        here = {n: s for n, s in shapes.items() if (n.startswith(prefix) if layer is not None else ".layers." not in n)}
        entries = [Entry(name=n, dtype=torch.bfloat16, shape=s) for n, s in here.items()]
        tensors: list[Iterator[Tensor]] = [_random(here, generator)]
        if layer is not None:
            experts = _Experts(config, architecture, scheme.weight, f"{prefix}mlp.experts", generator)
            entries += experts.entries()
            tensors.append(experts.tensors())
        shard = "model-embeddings.safetensors" if layer is None else f"model-layer-{layer:03d}.safetensors"
        writer.write_shard(shard, entries, (t for part in tensors for t in part))
    quantization = {} if dense else {"quantization_config": _quantization(architecture, scheme)}
    writer.finish(config.to_dict() | quantization)


def _config(architecture: Architecture, layers: int, sizes: Mapping[str, int]) -> Any:
    from transformers import AutoConfig

    vocabulary = -(-architecture.vocabulary * layers // architecture.layers // 64) * 64
    settings = {**architecture.config, "num_hidden_layers": layers, "vocab_size": vocabulary, **sizes}
    config = AutoConfig.for_model(architecture.model_type, **settings)
    config.architectures = [_model_class(config).__name__]
    config.dtype = "bfloat16"
    return config


def _model_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[type(config)]


def _unquantised_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor but those of experts, from the model itself, without its memory."""
    with torch.device("meta"):
        model = _model_class(config)(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if ".experts." not in name}


def _random(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> Iterator[Tensor]:
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            yield torch.ones(shape, dtype=torch.bfloat16)
        else:
            yield (torch.randn(shape, generator=generator) * STD).to(torch.bfloat16)


def _quantization(architecture: Architecture, scheme: Scheme) -> dict[str, Any]:
    if architecture.fused:
        names = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
        return gpt_oss.write([Rule(pattern=name, scheme=Scheme("none")) for name in names])
    excluded = [Rule(pattern=p, scheme=Scheme("none")) for p in NOT_EXPERTS]
    return quark.write([*excluded, Rule(pattern="*", scheme=scheme)])


class _Experts:
    """The tensors of one layer's experts."""

    def __init__(
        self, config: Any, architecture: Architecture, fmt: BlockFormat | None, prefix: str, generator: torch.Generator
    ) -> None:
        self._fused, self._format, self._prefix, self._generator = architecture.fused, fmt, prefix, generator
        self._experts: int = getattr(config, architecture.experts)
        self._hidden: int = config.hidden_size
        self._intermediate: int = getattr(config, architecture.intermediate)

    def entries(self) -> list[Entry]:
        """What ``tensors`` gives, in its order."""
        e, h, i, fmt = self._experts, self._hidden, self._intermediate, self._format
        if fmt is None:
            return [
                Entry(name=f"{self._prefix}.{expert}.{name}.weight", dtype=torch.bfloat16, shape=(rows, k))
                for expert in range(e)
                for name, rows, k in (("gate_proj", i, h), ("up_proj", i, h), ("down_proj", h, i))
            ]
        if self._fused:
            entries = []
            for name, rows, k in (("gate_up_proj", 2 * i, h), ("down_proj", h, i)):
                blocks = (e, rows, fmt.blocks(k))
                entries += [
                    Entry(name=f"{self._prefix}.{name}_blocks", dtype=torch.uint8, shape=(*blocks, fmt.block_bytes)),
                    Entry(name=f"{self._prefix}.{name}_scales", dtype=torch.uint8, shape=blocks),
                    Entry(name=f"{self._prefix}.{name}_bias", dtype=torch.bfloat16, shape=(e, rows)),
                ]
            return entries
        return [
            Entry(name=f"{self._prefix}.{expert}.{name}.{kind}", dtype=torch.uint8, shape=(rows, size))
            for expert in range(e)
            for name, rows, k in (("gate_proj", i, h), ("up_proj", i, h), ("down_proj", h, i))
            for kind, size in (("weight", fmt.stored_size(k)), ("weight_scale", fmt.blocks(k)))
        ]

    def tensors(self) -> Iterator[Tensor]:
        """Random codes, scales and biases; one projection is in memory at a time where experts are stored together."""
        e, h, i, fmt = self._experts, self._hidden, self._intermediate, self._format
        if fmt is None:
            shapes = {f"{expert}.{part}": (h, i) if part == 2 else (i, h) for expert in range(e) for part in range(3)}
            yield from _random(shapes, self._generator)
            return
        if self._fused:
            for rows, k in ((2 * i, h), (h, i)):
                weight = random_weight((e, rows, k), fmt, self._generator)
                yield weight.packed.unflatten(-1, (-1, fmt.block_bytes))
                yield weight.scales
                yield (torch.randn(e, rows, generator=self._generator) * STD).to(torch.bfloat16)
            return
        for _ in range(e):
            for rows, k in ((i, h), (i, h), (h, i)):
                weight = random_weight((1, rows, k), fmt, self._generator)
                yield weight.packed[0, :, : fmt.stored_size(k)]
                yield weight.scales[0]
