"""How large the errors are that rounding makes in the outputs of linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mxperts.formats import Scheme
from mxperts.ops.quantize import quantize
from mxperts.quantization.calibration.moments import Moments
from mxperts.quantization.calibration.projections import Feed, Projections
from mxperts.quantization.leaves import Leaf
from mxperts.quantization.methods.error import output_error


class Noise:
    """The squared errors of projections' outputs in every candidate, and the squares of the outputs."""

    def __init__(self, projections: Projections) -> None:
        self._projections = projections
        self._errors: dict[str, float] = {}
        self._energy = 0.0

    def add(self, leaves: Sequence[Leaf], candidates: Iterable[Scheme], feed: Feed) -> None:
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


def energy(states: Tensor, less: Tensor | None = None) -> float:
    """The sum of the squares of hidden states, or of what they are more than others."""
    total = 0.0
    for i, window in enumerate(states):
        wide = window.float() if less is None else window.float() - less[i].float()
        total += float(wide.square().sum(dtype=torch.float64))
    return total
