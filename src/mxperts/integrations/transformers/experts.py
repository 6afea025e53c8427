"""The experts implementation that Transformers' experts interface calls: packed weights through ``fused_experts``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mxperts.checkpoint.stored import stored_tensor
from mxperts.errors import BackendUnavailable
from mxperts.formats import FP8_STATIC, Activation, BlockFormat
from mxperts.integrations.transformers.gate import Gate, recognize
from mxperts.integrations.transformers.linear import StoredLinear
from mxperts.nn.prepared import PreparedWeights, has_own_layout
from mxperts.ops.dispatch import Backend, Problem, resolve
from mxperts.ops.experts import fused_experts
from mxperts.ops.linear import mx_linear
from mxperts.ops.prepare import PreparedExperts, Weight
from mxperts.tensor import MXTensor

ExpertsModule: TypeAlias = Any
"""A module on Transformers' experts interface, whose decorator gives it ``num_experts``, ``has_gate`` and so on."""

Linear: TypeAlias = Callable[[Tensor, torch.dtype], Tensor]
"""A linear layer as a function of its input [..., K] and the dtype of its output [..., N]."""

IMPLEMENTATION = "mxperts"
"""The name under which the implementation is registered, as ``experts_implementation``."""


@dataclass(frozen=True, kw_only=True)
class PackedProjection:
    """One projection of all experts.

    Attributes:
        format: of the weights.
        k: values in a row.
        codes, scales: what the module calls the two parameters.
        block_rows, parts: as ``stored_tensor`` takes them; gate and up are two parts where they are stored apart.
    """

    format: BlockFormat
    k: int
    codes: str
    scales: str
    block_rows: int = 1
    parts: int = 1


@dataclass(kw_only=True)
class Stacked:
    """How to run an experts module whose projections are one packed parameter each.

    Attributes:
        up, down: the projections.
        activation: what both projections' inputs are quantised to.
        rotation: by what the weights are rotated and both inputs are to be.
        interleaved: whether the rows of gate and up alternate.
        backend: "auto" or a backend's name.
        gate: the module's activation function, or None for one that only the module itself can compute.
        input_scales: static fp8: the scale of either projection's input.
        prepared: the weights in the backend's own layout, if it has one.
    """

    up: PackedProjection
    down: PackedProjection
    activation: Activation
    interleaved: bool
    backend: str
    rotation: str | None = None
    gate: Gate | None = None
    input_scales: tuple[float, float] | None = None
    prepared: PreparedWeights = field(default_factory=PreparedWeights, repr=False)


@dataclass(kw_only=True)
class Apart:
    """How to run an experts module whose experts differ in format: a module of linear layers each, named by number.

    Attributes:
        up, down: what the linear layers are called; gate and up may be two.
        backend, gate: as in ``Stacked``.
    """

    up: tuple[str, ...]
    down: str
    backend: str
    gate: Gate | None = None


def is_experts(module: nn.Module) -> bool:
    """Whether a module is on Transformers' experts interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "_apply_gate")


def up_projection(module: ExpertsModule) -> str:
    """What the module calls its first projection."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def projection_shapes(module: ExpertsModule) -> dict[str, tuple[int, int]]:
    """Rows N and columns K of an unquantised module's projections, by parameter: the first, then the second."""
    shapes = {}
    for name in (up_projection(module), "down_proj"):
        _, rows, columns = getattr(module, name).shape
        shapes[name] = (columns, rows) if module.is_transposed else (rows, columns)
    return shapes


def _has_norm(module: ExpertsModule) -> bool:
    """Whether each expert's output is normalised; Transformers < 5.20 has no such models."""
    return bool(getattr(module, "has_post_expert_norm", False))


