import pytest

from mxperts.benchmark import Status, bench_layer, choose, parse_shape
from mxperts.benchmark.problem import copies_needed
from mxperts.errors import ArgumentError
from mxperts.formats import Scheme


def test_each_problem_has_a_row_for_each_contender_the_baseline_first(rows):
    assert [(r.problem.tokens, r.contender) for r in rows] == [
        (tokens, contender)
        for tokens in (1, 3)
        for contender in ("dequantise-first", "mxperts reference", "broken", "huge")
    ]


def test_times_come_with_what_follows_from_them(rows):
    for row in rows:
        if row.status is not Status.OK:
            continue
        m = row.measured
        assert m.p20_ms <= m.median_ms <= m.p80_ms
        assert m.samples >= m.rounds >= 1
        assert m.gb_s == pytest.approx(row.work.bytes / m.median_ms / 1e6)
        assert m.gflop_s == pytest.approx(row.work.flops / m.median_ms / 1e6)
        assert m.bound_fraction == pytest.approx(m.bound_ms / m.median_ms)
        bytes_ms, flops_ms = row.work.bytes / m.stream_gb_s / 1e6, row.work.flops / m.matmul_gflop_s / 1e6
        assert m.bound_ms == pytest.approx(max(bytes_ms, flops_ms))
        assert m.stream_fraction > 0


def test_speed_ups_refer_to_the_baseline(rows):
    baseline, reference = rows[0], rows[1]
    assert baseline.measured.speedup == 1.0
    expected = baseline.measured.median_ms / reference.measured.median_ms
    assert reference.measured.speedup == pytest.approx(expected)


def test_errors_are_those_against_the_reference(rows):
    assert rows[1].error == 0.0
    assert 0 < rows[0].error <= rows[0].error_limit == 1e-2


def test_a_wrong_contender_is_refused(rows):
    broken = rows[2]
    assert broken.status is Status.WRONG
    assert broken.measured is None
    assert broken.error > broken.error_limit
    assert "exceeds 0.01" in broken.note


def test_a_contender_without_room_is_skipped_and_says_why(rows):
    huge = rows[3]
    assert huge.status is Status.SKIPPED
    assert huge.error is None
    assert "GB of memory" in huge.note


def test_copies_exceed_the_cache(rows):
    assert rows[0].copies == copies_needed(4 * 3264, 1 << 14) == 11


def test_records_are_flat_and_have_the_same_keys(rows):
    records = [row.record() for row in rows]
    assert len({tuple(record) for record in records}) == 1
    assert list(records[0])[-1] == "speedup"  # a processor has nothing to add
    assert all(v is None or isinstance(v, str | int | float) for record in records for v in record.values())
    first = records[0]
    assert (first["experts"], first["top_k"], first["hidden"], first["intermediate"]) == (4, 2, 64, 32)
    assert (first["scheme"], first["dtype"], first["device"]) == ("w_mxfp4", "bfloat16", "cpu")
    assert first["bytes"] == 2 * 3264 + 2 * 64 * 2
    assert records[3]["median_ms"] is None
    assert [bool(record["how"]) for record in records[:4]] == [False, True, False, False]


def test_weights_without_room_are_refused(monkeypatch):
    monkeypatch.setattr("mxperts.benchmark.device.host.available_memory", lambda: 1000)
    with pytest.raises(ArgumentError, match="take a smaller shape"):
        list(
            bench_layer([parse_shape("4,2,64,32")], [Scheme("w_mxfp4")], [1], choose(["reference"], []), cache=1 << 14)
        )


def test_problems_are_checked_before_anything_is_made():
    contenders = choose(["reference"], [])
    with pytest.raises(ArgumentError, match="at least one token"):
        next(bench_layer([parse_shape("4,2,64,32")], [Scheme("w_mxfp4")], [1, 0], contenders))
