"""One line of the benchmark of expert parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mxperts.benchmark.problem import Problem
from mxperts.benchmark.report import milliseconds
from mxperts.benchmark.row import Status

HEADER = ["shape", "tokens", "scheme", "processes", "exchange", "ms", "exchange ms", "n", "of one", "MB in", "MB out"]
HEADER += ["in/stock", "all/stock", "bits"]
LEFT = 5
NOTE = (
    "tokens: of each process. ms: median of n calls of the layer, each that of the slowest process; exchange ms: the "
    "same without the experts' work. of one: the time of one process alone with all experts and as many tokens, over "
    "ms. MB in, out: that all processes together send to others, hidden states to experts and results back; in/stock, "
    "all/stock: over what Transformers' exchange sends, of the former and of all. bits: whether they are those of one "
    "process; on cuda, both batch-invariant."
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one exchange at one problem.

    Attributes:
        median_ms, p20_ms, p80_ms, samples: of the layer.
        exchange_ms: median without the experts' work.
        one_ms: median of one process that has all experts.
        efficiency: ``one_ms`` over ``median_ms``.
        bytes_in, bytes_out, bytes_counts: that all processes send in a call: rows of hidden states, rows of results,
            and how many there are.
        stock_bytes_in, stock_bytes_out: of the same rows, in the dtype of hidden states.
        bit_equal: whether every process' result is that of one process, bit for bit.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    exchange_ms: float
    one_ms: float
    efficiency: float
    bytes_in: int
    bytes_out: int
    bytes_counts: int
    stock_bytes_in: int
    stock_bytes_out: int
    bit_equal: bool


@dataclass(frozen=True, kw_only=True)
class EPRow:
    """One exchange at one problem.

    Attributes:
        problem: of one process.
        processes, transport: how many there are, and what joins them.
        threads: of PyTorch, in each process.
        exchange: "mxperts" or "transformers".
        status, note: whether it was timed, and if not, why.
        measured: None unless ``status`` is ok.
    """

    problem: Problem
    processes: int
    transport: str
    threads: int
    exchange: str
    status: Status
    note: str
    measured: Measured | None

    def record(self) -> dict[str, Any]:
        """A flat dictionary of plain values, with the same keys for every row."""
        shape, problem = self.problem.shape, self.problem
        measured = asdict(self.measured) if self.measured else dict.fromkeys(Measured.__dataclass_fields__)
        return {
            "benchmark": "ep",
            "shape": shape.name,
            "experts": shape.experts,
            "top_k": shape.top_k,
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
            "tokens": problem.tokens,
            "scheme": problem.scheme.name,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "device": problem.device.partition(":")[0],
            "processes": self.processes,
            "transport": self.transport,
            "threads": self.threads,
            "seed": problem.seed,
            "exchange": self.exchange,
            "status": self.status.value,
            "note": self.note,
            **measured,
        }


def ep_table(rows: Sequence[EPRow]) -> tuple[list[str], list[list[str]], str]:
    """Header, rows of text, and what to print below."""
    notes = dict.fromkeys(f"{row.exchange}: {row.note}" for row in rows if row.note)
    return HEADER, [_cells(row) for row in rows], "\n".join([NOTE, *notes])


def _cells(row: EPRow) -> list[str]:
    problem, m = row.problem, row.measured
    cells = [problem.shape.name, str(problem.tokens), problem.scheme.name, str(row.processes), row.exchange]
    if m is None:
        return [*cells, row.status.value, *[""] * 8]
    stock = m.stock_bytes_in + m.stock_bytes_out
    return [
        *cells,
        milliseconds(m.median_ms),
        milliseconds(m.exchange_ms),
        str(m.samples),
        f"{m.efficiency:.0%}",
        f"{m.bytes_in / 1e6:.3f}",
        f"{m.bytes_out / 1e6:.3f}",
        f"{m.bytes_in / m.stock_bytes_in:.3f}" if m.stock_bytes_in else "",
        f"{(m.bytes_in + m.bytes_out) / stock:.3f}" if stock else "",
        "equal" if m.bit_equal else "differ",
    ]
