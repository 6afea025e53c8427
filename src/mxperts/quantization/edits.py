"""A checkpoint's numbers with some rows and columns scaled, so that everybody reads the same edited ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mxperts.checkpoint import Checkpoint
from mxperts.quantization.leaves import BIAS, Leaf


class EditedCheckpoint:
    """Reads a checkpoint's tensors, and scales what has been told to be scaled.

    Scales are powers of two, by which every number is scaled exactly unless its exponent leaves the range of the dtype.

    Args:
        checkpoint: the source.
        leaves: the linear layers in every tensor.
    """

    def __init__(self, checkpoint: Checkpoint, leaves: Mapping[str, Sequence[Leaf]]) -> None:
        self._checkpoint, self._leaves = checkpoint, leaves
        self._rows: dict[str, Tensor] = {}
        self._columns: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}

    def scale_rows(self, module: str, factors: Tensor) -> None:
        """Multiply a linear layer's rows, and its bias, by ``factors`` [N]."""
        self._rows[module] = factors.cpu() * self._rows.get(module, 1)

    def scale_columns(self, module: str, factors: Tensor) -> None:
        """Multiply a linear layer's columns by ``factors`` [K]."""
        self._columns[module] = factors.cpu() * self._columns.get(module, 1)

    def scale_vector(self, tensor: str, factors: Tensor) -> None:
        """Multiply a tensor [K] that is no linear layer's, such as a norm's weight, by ``factors`` [K]."""
        self._vectors[tensor] = factors.cpu() * self._vectors.get(tensor, 1)

    def leaf(self, leaf: Leaf) -> Tensor:
        """A linear layer's weight or bias."""
        return self._scaled(leaf, leaf.view(self._checkpoint.tensor(leaf.source.name)))

    def tensor(self, name: str) -> Tensor:
        """A tensor of the checkpoint."""
        tensor = self._checkpoint.tensor(name)
        if name in self._vectors:
            return (tensor.float() * self._vectors[name]).to(tensor.dtype)
        leaves = [leaf for leaf in self._leaves[name] if leaf.module in self._rows or leaf.module in self._columns]
        if leaves:
            tensor = tensor.clone()
            for leaf in leaves:
                part = leaf.view(tensor)
                part.copy_(self._scaled(leaf, part))
        return tensor

    def _scaled(self, leaf: Leaf, values: Tensor) -> Tensor:
        rows, columns = self._rows.get(leaf.module), self._columns.get(leaf.module)
        if rows is None and (columns is None or leaf.part == BIAS):
            return values
        wide = values.float()
        if rows is not None:
            wide = wide * (rows if leaf.part == BIAS else rows[:, None])
        if columns is not None and leaf.part != BIAS:
            wide = wide * columns
        return wide.to(values.dtype)
