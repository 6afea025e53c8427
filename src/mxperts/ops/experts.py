"""fused_experts: the experts of a mixture-of-experts layer, from packed weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxperts.errors import ArgumentError, BackendUnavailable
from mxperts.formats import FP8_STATIC, Activation, parse_activation
from mxperts.ops.activation import BoundActivation, bind_activation
from mxperts.ops.dispatch import Problem, resolve, run
from mxperts.ops.eager import is_eager
from mxperts.ops.prepare import ExpertsLayout, PreparedExperts, Weight, canonical_tensors, layout_of
from mxperts.ops.quantize import FLOAT_DTYPES

ACCUMULATIONS = ("auto", "exact")
INDEX_DTYPES = (torch.int32, torch.int64)

InputScale = float | Tensor


@dataclass(kw_only=True, eq=False, slots=True)  # frozen, it would take longer to make than to check
class ExpertsCall:
    """One call of ``fused_experts``, checked, as a backend gets it.

    Attributes:
        hidden_states: [T, H], any strides.
        weights: if not ``prepared``, packed codes and scales of ``gate_up_proj`` and the same of ``down_proj``, or the
            two dense tensors; else what the backend's ``prepare`` returned.
        layout: what the weights stand for.
        top_k_index: int32 or int64 [T, k]. On CPU the ids are checked; elsewhere one that is out of range is to
            contribute nothing, as -1 does.
        top_k_weights: any float dtype [T, k], meant as float32.
        activation: the activation function and its constants.
        activation_format: as ``Scheme.activation``.
        gate_up_bias, down_bias: any float dtype [E, 2I or I] and [E, H], meant as float32.
        input_scales: float32, each [1] or [E], for static fp8 only.
        expert_map: int32 or int64, global to local expert ids.
        router_weight_on_input: whether the input, not the output, is multiplied by the router weight.
        accumulation: one of ``ACCUMULATIONS``.
        prepared: whether ``weights`` have the backend's own layout.
    """

    hidden_states: Tensor
    weights: Sequence[Tensor]
    layout: ExpertsLayout
    top_k_index: Tensor
    top_k_weights: Tensor
    activation: BoundActivation
    activation_format: Activation
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    input_scales: tuple[Tensor, Tensor] | None
    expert_map: Tensor | None
    router_weight_on_input: bool
    accumulation: str
    prepared: bool


def fused_experts(
    hidden_states: Tensor,
    gate_up_proj: Weight | PreparedExperts,
    down_proj: Weight | None,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    activation: str = "silu",
    activation_format: Activation = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    swiglu_beta: float | None = None,
    swiglu_linear_beta: float | None = None,
    input_scales: tuple[InputScale, InputScale] | None = None,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    accumulation: str = "auto",
    rotation: str | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The weighted sum of each token's experts.

    For each token and each of its k experts: ``x`` is the token (times the router weight first if
    ``apply_router_weight_on_input``), quantised to ``activation_format`` and back; ``h = x @ gate_up_proj[e].T + bias``
    rounded once to the dtype of ``hidden_states``; ``a`` is the activation function of ``h``, computed in float32,
    rounded once to that dtype, quantised and back; ``y = (a @ down_proj[e].T + bias) * router weight``, without the
    router weight if the input has it. The sum over the experts is rounded once. Products are exact and sums at least
    float32.

    Args:
        hidden_states: float32, bfloat16 or float16 [T, H].
        gate_up_proj: [E, 2I, H], or [E, I, H] for an activation without a gate; an MXTensor or a dense float tensor,
            rounded to the dtype of ``hidden_states``; or the result of ``prepare``, with ``down_proj=None``.
        down_proj: [E, H, I], in the same format.
        top_k_index: int32 or int64 [T, k], expert ids. -1 contributes nothing, as does an id that ``expert_map`` maps
            to -1. The same id twice counts twice.
        top_k_weights: float [T, k], used as float32.
        activation: "silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "situ", "swiglustep", or, without a gate,
            "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul"; see ``ActivationFunction``.
        activation_format: what the inputs of both projections are quantised to: None, a block format or its name,
            "fp8_static" (also "fp8") or "fp8_dynamic" (E4M3, one scale a token).
        gate_up_bias, down_bias: float [E, 2I] or [E, I], and [E, H]; used as float32.
        interleaved: whether gate and up rows alternate, as in gpt-oss, instead of all gate rows coming first.
        swiglu_limit, swiglu_alpha, swiglu_beta, swiglu_linear_beta: constants of the activation function; None takes
            its default.
        input_scales: for static fp8, the scales of the inputs of both projections: each a number, or a float tensor
            with one element or one for each expert.
        expert_map: int32 or int64 [global E]: the local id of each global expert, or -1; ``top_k_index`` then holds
            global ids.
        apply_router_weight_on_input: see above; k must be 1.
        accumulation: "exact" sums in float32 throughout; "auto" also admits integer and fp8 matrix units with exact
            operands.
        rotation: None, or "hadamard32": both weights were rotated by ``mxperts.rotation.rotate_weight`` before they
            were quantised, and the inputs of both projections are rotated by ``rotate_input``, in float32. What it
            gives is quantised without being rounded in between, and rounded to the dtype of ``hidden_states`` where
            inputs are not quantised. H and I must be multiples of 32.
        out: [T, H] in ``out_dtype``, contiguous, to be filled and returned. Must share no memory with the other
            arguments.
        out_dtype: what the sum is rounded to; None: the dtype of ``hidden_states``. The reference, which sums in
            float64, also takes that.
        backend: "auto" or a backend's name.

    Returns:
        [T, H] in ``out_dtype``.

    Raises:
        ArgumentError: a shape, dtype, device or value that does not fit; values are looked at only on CPU, where an
            expert id out of range is an error; on other devices, where looking would wait for the device, it
            contributes nothing.
        FormatError: unknown activation format.
        BackendUnavailable: the named backend cannot run here.
    """
    _check_hidden_states(hidden_states)
    function = bind_activation(
        activation, limit=swiglu_limit, alpha=swiglu_alpha, beta=swiglu_beta, linear_beta=swiglu_linear_beta
    )
    activation_format = parse_activation(activation_format)
    weights, layout, backend = _weights(gate_up_proj, down_proj, interleaved, rotation, function, backend)
    if hidden_states.shape[1] != layout.hidden:
        raise ArgumentError(
            f"hidden_states have {hidden_states.shape[1]} values a token, but gate_up_proj takes H = {layout.hidden}"
        )
    _check_routing(hidden_states, top_k_index, top_k_weights, expert_map)
    _check_bias(gate_up_bias, "gate_up_bias", (layout.experts, layout.gate_up_rows))
    _check_bias(down_bias, "down_bias", (layout.experts, layout.hidden))
    scales = _input_scales(input_scales, activation_format, layout.experts, hidden_states.device)
    if apply_router_weight_on_input and top_k_index.shape[1] != 1:
        raise ArgumentError(f"apply_router_weight_on_input needs one expert a token, not k = {top_k_index.shape[1]}")
    if accumulation not in ACCUMULATIONS:
        raise ArgumentError(f"accumulation must be 'auto' or 'exact', not {accumulation!r}")
    operands = {
        "gate_up_proj": weights[0],
        "top_k_index": top_k_index,
        "top_k_weights": top_k_weights,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
        "expert_map": expert_map,
        "out": out,
    }
    for name, tensor in operands.items():
        if tensor is not None and tensor.device != hidden_states.device:
            raise ArgumentError(
                f"{name} is on {tensor.device} but hidden_states on {hidden_states.device}; move one of them"
            )

    call = ExpertsCall(
        hidden_states=hidden_states,
        weights=weights,
        layout=layout,
        top_k_index=top_k_index,
        top_k_weights=top_k_weights,
        activation=function,
        activation_format=activation_format,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        input_scales=scales,
        expert_map=expert_map,
        router_weight_on_input=apply_router_weight_on_input,
        accumulation=accumulation,
        prepared=isinstance(gate_up_proj, PreparedExperts),
    )
    out_dtype = _check_out_dtype(out_dtype, call, backend)
    if out is not None:
        _check_out(out, hidden_states.shape, out_dtype, hidden_states.requires_grad)
    if is_eager(*operands.values(), hidden_states, top_k_weights, *weights, *(scales or ())):
        result = torch.empty(hidden_states.shape, dtype=out_dtype, device=hidden_states.device)
        _execute(call, result if out is None else out, backend)
        return result if out is None else out
    if out is None:
        y: Tensor = _fused_experts_op(*_arguments(call), backend, out_dtype)
        return y
    _fused_experts_out_op(*_arguments(call), backend, out)
    return out


