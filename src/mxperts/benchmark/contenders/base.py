"""What takes part in a benchmark: something that can load the layers of a problem and run calls on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from mxperts.benchmark.inputs import Inputs, Weights
from mxperts.benchmark.problem import Problem
from mxperts.formats import MXFP4, Activation

Run = Callable[[int], Tensor]
"""Runs call ``i`` of the inputs on the layer of call ``i`` and returns [T, H]; it may return the same memory again."""
Bind = Callable[[Inputs], Run]
"""Makes a ``Run`` of inputs whose layers are loaded."""

BF16_LIMIT = 1e-2
"""Largest relative rms error of results that are rounded to bf16 where the contract says: twice in the layer, 2^-9 each
at most, and activations may round to another code after that."""


class Contender(ABC):
    """One way to run a layer.

    Attributes:
        name: in tables, and what options call it.
        limit: the largest relative rms error, against the reference, of a run that counts.
    """

    name: str
    limit: float = BF16_LIMIT

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, and what to do; None if it can."""
        return None

    def refuses(self, problem: Problem) -> str | None:
        """Why it cannot run a problem, as a phrase; None if it can."""
        return None

    def activation(self, problem: Problem) -> Activation:
        """The activation format in which the reference is to compute what this contender is compared with."""
        return problem.scheme.activation

    def copies(self, problem: Problem, copies: int, cache: int) -> int:
        """How many of the problem's ``copies`` it needs loaded; fewer where it has larger weights than packed ones."""
        return copies

    @abstractmethod
    def memory(self, problem: Problem, copies: int) -> int:
        """Bytes that it needs besides the inputs, for so many copies of the layer."""

    @abstractmethod
    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        """Bring weights into whatever form it wants. Takes as long as it takes: loading is not what is timed."""

    def version(self) -> str | None:
        """Version of the software behind it, if it is not mxperts itself."""
        return None

    def how(self, problem: Problem) -> str:
        """In a few words, how it runs a problem here, if it can say."""
        return ""


def needs_whole_blocks(problem: Problem) -> str | None:
    """Why a contender refuses a problem that takes no padding."""
    block = MXFP4.block_size
    if problem.shape.hidden % block or problem.shape.intermediate % block:
        return f"it needs H and I to be multiples of {block}"
    return None
