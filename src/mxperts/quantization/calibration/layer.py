"""Quantising one decoder layer, its linear layers in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mxperts.integrations.transformers import is_experts
from mxperts.integrations.transformers.layerwise import LayerwiseModel
from mxperts.nn import MXLinear
from mxperts.quantization.calibration.experts import Expert, RoutedTokens, quantize_experts
from mxperts.quantization.calibration.moments import Moments
from mxperts.quantization.calibration.projections import Projections, Readers
from mxperts.quantization.calibration.sites import Site, Stop, find_sites, seeing
from mxperts.quantization.leaves import WEIGHT, Leaf
from mxperts.tensor import MXTensor

Done = Callable[[str, MXTensor, bool], None]
"""Told of a linear layer that is quantised: its name, its weight, and whether too few inputs came to it."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The calibration text on its way through the model.

    Attributes:
        ids: int64 [windows, context].
        states: what enters the layer at hand, [windows, context, H].
        step: windows that run at a time.
    """

    ids: Tensor
    states: Tensor
    step: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Ids, hidden states, and which windows they are."""
        for start in range(0, len(self.ids), self.step):
            part = slice(start, start + self.step)
            yield self.ids[part], self.states[part], part


def forward(model: LayerwiseModel, index: int, ids: Tensor, states: Tensor, layer: Callable[..., Any]) -> Tensor:
    """What a decoder layer gives for these hidden states, called as the model calls it."""

    def run(embedded: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = layer(states.to(embedded.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    return model.run(ids, index, run)


def quantize_layer(
    model: LayerwiseModel,
    index: int,
    leaves: Sequence[Leaf],
    texts: Texts,
    projections: Projections,
    scratch: Path,
    smooth: Callable[[Expert], None] | None,
    done: Done,
) -> None:
    """Quantise what is to be quantised of a decoder layer that is loaded but for experts that are to be quantised.

    Every input is that which the quantised model will see: a linear layer that is quantised is run quantised from then
    on.

    Args:
        model: the unquantised model.
        index: of the layer.
        leaves: the layer's weights and biases.
        texts: the text, and what enters the layer.
        projections: how to quantise.
        scratch: a folder for files.
        smooth: called with every expert before it is quantised.
        done: told of every linear layer that is quantised.
    """
    owned = owners(model, leaves, projections)
    for site in sites_of(model, index, owned, texts):
        if site.is_experts:
            (name,) = site.modules
            routed = route(model, index, texts, name, scratch / "experts.tmp")
            quantize_experts(model.model.get_submodule(name), owned[name], routed, projections, smooth, done)
            routed.close()
        else:
            quantize_linears(model, index, texts, site, owned, projections, done)


def sites_of(model: LayerwiseModel, index: int, owned: Iterable[str], texts: Texts) -> list[Site]:
    """Where a decoder layer's modules of these names read their inputs, in the order in which they run."""
    modules = {name: model.model.get_submodule(name) for name in owned}

    def forward_first() -> None:
        ids, states, _ = next(texts.batches())
        forward(model, index, ids, states, own_forward(model, index))

    return find_sites(modules, forward_first)


def own_forward(model: LayerwiseModel, index: int) -> Callable[..., Any]:
    """A decoder layer's own forward; ``model.run`` puts another in its place. After the last comes none."""
    if index == len(model.layers):
        return lambda hidden_states, *args, **kwargs: hidden_states
    layer = model.layers[index]
    return lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)


def owners(model: LayerwiseModel, leaves: Sequence[Leaf], projections: Projections) -> dict[str, list[Leaf]]:
    """The linear layers and experts modules that have anything to quantise, with all their weights and biases."""
    found: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        name = model.target(leaf.source.name).rpartition(".")[0]
        found.setdefault(name, []).append(leaf)

    def quantised(name: str) -> bool:
        module = _submodule(model.model, name)
        known = module is not None and (is_experts(module) or isinstance(module, nn.Linear | MXLinear))
        return known and any(projections.schemes[leaf.module].weight is not None for leaf in found[name])

    return {name: group for name, group in found.items() if quantised(name)}


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None  # part of the checkpoint, but not of the model that Transformers runs


def run_to(model: LayerwiseModel, index: int, texts: Texts, name: str, see: Callable[..., object]) -> None:
    """Run a decoder layer on all of the text up to one of its modules."""

    def stop(name: str, *args: Any) -> None:
        see(*args)
        raise Stop

    with seeing({name: model.model.get_submodule(name)}, stop):
        for ids, states, _ in texts.batches():
            try:
                forward(model, index, ids, states, own_forward(model, index))
            except Stop:
                continue


def route(model: LayerwiseModel, index: int, texts: Texts, name: str, file: Path) -> RoutedTokens:
    """Run a decoder layer on all of the text up to its experts module of this name; keep what that is called with."""
    module: Any = model.model.get_submodule(name)
    tokens, hidden = texts.ids.numel(), texts.states.shape[-1]
    routed = RoutedTokens(file, tokens, hidden, texts.states.dtype)
    run_to(model, index, texts, name, routed.add)
    routed.finish(module.num_experts)
    return routed


def quantize_linears(
    model: LayerwiseModel,
    index: int,
    texts: Texts,
    site: Site,
    owned: Mapping[str, Sequence[Leaf]],
    projections: Projections,
    done: Done,
) -> None:
    """Quantise the linear layers of a site of a decoder layer; from then on they run quantised."""
    names = {leaf.module: name for name in site.modules for leaf in owned[name] if leaf.part == WEIGHT}
    leaves = [leaf for name in site.modules for leaf in owned[name] if leaf.part == WEIGHT]

    def feed(moments: Moments) -> None:
        run_to(model, index, texts, site.modules[0], lambda x, *args: moments.add(x))

    for leaf_name, (weight, short) in projections.quantize([Readers(leaves=leaves, feed=feed)]).items():
        linear = model.model.get_submodule(names[leaf_name])
        quantised = MXLinear.from_tensors(
            weight,
            linear.bias,
            activation=projections.schemes[leaf_name].activation,
            input_scale=projections.numbers.input_scales.get(leaf_name),
            rotation=projections.numbers.rotation,
            backend=projections.backend,
        )
        model.model.set_submodule(names[leaf_name], quantised)
        done(leaf_name, weight, short)
