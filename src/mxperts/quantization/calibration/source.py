"""The unquantised model, read from its checkpoint one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mxperts.checkpoint import Checkpoint
from mxperts.checkpoint.safetensors_file import DTYPES
from mxperts.integrations.transformers import is_experts
from mxperts.integrations.transformers.layerwise import LayerwiseModel
from mxperts.quantization.calibration.layer import owners
from mxperts.quantization.calibration.projections import Projections
from mxperts.quantization.calibration.text import Calibration
from mxperts.quantization.edits import EditedCheckpoint
from mxperts.quantization.leaves import WEIGHT, Leaf


class SourceModel:
    """A checkpoint and its model.

    Args:
        checkpoint: the source.
        found: its linear layers by tensor.
        calibration: how the model is run.

    Attributes:
        checkpoint: the source.
        edits: how its tensors are read.
        model: the model; nothing is loaded.
        tensors: the checkpoint's tensors by layer; by None, those outside of layers.
        leaves: the linear layers in these.
    """

    def __init__(self, checkpoint: Checkpoint, found: Mapping[str, Sequence[Leaf]], calibration: Calibration) -> None:
        self.checkpoint, self._calibration, self._dtype = checkpoint, calibration, _dtype(found)
        self.edits = EditedCheckpoint(checkpoint, found)
        self.renew()
        self.tensors: dict[int | None, list[str]] = {i: [] for i in (*range(len(self.model.layers)), None)}
        for name in checkpoint.tensors:
            self.tensors[self.model.layer_of(name)].append(name)
        self.leaves = {i: [leaf for name in names for leaf in found[name]] for i, names in self.tensors.items()}

    def renew(self) -> None:
        """Begin again with a model of which nothing is loaded and nothing dropped."""
        self.model = LayerwiseModel(
            self.checkpoint.path,
            dtype=self._dtype,
            device=torch.device(self._calibration.device),
            trust_remote_code=self._calibration.trust_remote_code,
        )

    def load_rest(self) -> None:
        """Load embeddings, and all else outside of decoder layers that the model needs to call these."""
        self.model.load({name: self.edits.tensor(name) for name in self.tensors[None]})

    def load_layer(self, index: int, projections: Projections) -> None:
        """Load a decoder layer but for experts of which any is to be quantised: these are read one by one."""
        experts = tuple(
            f"{name}."
            for name in owners(self.model, self.leaves[index], projections)
            if is_experts(self.model.model.get_submodule(name))
        )
        names = [name for name in self.tensors[index] if not self.model.target(name).startswith(experts)]
        self.model.load_layer(index, {name: self.edits.tensor(name) for name in names}, without=experts)

    def drop_layer(self, index: int) -> None:
        """Free a layer's memory for good."""
        self.model.drop_layer(index)
        self.checkpoint.close()  # or the mapped pages of all files would count as this process's memory


def _dtype(found: Mapping[str, Sequence[Leaf]]) -> torch.dtype:
    """That of most linear layers."""
    sizes: dict[torch.dtype, int] = {}
    for leaf in (leaf for group in found.values() for leaf in group if leaf.part == WEIGHT):
        dtype = DTYPES[leaf.source.dtype]
        sizes[dtype] = sizes.get(dtype, 0) + leaf.shape[0] * leaf.shape[1]
    return max(sizes, key=lambda dtype: sizes[dtype])
