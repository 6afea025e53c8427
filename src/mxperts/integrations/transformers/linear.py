"""A linear layer whose parameters are named, typed and shaped as the checkpoint stores them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mxperts.checkpoint.stored import stored_tensor
from mxperts.formats import FP8_STATIC, Activation, BlockFormat
from mxperts.integrations.transformers.parameters import add_parameter
from mxperts.ops.linear import mx_linear
from mxperts.tensor import MXTensor


class StoredLinear(nn.Module):
    """A linear layer with a packed weight.

    Args:
        like: the layer it replaces; its bias is kept.
        fmt: format of the weight.
        activation: what the input is quantised to.
        codes: name, shape and dtype of the codes' parameter; scales likewise.
        block_rows: rows of the weight that share their scales.
        input_scale: shape and dtype of the static fp8 input scale, if there is one.
        rotation: by what the weight is rotated and the input is to be.
        backend: "auto" or a backend's name.
    """

    def __init__(
        self,
        like: nn.Linear,
        fmt: BlockFormat,
        activation: Activation,
        *,
        codes: tuple[str, tuple[int, ...], torch.dtype],
        scales: tuple[str, tuple[int, ...], torch.dtype],
        block_rows: int = 1,
        input_scale: tuple[tuple[int, ...], torch.dtype] | None = None,
        rotation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.format, self.activation, self.backend = fmt, activation, backend
        self.rotation = rotation
        self.codes, self.scales = codes[0], scales[0]
        self.block_rows = block_rows
        self.static_scale: float | None = None
        for name, shape, dtype in (codes, scales):
            add_parameter(self, name, shape, dtype)
        if input_scale is not None:
            add_parameter(self, "input_scale", *input_scale)
        self.bias = like.bias

    def finish(self) -> None:
        """Once the parameters are loaded: a static input scale is a constant, not to be rounded with the model."""
        if self.activation == FP8_STATIC:
            self.static_scale = float(self.get_parameter("input_scale").detach())

    def mx_weight(self) -> MXTensor:
        """The weight [N, K]; shares memory with the parameters."""
        codes, scales = getattr(self, self.codes), getattr(self, self.scales)
        return stored_tensor(codes, scales, self.format, self.in_features, block_rows=self.block_rows)

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """``mx_linear`` of ``x`` [..., K]: [..., N] in ``out_dtype``, by default that of ``x``."""
        return mx_linear(
            x,
            self.mx_weight(),
            self.bias,
            activation=self.activation,
            input_scale=self.static_scale,
            rotation=self.rotation,
            out_dtype=out_dtype,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """For ``print``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, format={self.format}, activation={self.activation}, rotation={self.rotation}"