def mx_experts(model: nn.Module) -> Iterator[tuple[str, ExpertsModule]]:
    """Name and module of every experts module that mxperts runs."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "mxperts", None), Stacked | Apart):
            yield name, module


def mx_weight(module: ExpertsModule, projection: PackedProjection) -> MXTensor:
    """A packed projection of an experts module as an MXTensor [E, N, K]; shares memory with its parameters."""
    p = projection
    codes, scales = getattr(module, p.codes), getattr(module, p.scales)
    return stored_tensor(codes, scales, p.format, p.k, block_rows=p.block_rows, parts=p.parts)


def prepare_weights(module: ExpertsModule, dtype: torch.dtype) -> PreparedExperts | None:
    """The weights of a module that ``runs_fused`` in the layout of the backend that runs hidden states of ``dtype``.

    The memory of the module's parameters is freed; see ``PreparedWeights``.

    Returns:
        None where the backend wants the parameters as they are, or where their memory is not ours to free.

    Raises:
        BackendUnavailable: the named backend cannot run here, or memory is short; the module is as before.
    """
    packed: Stacked = module.mxperts
    if not torch.compiler.is_compiling() and _is_offloaded(module):
        return None
    up, down = packed.up, packed.down
    return packed.prepared.of(
        module,
        (up.codes, up.scales, down.codes, down.scales),
        lambda: _weights(module),
        partial(_as_stored, (up, down)),
        weight=up.format,
        interleaved=packed.interleaved,
        activation_format=packed.activation,
        dtype=dtype,
        rotation=packed.rotation,
        backend=packed.backend,
    )


def _weights(module: ExpertsModule) -> tuple[Weight, Weight]:
    return mx_weight(module, module.mxperts.up), mx_weight(module, module.mxperts.down)


def _give_back(module: ExpertsModule, *args: object) -> None:
    """Compiled code would not notice that ``load_state_dict(assign=True)`` replaces parameters."""
    module.mxperts.prepared.give_back()


def _as_stored(projections: tuple[PackedProjection, ...], experts: PreparedExperts) -> list[Tensor]:
    """Codes and scales of each projection as the module's parameters have them: the inverse of ``mx_weight``."""
    tensors = []
    for p, weight in zip(projections, experts.unprepare(), strict=True):
        assert isinstance(weight, MXTensor)
        scales = weight.scales.unflatten(-2, (p.parts, -1))[..., :: p.block_rows, :].flatten(-3, -2)
        tensors += [weight.packed[..., : p.format.stored_size(p.k)], scales]
    return tensors


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's parameters for each forward pass and takes them away again."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))


