"""Experts whose weights are held once, in a backend's own layout, behind parameters that look as they always do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mxperts.errors import BackendUnavailable, MxpertsError
from mxperts.formats import Activation, BlockFormat
from mxperts.ops.dispatch import explain
from mxperts.ops.prepare import PreparedExperts, Weight, prepare

_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size"),
    *("is_floating_point", "is_complex", "get_device", "requires_grad_"),
)
_PROPERTIES = (
    *("shape", "ndim", "dtype", "layout", "device", "itemsize", "nbytes"),
    *("is_cpu", "is_cuda", "is_meta", "is_sparse", "is_nested", "is_quantized"),
    *("requires_grad", "grad", "grad_fn", "is_leaf"),
)
_METADATA: frozenset[Any] = frozenset(
    [getattr(Tensor, name) for name in _METHODS] + [getattr(Tensor, name).__get__ for name in _PROPERTIES]
)
"""What can be asked of a tensor without looking at its values, as ``__torch_function__`` is told it."""


class PreparedParameter(nn.Parameter):
    """A parameter whose values a ``PreparedWeights`` holds: it has a shape, a dtype and a device, but no memory.

    Whatever asks for more, to read, write, convert, copy or save it, first makes it and those that were prepared with
    it the ordinary parameters again that they were: the same objects, the same values. So no other values than these
    are ever seen, and what is written is never lost.
    """

    _prepared: PreparedWeights

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> Any:
        """An ordinary parameter: what copies of this one are."""
        return nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of every function of a tensor."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, PreparedParameter):
                leaf._prepared.give_back()
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as what it stands for."""
        self._prepared.give_back()
        return self.__reduce_ex__(protocol)  # now that of its new class


class PreparedWeights:
    """The weights of an experts module in its backend's layout, instead of in its parameters.

    The memory of the parameters is released while they are held here: see ``PreparedParameter``. Copies of this object
    hold nothing, as the parameters of a copied module are ordinary ones.

    Attributes:
        experts: the weights; None while the parameters have them.
    """

    def __init__(self) -> None:
        self.experts: PreparedExperts | None = None
        # Weak, or it would take the garbage collector to free a module.
        self._parameters: list[weakref.ref[nn.Parameter]] = []
        self._in_use: dict[int, Tensor] = {}
        self._canonical: Callable[[PreparedExperts], Sequence[Tensor]] | None = None

    def of(
        self,
        module: nn.Module,
        names: Sequence[str],
        weights: Callable[[], tuple[Weight, Weight]],
        canonical: Callable[[PreparedExperts], Sequence[Tensor]],
        *,
        weight: BlockFormat | None,
        interleaved: bool,
        activation_format: Activation,
        dtype: torch.dtype,
        rotation: str | None,
        backend: str,
    ) -> PreparedExperts | None:
        """The weights of a module, prepared now if they are not yet, or no longer.

        Under torch.compile nothing is prepared, and it is not noticed if a parameter is replaced by another object.

        Args:
            module, names: whose parameters of these names hold the weights.
            weights: gives the weights from the parameters, as ``prepare`` takes them.
            canonical: gives the parameters' values from the prepared weights, but for their shapes. Must not refer to
                the module.
            weight: the format of the weights; None for dense ones.
            interleaved, activation_format, dtype, rotation, backend: as in ``prepare``.

        Returns:
            None where the module's parameters are what the backend wants, or are not the module's own to replace.

        Raises:
            BackendUnavailable: the named backend cannot run here, or memory is short; parameters are as before.
        """
        if torch.compiler.is_compiling():
            return self.experts
        if self.experts is not None:
            if backend in ("auto", self.experts.backend) and all(self._is_mine(module._parameters[n]) for n in names):
                return self.experts
            self.give_back()
        parameters = [p for name in names if _is_ordinary(p := module._parameters[name])]
        if len(parameters) < len(names) or not has_own_layout(
            device=parameters[0].device,
            dtype=dtype,
            weight=weight,
            activation_format=activation_format,
            rotation=rotation,
            backend=backend,
        ):
            return None
        with torch.inference_mode(False), torch.no_grad():
            # Views, and what DLPack shares, refer to the tensor itself; the latter to its memory by address.
            in_use = {i: p.data for i, p in enumerate(parameters) if p._use_count() > 1}  # type: ignore[attr-defined]
            gate_up_proj, down_proj = weights()
            try:
                experts = prepare(
                    gate_up_proj,
                    down_proj,
                    interleaved=interleaved,
                    activation_format=activation_format,
                    dtype=dtype,
                    rotation=rotation,
                    backend=backend,
                )
            except MxpertsError:
                raise
            except (MemoryError, OSError, RuntimeError) as error:  # how Python, the system and torch run out of memory
                raise BackendUnavailable(
                    f"preparing {type(module).__name__} for its backend failed: {str(error) or type(error).__name__}. "
                    "This takes the memory of one more layer for a moment; the weights are as they were"
                ) from error
            self._hold(experts, parameters, in_use, canonical)
        return experts

    def give_back(self) -> None:
        """Make the parameters hold their values again, and hold nothing here."""
        with torch.inference_mode(False), torch.no_grad():
            mine = [(i, p) for i, ref in enumerate(self._parameters) if (p := ref()) is not None and self._is_mine(p)]
            if mine and self.experts is not None and self._canonical is not None:
                values = self._canonical(self.experts)
                restored = [(p, self._in_use.get(i, values[i]).reshape(p.shape).contiguous()) for i, p in mine]
                for p, data in restored:  # nothing here can fail
                    _replace_data(p, data)
                    p.__class__ = nn.Parameter
                    p.__dict__.pop("_prepared", None)
        self.experts, self._parameters, self._in_use, self._canonical = None, [], {}, None

    def _hold(
        self,
        experts: PreparedExperts,
        parameters: Sequence[nn.Parameter],
        in_use: dict[int, Tensor],
        canonical: Callable[[PreparedExperts], Sequence[Tensor]],
    ) -> None:
        holes = [_hole(p) for p in parameters]
        self.experts, self._in_use, self._canonical = experts, in_use, canonical
        self._parameters = [weakref.ref(p) for p in parameters]
        for p, hole in zip(parameters, holes, strict=True):  # in this order: wherever it stops, values are there
            p._prepared = self  # type: ignore[attr-defined]
            p.__class__ = PreparedParameter
            _replace_data(p, hole)

    def _is_mine(self, parameter: Tensor | None) -> bool:
        return type(parameter) is PreparedParameter and parameter._prepared is self

    def __reduce__(self) -> tuple[type[PreparedWeights], tuple[()]]:
        return PreparedWeights, ()


def has_own_layout(
    *,
    device: torch.device,
    dtype: torch.dtype,
    weight: BlockFormat | None,
    activation_format: Activation,
    rotation: str | None,
    backend: str,
) -> bool:
    """Whether the backend that would run these experts lays weights out in another way than parameters do.

    Raises:
        BackendUnavailable: the named backend cannot run here.
    """
    choice = explain(
        device=device, dtype=dtype, weight=weight, activation=activation_format, rotation=rotation, backend=backend
    )
    return choice.backend.name != "reference"


def _is_ordinary(parameter: Tensor | None) -> TypeGuard[nn.Parameter]:
    """Whether a parameter has values, all of them: part of a distributed tensor is of another type."""
    return type(parameter) is nn.Parameter and not parameter.is_meta


def _replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        parameter.data = data


def _hole(like: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device whose memory is freed."""
    one = torch.empty(1, dtype=like.dtype, device=like.device)
    hole = one.expand(like.shape)
    one.untyped_storage().resize_(0)
    return hole
