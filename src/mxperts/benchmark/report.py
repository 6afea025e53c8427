"""Rows of benchmarks as a table for people, as flat records, as one JSON document and as lines of a file of results."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mxperts.benchmark.row import LayerRow, Status
from mxperts.evaluation.environment import environment

HEADER = ["shape", "tokens", "scheme", "contender", "ms", "p20", "p80", "n"]
HEADER += ["GB/s", "of stream", "GFLOP/s", "of bound", "speed-up", "error"]
LEFT = 4
NOTE = (
    "ms: median of n calls; p20, p80: percentiles. GB/s: packed weights of the active experts, and hidden states, over "
    "ms, whatever a contender reads; of stream: of the bandwidth measured in the same rounds. of bound: shortest time "
    "that bandwidth and bf16 matrix product allow, over ms. speed-up: over the first row of the problem. error: "
    "relative rms against the reference."
)

REPLAY_NOTE = (
    "Calls of different routings are recorded one after another in a CUDA graph: n counts replays, ms is the mean of a "
    "replay's calls."
)


def table(rows: Sequence[LayerRow]) -> tuple[list[str], list[list[str]], str]:
    """Header, rows of text, and what to print below."""
    measured = [row.measured for row in rows if row.measured is not None]
    notes = [NOTE]
    if measured:
        stream, matmul = _range(m.stream_gb_s for m in measured), _range(m.matmul_gflop_s for m in measured)
        where = f"on {rows[0].threads} threads"
        if (device := rows[0].problem.device) != "cpu":
            where = f"on {device}"
            notes.append(REPLAY_NOTE)
        notes.append(f"This machine, {where}: reads {stream} GB/s, multiplies {matmul} GFLOP/s.")
    remarks = dict.fromkeys(_remark(row) for row in rows if row.note)
    if any(m.disturbed for m in measured):
        remarks["*: other processes used the machine all the time; take these times for upper bounds."] = None
    return HEADER, [_cells(row) for row in rows], "\n".join([" ".join(notes), *remarks])


def _remark(row: LayerRow) -> str:
    return f"{row.contender}: " + (row.note if row.status is Status.OK else f"{row.status}: {row.note}")


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, high = (f"{value:.0f}" for value in (ordered[0], ordered[-1]))
    return low if low == high else f"{low} to {high}"


def _cells(row: LayerRow) -> list[str]:
    problem, m = row.problem, row.measured
    cells = [problem.shape.name, str(problem.tokens), problem.scheme.name, row.contender]
    error = "" if row.error is None else f"{row.error:.1e}"
    if m is None:
        return [*cells, row.status.value, *[""] * 8, error]
    decimals = 3 if problem.device == "cpu" else 4  # on an accelerator, a layer may take 20 microseconds
    return [
        *cells,
        milliseconds(m.median_ms, decimals) + ("*" if m.disturbed else ""),
        milliseconds(m.p20_ms, decimals),
        milliseconds(m.p80_ms, decimals),
        str(m.samples),
        f"{m.gb_s:.2f}",
        f"{m.stream_fraction:.0%}",
        f"{m.gflop_s:.1f}",
        f"{m.bound_fraction:.0%}",
        "" if m.speedup is None else f"{m.speedup:.2f}x",
        error,
    ]


def milliseconds(ms: float, decimals: int = 3) -> str:
    """As many significant digits as decimals, and one, at most ``decimals`` after the point."""
    return f"{ms:.{max(0, decimals + 1 - len(str(int(ms))))}f}"


def conditions(machine: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What figures depend on besides the problem: machine, versions, commit and time.

    Args:
        machine: what is known of the device besides.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {**environment(), **(machine or {}), "commit": commit(), "time": now}


def commit() -> str | None:
    """The commit that mxperts runs from, with ``+`` if files have changed since; None outside its own repository."""
    folder = Path(__file__).parent
    try:
        _git(folder, "ls-files", "--error-unmatch", "../errors.py")
        return f"{_git(folder, 'rev-parse', 'HEAD')}{'+' if _git(folder, 'status', '--porcelain', '..') else ''}"
    except (OSError, subprocess.CalledProcessError):
        return None


def save(file: Path, records: Iterable[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    """Append one JSON line a record, with the conditions in each."""
    with file.open("a", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps({**record, "conditions": dict(found)}, ensure_ascii=False) + "\n")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
