"""Transformers' expert parallelism with packed weights: our ``ep_implementation`` and what a model needs for it.

Needs transformers >= 5.23; importing this with an older one fails: see ``quantizer.expert_parallel``.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.expert_parallel import AutoEP, EPImplementation, EPImplementationInterface

from mxperts.distributed.exchange import Exchange, gather_shares, own_share
from mxperts.distributed.wire import Wire
from mxperts.errors import ArgumentError
from mxperts.integrations.transformers.experts import (
    Apart,
    ExpertsModule,
    Stacked,
    backend_of,
    expert_rows,
    is_experts,
    mx_experts,
    sums_of,
)
from mxperts.integrations.transformers.linear import StoredLinear

IMPLEMENTATION = "mxperts"
"""The name under which it is registered, as ``DistributedConfig.ep_implementation``."""


class MXExpertParallel(EPImplementation):  # type: ignore[misc]
    """Tokens travel to their experts in the activation format, results travel back unrounded: see ``Exchange``.

    Experts that are not packed are left to Transformers' own implementation.
    """

    def __init__(self, experts: ExpertsModule, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        packed = isinstance(getattr(experts, "mxperts", None), Stacked)
        self.stock = None if packed else AutoEP(experts, ep_mesh, tp_mesh)
        self._exchange = lru_cache(self._make_exchange)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output [T, H] for the tokens [T, H] that this process holds."""
        if self.stock is not None:
            stock: Tensor = self.stock(hidden_states, top_k_index, top_k_weights)
            return stock
        exchange, backend = self._exchange(hidden_states.device, hidden_states.dtype, hidden_states.shape[1])
        tokens, group = len(hidden_states), self.tp_mesh.get_group()
        share = own_share(group, tokens)
        y: Tensor = exchange(
            hidden_states[share],
            top_k_index[share],
            top_k_weights[share],
            lambda rows, expert: expert_rows(self.experts, rows, expert, exchange.sums),
            backend.load("sum_slots"),
        )
        y = y if group.size() == 1 else gather_shares(group, y, tokens)
        if hidden_states.requires_grad:
            mark: Any = _WithoutGradient.apply
            y = mark(hidden_states, y)
        return y

    def _make_exchange(self, device: torch.device, dtype: torch.dtype, hidden: int) -> Any:
        packed: Stacked = self.experts.mxperts
        backend = backend_of(self.experts, device, dtype)
        wire = Wire(
            hidden=hidden,
            dtype=dtype,
            activation=packed.activation if packed.rotation is None else None,  # it quantises what it has rotated
            input_scale=None if packed.input_scales is None else packed.input_scales[0],
            backend=packed.backend,
        )
        sums = sums_of(self.experts, backend)
        return Exchange(group=self.ep_mesh.get_group(), experts=self.num_local_experts, wire=wire, sums=sums), backend


class _WithoutGradient(torch.autograd.Function):
    """The second tensor, as a function of the first of which nobody knows the gradient: as ``fused_experts`` has it."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("packed experts have no autograd formula: they cannot be trained")


EPImplementationInterface.register(IMPLEMENTATION, MXExpertParallel)


def complete(config: DistributedConfig | dict[str, Any], model_config: PreTrainedConfig, **kwargs: Any) -> Any:
    """What ``load`` hands to Transformers: "auto" is our implementation, and an empty ``tp_plan`` replicates.

    Transformers 5.23 documents that an empty plan splits nothing but the experts, and refuses it.

    Args:
        config: as the caller gave it; it is not changed.
        model_config: of the model.
        **kwargs: for ``from_config``.

    Raises:
        ArgumentError: the model has no experts that can be spread.
    """
    given = DistributedConfig.from_dict(config) if isinstance(config, dict) else config
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(model_config, **kwargs)
    if given.ep_size > 1 and not model.ep_plan:
        raise ArgumentError(
            f"{type(model).__name__} has no experts that Transformers can spread over processes; load it in one"
        )
    changes: dict[str, Any] = {}
    if given.ep_implementation == "auto":
        changes["ep_implementation"] = IMPLEMENTATION
    if given.tp_size > 1 and given.tp_plan == {}:
        changes["tp_plan"] = dict.fromkeys(model.tp_plan or [model.base_model_prefix], "replicate")
    return dataclasses.replace(given, **changes)


def check(model: Any) -> None:
    """What is packed of a model must be such that it can be spread as its ``DistributedConfig`` asks.

    Raises:
        ArgumentError: it cannot.
    """
    config: DistributedConfig = model.config.distributed_config
    splits = config.tp_size > 1 and not _replicates(config.tp_plan)
    for name, module in model.named_modules():
        if is_experts(module) and config.ep_size > 1:
            _check_experts(name, module, config.ep_size)
        if isinstance(module, StoredLinear) and splits:
            raise ArgumentError(
                f"{name}: a linear layer with packed weights cannot be split by tensor parallelism; "
                "spread the experts alone, with tp_plan={} in DistributedConfig"
            )


def _replicates(plan: object) -> bool:
    """Whether a tensor-parallel plan splits nothing."""
    return isinstance(plan, dict) and set(plan.values()) <= {"replicate"}


def _check_experts(name: str, module: ExpertsModule, processes: int) -> None:
    if isinstance(getattr(module, "mxperts", None), Apart):
        raise ArgumentError(
            f"{name}: its experts differ in format; they cannot be spread over processes, load it in one"
        )
    if module.num_experts % processes:
        raise ArgumentError(
            f"{name}: {module.num_experts} experts cannot be spread evenly over {processes} processes; "
            f"take a number that divides {module.num_experts}"
        )


def keep_local(model: nn.Module) -> bool:
    """Make the part of each expert's parameter that this process has an ordinary parameter.

    Only so can a backend lay weights out in its own way, and so ``save_pretrained`` would write a part only: see
    ``MXQuantizer.is_serializable``. What FSDP manages, it moves itself: it stays as it is.

    Returns:
        Whether there was anything to do.
    """
    found = False
    for _, module in mx_experts(model):
        if hasattr(module, "unshard"):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                spread: Any = parameter
                local = nn.Parameter(spread.detach().to_local(), requires_grad=False)
                local._is_hf_initialized = True  # type: ignore[attr-defined]
                module.register_parameter(name, local)
                found = True
    return found
