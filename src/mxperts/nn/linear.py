"""MXLinear: nn.Linear with a weight in an MX format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mxperts.formats import FP8_STATIC, Activation, Preset, Scheme
from mxperts.nn.parameters import FrozenModule, frozen, quantize_weight, unset_scale, zero_weight
from mxperts.ops.experts import InputScale, as_input_scale
from mxperts.ops.linear import mx_linear
from mxperts.ops.prepare import Weight, check_weight, weight_format
from mxperts.rotation import check_rotation


class MXLinear(FrozenModule):
    """``mx_linear`` with its own weight.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias.
        scheme: format of the weight and of the input; a scheme without a weight format holds a dense weight.
        device: where the parameters are; "meta" allocates nothing.
        dtype: of the bias, and of a dense weight; default: torch's.
        rotation: by what the weight is rotated and the input is to be, as in ``mx_linear``.
        backend: "auto" or a backend's name.

    Attributes:
        weight, weight_scale: packed codes uint8 [N, P] and scales uint8 [N, ceil(K / 32)], zeros until loaded.
        bias: [N], zeros until loaded, or None.
        input_scale: float32 [], only with static fp8; NaN until loaded. It keeps its dtype through ``to(dtype)``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: Scheme | str = "w_mxfp4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rotation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_rotation(rotation, weight=in_features)
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.rotation = Scheme(scheme), rotation
        self.backend = backend
        self.set_weight(
            "weight", zero_weight(self.scheme.weight, out_features, in_features, device=device, dtype=dtype)
        )
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else frozen(zeros))
        if self.scheme.activation == FP8_STATIC:
            self.input_scale = frozen(unset_scale(device))

    @classmethod
    def from_tensors(
        cls,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        activation: Activation = None,
        input_scale: InputScale | None = None,
        rotation: str | None = None,
        backend: str = "auto",
    ) -> MXLinear:
        """A module around existing tensors, which are not copied; arguments as in ``mx_linear``.

        Raises:
            ArgumentError: the weight has not two dimensions, or the scale does not fit.
        """
        check_weight(weight, "weight", "[N, K]", ndim=2)
        rows, k = weight.shape
        scheme = Scheme.of(weight_format(weight), activation)
        module = cls(k, rows, False, scheme, device="meta", rotation=rotation, backend=backend)
        module.set_weight("weight", weight)
        if bias is not None:
            module.bias = frozen(bias.detach())
        if input_scale is not None:
            module.input_scale = frozen(as_input_scale(input_scale, "input_scale", 1, weight.device))
        elif scheme.activation == FP8_STATIC:
            module.input_scale = frozen(unset_scale(weight.device))
        return module

    @classmethod
    def quantize(
        cls,
        linear: nn.Linear,
        scheme: Scheme | str,
        *,
        input_scale: InputScale | None = None,
        preset: Preset | str | None = None,
        rotation: str | None = None,
        backend: str = "auto",
    ) -> MXLinear:
        """``linear`` with its weight, rotated before, quantised by ``mx.quantize`` to the scheme's weight format."""
        scheme = Scheme(scheme)
        weight = quantize_weight(linear.weight, scheme.weight, "weight", rotation, preset=preset, backend=backend)
        return cls.from_tensors(
            weight,
            linear.bias,
            activation=scheme.activation,
            input_scale=input_scale,
            rotation=rotation,
            backend=backend,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``mx_linear`` of ``x`` [..., K]: [..., N]."""
        return mx_linear(
            x,
            self.get_weight("weight", self.scheme.weight, self.in_features),
            self.bias,
            activation=self.scheme.activation,
            input_scale=getattr(self, "input_scale", None),
            rotation=self.rotation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The arguments, for ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, rotation={self.rotation}, backend={self.backend}"
        )
