"""The linear layers in a checkpoint's tensors: mostly one each, but all experts of a layer may be in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from mxperts.checkpoint import Checkpoint, TensorNames
from mxperts.checkpoint.config import text_config
from mxperts.checkpoint.names import ALTERNATING, split_fused
from mxperts.checkpoint.safetensors_file import TensorInfo
from mxperts.errors import CheckpointError

WEIGHT, BIAS = ".weight", ".bias"


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A linear layer's weight or bias, and where it is.

    Attributes:
        module: the layer's name.
        part: ``.weight`` or ``.bias``.
        source: the tensor it is in.
        shape: of the weight or bias itself.
        view: cuts it out of the tensor.
    """

    module: str
    part: str
    source: TensorInfo
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor]


def leaves(checkpoint: Checkpoint, names: TensorNames) -> dict[str, list[Leaf]]:
    """The linear layers in every tensor, by the tensor's name; none in norms, embeddings of other ranks and the like.

    Args:
        checkpoint: the checkpoint.
        names: of the layout that is to be written, which says what an expert's gate and up are in it.

    Raises:
        CheckpointError: experts in one tensor have a shape that does not say how they lie in it.
    """
    return {name: list(_leaves(checkpoint, info, names)) for name, info in checkpoint.tensors.items()}


def _leaves(checkpoint: Checkpoint, info: TensorInfo, names: TensorNames) -> Iterator[Leaf]:
    module = info.name.removesuffix(WEIGHT)
    if module != info.name and len(info.shape) == 2:
        yield Leaf(module=module, part=WEIGHT, source=info, shape=info.shape, view=lambda t: t)
    elif (weight := split_fused(info.name)) is not None and len(info.shape) == 3:
        yield from _fused_weights(checkpoint, info, names, *weight)
    elif (bias := split_fused(info.name.removesuffix("_bias"))) is not None and len(info.shape) == 2:
        yield from _fused_biases(checkpoint, info, names, *bias)


def _fused_weights(
    checkpoint: Checkpoint, info: TensorInfo, names: TensorNames, experts: str, projection: str
) -> Iterator[Leaf]:
    transposed = _is_transposed(checkpoint, experts)
    count, n, k = info.shape if not transposed else (info.shape[0], info.shape[2], info.shape[1])
    for name, rows in _parts(checkpoint, names, projection, n).items():
        for e in range(count):

            def view(t: Tensor, e: int = e, rows: slice = rows) -> Tensor:
                return t[e].T[rows] if transposed else t[e][rows]

            shape = (len(range(n)[rows]), k)
            yield Leaf(module=f"{experts}.{e}.{name}", part=WEIGHT, source=info, shape=shape, view=view)


def _fused_biases(
    checkpoint: Checkpoint, info: TensorInfo, names: TensorNames, experts: str, projection: str
) -> Iterator[Leaf]:
    count, n = info.shape
    for name, rows in _parts(checkpoint, names, projection, n).items():
        for e in range(count):

            def view(t: Tensor, e: int = e, rows: slice = rows) -> Tensor:
                return t[e][rows]

            shape = (len(range(n)[rows]),)
            yield Leaf(module=f"{experts}.{e}.{name}", part=BIAS, source=info, shape=shape, view=view)


def _parts(checkpoint: Checkpoint, names: TensorNames, projection: str, rows: int) -> Mapping[str, slice]:
    """The linear layers that an expert's fused projection is split into, and their rows."""
    if projection != "gate_up_proj":
        return {projection: slice(rows)}
    if text_config(checkpoint.config).get("model_type") in ALTERNATING:
        return names.alternating
    return {"gate_proj": slice(rows // 2), "up_proj": slice(rows // 2, rows)}


def _is_transposed(checkpoint: Checkpoint, experts: str) -> bool:
    """Whether experts are stored [E, in, out]: the hidden size says so, and that gate and up are two of the down's."""
    hidden = text_config(checkpoint.config).get("hidden_size")
    found = [checkpoint.tensors.get(f"{experts}.{p}") for p in ("gate_up_proj", "down_proj")]
    if all(info is not None and len(info.shape) == 3 for info in found):
        (_, a, b), (_, c, d) = (info.shape for info in found if info is not None)
        if (b, c, 2 * d) == (hidden, hidden, a):
            return False
        if (a, d, 2 * c) == (hidden, hidden, b):
            return True
    raise CheckpointError(
        f"{experts}: gate_up_proj is {found[0]} and down_proj {found[1]}; expected [E, 2I, H] and [E, H, I], or "
        f"[E, H, 2I] and [E, I, H], with hidden_size H = {hidden}"
    )
