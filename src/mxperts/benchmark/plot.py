"""The figure: how near each contender comes to what the machine allows, by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mxperts.benchmark.row import LayerRow
from mxperts.errors import MxpertsError
from mxperts.evaluation.plot import drawing


def plot(rows: Sequence[LayerRow], file: str | Path) -> None:
    """Draw time against tokens, both logarithmic, one panel for each shape and scheme, with the bound as a dashed line.

    Args:
        rows: what ``bench_layer`` gave; those without times are left out.
        file: PNG, or whatever format matplotlib knows by the file's suffix.

    Raises:
        MxpertsError: matplotlib is not installed, or there is nothing to draw.
    """
    figure_class = drawing()
    timed = [(row, row.measured) for row in rows if row.measured is not None]
    panels = list(dict.fromkeys((row.problem.shape.name, row.problem.scheme.name) for row, _ in timed))
    if not panels:
        raise MxpertsError("nothing to draw: no contender was timed")
    figure = figure_class(figsize=(1 + 5 * len(panels), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (shape, scheme) in zip(axes, panels, strict=True):
        here = [(r, m) for r, m in timed if (r.problem.shape.name, r.problem.scheme.name) == (shape, scheme)]
        for contender in dict.fromkeys(row.contender for row, _ in here):
            points = [(row.problem.tokens, m) for row, m in here if row.contender == contender]
            tokens, ms = [t for t, _ in points], [m.median_ms for _, m in points]
            spread = [[m.median_ms - m.p20_ms for _, m in points], [m.p80_ms - m.median_ms for _, m in points]]
            panel.errorbar(tokens, ms, yerr=spread, marker="o", capsize=3, markersize=4, label=contender)
        bounds = sorted({row.problem.tokens: m.bound_ms for row, m in here}.items())
        panel.plot(*zip(*bounds, strict=True), linestyle="--", color="0.5", label="bound")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("tokens")
        panel.set_ylabel("ms a layer")
        panel.set_title(f"{shape}, {scheme}")
        panel.grid(which="both", alpha=0.25)
        panel.legend(fontsize=8)
    figure.savefig(file, dpi=150)
