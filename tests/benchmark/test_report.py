import json

import pytest

from mxperts.benchmark import report
from mxperts.benchmark.plot import plot
from mxperts.errors import MxpertsError


def test_the_table_has_times_or_a_reason(rows):
    header, cells, note = report.table(rows)
    assert header[: report.LEFT] == ["shape", "tokens", "scheme", "contender"]
    assert all(len(row) == len(header) for row in cells)
    of = {(row[1], row[3]): dict(zip(header, row, strict=True)) for row in cells}
    assert of["1", "dequantise-first"]["speed-up"] == "1.00x"
    assert float(of["3", "mxperts reference"]["ms"].removesuffix("*")) > 0
    assert of["1", "broken"]["ms"] == "wrong"
    assert of["1", "huge"]["ms"] == "skipped"
    assert "huge: skipped: needs " in note
    assert "broken: wrong: relative rms error" in note
    assert "This machine, on 1 threads: reads" in note


@pytest.mark.parametrize(("ms", "text"), [(0.12345, "0.123"), (1.2345, "1.234"), (12.345, "12.35"), (12345.6, "12346")])
def test_milliseconds_have_four_digits(ms, text):
    assert report.milliseconds(ms) == text


def test_saved_rows_are_lines_with_their_conditions(rows, tmp_path):
    file = tmp_path / "results.jsonl"
    found = report.conditions()
    for row in rows[:2]:
        report.save(file, [row.record()], found)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["contender"] for line in lines] == ["dequantise-first", "mxperts reference"]
    assert lines[0]["conditions"]["processor"]
    assert lines[0]["conditions"]["versions"]["torch"]
    assert lines[0]["median_ms"] == rows[0].measured.median_ms


def test_the_commit_is_that_of_the_source_or_none():
    found = report.commit()
    assert found is None or len(found.removesuffix("+")) == 40


def test_plot(rows, tmp_path):
    pytest.importorskip("matplotlib")
    plot(rows, tmp_path / "times.png")
    assert (tmp_path / "times.png").stat().st_size > 1000
    with pytest.raises(MxpertsError, match="nothing to draw"):
        plot(rows[2:4], tmp_path / "none.png")