def _check_hidden_states(hidden_states: Tensor) -> None:
    if not isinstance(hidden_states, Tensor):
        raise ArgumentError(f"hidden_states must be a torch.Tensor, not {type(hidden_states).__name__}")
    if hidden_states.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"hidden_states must be float32, bfloat16 or float16, not {hidden_states.dtype}")
    if hidden_states.ndim != 2:
        raise ArgumentError(
            f"hidden_states must have shape [T, H], not {tuple(hidden_states.shape)}; flatten batch and sequence"
        )


def _weights(
    gate_up_proj: Weight | PreparedExperts,
    down_proj: Weight | None,
    interleaved: bool,
    rotation: str | None,
    function: BoundActivation,
    backend: str,
) -> tuple[list[Tensor], ExpertsLayout, str]:
    """Tensors, their layout, and the backend that is to read them."""
    if not isinstance(gate_up_proj, PreparedExperts):
        if down_proj is None:
            raise ArgumentError("down_proj is missing; None stands in its place only beside the result of prepare")
        layout = layout_of(gate_up_proj, down_proj, interleaved=interleaved, gated=function.gated, rotation=rotation)
        return canonical_tensors(gate_up_proj, down_proj), layout, backend
    layout = gate_up_proj.layout
    if down_proj is not None:
        raise ArgumentError("down_proj must be None beside prepared experts, which hold both projections")
    if backend not in ("auto", gate_up_proj.backend):
        raise ArgumentError(
            f"these experts were prepared for backend {gate_up_proj.backend!r}, not {backend!r}; prepare them again"
        )
    if interleaved != layout.interleaved:
        raise ArgumentError(f"these experts were prepared with interleaved={layout.interleaved}, not {interleaved}")
    if rotation != layout.rotation:
        raise ArgumentError(f"these experts were prepared with rotation={layout.rotation!r}, not {rotation!r}")
    if function.gated != layout.gated:
        raise ArgumentError(
            f"activation {function.name!r} {'needs' if function.gated else 'has no'} gate and up rows, "
            f"but the prepared gate_up_proj has {layout.gate_up_rows} rows for I = {layout.intermediate}"
        )
    return list(gate_up_proj.weights), layout, gate_up_proj.backend


