import json
import math
from dataclasses import replace

import pytest

from mxperts.errors import MxpertsError
from mxperts.evaluation import Estimate, Report, evaluate, evaluate_base, plot


@pytest.fixture(scope="module")
def report(base_model, other_model, windows) -> Report:
    first, base = evaluate_base(base_model, windows, name="bf16")
    others = [
        evaluate(other_model, windows, base, name="w_mxfp4"),
        evaluate(base_model, windows, base, name="none"),
    ]
    return Report(base=first, others=others, conditions={"seed": 7})


def test_rows_are_the_base_then_by_divergence(report):
    assert [e.name for e in report.rows] == ["bf16", "none", "w_mxfp4"]


def test_table_has_one_cell_a_column(report):
    header, rows = report.table()
    assert all(len(row) == len(header) for row in rows)
    assert "±" in rows[2][header.index("KLD")]
    assert rows[0][header.index("KLD")] == ""
    assert rows[1][header.index("KLD")] == "0.0000 ± 0.0000"


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(30.123, 0.34), "30.12 ± 0.34"),
        (Estimate(2260.4, 14.2), "2260 ± 14"),
        (Estimate(0.00076745, 0.0000033), "0.0007675 ± 0.0000033"),
        (Estimate(0.0, 0.0), "0.0000 ± 0.0000"),
        (Estimate(math.inf, math.nan), "inf ± nan"),
        (Estimate(math.inf, math.inf), "inf ± inf"),
    ],
)
def test_values_have_as_many_digits_as_their_error_allows(report, estimate, text):
    header, rows = Report(base=replace(report.base, perplexity=estimate), others=[], conditions={}).table()
    assert rows[0][header.index("PPL")] == text


def test_table_of_the_base_alone_compares_nothing(report):
    header, rows = Report(base=report.base, others=[], conditions={}).table()
    assert "KLD" not in header
    assert len(rows[0]) == len(header)


def test_records_have_the_same_keys_and_raw_numbers(report):
    records = report.records()
    assert len({tuple(r) for r in records}) == 1
    assert records[2]["kl"] == report.rows[2].divergence.kl.value
    assert records[0]["kl"] is None


def test_document_is_json(report):
    document = json.loads(json.dumps(report.document()))
    assert document["conditions"] == {"seed": 7}
    assert document["rows"][2]["divergence"]["kl"]["value"] == report.rows[2].divergence.kl.value


def test_plot_writes_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    plot(report, tmp_path / "kl.png")
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_nothing_is_refused(report, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(MxpertsError, match="nothing to draw"):
        plot(Report(base=report.base, others=[], conditions={}), tmp_path / "kl.png")


def test_plot_without_matplotlib_names_the_extra(report, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MxpertsError, match=r"mxperts\[plot\]"):
        plot(report, tmp_path / "kl.png")