def needs_preparing(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether ``prepare_weights`` has anything to do."""
    packed = getattr(module, "mxperts", None)
    if not isinstance(packed, Stacked) or not runs_fused(module) or _is_offloaded(module):
        return False
    try:
        return has_own_layout(
            device=getattr(module, packed.up.codes).device,
            dtype=dtype,
            weight=packed.up.format,
            activation_format=packed.activation,
            rotation=packed.rotation,
            backend=packed.backend,
        )
    except BackendUnavailable:  # on this device; the model may be moved to another before it runs
        return False


def experts_forward(module: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """One experts layer, as Transformers' experts interface calls it.

    Args:
        module: an experts module; one without packed weights runs Transformers' own grouped implementation.
        hidden_states: [T, H].
        top_k_index: [T, k]; ids >= E belong to other processes.
        top_k_weights: [T, k].

    Returns:
        [T, H].
    """
    packed: Stacked | Apart | None = getattr(module, "mxperts", None)
    if packed is None:
        stock: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return stock(module, hidden_states, top_k_index, top_k_weights)
    top_k_index = top_k_index.masked_fill(top_k_index >= module.num_experts, -1)
    if isinstance(packed, Stacked) and packed.gate is not None and runs_fused(module):
        return _fused(module, packed, packed.gate, hidden_states, top_k_index, top_k_weights)
    total = torch.zeros_like(hidden_states, dtype=torch.float32)  # [T, H]
    weights = top_k_weights.to(torch.float32)
    for token, slot, y in _one_by_one(module, packed, hidden_states, top_k_index):
        total.index_add_(0, token, y * weights[token, slot].unsqueeze(-1))
    return total.to(hidden_states.dtype)


def expert_rows(module: ExpertsModule, hidden_states: Tensor, expert: Tensor, sums: torch.dtype) -> Tensor:
    """What a module with stacked experts computes of each row before it is weighted, summed up and rounded.

    Args:
        module: the experts.
        hidden_states: [R, H].
        expert: int64 [R], which of the module's experts each row is for.
        sums: as ``sums_of`` says.

    Returns:
        [R, H] in ``sums``.
    """
    packed: Stacked = module.mxperts
    top_k_index = expert.unsqueeze(1)  # [R, 1]
    if packed.gate is not None and runs_fused(module):
        weights = torch.ones_like(top_k_index, dtype=torch.float32)
        return _fused(module, packed, packed.gate, hidden_states, top_k_index, weights, sums)
    rows = torch.zeros_like(hidden_states, dtype=sums)
    for token, _, y in _one_by_one(module, packed, hidden_states, top_k_index):
        rows[token] = y
    return rows


def backend_of(module: ExpertsModule, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that sums up each token's experts: the one that runs them, or the reference for one by one."""
    packed: Stacked = module.mxperts
    problem = Problem(
        op="fused_experts",
        device=device,
        dtype=dtype,
        weight=packed.up.format,
        activation=packed.activation,
        rotation=packed.rotation,
    )
    return resolve(packed.backend if runs_fused(module) else "reference", problem).backend


def sums_of(module: ExpertsModule, backend: Backend) -> torch.dtype:
    """In what ``backend_of`` a module sums."""
    return backend.sums if runs_fused(module) else torch.float32


def runs_fused(module: ExpertsModule) -> bool:
    """Whether one ``fused_experts`` is all that a module with packed weights computes."""
    return isinstance(module.mxperts, Stacked) and module.mxperts.gate is not None and not _has_norm(module)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def expert_projections(module: ExpertsModule, expert: int) -> tuple[Linear, Linear]:
    """Both projections of one expert of any experts module, packed or not: functions of input and output dtype.

    The first gives gate and up in the order in which ``apply_activation`` takes them. Biases are added, and inputs are
    quantised as the module does.
    """
    packed: Stacked | Apart | None = getattr(module, "mxperts", None)
    if packed is not None:
        return _projections(module, packed, expert)

    def dense(name: str) -> Linear:
        weight = getattr(module, name)[expert]
        bias = getattr(module, f"{name}_bias", None)
        return lambda x, dtype: mx_linear(
            x,
            weight.transpose(-1, -2) if module.is_transposed else weight,
            None if bias is None else bias[expert],
            out_dtype=dtype,
        )

    return dense(up_projection(module)), dense("down_proj")


def apply_activation(module: ExpertsModule, h: Tensor) -> Tensor:
    """What the module's activation function makes of the first projection's output [..., 2I], or [..., I]."""
    packed: Stacked | Apart | None = getattr(module, "mxperts", None)
    return activate(module, None if packed is None else packed.gate, h)


def finish_experts(module: ExpertsModule) -> None:
    """Find out, once a module is loaded, which activation function it computes and which static scales it has."""
    packed: Stacked | Apart = module.mxperts
    packed.gate = recognize(module)
    if isinstance(packed, Stacked) and packed.activation == FP8_STATIC:
        # The largest of all experts', and of gate's and up's, as vLLM takes it.
        up, down = (
            getattr(module, f"{name}_input_scale").detach().max() for name in (up_projection(module), "down_proj")
        )
        packed.input_scales = (float(up), float(down))
    if isinstance(packed, Stacked):
        module.register_load_state_dict_pre_hook(_give_back)


def _fused(
    module: ExpertsModule,
    packed: Stacked,
    gate: Gate,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    prepared = prepare_weights(module, hidden_states.dtype)
    gate_up_proj, down_proj = (prepared, None) if prepared is not None else _weights(module)
    return fused_experts(
        hidden_states,
        gate_up_proj,
        down_proj,
        top_k_index,
        top_k_weights,
        activation=gate.name,
        activation_format=packed.activation,
        gate_up_bias=getattr(module, f"{up_projection(module)}_bias", None),
        down_bias=getattr(module, "down_proj_bias", None),
        interleaved=packed.interleaved,
        input_scales=packed.input_scales,
        rotation=packed.rotation,
        out_dtype=out_dtype,
        backend=packed.backend,
        **gate.constants,
    )


def _one_by_one(
    module: ExpertsModule, packed: Stacked | Apart, hidden_states: Tensor, top_k_index: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same contract with a linear operation for each projection of each expert that is hit.

    For experts of several formats, and for models whose activation function only they themselves can compute.

    Yields:
        For each expert its pairs' tokens and slots, and their unweighted results, float32 [pairs, H].
    """
    for expert in top_k_index[top_k_index >= 0].unique().tolist():
        token, slot = torch.nonzero(top_k_index == expert, as_tuple=True)
        up, down = _projections(module, packed, expert)
        h = up(hidden_states[token], hidden_states.dtype)
        a = activate(module, packed.gate, h)
        y = down(a, torch.float32)
        if _has_norm(module):
            y = module.post_expert_norm(y.to(hidden_states.dtype)).to(torch.float32)
        yield token, slot, y


def activate(module: ExpertsModule, gate: Gate | None, h: Tensor) -> Tensor:
    """An experts module's activation function of ``h`` [..., 2I], gate and up as the module has them, or [..., I]."""
    if gate is not None:
        return gate.apply(h, interleaved=not module.is_concatenated)
    own: Tensor = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    return own


def _projections(module: ExpertsModule, packed: Stacked | Apart, expert: int) -> tuple[Linear, Linear]:
    """Both projections of one expert, as functions of the input and the output's dtype.

    The first gives gate and up in the order in which the module's own ``_apply_gate`` takes them.
    """
    if isinstance(packed, Apart):
        linears = module.get_submodule(str(expert))
        parts = [linears.get_submodule(name) for name in packed.up]
        down = linears.get_submodule(packed.down)

        def first(x: Tensor, dtype: torch.dtype) -> Tensor:
            return in_order(module, [_linear(part, x, dtype, packed.backend) for part in parts])

        return first, lambda x, dtype: _linear(down, x, dtype, packed.backend)

    scales = packed.input_scales or (None, None)

    def packed_linear(projection: PackedProjection, name: str, scale: float | None) -> Linear:
        bias = getattr(module, f"{name}_bias", None)
        weight = mx_weight(module, projection)[expert]
        return lambda x, dtype: mx_linear(
            x,
            weight,
            None if bias is None else bias[expert],
            activation=packed.activation,
            input_scale=scale,
            rotation=packed.rotation,
            out_dtype=dtype,
            backend=packed.backend,
        )

    up = packed_linear(packed.up, up_projection(module), scales[0])
    if module.has_gate and packed.interleaved == module.is_concatenated:
        whole = up
        up = lambda x, dtype: in_order(module, list(whole(x, dtype).chunk(2, dim=-1)))  # noqa: E731
    return up, packed_linear(packed.down, "down_proj", scales[1])


def in_order(module: ExpertsModule, parts: list[Tensor]) -> Tensor:
    """Gate and up as the module wants them: one after the other, or alternating."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=-1) if module.is_concatenated else torch.stack(parts, dim=-1).flatten(-2)


def _linear(linear: nn.Module, x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """The output of a linear layer, packed or not, rounded once to ``dtype``."""
    if isinstance(linear, StoredLinear):
        return linear.forward(x, dtype)
    assert isinstance(linear, nn.Linear)
    return mx_linear(x, linear.weight, linear.bias, out_dtype=dtype, backend=backend)
