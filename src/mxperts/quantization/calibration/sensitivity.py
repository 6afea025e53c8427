"""How much each part of a model suffers in each format, measured on the text, and which format it gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mxperts.checkpoint.safetensors_file import replacing
from mxperts.errors import ArgumentError
from mxperts.formats import FP8_STATIC, MXFP4, MXFP6_E2M3, MXFP8_E4M3, BlockFormat, Scheme
from mxperts.ops.quantize import quantize
from mxperts.quantization.calibration.experts import experts_of
from mxperts.quantization.calibration.layer import Texts, forward, own_forward, owners, route, run_to, sites_of
from mxperts.quantization.calibration.moments import Moments
from mxperts.quantization.calibration.projections import Projections
from mxperts.quantization.calibration.sites import seeing
from mxperts.quantization.calibration.source import SourceModel
from mxperts.quantization.calibration.states import HiddenStates, mapped
from mxperts.quantization.leaves import WEIGHT, Leaf
from mxperts.quantization.methods.error import output_error
from mxperts.quantization.methods.mixed import allocate

CANDIDATES = (MXFP4, MXFP6_E2M3, MXFP8_E4M3)
"""Formats that a part of a model may get."""
_COSTS = "costs.json"


@dataclass(kw_only=True)
class Group:
    """Linear layers that get one format: all experts of a layer, or those that read one input.

    Other software fuses these, and can run them in one format only.

    Attributes:
        modules: their names.
        values: number of weights.
        sizes: bytes of codes and scales in every candidate.
        noise: in every candidate, the error of the outputs of its projections, relative to the outputs, summed up.
    """

    modules: list[str] = field(default_factory=list)
    values: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, leaves: Iterable[Leaf], candidates: Iterable[Scheme]) -> None:
        """Add linear layers."""
        for leaf in leaves:
            rows, k = leaf.shape
            self.modules.append(leaf.module)
            self.values += rows * k
            for scheme in candidates:
                size = rows * nbytes(k, scheme.weight)
                self.sizes[scheme.name] = self.sizes.get(scheme.name, 0) + size


def nbytes(k: int, fmt: BlockFormat | None) -> int:
    """Bytes of the codes and scales of a row of K weights."""
    assert fmt is not None
    return fmt.stored_size(k) + fmt.blocks(k)


def check_bits(bits: float, scheme: Scheme, leaves: Iterable[Leaf]) -> None:
    """Check, before anything is measured, that so few bits are possible.

    Raises:
        ArgumentError: they are not, or the scheme is none that can be mixed.
    """
    if scheme.weight is None or scheme.activation == FP8_STATIC:
        raise ArgumentError(
            f"bits chooses among formats of weights, with the activation format of {scheme}: not possible"
        )
    shapes = [leaf.shape for leaf in leaves]
    values = sum(rows * k for rows, k in shapes)
    least, most = (8 * sum(rows * nbytes(k, fmt) for rows, k in shapes) / max(values, 1) for fmt in CANDIDATES[::2])
    if not least <= bits <= most:
        raise ArgumentError(
            f"bits must be between {least:.4g} and {most:.4g} for this model, scales included, not {bits}"
        )


class Sensitivity:
    """Measures a model layer by layer; what is measured is kept, so that an interrupted run goes on.

    Every part is measured in the unquantised model.

    Args:
        source: the unquantised model.
        ids: the text, int64 [windows, context].
        step: windows that run at a time.
        projections: reads weights; its scheme's activation format goes with every candidate.
        free: the linear layers that a format is to be chosen for.
        scratch: a folder for files.
        advance: told of every linear layer that is measured.
    """

    def __init__(
        self,
        source: SourceModel,
        ids: Tensor,
        step: int,
        projections: Projections,
        *,
        free: frozenset[str],
        scratch: Path,
        advance: Callable[[str], None],
    ) -> None:
        self._source, self._model, self._ids, self._step = source, source.model, ids, step
        self._projections, self._free, self._scratch, self._advance = projections, free, scratch, advance
        hidden = self._model.model.config.get_text_config().hidden_size
        self._states = HiddenStates(scratch, "measured", (*ids.shape, hidden), self._model.dtype)
        self._file = scratch / _COSTS
        self._costs: dict[str, dict[str, dict[str, object]]] = (
            json.loads(self._file.read_bytes()) if self._file.exists() else {}
        )

    def allocate(self, bits: float) -> dict[str, Scheme]:
        """Which scheme every linear layer gets, at ``bits`` a weight on average."""
        count = len(self._model.layers)
        if str(count - 1) not in self._costs:
            self._measure(count)
        groups = {name: Group(**group) for layer in self._costs.values() for name, group in layer.items()}  # type: ignore[arg-type]
        costs = {
            name: {Scheme(s): (group.sizes[s], group.noise[s]) for s in group.sizes} for name, group in groups.items()
        }
        chosen = allocate(costs, bits=bits, values={name: group.values for name, group in groups.items()})
        return {module: chosen[name] for name, group in groups.items() for module in group.modules}

    def _measure(self, count: int) -> None:
        self._source.load_rest()
        start = self._states.newest(count)
        if start is None:
            start = 0
            with self._states.writing(0) as entering:
                for ids, _, part in self._texts(self._ids).batches():
                    entering[part] = self._model.run(ids, 0, lambda embedded, *args, **kwargs: embedded).cpu()
        for index in range(start, count):
            self._source.load_layer(index, self._projections)
            leaving = self._layer(index, self._texts(self._states.entering(index)))
            if index + 1 < count:
                with self._states.writing(index + 1) as entering:
                    entering.copy_(leaving)
            self._source.drop_layer(index)

    def _texts(self, states: Tensor) -> Texts:
        return Texts(ids=self._ids, states=states, step=self._step)

    def _layer(self, index: int, texts: Texts) -> Tensor:
        """Measure a layer, and note it.

        Returns:
            What leaves it.
        """
        model, leaves = self._model, self._source.leaves[index]
        owned = owners(model, leaves, self._projections)
        groups: dict[str, Group] = {}
        outputs: dict[str, Tensor] = {}
        for site in sites_of(model, index, owned, texts):
            name = site.modules[0]
            if site.is_experts:
                groups[name], outputs[name] = self._experts(index, texts, name, owned[name])
            else:
                parts = [leaf for module in site.modules for leaf in owned[module] if leaf.part == WEIGHT]
                groups[name] = self._linears(index, texts, name, parts)
        leaving = self._run(index, texts, outputs)
        groups = {name: group for name, group in groups.items() if group.modules}
        gain = _energy(leaving, texts.states) / max(_energy(leaving), 1e-30)
        for group in groups.values():
            group.noise = {scheme: noise * gain for scheme, noise in group.noise.items()}
        self._costs[str(index)] = {name: vars(group) for name, group in groups.items()}
        with replacing(self._file) as f:
            f.write(json.dumps(self._costs).encode())
        return leaving

    def _candidates(self, leaf: Leaf) -> list[Scheme]:
        return [Scheme.of(fmt, self._projections.schemes[leaf.module].activation) for fmt in CANDIDATES]

    def _linears(self, index: int, texts: Texts, name: str, parts: Sequence[Leaf]) -> Group:
        """Linear layers that read one input."""
        quantised = [leaf for leaf in parts if leaf.module in self._free]
        group, noise = Group(), _Noise(self._projections)
        if quantised:
            candidates = self._candidates(quantised[0])
            group.add(quantised, candidates)
            noise.add(
                quantised,
                candidates,
                lambda moments: run_to(self._model, index, texts, name, lambda x, *args: moments.add(x)),
            )
            group.noise = noise.total()
        for leaf in quantised:
            self._advance(leaf.module)
        return group

    def _experts(self, index: int, texts: Texts, name: str, parts: Sequence[Leaf]) -> tuple[Group, Tensor]:
        """All experts of a layer, and what they give, float32 [T, H]."""
        module = self._model.model.get_submodule(name)
        routed = route(self._model, index, texts, name, self._scratch / "experts.tmp")
        outputs = torch.zeros(texts.ids.numel(), texts.states.shape[-1])
        group, first, second = Group(), _Noise(self._projections), _Noise(self._projections)
        for expert in experts_of(module, parts, routed, self._projections.unquantised()):
            for noise, leaves, feed in (
                (first, expert.first, expert.feed_first),
                (second, expert.second, expert.feed_second),
            ):
                quantised = [leaf for leaf in leaves if leaf.module in self._free]
                if quantised:
                    candidates = self._candidates(quantised[0])
                    group.add(quantised, candidates)
                    noise.add(quantised, candidates, feed)
                for leaf in quantised:
                    self._advance(leaf.module)
            expert.add_outputs(outputs)
            expert.weights.clear()
        routed.close()
        totals = [noise.total() for noise in (first, second)]
        group.noise = {name: sum(total.get(name, 0.0) for total in totals) for name in group.sizes}
        return group, outputs

    def _run(self, index: int, texts: Texts, outputs: Mapping[str, Tensor]) -> Tensor:
        """What leaves a layer, whose experts have given ``outputs``: [windows, context, H], in a file."""
        leaving = mapped(self._scratch / "leaving.tmp", texts.states.shape, texts.states.dtype)
        modules = {name: self._model.model.get_submodule(name) for name in outputs}
        at = dict.fromkeys(outputs, 0)
        given = ""

        def see(name: str, *args: object) -> None:
            nonlocal given
            given = name

        def give(hidden_states: Tensor) -> Tensor:
            start = at[given]
            at[given] += len(hidden_states)
            return outputs[given][start : at[given]].to(hidden_states)

        with seeing(modules, see, give):
            for ids, states, part in texts.batches():
                layer = own_forward(self._model, index)
                leaving[part] = forward(self._model, index, ids, states, layer).cpu()
        return leaving


class _Noise:
    """The squared errors of projections' outputs in every candidate, and the squares of the outputs."""

    def __init__(self, projections: Projections) -> None:
        self._projections = projections
        self._errors: dict[str, float] = {}
        self._energy = 0.0

    def add(self, leaves: Sequence[Leaf], candidates: Iterable[Scheme], feed: Callable[[Moments], None]) -> None:
        """Add linear layers that read the same input."""
        p = self._projections
        weight = torch.cat([p.numbers.rotated(p.values(leaf).to(p.device)) for leaf in leaves])
        schemes = list(candidates)
        moments = Moments(
            weight.shape[1], schemes[0].activation, None, p.device, rotation=p.numbers.rotation, clean=True
        )
        feed(moments)
        if not moments.rows:
            return
        inputs, total = moments.inputs(), float(moments.weight)
        clean = inputs.moment if inputs.clean is None else inputs.clean
        self._energy += total * float(((weight.float() @ clean) * weight).sum(dtype=torch.float64))
        for scheme in schemes:
            assert scheme.weight is not None
            rounded = quantize(weight, scheme.weight, preset=p.numbers.preset, scale_rule=p.numbers.scale_rule)
            error = total * max(output_error(weight, rounded, inputs), 0.0)
            self._errors[scheme.name] = self._errors.get(scheme.name, 0.0) + error

    def total(self) -> dict[str, float]:
        """The errors relative to the outputs."""
        return {scheme: error / max(self._energy, 1e-30) for scheme, error in self._errors.items()}


def _energy(states: Tensor, less: Tensor | None = None) -> float:
    """The sum of the squares of hidden states, or of what they are more than others."""
    total = 0.0
    for i, window in enumerate(states):
        wide = window.float() if less is None else window.float() - less[i].float()
        total += float(wide.square().sum(dtype=torch.float64))
    return total
