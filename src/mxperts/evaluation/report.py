"""Evaluations as a table for people, as flat records and as one JSON document."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mxperts.evaluation.divergence import DELTA_P_PERCENTILES, PERCENTILES, Divergence
from mxperts.evaluation.evaluate import Evaluation
from mxperts.evaluation.layers import LayerErrors, PartError
from mxperts.evaluation.statistics import Estimate

NOTE = (
    "± is one standard error, tokens taken as independent. KLD: KL divergence from the first row, nats a token; "
    "ln ratio: ln of the perplexity over the first row's; Δp: change of the probability of the token that comes; "
    "router: share of the first row's experts chosen too."
)
"""What the columns of a comparison mean."""
LAYER_NOTE = (
    "Error of each part's output in percent of the base's: given the base's input → accumulated, with everything "
    "quantised."
)
"""What the columns of the table of layers mean."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The base and everything that was compared with it.

    Attributes:
        base: the first row.
        others: compared with it, in any order.
        conditions: what the figures depend on, such as versions, threads, model and text; JSON carries it.
        layers: where the errors come from, for models of which it was measured.
    """

    LEFT: ClassVar[int] = 1
    """Columns of the table that are text."""

    base: Evaluation
    others: Sequence[Evaluation]
    conditions: Mapping[str, Any]
    layers: Sequence[LayerErrors] = ()

    @property
    def rows(self) -> list[Evaluation]:
        """The base, then the others by increasing KL divergence."""
        return [self.base, *sorted(self.others, key=lambda e: e.divergence.kl.value if e.divergence else 0.0)]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text; all columns but the first ``LEFT`` are numbers."""
        header = ["scheme", "bits/weight", "experts MB", "PPL"]
        if self.others:
            header += ["ln ratio", "KLD", "KLD 99%", "RMS Δp %", "same top-1 %", "router %"]
        header.append("tokens/s")
        return header, [_row(e, compared=bool(self.others)) for e in self.rows]

    @property
    def note(self) -> str:
        """What the columns mean, to print below the table."""
        if not self.others:
            return ""
        rest = self.conditions.get("base_rest_mass", {}).get("mean")
        if not rest:
            return NOTE
        return (
            f"{NOTE} KLD is a lower bound: of the first row's distributions the {self.conditions['base_top_k']} most "
            f"likely tokens are known, and {100 * rest:.3g} % of the probability, on average, as one number."
        )

    def records(self) -> list[dict[str, Any]]:
        """One flat dictionary a row, all with the same keys: raw numbers, for CSV."""
        return [_record(e) for e in self.rows]

    def layer_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text of all layers' errors, a column for each part; the first two columns are text."""
        parts = list(dict.fromkeys(p.part for found in self.layers for p in found.parts))
        rows = []
        for found in self.layers:
            for number in dict.fromkeys(p.layer for p in found.parts):
                cells = {p.part: _own_and_accumulated(p) for p in found.parts if p.layer == number}
                layer = "outside" if number is None else str(number)
                rows.append([found.name, layer, *(cells.get(part, "") for part in parts)])
        return ["scheme", "layer", *parts], rows

    def layer_records(self) -> list[dict[str, Any]]:
        """One flat dictionary a part of a model: raw numbers, for CSV."""
        return [
            {"scheme": found.name, **_numbers(dataclasses.asdict(part))}
            for found in self.layers
            for part in found.parts
        ]

    def document(self) -> dict[str, Any]:
        """Everything, for JSON; what is not a number, such as the standard error of a maximum, is None."""
        rows, layers = [dataclasses.asdict(e) for e in self.rows], [dataclasses.asdict(e) for e in self.layers]
        found = {"conditions": dict(self.conditions), "rows": rows}
        document: dict[str, Any] = _numbers(found | ({"layers": layers} if layers else {}))
        return document


def _own_and_accumulated(part: PartError) -> str:
    own, accumulated = f"{100 * part.own:.2f}", part.accumulated
    return own if accumulated is None else f"{own} → {100 * accumulated:.2f}"


def _row(e: Evaluation, *, compared: bool) -> list[str]:
    cells = [e.name, f"{e.expert_bits:.2f}", f"{e.size.experts / 1e6:.2f}", with_error(e.perplexity)]
    if compared:
        cells += [""] * 6 if e.divergence is None else _divergence_cells(e.divergence, e.mean_router_agreement)
    return [*cells, "" if e.tokens_per_second is None else f"{e.tokens_per_second:.0f}"]


def _divergence_cells(d: Divergence, router: float | None) -> list[str]:
    return [
        with_error(d.ln_ratio, sign="+"),
        with_error(d.kl),
        f"{d.kl_percentiles[99.0].value:.4f}",
        with_error(d.rms_delta_p, scale=100),
        with_error(d.same_top, scale=100),
        "" if router is None else f"{router * 100:.2f}",
    ]


def with_error(e: Estimate, *, scale: float = 1, sign: str = "-") -> str:
    """``value ± error`` with two significant digits of the error, at most 8 decimals, and the value to the same."""
    value, error = e.value * scale, e.stderr * scale
    known = math.isfinite(error) and error > 0
    digits = min(8, max(0, 1 - math.floor(math.log10(error)))) if known else 4
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def _record(e: Evaluation) -> dict[str, Any]:
    d = e.divergence
    record: dict[str, Any] = {
        "scheme": e.name,
        "tokens": e.tokens,
        "expert_bits": e.expert_bits,
        "model_bits": e.model_bits,
        "expert_bytes": e.size.experts,
        "model_bytes": e.size.model,
    }
    estimates: dict[str, Estimate | None] = {"perplexity": e.perplexity}
    for name in ("ln_ratio", "kl", "delta_p", "rms_delta_p", "same_top"):
        estimates[name] = getattr(d, name) if d else None
    estimates |= {f"kl_{p:g}": d.kl_percentiles[p] if d else None for p in PERCENTILES}
    estimates |= {f"delta_p_{p:g}": d.delta_p_percentiles[p] if d else None for p in DELTA_P_PERCENTILES}
    for name, estimate in estimates.items():
        record[name] = estimate.value if estimate else None
        record[f"{name}_stderr"] = _numbers(estimate.stderr) if estimate else None
    return {
        **record,
        "router_agreement": e.mean_router_agreement,
        "seconds": e.seconds,
        "tokens_per_second": e.tokens_per_second,
    }


def _numbers(value: Any) -> Any:
    """The same with None for whatever is NaN or infinite, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _numbers(v) for key, v in value.items()}
    return [_numbers(v) for v in value] if isinstance(value, list | tuple) else value
