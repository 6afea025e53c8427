"""How many bytes a model's weights take."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxperts.evaluation.router import experts_modules


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of a model in memory: parameters and buffers, whatever they are stored as; what is tied counts once.

    Parameters that a backend holds in a layout of its own count as what they stand for: the same, but for padding. The
    experts of a model that is spread over processes count wherever they are.

    Attributes:
        experts: of the experts modules alone.
        model: of the whole model.
    """

    experts: int
    model: int

    @classmethod
    def of(cls, model: nn.Module) -> Size:
        """Count."""
        modules = experts_modules(model).values()
        elsewhere = sum(_elsewhere(m) for m in modules) * (processes(model) - 1)
        experts = _nbytes(t for m in modules for t in _tensors(m))
        return cls(experts=experts + elsewhere, model=_nbytes(_tensors(model)) + elsewhere)


def values(model: Any) -> Size:
    """As ``Size.of``, but numbers of values instead of bytes, whatever the model's weights are stored as.

    They are counted in an unquantised model of the same class and configuration, which takes no memory.
    """
    with torch.device("meta"):
        unquantized = type(model)(copy.deepcopy(model.config))
    modules = experts_modules(unquantized).values()
    return Size(
        experts=sum(t.numel() for m in modules for t in m.parameters()),
        model=sum(t.numel() for t in unquantized.parameters()),
    )


def processes(model: Any) -> int:
    """Over how many processes the experts are spread."""
    config = getattr(model, "config", None)
    return int(getattr(getattr(config, "distributed_config", None), "ep_size", 1))


def _elsewhere(module: Any) -> int:
    """Bytes that each other process has of a module of which this one has a part; a DTensor tells all itself."""
    experts = [t for t in _tensors(module) if t.ndim > 0 and t.shape[0] == module.num_experts]
    return _nbytes(t for t in experts if not hasattr(t, "full_tensor"))


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): t.nbytes for t in tensors}.values())  # to ask for their addresses would bring values back
