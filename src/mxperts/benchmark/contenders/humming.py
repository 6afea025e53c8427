"""humming's experts: kernels that it compiles for each layer, with the configurations that it chooses itself.

Source: humming-kernels 0.1.19, ``forward.py``, ``transform.py`` and ``tune``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mxperts.benchmark.contenders.base import Bind, Contender, Run, needs_whole_blocks
from mxperts.benchmark.contenders.grouped.routing import blocks_of
from mxperts.benchmark.contenders.installed import package_folder, version_of
from mxperts.benchmark.inputs import Call, Inputs, Weights
from mxperts.benchmark.problem import Problem
from mxperts.formats import MXFP4, MXFP6_E2M3, MXFP6_E3M2, Activation
from mxperts.tensor import MXTensor

ELEMENTS = {MXFP4: "float4e2m1", MXFP6_E2M3: "float6e2m3", MXFP6_E3M2: "float6e3m2"}
"""What humming calls elements."""
PADDING = {"pad_n_to_multiple": 256, "pad_k_to_multiple": 128}
SILU = {"activation_type": "binary_split", "activation_impl": "(a / (1.f + expf(-a))) * b"}
COMPUTE = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "indexed"})
LOCKS = 2048


class Humming(Contender):
    """Weights in MXFP4 or MXFP6; activations in bf16, or in E4M3 with scales of humming's own.

    Args:
        group: activations that share a scale, 0 for all of a token; None leaves them in bf16.
    """

    def __init__(self, group: int | None = None) -> None:
        self._group = group
        self.name = {None: "humming", 0: "humming-fp8"}.get(group, f"humming-fp8-{group}")
        if group is not None:
            self.limit = 8e-2  # activations keep three bits after the leading one

    def unavailable(self) -> str | None:
        return None if package_folder("humming") else "not installed: pip install humming-kernels"

    def refuses(self, problem: Problem) -> str | None:
        if problem.scheme.weight not in ELEMENTS:
            return f"it is called for MXFP4 and MXFP6 weights only here, not for {problem.scheme.weight}"
        if problem.activation != "silu":
            return f"it is called for silu only here, not for {problem.activation}"
        return needs_whole_blocks(problem)

    def activation(self, problem: Problem) -> Activation:
        return None

    def memory(self, problem: Problem, copies: int) -> int:
        return 2 * copies * problem.packed_bytes  # some of it while it rearranges

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        loaded = [(self._load(layer.gate_up), self._load(layer.down)) for layer in layers]

        def bind(inputs: Inputs) -> Run:
            pairs = inputs.problem.tokens * inputs.problem.shape.top_k
            tunings = [_tuning(config, pairs) for config, _ in loaded[0]]
            calls = [_HummingCall(inputs.problem, call, loaded[0], tunings) for call in inputs.calls]
            return lambda i: calls[i % len(calls)](loaded[i % len(loaded)])

        return bind

    def version(self) -> str | None:
        return version_of("humming-kernels")

    def _load(self, weight: MXTensor) -> _Loaded:
        """humming's configuration and tensors of a projection."""
        dtypes, schema = importlib.import_module("humming.dtypes"), importlib.import_module("humming.schema")
        transform = importlib.import_module("humming.transform")
        weights = schema.HummingWeightSchema(
            b_dtype=dtypes.DataType.from_str(ELEMENTS[weight.format]),
            bs_dtype=dtypes.float8e8m0,
            weight_scale_group_size=weight.format.block_size,
        )
        states = None
        if self._group is not None:
            states = schema.HummingInputSchema(
                a_dtype=dtypes.DataType.from_str("float8e4m3"), input_scale_group_size=self._group
            )
        experts, n, k = weight.shape
        config, tensors = transform.prepare_and_transform_humming_tensors(
            {"weight": weight.packed.view(torch.int32), "weight_scale": weight.scales.view(torch.float8_e8m0fnu)},
            n,
            k,
            weights,
            states,
            num_experts=experts,
            torch_dtype=torch.bfloat16,
            device=weight.device,
            **PADDING,
        )
        return config, tensors


_Loaded = tuple[Any, dict[str, Tensor]]


class _HummingCall:
    """The launches of one call. Pairs are sorted by their experts when it is made, as for the other peers."""

    def __init__(
        self, problem: Problem, call: Call, loaded: tuple[_Loaded, _Loaded], tunings: list[dict[str, Any]]
    ) -> None:
        shape, x = problem.shape, call.hidden_states
        self._problem, self._call = problem, call
        self._pairs = problem.tokens * shape.top_k
        self._tunings = [json.dumps([[0, 1 << 30, tuning]]) for tuning in tunings]
        self._blocks = []
        for tuning in tunings:
            blocks = blocks_of(call.top_k_index, tuning["block_shape"][0], shape.experts, always_sort=True)
            count = torch.tensor([blocks.pairs.numel()], dtype=torch.int32, device=x.device)
            self._blocks.append((blocks.pairs, blocks.experts, count))
        self._h = x.new_empty(self._pairs, 2 * shape.intermediate)
        bf16 = loaded[1][0].a_dtype.num_bits == 16
        self._a = x.new_empty(self._pairs, shape.intermediate) if bf16 else None
        self._y = x.new_empty(self._pairs, shape.hidden)
        self._out = x.new_empty(problem.tokens, shape.hidden)

    def __call__(self, loaded: tuple[_Loaded, _Loaded]) -> Tensor:
        from mxperts.benchmark.contenders.grouped.experts import sum_pairs

        shape = self._problem.shape
        self._multiply(0, loaded[0], self._call.hidden_states, self._h, shape.top_k)
        self._multiply(1, loaded[1], self._h, self._y, 1, outputs=self._a, **SILU)
        sum_pairs(self._y, self._call.top_k_weights, self._out)
        return self._out

    def _multiply(self, projection: int, loaded: _Loaded, x: Tensor, y: Tensor, top_k: int, **process: Any) -> None:
        forward = _forward()
        config, tensors = loaded
        pairs, experts, count = self._blocks[projection]
        x, group_scales, token_scales = forward.may_process_input(config, inputs=x, **process)
        mode = config.input_quant_mode
        forward.humming_forward(
            config,
            inputs=x,
            weight=tensors["weight"],
            weight_scale=tensors.get("weight_scale"),
            weight_scale_2=tensors.get("weight_scale_2"),
            outputs=y,
            input_scale=group_scales if mode.has_group_scale else token_scales,
            input_scale_2=token_scales if mode.has_secondary_scale else None,
            sorted_ids=pairs,
            expert_ids=experts,
            num_tokens_padded=count,
            locks=_locks(y.device),
            top_k=top_k,
            valid_shape_m=self._pairs,
            compute_config=COMPUTE,
            tuning_config=self._tunings[projection],
        )


def _tuning(config: Any, pairs: int) -> dict[str, Any]:
    tune = importlib.import_module("humming.tune")
    tuning: dict[str, Any] = tune.get_heuristics_config(layer_config=config, shape_m=pairs, gemm_type="indexed")
    return tuning


@cache
def _forward() -> Any:
    return importlib.import_module("humming.forward")


@cache
def _locks(device: torch.device) -> Tensor:
    return torch.zeros(LOCKS, dtype=torch.int32, device=device)
