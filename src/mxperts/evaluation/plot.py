"""KL divergence against bits a weight: what a scheme costs, and what it buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mxperts.errors import FormatError, MxpertsError
from mxperts.evaluation.report import Report
from mxperts.formats import Scheme

SIZE = (11, 7)
"""Of the figure, in inches."""
_LINES = 40
"""Labels that fit above each other."""


def plot(report: Report, file: str | Path) -> None:
    """Draw every compared scheme: bits a weight across, KL divergence up (logarithmic), one standard error as a bar.

    Args:
        report: with at least one row besides the base. Rows whose divergence is 0 have no place on a logarithmic axis
            and are left out; the title says how many.
        file: PNG, or whatever format matplotlib knows by the file's suffix.

    Raises:
        MxpertsError: matplotlib is not installed, or there is nothing to draw.
    """
    figure = drawing()(figsize=SIZE, layout="constrained")
    draw_divergence(figure, report)
    figure.savefig(file, dpi=150)


def draw_divergence(figure: Any, report: Report) -> None:
    """What ``plot`` draws, on a figure of matplotlib.

    Raises:
        MxpertsError: there is nothing to draw.
    """
    compared = [(e, e.divergence.kl) for e in report.rows if e.divergence is not None]
    drawn = [(e, kl) for e, kl in compared if kl.value > 0]
    if not drawn:
        raise MxpertsError("nothing to draw: no model differs from the base")
    left_out = f", {len(compared) - len(drawn)} equal to it left out" if len(drawn) < len(compared) else ""

    axes = figure.add_subplot()
    front = _front([(e.expert_bits, kl.value) for e, kl in drawn])
    axes.plot(*zip(*front, strict=True), color="tab:green", linewidth=6, alpha=0.3, label="none better at fewer bits")
    for kind, (marker, colour) in _KINDS.items():
        series = [(e.expert_bits, kl) for e, kl in drawn if _kind(e.name) == kind]
        if series:
            bits, kls = [b for b, _ in series], [kl for _, kl in series]
            values, errors = [kl.value for kl in kls], [kl.stderr for kl in kls]
            axes.errorbar(bits, values, yerr=errors, fmt=marker, color=colour, capsize=3, markersize=5, label=kind)
    heights = _label_heights([(round(e.expert_bits, 1), kl.value) for e, kl in drawn])
    for (e, kl), height in zip(drawn, heights, strict=True):
        axes.annotate(
            label(e.name),
            (e.expert_bits, kl.value),
            xytext=(e.expert_bits + 0.15, height),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6},
        )
    all_bits = [e.expert_bits for e, _ in drawn]
    axes.set_yscale("log")
    axes.set_xlim(min(all_bits) - 0.3, max(all_bits) + 1.6)
    axes.set_ylim(min(heights) / 1.5, max(heights) * 1.5)
    axes.set_xlabel("bits a weight (experts, scales included)")
    axes.set_ylabel("KL divergence from the base, nats a token")
    axes.set_title(f"Divergence from {label(report.base.name)}, {report.base.tokens} tokens{left_out}")
    axes.grid(which="both", alpha=0.25)
    axes.legend()


def label(name: str) -> str:
    """A name as matplotlib writes it, which takes what is between dollars for a formula."""
    return name.replace("$", r"\$")


_KINDS = {
    "weights alone": ("o", "tab:blue"),
    "weights and activations": ("s", "tab:orange"),
    "checkpoint": ("D", "tab:purple"),
}
"""What the rows of a report are, with marker and colour."""


def _kind(name: str) -> str:
    """What a row is, as far as its name tells: a scheme's name says whether activations are quantised."""
    try:
        return "weights alone" if Scheme(name).activation is None else "weights and activations"
    except FormatError:
        return "checkpoint"


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bits, divergence) that no other beats in both."""
    front: list[tuple[float, float]] = []
    for bits, kl in sorted(points):
        if not front or kl < front[-1][1]:
            front.append((bits, kl))
    return front


def drawing() -> Any:
    """Matplotlib's ``Figure``; call it before hours of work that end in a drawing.

    Raises:
        MxpertsError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MxpertsError("drawing needs matplotlib; install it with: pip install 'mxperts[plot]'") from None
    return Figure


def _label_heights(points: Sequence[tuple[float, float]]) -> list[float]:
    """Where to write the labels of points (column, height), so that none covers another in its column.

    Labels that are too close form a stack, a line apart, whose centre is the mean of its points.
    """
    logs = [math.log10(height) for _, height in points]
    line = max(max(logs) - min(logs), 0.5) / _LINES
    heights = [0.0] * len(points)
    for column in {column for column, _ in points}:
        stacks: list[list[int]] = []
        for i in sorted((i for i, (c, _) in enumerate(points) if c == column), key=lambda i: logs[i]):
            stacks.append([i])
            while len(stacks) > 1 and _top(stacks[-2], logs, line) + line > _bottom(stacks[-1], logs, line):
                merged = stacks.pop()
                stacks[-1] += merged
        for stack in stacks:
            for position, i in enumerate(stack):
                heights[i] = 10 ** (_bottom(stack, logs, line) + position * line)
    return heights


def _bottom(stack: Sequence[int], logs: Sequence[float], line: float) -> float:
    return sum(logs[i] for i in stack) / len(stack) - (len(stack) - 1) / 2 * line


def _top(stack: Sequence[int], logs: Sequence[float], line: float) -> float:
    return _bottom(stack, logs, line) + (len(stack) - 1) * line
