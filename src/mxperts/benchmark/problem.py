"""What is timed: one mixture-of-experts layer of given sizes, at a number of tokens, in a scheme."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mxperts.errors import ArgumentError
from mxperts.formats import Scheme
from mxperts.formats.naming import suggest

ROUTINGS = 16
"""Routings that are cycled through, each with hidden states of its own, so that calls read other experts."""
MAX_COPIES = 64
"""Most copies of a layer's weights."""
DEVICES = ("cpu", "cuda")
"""Kinds of devices that layers are timed on."""
ACTIVATIONS = ("silu", "swigluoai")
"""Activation functions of the models that are named here; all contenders know both or say that they do not."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the experts of a layer.

    Attributes:
        name: a model's, or the sizes themselves.
        experts, top_k, hidden, intermediate: E, k, H and I.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def values(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="gpt-oss-20b", experts=32, top_k=4, hidden=2880, intermediate=2880),
        Shape(name="gpt-oss-120b", experts=128, top_k=4, hidden=2880, intermediate=2880),
        Shape(name="qwen3-30b-a3b", experts=128, top_k=8, hidden=2048, intermediate=768),
        Shape(name="mixtral-8x7b", experts=8, top_k=2, hidden=4096, intermediate=14336),
        Shape(name="deepseek-v3", experts=256, top_k=8, hidden=7168, intermediate=2048),
        Shape(name="small", experts=8, top_k=2, hidden=1024, intermediate=2048),
    )
}
"""Layers that can be named."""


def parse_shape(text: str) -> Shape:
    """A shape from its name or from ``E,k,H,I``.

    Raises:
        ArgumentError: neither, or sizes that make no layer.
    """
    key = text.strip().lower()
    if key in SHAPES:
        return SHAPES[key]
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", key):
        raise ArgumentError(f"unknown shape {text!r}; give four sizes E,k,H,I, or a name: {suggest(key, list(SHAPES))}")
    sizes = [int(size) for size in key.split(",")]
    if len(sizes) != 4 or min(sizes) < 1 or sizes[1] > sizes[0]:
        raise ArgumentError(f"a shape has four sizes E,k,H,I above 0, with k at most E, not {text!r}")
    experts, top_k, hidden, intermediate = sizes
    name = ",".join(str(size) for size in sizes)
    return Shape(name=name, experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing to time.

    Attributes:
        shape: sizes of the layer.
        tokens: T, in one call.
        scheme: formats of weights and activations; the weights must have one.
        activation: the activation function, one of ``ACTIVATIONS``.
        dtype: of hidden states.
        seed: of everything random.
        device: where it runs: "cpu" or "cuda".

    Raises:
        ArgumentError: something that no contender could run.
    """

    shape: Shape
    tokens: int
    scheme: Scheme
    activation: str = "silu"
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ArgumentError(f"a problem has at least one token, not {self.tokens}")
        if self.scheme.weight is None:
            raise ArgumentError(f"scheme {self.scheme} leaves the weights unquantised; benchmarks need an MX format")
        if self.activation not in ACTIVATIONS:
            raise ArgumentError(
                f"unknown activation function {self.activation!r}; {suggest(self.activation, ACTIVATIONS)}"
            )
        check_device(self.device)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights of one copy of the layer, scales included."""
        fmt, shape = self.scheme.weight, self.shape
        assert fmt is not None, self.scheme
        rows = fmt.nbytes(2 * shape.intermediate, shape.hidden) + fmt.nbytes(shape.hidden, shape.intermediate)
        return shape.experts * rows

    @property
    def dense_bytes(self) -> int:
        """Bytes of one copy's weights in ``dtype``."""
        return self.shape.experts * self.shape.values * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.tokens} token{'s' * (self.tokens > 1)}, {self.scheme}"


def check_device(device: str, known: Sequence[str] = DEVICES) -> None:
    """Refuse devices that benchmarks do not run on.

    Args:
        device: such as "cpu", "cuda" or "cuda:1".
        known: kinds of devices that the benchmark at hand runs on.

    Raises:
        ArgumentError: the device is not there, or this version cannot time on it.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device {device!r} is not there: PyTorch {torch.__version__} sees no CUDA device")
    if kind not in known or (index and kind != "cuda"):
        kinds = " and ".join(f"'{kind}'" for kind in known)
        raise ArgumentError(f"these benchmarks run on {kinds} in this version, not on {device!r}")
    if index and not (index.isdigit() and int(index) < torch.cuda.device_count()):
        raise ArgumentError(f"device {device!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")


def copies_needed(layer_bytes: int, cache_bytes: int, factor: int = 8) -> int:
    """Copies of a layer to cycle through, so that its weights come from memory and not from a cache.

    Args:
        layer_bytes: of one copy.
        cache_bytes: of the last-level cache.
        factor: how many times the cache all copies together are to fill, within ``MAX_COPIES``.
    """
    return min(MAX_COPIES, max(1, -(-factor * cache_bytes // layer_bytes)))