def _check_routing(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, expert_map: Tensor | None
) -> None:
    for name, tensor in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights), ("expert_map", expert_map)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name != "expert_map"):
            raise ArgumentError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    tokens = hidden_states.shape[0]
    if top_k_index.dtype not in INDEX_DTYPES:
        raise ArgumentError(f"top_k_index must be int32 or int64, not {top_k_index.dtype}")
    if top_k_index.ndim != 2 or top_k_index.shape[0] != tokens or top_k_index.shape[1] == 0:
        raise ArgumentError(
            f"top_k_index must have shape [T, k] with T = {tokens} as in hidden_states and k >= 1, "
            f"not {tuple(top_k_index.shape)}"
        )
    if not top_k_weights.is_floating_point():
        raise ArgumentError(f"top_k_weights must be a float tensor, not {top_k_weights.dtype}")
    if top_k_weights.shape != top_k_index.shape:
        raise ArgumentError(
            f"top_k_weights must have the shape of top_k_index, {tuple(top_k_index.shape)}, "
            f"not {tuple(top_k_weights.shape)}"
        )
    if expert_map is None:
        return
    if expert_map.dtype not in INDEX_DTYPES:
        raise ArgumentError(f"expert_map must be int32 or int64, not {expert_map.dtype}")
    if expert_map.ndim != 1 or expert_map.shape[0] == 0:
        raise ArgumentError(
            f"expert_map must have one entry for each global expert, not shape {tuple(expert_map.shape)}"
        )


