"""A report as one HTML page that needs nothing else, and its pictures as files beside it."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from mxperts.checkpoint.safetensors_file import replacing
from mxperts.errors import ArgumentError
from mxperts.evaluation.evaluate import Evaluation
from mxperts.evaluation.pictures import DARK, LIGHT, Picture, pictures
from mxperts.evaluation.plot import drawing
from mxperts.evaluation.report import LAYER_NOTE, Report, with_error
from mxperts.evaluation.statistics import Estimate

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A table of the page; the first column is what a row is about.

    Attributes:
        caption: what it shows.
        header, rows: text.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def check_report_file(file: str | Path) -> None:
    """Find out before hours of work whether ``write_report`` will be able to write.

    Raises:
        ArgumentError: there is no such folder, or no permission to write there, or ``file`` is a folder.
        MxpertsError: matplotlib is not installed.
    """
    check_writable(Path(file))
    drawing()


def check_writable(file: Path) -> None:
    """Check that a file can be written, or replaced.

    Raises:
        ArgumentError: there is no such folder, or no permission to write there, or ``file`` is a folder.
    """
    if not file.parent.is_dir():
        raise ArgumentError(f"{file} cannot be written: there is no folder {file.parent}; make it first")
    if file.is_dir():
        raise ArgumentError(f"{file} cannot be written: it is a folder; name a file in it")
    if not os.access(file.parent, os.W_OK):
        raise ArgumentError(f"{file} cannot be written: no permission to write in {file.parent}")


def write_report(report: Report, file: str | Path) -> list[Path]:
    """Write a report as a self-contained page, and its pictures as PNG files beside it.

    The page is written last; it and each picture appear whole or not at all, and replace what has their name.

    Args:
        report: the evaluations.
        file: the page to write. The pictures of ``out.html`` are ``out-divergence.png`` and so on.

    Returns:
        The files: the page, then the pictures.

    Raises:
        ArgumentError, MxpertsError: as ``check_report_file``.
    """
    file = Path(file)
    check_report_file(file)
    drawn = [(picture, picture.png(LIGHT), picture.png(DARK)) for picture in pictures(report)]
    page = _page(report, drawn).encode()
    written = [file.with_name(f"{file.stem}-{picture.name}.png") for picture, _, _ in drawn]
    for name, (_, light, _) in zip(written, drawn, strict=True):
        with replacing(name) as f:
            f.write(light)
    with replacing(file) as f:
        f.write(page)
    return [file, *written]


def _page(report: Report, drawn: Sequence[tuple[Picture, bytes, bytes]]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": _text, "token": _token, "base64": lambda data: base64.b64encode(data).decode()}
    environment.filters["estimate"] = lambda cell: cell.partition(" ± ")[::2]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        compared=[e for e in report.rows if e.divergence is not None],
        scoreboard=_scoreboard(report),
        percentiles=_percentiles(report),
        layers=_layers(report),
        dead=_dead(report),
        pictures={picture.name: (picture, light, dark) for picture, light, dark in drawn},
        note=report.note,
        conditions=_flat(report.conditions),
    )


def _scoreboard(report: Report) -> _Table:
    header = ["model", "bits/weight experts", "bits/weight all", "size MB", "PPL", "ln ratio", "KLD", "Δp %"]
    header += ["RMS Δp %", "same top-1 %", "router %", "tokens/s"]
    rows = []
    for e in report.rows:
        d, agreement = e.divergence, e.mean_router_agreement
        cells = [e.name, f"{e.expert_bits:.2f}", f"{e.model_bits:.2f}", f"{e.size.model / 1e6:.2f}"]
        cells.append(with_error(e.perplexity))
        cells += (
            [""] * 5
            if d is None
            else [
                with_error(d.ln_ratio, sign="+"),
                with_error(d.kl),
                with_error(d.delta_p, scale=100, sign="+"),
                with_error(d.rms_delta_p, scale=100),
                with_error(d.same_top, scale=100),
            ]
        )
        cells.append("" if agreement is None else f"{100 * agreement:.2f}")
        rows.append([*cells, "" if e.tokens_per_second is None else f"{e.tokens_per_second:.0f}"])
    return _Table(caption=f"By KL divergence from {report.base.name}", header=header, rows=rows)


def _percentiles(report: Report) -> list[_Table]:
    tables = []
    for caption, name, scale in (
        ("KL divergence by percentile, nats a token", "kl_percentiles", 1.0),
        ("Δp by percentile, percent", "delta_p_percentiles", 100.0),
    ):
        found = [(e.name, getattr(e.divergence, name)) for e in report.rows if e.divergence is not None]
        if found:
            places = found[0][1]
            header = ["model", *({0.0: "min", 50.0: "median", 100.0: "max"}.get(p, f"{p:g} %") for p in places)]
            rows = [[row, *(_estimate(e, scale) for e in values.values())] for row, values in found]
            tables.append(_Table(caption=caption, header=header, rows=rows))
    return tables


def _estimate(e: Estimate, scale: float) -> str:
    """With its standard error, where that is known."""
    return f"{scale * e.value:.5g}" if math.isnan(e.stderr) else with_error(e, scale=scale)


def _layers(report: Report) -> _Table:
    header, rows = report.layer_table()
    return _Table(caption=LAYER_NOTE, header=header, rows=rows)


def _dead(report: Report) -> list[tuple[str, str]]:
    """Models with experts that no token was sent to, and which these are."""
    return [(e.name, _named(e)) for e in report.rows if e.dead_experts]


def _named(e: Evaluation) -> str:
    return "; ".join(f"{layer}: {', '.join(map(str, experts))}" for layer, experts in e.dead_experts.items())


def _flat(conditions: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """What the figures depend on, one line each."""
    lines = []
    for name, value in conditions.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{name}.")
        else:
            lines.append((prefix + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return lines


def _text(text: str) -> str:
    """A text without what browsers do not show."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def _token(text: str) -> str:
    """A token with its blanks made visible."""
    return _text(text).replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "∅"
