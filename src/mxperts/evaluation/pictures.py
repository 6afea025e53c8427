"""The pictures of a report, each drawn for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mxperts.evaluation.divergence import Divergence
from mxperts.evaluation.evaluate import Evaluation
from mxperts.evaluation.layers import LayerErrors
from mxperts.evaluation.plot import SIZE, draw_divergence, drawing, label
from mxperts.evaluation.report import Report

_WIDTH = 11.0
"""Of all pictures, in inches."""
_FEW = 20
"""Columns up to which the cells of a map have their values written in them."""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of lines and text, and of what is behind them."""

    ink: str
    paper: str


LIGHT = Theme(ink="#1f2328", paper="#ffffff")
DARK = Theme(ink="#e6e8eb", paper="#16181d")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that can be drawn.

    Attributes:
        name: for files and links.
        title: of its section.
        caption: what is to be seen, for all readers.
        alt: what it shows, for those who cannot see it.
        height: in inches.
        draw: draws it on a figure of matplotlib.
    """

    name: str
    title: str
    caption: str
    alt: str
    height: float
    draw: Callable[[Any], None]

    def png(self, theme: Theme) -> bytes:
        """The picture in a theme's colours; the same report gives the same bytes.

        Raises:
            MxpertsError: matplotlib is not installed.
        """
        figure_class = drawing()
        import matplotlib

        with matplotlib.rc_context(_style(theme)):
            figure = figure_class(figsize=(_WIDTH, self.height), layout="constrained")
            self.draw(figure)
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=120)
        return file.getvalue()


def _style(theme: Theme) -> dict[str, Any]:
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    return {**dict.fromkeys(ink, theme.ink), **dict.fromkeys(paper, theme.paper), "grid.color": theme.ink}


def pictures(report: Report) -> Iterator[Picture]:
    """What there is to see in a report."""
    compared = [(e, e.divergence) for e in report.rows if e.divergence is not None]
    if any(d.kl.value > 0 for _, d in compared):
        yield Picture(
            name="divergence",
            title="Divergence and size",
            caption="KL divergence from the base against bits a weight of the experts. Bars are one standard error; "
            "the green line joins the models that no other beats in both.",
            alt="Scatter plot of KL divergence against bits a weight; the scoreboard has the numbers.",
            height=SIZE[1],
            draw=lambda figure: draw_divergence(figure, report),
        )
        yield Picture(
            name="histogram",
            title="Divergence, token by token",
            caption="Share of tokens by their KL divergence, on a logarithmic axis: thick line the mean, thin line the "
            "99th percentile. What is far below the first percentile is left out.",
            alt="A histogram of KL divergence for each model; the table of percentiles has the numbers.",
            height=1.2 + 0.55 * len(compared),
            draw=lambda figure: _draw_histograms(figure, compared),
        )
    routed = [e for e, _ in compared if e.router_agreement]
    if routed:
        yield Picture(
            name="router",
            title="Router agreement by layer",
            caption="Of the experts that the base's routers choose, the share that the model's choose too, in percent.",
            alt="A map of router agreement, models by layers; the JSON output has the numbers.",
            height=1.4 + 0.35 * len(routed),
            draw=lambda figure: _draw_routers(figure, routed),
        )
    layers = [found for found in report.layers if _part_names(found)]
    if layers:
        rows = sum(len(_part_names(found)) for found in layers)
        yield Picture(
            name="layers",
            title="Error by layer and projection",
            caption="Relative error of each part's output, in percent. Left: given the base's input, so that errors do "
            "not add up. Right: with everything quantised.",
            alt="Maps of relative error, parts by layers, for each model; the table below has the numbers.",
            height=1.0 + 0.32 * rows + 0.75 * len(layers),
            draw=lambda figure: _draw_layers(figure, layers),
        )
    if report.base.load:
        yield Picture(
            name="load",
            title="Tokens by expert",
            caption="Tokens that each expert of the base gets, over what it would get if all had as many. Crosses are "
            "experts that no token was sent to.",
            alt="A map of the base's tokens by layer and expert; experts without tokens are named below.",
            height=1.4 + max(2.0, 0.3 * len(report.base.load)),
            draw=lambda figure: _draw_load(figure, report.base),
        )


def _draw_histograms(figure: Any, compared: Sequence[tuple[Evaluation, Divergence]]) -> None:
    all_axes = figure.subplots(len(compared), sharex=True, squeeze=False)[:, 0]
    for axes, (e, d) in zip(all_axes, compared, strict=True):
        shares = [n / e.tokens for n in d.kl_histogram.counts]
        axes.stairs(shares, d.kl_histogram.edges, fill=True, color="tab:blue", alpha=0.75)
        axes.axvline(d.kl.value, color="tab:orange", linewidth=2.5)
        axes.axvline(d.kl_percentiles[99.0].value, color="tab:orange", linewidth=1)
        axes.set_ylabel(label(e.name), rotation=0, ha="right", va="center", fontsize=9)
        axes.set_yticks([])
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    all_axes[0].set_xscale("log")
    lows, highs = ([p for _, d in compared if (p := d.kl_percentiles[q].value) > 0] for q in (1.0, 100.0))
    all_axes[0].set_xlim(min(lows, default=min(highs)) / 5, 2 * max(highs))
    all_axes[-1].set_xlabel("KL divergence from the base, nats a token")


def _draw_routers(figure: Any, rows: Sequence[Evaluation]) -> None:
    layers = list(rows[0].router_agreement or {})
    values = [[100 * (e.router_agreement or {})[layer] for layer in layers] for e in rows]
    axes = figure.add_subplot()
    shown = _map(axes, values, [label(e.name) for e in rows], [str(i) for i in range(len(layers))], digits=1)
    axes.set_xlabel("MoE layer")
    figure.colorbar(shown, ax=axes, label="agreement, %")


def _part_names(found: LayerErrors) -> list[str]:
    """The parts that are in decoder layers, in the order in which they come."""
    return list(dict.fromkeys(p.part for p in found.parts if p.layer is not None))


def _draw_layers(figure: Any, layers: Sequence[LayerErrors]) -> None:
    from matplotlib.colors import LogNorm

    errors = [e for found in layers for p in found.parts for e in (p.own, p.accumulated) if e and e == e]
    norm = LogNorm(100 * min(errors, default=0.01), 100 * max(errors, default=1.0))
    heights = [len(_part_names(found)) + 1.5 for found in layers]
    grid = figure.subplots(len(layers), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (own, accumulated), found in zip(grid, layers, strict=True):
        names = _part_names(found)
        numbers = sorted({p.layer for p in found.parts if p.layer is not None})
        for axes, title, attribute in ((own, "own error", "own"), (accumulated, "accumulated", "accumulated")):
            by_place = {(p.part, p.layer): getattr(p, attribute) for p in found.parts}
            parts = [name for name in names if any(by_place.get((name, n)) is not None for n in numbers)]
            cells = [[by_place.get((name, n)) for n in numbers] for name in parts]
            percent = [[float("nan") if not v else 100 * v for v in row] for row in cells]
            shown = _map(axes, percent, parts, [str(n) for n in numbers], digits=1, norm=norm, columns=_FEW // 2)
            axes.set_title(f"{label(found.name)}: {title}", fontsize=10)
    bar = {"location": "top", "fraction": 0.2 / figure.get_figheight(), "shrink": 0.5, "aspect": 40}
    figure.colorbar(shown, ax=grid, label="relative error, %", **bar)
    figure.supxlabel("decoder layer", fontsize=10)


def _draw_load(figure: Any, base: Evaluation) -> None:
    loads = list(base.load.values())
    experts = max(map(len, loads))
    shares = [
        [n * len(load) / max(sum(load), 1) for n in load] + [float("nan")] * (experts - len(load)) for load in loads
    ]
    axes = figure.add_subplot()
    shown = _map(axes, shares, [str(i) for i in range(len(loads))], [str(e) for e in range(experts)], digits=1)
    dead = [(e, i) for i, load in enumerate(loads) for e, n in enumerate(load) if n == 0]
    if dead:
        axes.scatter(*zip(*dead, strict=True), marker="x", color="red")
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    figure.colorbar(shown, ax=axes, label="tokens, 1 = even")


def _map(
    axes: Any,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns_: Sequence[str],
    *,
    digits: int,
    norm: Any = None,
    columns: int = _FEW,
) -> Any:
    """Cells in colour, with their values written in them if there are few; NaN cells are empty."""
    shown = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    step = max(1, len(columns_) // 24)
    axes.set_xticks(range(0, len(columns_), step), columns_[::step], fontsize=8)
    axes.spines[:].set_visible(False)
    if len(columns_) <= columns:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:
                    dark = shown.norm(value) < 0.6
                    text = f"{value:.{digits}f}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    return shown