def _check_bias(bias: Tensor | None, name: str, shape: tuple[int, int]) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise ArgumentError(f"{name} must be a torch.Tensor, not {type(bias).__name__}")
    if not bias.is_floating_point():
        raise ArgumentError(f"{name} must be a float tensor, not {bias.dtype}")
    if tuple(bias.shape) != shape:
        raise ArgumentError(f"{name} must have shape {shape}, one row for each expert, not {tuple(bias.shape)}")


def _input_scales(
    given: tuple[InputScale, InputScale] | None, activation_format: Activation, experts: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Both scales as float32, each [1] or [E]."""
    if (activation_format == FP8_STATIC) != (given is not None):
        raise ArgumentError(
            "activation_format='fp8_static' needs input_scales=(gate_up, down); 'fp8_dynamic' finds its own"
            if given is None
            else f"input_scales are of use only with activation_format='fp8_static', not {activation_format}"
        )
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ArgumentError("input_scales must be a pair: the scale of gate_up_proj's input and that of down_proj's")
    gate_up, down = (as_input_scale(scale, f"input_scales[{i}]", experts, device) for i, scale in enumerate(given))
    return gate_up, down


def as_input_scale(scale: InputScale, name: str, experts: int, device: torch.device) -> Tensor:
    """A static fp8 scale as float32 [1] or [E].

    Raises:
        ArgumentError: another shape, dtype or device, or a number that is not above 0.
    """
    if not isinstance(scale, Tensor):
        if not isinstance(scale, int | float) or not (math.isfinite(scale) and scale > 0):
            raise ArgumentError(f"{name} must be a number above 0 or a tensor of them, not {scale!r}")
        return torch.full((1,), scale, dtype=torch.float32, device=device)
    if not scale.is_floating_point():
        raise ArgumentError(f"{name} must be a float tensor, not {scale.dtype}")
    if tuple(scale.shape) not in ((), (1,), (experts,)):
        shapes = "one element" if experts == 1 else f"one element, or one for each of {experts} experts"
        raise ArgumentError(f"{name} must have {shapes}, not shape {tuple(scale.shape)}")
    if scale.device != device:
        raise ArgumentError(f"{name} is on {scale.device} but the input on {device}; move one of them")
    return scale.to(torch.float32).reshape(-1)


def _check_out_dtype(out_dtype: torch.dtype | None, call: ExpertsCall, backend: str) -> torch.dtype:
    """What the sum is rounded to; see ``fused_experts``."""
    if out_dtype is torch.float64:
        if resolve(backend, _problem(call)).backend.sums is not torch.float64:
            raise BackendUnavailable("out_dtype=torch.float64 needs backend='reference': all others sum in float32")
    elif out_dtype not in (None, *FLOAT_DTYPES):
        raise ArgumentError(f"out_dtype must be float32, bfloat16, float16 or float64, not {out_dtype}")
    return out_dtype or call.hidden_states.dtype


def _check_out(out: Tensor, shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> None:
    if out.shape != shape or out.dtype is not dtype:
        raise ArgumentError(f"out must be {dtype} of shape {tuple(shape)}, not {out.dtype} of shape {tuple(out.shape)}")
    if not out.is_contiguous():
        raise ArgumentError(f"out must be contiguous; its strides are {out.stride()}")
    if torch.is_grad_enabled() and (requires_grad or out.requires_grad):
        raise ArgumentError("out= takes no part in automatic differentiation; leave it out, or use torch.no_grad()")


_ARGUMENTS = (
    "Tensor hidden_states, Tensor[] weights, str layout, Tensor top_k_index, Tensor top_k_weights, str activation, "
    "str activation_format, Tensor? gate_up_bias, Tensor? down_bias, Tensor? gate_up_scale, Tensor? down_scale, "
    "Tensor? expert_map, bool router_weight_on_input, str accumulation, bool prepared, str backend"
)


@torch.library.custom_op(
    "mxperts::fused_experts", mutates_args=(), schema=f"({_ARGUMENTS}, ScalarType out_dtype) -> Tensor"
)
def _fused_experts_op(*arguments: Any) -> Tensor:
    *inputs, out_dtype = arguments
    hidden_states: Tensor = inputs[0]
    out = torch.empty(hidden_states.shape, dtype=out_dtype, device=hidden_states.device)
    _run(out, *inputs)
    return out


@_fused_experts_op.register_fake
def _(*arguments: Any) -> Tensor:
    hidden_states: Tensor = arguments[0]
    return hidden_states.new_empty(hidden_states.shape, dtype=arguments[-1])


@torch.library.custom_op(
    "mxperts::fused_experts_out", mutates_args=("out",), schema=f"({_ARGUMENTS}, Tensor(a!) out) -> ()"
)
def _fused_experts_out_op(*arguments: Any) -> None:
    *inputs, out = arguments
    _run(out, *inputs)


@_fused_experts_out_op.register_fake
def _(*arguments: Any) -> None:
    return None


def _arguments(call: ExpertsCall) -> tuple[Any, ...]:
    """A call as operators take it, whose arguments must be plain: see ``_ARGUMENTS``."""
    return (
        call.hidden_states,
        call.weights,
        call.layout.encode(),
        call.top_k_index,
        call.top_k_weights,
        call.activation.encode(),
        "" if call.activation_format is None else str(call.activation_format),
        call.gate_up_bias,
        call.down_bias,
        *(call.input_scales or (None, None)),
        call.expert_map,
        call.router_weight_on_input,
        call.accumulation,
        call.prepared,
    )


def _run(
    out: Tensor,
    hidden_states: Tensor,
    weights: Sequence[Tensor],
    layout: str,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    activation: str,
    activation_format: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    expert_map: Tensor | None,
    router_weight_on_input: bool,
    accumulation: str,
    prepared: bool,
    backend: str,
) -> None:
    """What ``_arguments`` made of a call, run."""
    call = ExpertsCall(
        hidden_states=hidden_states,
        weights=weights,
        layout=ExpertsLayout.decode(layout),
        top_k_index=top_k_index,
        top_k_weights=top_k_weights,
        activation=BoundActivation.decode(activation),
        activation_format=parse_activation(activation_format or None),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        input_scales=None if gate_up_scale is None or down_scale is None else (gate_up_scale, down_scale),
        expert_map=expert_map,
        router_weight_on_input=router_weight_on_input,
        accumulation=accumulation,
        prepared=prepared,
    )
    _execute(call, out, backend)


def _execute(call: ExpertsCall, out: Tensor, backend: str) -> None:
    """Look at the values, which only now are there under torch.compile, and run the backend."""
    if call.hidden_states.device.type == "cpu":
        _check_ids(call)
        for i, scale in enumerate(call.input_scales or ()):
            check_scale_values(scale, f"input_scales[{i}]")
    run(backend, _problem(call), call, out)


def _problem(call: ExpertsCall) -> Problem:
    return Problem(
        op="fused_experts",
        device=call.hidden_states.device,
        dtype=call.hidden_states.dtype,
        weight=call.layout.weight,
        activation=call.activation_format,
        rotation=call.layout.rotation,
    )


def _check_ids(call: ExpertsCall) -> None:
    """Raise ``ArgumentError`` for the first expert id out of range."""
    experts = call.layout.experts
    ids = experts if call.expert_map is None else call.expert_map.shape[0]
    for name, tensor, count in (("top_k_index", call.top_k_index, ids), ("expert_map", call.expert_map, experts)):
        if tensor is None or tensor.numel() == 0:
            continue
        least, most = torch.aminmax(tensor)
        if int(least) < -1 or int(most) >= count:
            wrong = tensor[(tensor < -1) | (tensor >= count)]
            raise ArgumentError(
                f"{name} holds {int(wrong[0])}; ids of {count} experts lie in 0..{count - 1}, and -1 means none"
            )


def check_scale_values(scale: Tensor, name: str) -> None:
    """Raise ``ArgumentError`` unless all elements are above 0 and finite."""
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ArgumentError(f"{name} must be above 0 and finite, not {scale.tolist()}")
