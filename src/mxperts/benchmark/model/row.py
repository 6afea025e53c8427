"""One line of a benchmark of models, and the table of them: rows as in llama-bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mxperts.benchmark.row import Status

HEADER = ["model", "scheme", "GB", "contender", "threads", "test", "tokens/s", "±", "n", "peak GB", "load s"]
HEADER += ["speed-up", "error"]
LEFT = 4
NOTE = (
    "ppN: processing a prompt of N tokens; tgN: generating N tokens one by one, from an empty context. tokens/s: mean "
    "of n runs ± standard deviation. GB: of the checkpoint's tensors. peak GB: most memory of the process while the "
    "contender was loaded and run. speed-up: over the first contender. error: of the logits of a few tokens against "
    "the first contender, relative rms, median of the tokens."
)


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One contender in one test of one model.

    Attributes:
        model, scheme: what was run.
        bytes: of the checkpoint's tensors.
        contender, version: its name, and the version of the software behind it if that is not mxperts.
        test: ``pp`` and the length of a prompt, or ``tg`` and the number of tokens generated.
        tokens: of a run; fewer than the test's name says where the time budget ended generation.
        threads, dtype, device: how it ran.
        status, note: whether it was timed, and if not, why.
        mean, deviation: tokens a second.
        median, p20, p80: the same.
        samples: runs.
        disturbed: whether other processes used the machine in every run.
        peak_bytes: of memory of the process, while the contender was there; None where the system does not tell.
        load_seconds: to load it.
        error, error_limit: of logits, as described in ``NOTE``; no error for the first contender, no limit for one that
            computes something else.
        speedup: mean over that of the first contender in the same test.
    """

    model: str
    scheme: str
    bytes: int
    contender: str
    version: str | None
    test: str
    tokens: int
    threads: int
    dtype: str
    device: str
    status: Status
    note: str
    mean: float | None
    deviation: float | None
    median: float | None
    p20: float | None
    p80: float | None
    samples: int
    disturbed: bool
    peak_bytes: int | None
    load_seconds: float | None
    error: float | None
    error_limit: float | None
    speedup: float | None

    def record(self) -> dict[str, Any]:
        """A flat dictionary of plain values, with the same keys for every row."""
        return {"benchmark": "model", **asdict(self), "status": self.status.value}


def model_table(rows: Sequence[ModelRow]) -> tuple[list[str], list[list[str]], str]:
    """Header, rows of text, and what to print below."""
    remarks = dict.fromkeys(f"{row.contender}: {row.status}: {row.note}" for row in rows if row.status is not Status.OK)
    if any(row.disturbed for row in rows):
        remarks["*: other processes used the machine all the time; take these rates for lower bounds."] = None
    for row in rows:
        if row.status is Status.OK and row.test != f"{row.test[:2]}{row.tokens}":
            remarks[f"{row.contender}, {row.test}: stopped after {row.tokens} tokens."] = None
    return HEADER, [_cells(row) for row in rows], "\n".join([NOTE, *remarks])


def _cells(row: ModelRow) -> list[str]:
    first = [row.model, row.scheme, f"{row.bytes / 1e9:.2f}", row.contender, str(row.threads), row.test]
    if row.mean is None or row.deviation is None:
        rates = [row.status.value, "", ""]
    else:
        rates = [f"{row.mean:.2f}" + ("*" if row.disturbed else ""), f"{row.deviation:.2f}", str(row.samples)]
    return [
        *first,
        *rates,
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}",
        "" if row.load_seconds is None else f"{row.load_seconds:.1f}",
        "" if row.speedup is None else f"{row.speedup:.2f}x",
        "" if row.error is None else f"{row.error:.1e}",
    ]
