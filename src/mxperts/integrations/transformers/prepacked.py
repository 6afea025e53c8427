"""Making a model ready for packed weights: its modules get the parameters that a quantised checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from mxperts.checkpoint.layout import ModelScheme
from mxperts.checkpoint.names import split_expert
from mxperts.checkpoint.safetensors_file import DTYPES, TensorInfo
from mxperts.checkpoint.stored import MXModule, mx_modules
from mxperts.errors import CheckpointError
from mxperts.formats import FP8_STATIC
from mxperts.integrations.transformers.experts import (
    Apart,
    ExpertsModule,
    PackedProjection,
    Stacked,
    is_experts,
    projection_shapes,
)
from mxperts.integrations.transformers.linear import StoredLinear
from mxperts.integrations.transformers.parameters import add_parameter, attribute, experts_component, merge_experts
from mxperts.integrations.transformers.unpacked import Unpacked, store_packed

UP_SPELLINGS = (("gate_proj", "up_proj"), ("w1", "w3"), ("gate_up_proj",), ("up_proj",))
"""How exporters name an expert's first projection: gate and up apart, or in one, or no gate at all."""
DOWN_SPELLINGS = (("down_proj",), ("w2",))


def prepare_for_packed(
    model: nn.Module, tensors: Mapping[str, TensorInfo], scheme: ModelScheme, backend: str
) -> list[WeightConverter]:
    """Give every module that the checkpoint stores quantised the parameters for it.

    Args:
        model: on the meta device, as Transformers builds it.
        tensors: the headers of the checkpoint's tensors.
        scheme: what its config says.
        backend: which backend will run it.

    Returns:
        The conversions from stored tensors to these parameters.

    Raises:
        CheckpointError: the checkpoint does not store what its config and the model call for.
    """
    return _Preparation(model, tensors, scheme, backend).run()


@dataclass(frozen=True, kw_only=True)
class _Projection:
    """One projection of an experts module, and how the checkpoint stores it.

    Attributes:
        parameter: the module's name of it.
        n, k: rows and columns in one expert.
        names: the exporter's projections that make it up: gate and up, or one.
        leaves: the checkpoint's names of these in every expert.
        quantized: what is stored for each leaf, or None where it is not quantised.
    """

    parameter: str
    n: int
    k: int
    names: tuple[str, ...]
    leaves: list[str]
    quantized: list[MXModule | None]


