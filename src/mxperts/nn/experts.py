"""MXExperts: the experts of a mixture-of-experts layer with weights in an MX format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mxperts.formats import FP8_STATIC, Activation, Preset, Scheme
from mxperts.nn.parameters import FrozenModule, frozen, quantize_weight, unset_scale, zero_weight
from mxperts.nn.prepared import PreparedParameter, PreparedWeights
from mxperts.ops.activation import bind_activation
from mxperts.ops.experts import InputScale, as_input_scale, fused_experts
from mxperts.ops.prepare import PreparedExperts, Weight, canonical_tensors, layout_of
from mxperts.rotation import check_rotation


class MXExperts(FrozenModule):
    """``fused_experts`` with its own weights; it is called as the ``experts`` of a model in Transformers are.

    Args:
        num_experts, hidden_size, intermediate_size: E, H and I.
        scheme: format of the weights and of the inputs; a scheme without a weight format holds dense weights.
        activation, interleaved, apply_router_weight_on_input: as in ``fused_experts``.
        swiglu_limit, swiglu_alpha, swiglu_beta, swiglu_linear_beta: as in ``fused_experts``.
        rotation: by what the weights are rotated and inputs are to be, as in ``fused_experts``.
        bias: whether both projections have biases.
        device: where the parameters are; "meta" allocates nothing.
        dtype: of the biases, and of dense weights; default: torch's.
        backend: "auto" or a backend's name.

    Attributes:
        gate_up_proj, gate_up_proj_scale: packed codes uint8 [E, 2I, P] ([E, I, P] for an activation without a gate) and
            scales uint8 [E, 2I, ceil(H / 32)], zeros until loaded.
        down_proj, down_proj_scale: the same of [E, H, I].
        gate_up_proj_bias, down_proj_bias: [E, 2I] and [E, H], zeros until loaded, or None.
        gate_up_proj_input_scale, down_proj_input_scale: float32 [], only with static fp8; NaN until loaded. [E] is
            possible too. They keep their dtype through ``to(dtype)``.

    For a backend with a weight layout of its own, the first forward pass, or ``prepare``, brings the weights to it and
    frees the parameters' memory. Whatever looks at a parameter then finds its values all the same, and brings all of
    them back until the next forward pass.
    """

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None
    gate_up_proj_input_scale: nn.Parameter
    down_proj_input_scale: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        scheme: Scheme | str = "w_mxfp4",
        activation: str = "silu",
        rotation: str | None = None,
        bias: bool = False,
        interleaved: bool = False,
        swiglu_limit: float | None = None,
        swiglu_alpha: float | None = None,
        swiglu_beta: float | None = None,
        swiglu_linear_beta: float | None = None,
        apply_router_weight_on_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        check_rotation(rotation, gate_up_proj=hidden_size, down_proj=intermediate_size)
        self.scheme, self.rotation = Scheme(scheme), rotation
        self.interleaved = interleaved
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.backend = backend
        self._prepared = PreparedWeights()
        self.activation = bind_activation(
            activation, limit=swiglu_limit, alpha=swiglu_alpha, beta=swiglu_beta, linear_beta=swiglu_linear_beta
        )
        rows = intermediate_size * (2 if self.activation.gated else 1)
        for name, n, k in (("gate_up_proj", rows, hidden_size), ("down_proj", hidden_size, intermediate_size)):
            weight = zero_weight(self.scheme.weight, num_experts, n, k, device=device, dtype=dtype)
            self.set_weight(name, weight)
            zeros = torch.zeros(num_experts, n, device=device, dtype=dtype) if bias else None
            self.register_parameter(f"{name}_bias", None if zeros is None else frozen(zeros))
            if self.scheme.activation == FP8_STATIC:
                self.register_parameter(f"{name}_input_scale", frozen(unset_scale(device)))

    @classmethod
    def from_tensors(
        cls,
        gate_up_proj: Weight,
        down_proj: Weight,
        *,
        activation_format: Activation = None,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        input_scales: tuple[InputScale, InputScale] | None = None,
        interleaved: bool = False,
        **settings: Any,
    ) -> MXExperts:
        """A module around existing tensors, which are not copied.

        Args:
            gate_up_proj to interleaved: as in ``fused_experts``.
            settings: the constructor's ``activation``, ``swiglu_*``, ``apply_router_weight_on_input``, ``rotation``
                and ``backend``.

        Raises:
            ArgumentError: the weights do not fit together or to the activation function, or a scale does not fit.
        """
        layout = layout_of(gate_up_proj, down_proj, interleaved=interleaved)
        module = cls(
            layout.experts,
            layout.hidden,
            layout.intermediate,
            scheme=Scheme.of(layout.weight, activation_format),
            interleaved=interleaved,
            device="meta",
            **settings,
        )
        layout_of(gate_up_proj, down_proj, interleaved=interleaved, gated=module.activation.gated)
        device = gate_up_proj.device
        if input_scales is None and module.scheme.activation == FP8_STATIC:
            input_scales = unset_scale(device), unset_scale(device)
        for i, (name, weight, bias) in enumerate(
            (("gate_up_proj", gate_up_proj, gate_up_bias), ("down_proj", down_proj, down_bias))
        ):
            module.set_weight(name, weight)
            if bias is not None:
                setattr(module, f"{name}_bias", frozen(bias.detach()))
            if input_scales is not None:
                scale = as_input_scale(input_scales[i], f"input_scales[{i}]", layout.experts, device)
                module.register_parameter(f"{name}_input_scale", frozen(scale))
        return module

    @classmethod
    def quantize(
        cls,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        scheme: Scheme | str,
        *,
        preset: Preset | str | None = None,
        rotation: str | None = None,
        backend: str = "auto",
        **settings: Any,
    ) -> MXExperts:
        """``from_tensors`` with dense weights that ``mx.quantize`` brings to the scheme's weight format.

        Args:
            gate_up_proj, down_proj: float tensors in the shapes of ``fused_experts``.
            scheme: format of the weights and of the inputs.
            preset: as in ``mx.quantize``.
            rotation: what to rotate the weights by before they are quantised.
            backend: of the quantisation and of the module.
            settings: the other arguments of ``from_tensors``.
        """
        scheme = Scheme(scheme)
        weights: list[Weight] = [
            quantize_weight(dense, scheme.weight, name, rotation, preset=preset, backend=backend)
            for name, dense in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj))
        ]
        return cls.from_tensors(
            *weights, activation_format=scheme.activation, rotation=rotation, backend=backend, **settings
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module`` has it, which calls it for attributes too; what it replaces is no longer prepared."""
        if isinstance(self._parameters.get(name), PreparedParameter):
            self._prepared.give_back()
        super().register_parameter(name, param)

    def prepare(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Bring the weights to the layout of the backend that will run hidden states of ``dtype``.

        The first forward pass does it otherwise, but not one under ``torch.compile``.

        Raises:
            BackendUnavailable: the named backend cannot run here, or memory is short; the module is as before.
        """
        self._prepare(dtype)

    def _prepare(self, dtype: torch.dtype) -> PreparedExperts | None:
        names = ("gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale")
        return self._prepared.of(
            self,
            names if self.scheme.weight is not None else names[::2],
            self._weights,
            lambda experts: canonical_tensors(*experts.unprepare()),
            weight=self.scheme.weight,
            interleaved=self.interleaved,
            activation_format=self.scheme.activation,
            dtype=dtype,
            rotation=self.rotation,
            backend=self.backend,
        )

    def _weights(self) -> tuple[Weight, Weight]:
        fmt = self.scheme.weight
        return (
            self.get_weight("gate_up_proj", fmt, self.hidden_size),
            self.get_weight("down_proj", fmt, self.intermediate_size),
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``fused_experts`` of ``hidden_states`` [T, H], ``top_k_index`` and ``top_k_weights`` [T, k]: [T, H]."""
        function = self.activation
        static = self.scheme.activation == FP8_STATIC
        prepared = self._prepare(hidden_states.dtype)
        gate_up_proj, down_proj = (prepared, None) if prepared is not None else self._weights()
        return fused_experts(
            hidden_states,
            gate_up_proj,
            down_proj,
            top_k_index,
            top_k_weights,
            activation=function.name,
            activation_format=self.scheme.activation,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            interleaved=self.interleaved,
            swiglu_limit=function.limit,
            swiglu_alpha=function.alpha,
            swiglu_beta=function.beta,
            swiglu_linear_beta=function.linear_beta,
            input_scales=(self.gate_up_proj_input_scale, self.down_proj_input_scale) if static else None,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            rotation=self.rotation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The arguments, for ``print``."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, scheme={self.scheme}, activation={self.activation.name}, "
            f"rotation={self.rotation}, bias={self.gate_up_proj_bias is not None}, interleaved={self.interleaved}, "
            f"backend={self.backend}"
        )
