"""Which linear layers of a decoder layer read the same input, and in which order they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxperts.errors import ArgumentError
from mxperts.integrations.transformers import is_experts


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in a decoder layer where one input is read.

    Attributes:
        modules: the linear layers that read it, or an experts module.
        is_experts: which of the two.
    """

    modules: tuple[str, ...]
    is_experts: bool


class Stop(Exception):
    """Ends a forward pass when all that it was for has been seen."""


def find_sites(modules: Mapping[str, nn.Module], forward: Callable[[], None]) -> list[Site]:
    """The sites of a decoder layer in the order in which they are reached.

    Args:
        modules: linear layers and experts modules by name. The latter need no weights: they give NaN.
        forward: runs the decoder layer on a part of the text.

    Returns:
        Modules that are not called are in none.

    Raises:
        ArgumentError: a linear layer reads what experts have computed.
    """
    seen: dict[str, Tensor] = {}  # all are kept until the end, or memory of one might be used again for another
    with seeing(modules, lambda name, x, *args: seen.setdefault(name, x)):
        forward()
    found: dict[Any, list[str]] = {}
    for name, x in seen.items():
        if is_experts(modules[name]):
            found[name] = [name]
        elif x.isnan().any():
            raise ArgumentError(
                f"{name} reads what experts compute, or NaN: it cannot be calibrated; exclude it, or take --method rtn"
            )
        else:
            found.setdefault((x.data_ptr(), x.shape[-1], x.numel()), []).append(name)
    return [Site(modules=tuple(names), is_experts=is_experts(modules[names[0]])) for names in found.values()]


def _nan(hidden_states: Tensor) -> Tensor:
    return torch.full_like(hidden_states, torch.nan)


@contextmanager
def seeing(
    modules: Mapping[str, nn.Module], see: Callable[..., object], give: Callable[[Tensor], Tensor] = _nan
) -> Iterator[None]:
    """Have ``see`` called with a module's name and what it is called with, while this lasts.

    Experts give what ``give`` makes of their hidden states instead of what they would compute: NaN by default.
    """

    def stand_in(name: str) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            see(name, hidden_states, *args, *kwargs.values())
            return give(hidden_states)

        return forward

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(name, *args)

        return before

    handles = []
    for name, module in modules.items():
        if is_experts(module):
            module.forward = stand_in(name)
        else:
            handles.append(module.register_forward_pre_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            if is_experts(module):
                del module.forward