class _Preparation:
    def __init__(self, model: Any, tensors: Mapping[str, TensorInfo], scheme: ModelScheme, backend: str) -> None:
        self.model, self.tensors, self.scheme, self.backend = model, tensors, scheme, backend
        self.mx = mx_modules(tensors, scheme, model.config.to_dict())
        self.parameters = set(model.state_dict())
        self.stored = _stored_experts(tensors)
        self.renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
        self.converters: dict[tuple[str, ...], WeightConverter] = {}
        self.done: set[str] = set()  # names of the checkpoint's modules that are taken care of

    def run(self) -> list[WeightConverter]:
        for rule in self.scheme.rules:
            if rule.scheme.weight is None and rule.scheme.activation is not None:
                raise CheckpointError(f"the config quantises inputs of {rule.pattern} but no weights: not supported")
        one_by_one = {self.to_model(f"{name}.down_proj"): name for name in self.stored}
        fused = {self.to_model(name): name for name, m in self.mx.items() if len(m.shape) == 3}
        for path, module in list(self.model.named_modules()):
            if not is_experts(module):
                continue
            if name := one_by_one.get(f"{path}.down_proj"):
                self.prepare_experts(path, module, name)
            elif f"{path}.down_proj" in fused:
                self.prepare_fused(module, {p: fused.get(f"{path}.{p}", "") for p in projection_shapes(module)})
        self.prepare_others()
        return list(self.converters.values())

    def to_model(self, name: str) -> str:
        """The model's name of what the checkpoint calls ``name``: renamed, and the base model's prefix mended."""
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        prefix = f"{self.model.base_model_prefix}."
        if name not in self.parameters:
            if name.removeprefix(prefix) in self.parameters:
                return name.removeprefix(prefix)
            if prefix + name in self.parameters:
                return prefix + name
        return name

    def prepare_experts(self, path: str, module: ExpertsModule, experts: str) -> None:
        """Experts that are stored one by one: stacked where all have one format, kept apart otherwise."""
        stored = self.stored[experts]
        projections = []
        for (parameter, (n, k)), spellings in zip(
            projection_shapes(module).items(), (UP_SPELLINGS, DOWN_SPELLINGS), strict=True
        ):
            names = next((s for s in spellings if stored.issuperset(s)), None)
            if names is None:
                known = " or ".join("/".join(s) for s in spellings)
                raise CheckpointError(f"{experts}: expected projections {known}, found {', '.join(sorted(stored))}")
            leaves = [f"{experts}.{e}.{p}" for e in range(module.num_experts) for p in names]
            quantized = [self.mx.get(leaf) for leaf in leaves]
            for m in quantized:
                self.check_shape(m, n // len(names), k)
            self.done.update(leaves)
            projections.append(
                _Projection(parameter=parameter, n=n, k=k, names=names, leaves=leaves, quantized=quantized)
            )
        up, down = projections
        forms = {m and (m.scheme, m.block_rows) for m in (*up.quantized, *down.quantized)}
        if forms == {None}:
            return
        if len(forms) == 1:
            self.stack(path, module, up, down)
        else:
            self.keep_apart(module, experts, up, down)

    def stack(self, path: str, module: ExpertsModule, up: _Projection, down: _Projection) -> None:
        """One parameter [E, N, P] a projection, one [E, N, K/32] for its scales."""
        first = up.quantized[0]
        assert first is not None
        component = experts_component(self.model, path)
        module.mxperts = Stacked(
            up=self.pack_projection(module, component, up),
            down=self.pack_projection(module, component, down),
            activation=first.scheme.activation,
            interleaved=not module.is_concatenated and len(up.names) == 1,
            backend=self.backend,
            rotation=self.scheme.rotation,
        )

    def pack_projection(self, module: ExpertsModule, component: str, p: _Projection) -> PackedProjection:
        first = p.quantized[0]
        assert first is not None
        delattr(module, p.parameter)
        stored = [first.codes, first.scales]
        if first.scheme.activation == FP8_STATIC:
            stored.append(self.input_scale(first.name))
        names = []
        for info in stored:
            suffix = info.name.removeprefix(first.name)
            names.append(p.parameter + attribute(suffix))
            if len(info.shape) > 1:
                rows, *row = info.shape
                shape: tuple[int, ...] = (module.num_experts, rows * len(p.names), *row)
            else:  # a number for each of gate and up
                shape = (len(p.leaves), *info.shape)
            add_parameter(module, names[-1], shape, DTYPES[info.dtype])
            self.merge(component, p, suffix)
        if module.has_bias and f"{first.name}.bias" in self.tensors:
            self.merge(component, p, ".bias")
        return PackedProjection(
            format=first.format,
            k=p.k,
            codes=names[0],
            scales=names[1],
            block_rows=first.block_rows,
            parts=len(p.names),
        )

    def merge(self, component: str, p: _Projection, suffix: str) -> None:
        """Have one tensor of every expert stacked; layers that are stored alike share a conversion."""
        key = (component, *p.names, suffix)
        self.converters.setdefault(key, merge_experts(component, p.names, suffix, p.parameter))

    def keep_apart(self, module: ExpertsModule, experts: str, up: _Projection, down: _Projection) -> None:
        """Experts in several formats: one module of linear layers an expert, named as the checkpoint names them."""
        if self.to_model(f"{experts}.0") != f"{experts}.0":
            raise CheckpointError(
                f"{experts}: experts of one layer differ in format; that can be loaded only if the checkpoint names "
                f"them as the model does, {self.to_model(f'{experts}.0')}"
            )
        apart = [nn.Module() for _ in range(module.num_experts)]
        for p in (up, down):
            dtype = getattr(module, p.parameter).dtype
            delattr(module, p.parameter)
            if module.has_bias:
                delattr(module, f"{p.parameter}_bias")
            for index, (leaf, m) in enumerate(zip(p.leaves, p.quantized, strict=True)):
                expert, name = divmod(index, len(p.names))
                linear = nn.Linear(p.k, p.n // len(p.names), bias=module.has_bias, device="meta", dtype=dtype)
                apart[expert].add_module(p.names[name], linear if m is None else self.packed_linear(leaf, linear, m))
        for expert, linears in enumerate(apart):
            module.add_module(str(expert), linears)
        module.mxperts = Apart(up=up.names, down=down.names[0], backend=self.backend)
        module._is_hf_initialized = True

    def prepare_fused(self, module: ExpertsModule, stored: Mapping[str, str]) -> None:
        """gpt-oss: a projection of all experts is stored as one tensor, [E, N, K/32, 16].

        Args:
            module: the experts.
            stored: the checkpoint's name of each of its projections, or nothing.
        """
        packed = []
        for parameter, (n, k) in projection_shapes(module).items():
            m = self.mx.get(stored[parameter])
            if m is None or m.shape != (module.num_experts, n, k):
                found = "nothing" if m is None else f"{m.codes.name} {list(m.shape)}"
                raise CheckpointError(f"expected {parameter} of shape {[module.num_experts, n, k]}, found {found}")
            delattr(module, parameter)
            names = []
            for info in (m.codes, m.scales):
                names.append(parameter + info.name.removeprefix(m.name))
                add_parameter(module, names[-1], info.shape, DTYPES[info.dtype])
            packed.append(PackedProjection(format=m.format, k=k, codes=names[0], scales=names[1]))
            self.done.add(m.name)
        up, down = packed
        interleaved = not module.is_concatenated
        module.mxperts = Stacked(up=up, down=down, activation=None, interleaved=interleaved, backend=self.backend)

    def prepare_others(self) -> None:
        """Linear layers, and whatever else has a quantised weight, such as a router."""
        modules = dict(self.model.named_modules())
        for leaf, m in self.mx.items():
            path = self.to_model(f"{leaf}.weight").removesuffix(".weight")
            module = modules.get(path)
            if leaf in self.done or module is None:
                continue  # not part of the model: Transformers lists it as unexpected
            if type(module) is nn.Linear:
                self.model.set_submodule(path, self.packed_linear(leaf, module, m))
            else:
                self.packed_weight(leaf, module, m)
        self.check_linears(modules)

    def check_linears(self, modules: Mapping[str, nn.Module]) -> None:
        """No linear layer may be unquantised that the config quantises."""
        for name, info in self.tensors.items():
            leaf = name.removesuffix(".weight")
            if leaf == name or leaf in self.mx or leaf in self.done or self.scheme.scheme_of(leaf).weight is None:
                continue
            if type(modules.get(self.to_model(name).removesuffix(".weight"))) is nn.Linear:
                raise CheckpointError(
                    f"{info.file}: {name} is {info} without scales, but the config quantises {leaf} to "
                    f"{self.scheme.scheme_of(leaf)}"
                )

    def packed_linear(self, leaf: str, linear: nn.Linear, m: MXModule) -> StoredLinear:
        """A linear layer with the parameters that the checkpoint stores for it."""
        self.check_shape(m, linear.out_features, linear.in_features)
        input_scale = None
        if m.scheme.activation == FP8_STATIC:
            info = self.input_scale(leaf)
            input_scale = (info.shape, DTYPES[info.dtype])
        codes, scales = ((t.name.removeprefix(f"{leaf}."), t.shape, DTYPES[t.dtype]) for t in (m.codes, m.scales))
        return StoredLinear(
            linear,
            m.format,
            m.scheme.activation,
            codes=codes,
            scales=scales,
            block_rows=m.block_rows,
            input_scale=input_scale,
            rotation=self.scheme.rotation,
            backend=self.backend,
        )

    def packed_weight(self, leaf: str, module: nn.Module, m: MXModule) -> None:
        """Something else with a weight [N, K], such as a router."""
        if self.scheme.rotation is not None:
            raise CheckpointError(
                f"{leaf}: only linear layers and experts can be rotated, not a {type(module).__name__}"
            )
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or tuple(weight.shape) != m.shape:
            raise CheckpointError(f"{leaf}: a {type(module).__name__} has no weight of shape {list(m.shape)}")
        codes, scales = ((t.name.removeprefix(f"{leaf}."), t.shape, DTYPES[t.dtype]) for t in (m.codes, m.scales))
        store_packed(
            module,
            Unpacked(
                format=m.format,
                activation=m.scheme.activation,
                k=m.k,
                dtype=weight.dtype,
                codes=codes[0],
                scales=scales[0],
                block_rows=m.block_rows,
            ),
            codes[1:],
            scales[1:],
        )

    def input_scale(self, leaf: str) -> TensorInfo:
        """The stored scale of a static fp8 input."""
        return self.tensors[f"{leaf}{self.scheme.names.input_scale}"]

    def check_shape(self, m: MXModule | None, n: int, k: int) -> None:
        """What is stored for a module must have the shape that the model gives it."""
        if m is not None and m.shape != (n, k):
            raise CheckpointError(
                f"{m.codes.file}: {m.codes.name} is {m.codes}, a weight of shape {list(m.shape)} in {m.format}; "
                f"the model has one of shape {[n, k]}"
            )


def _stored_experts(tensors: Mapping[str, TensorInfo]) -> dict[str, set[str]]:
    """The projections of experts that are stored one by one, by the checkpoint's name of the experts."""
    found: dict[str, set[str]] = {}
    for name in tensors:
        module, _, tensor = name.rpartition(".")
        if tensor.startswith("weight") and (expert := split_expert(module)):
            found.setdefault(expert[0], set()).add(expert[2])
    return found
