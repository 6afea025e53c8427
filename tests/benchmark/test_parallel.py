"""The benchmark of experts over processes, in one process; several: docs/expert_parallel.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mxperts as mx
from mxperts.benchmark import Status, parse_shape
from mxperts.benchmark.parallel import Group, bench_ep, ep_table
from mxperts.cli import app
from mxperts.formats import Scheme


def test_rows_have_times_bytes_and_bits() -> None:
    schemes = [Scheme(s) for s in ("w4a16", "w4a4")]
    with Group("cpu") as group:
        found = list(bench_ep([parse_shape("4,2,64,64")], schemes, [1, 5], group, time_budget=0))
    assert [[row.exchange for row in rows] for rows in found] == [["mxperts", "transformers"]] * 4
    rows = [row for problem in found for row in problem]
    assert len({frozenset(row.record()) for row in rows}) == 1
    for ours, stock in found:
        assert ours.status is Status.OK
        assert ours.measured is not None
        assert ours.measured.bit_equal
        assert ours.measured.median_ms > 0
        assert (ours.measured.bytes_in, ours.measured.bytes_out) == (0, 0)  # nothing leaves the one process
        assert (ours.processes, ours.transport) == (1, "gloo")
        assert stock.status in (Status.OK, Status.SKIPPED)
    header, cells, _ = ep_table(rows)
    assert {len(row) for row in cells} == {len(header)}


def test_experts_that_cannot_be_spread_evenly_are_refused() -> None:
    with Group("cpu") as group:
        group.size = 3
        with pytest.raises(mx.ArgumentError, match="4 experts cannot be spread evenly over 3 processes"):
            next(bench_ep([parse_shape("4,2,64,64")], [Scheme("w4a4")], [1], group))


def test_the_command_saves_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = ["bench", "ep", "4,2,64,64", "--tokens", "2", "--schemes", "w4a4", "--time-budget", "0"]
    result = CliRunner().invoke(app, [*arguments, "--save", str(file), "--output", "json"])
    assert result.exit_code == 0, result.stderr
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["exchange"] for row in saved] == ["mxperts", "transformers"]
    assert json.loads(result.stdout)["rows"] == [{k: v for k, v in row.items() if k != "conditions"} for row in saved]
