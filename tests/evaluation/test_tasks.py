import pytest

from mxperts.errors import ArgumentError
from mxperts.evaluation import TaskEvaluation, TaskReport, compare_on_tasks
from mxperts.integrations.lm_eval import Score


def score(task: str, metric: str, value: float, **others: object) -> Score:
    known = {"stderr": None, "higher_is_better": None, "num_fewshot": 0, "samples": 100}
    return Score(task=task, metric=metric, value=value, **(known | others))


BASE = [
    score("quiz", "acc", 0.75, stderr=0.043, higher_is_better=True, num_fewshot=5),
    score("page", "bits_per_byte", 2.5, higher_is_better=False, samples=None),
]
WORSE = [
    score("quiz", "acc", 0.5, stderr=0.05, higher_is_better=True, num_fewshot=5),
    score("page", "bits_per_byte", 2.625, higher_is_better=False, samples=None),
]


@pytest.fixture
def report() -> TaskReport:
    rows = [TaskEvaluation(name="bf16", scores=BASE, seconds=1), TaskEvaluation(name="w4a4", scores=WORSE, seconds=2)]
    return TaskReport(rows=rows, conditions={"limit": 2})


def test_models_stand_below_each_other_and_differ_from_the_first(report):
    header, rows = report.table()
    assert header == ["task", "metric", "scheme", "n-shot", "samples", "value", "difference"]
    assert rows == [
        ["quiz", "acc ↑", "bf16", "5", "100", "0.750 ± 0.043", ""],
        ["quiz", "acc ↑", "w4a4", "5", "100", "0.500 ± 0.050", "-0.2500"],
        ["page", "bits_per_byte ↓", "bf16", "0", "", "2.5000", ""],
        ["page", "bits_per_byte ↓", "w4a4", "0", "", "2.6250", "+0.1250"],
    ]
    assert "difference: from bf16" in report.note


def test_one_model_has_no_difference(report):
    alone = TaskReport(rows=report.rows[:1], conditions={})
    header, rows = alone.table()
    assert "difference" not in header
    assert {len(row) for row in rows} == {len(header)}
    assert "difference" not in alone.note


def test_the_same_model_twice_is_compared(report):
    header, rows = TaskReport(rows=[report.rows[0]] * 2, conditions={}).table()
    assert [row[header.index("difference")] for row in rows] == ["", "+0.0000", "", "+0.0000"]


def test_records_and_document_have_raw_numbers(report):
    records = report.records()
    assert len({tuple(record) for record in records}) == 1
    assert (records[1]["scheme"], records[1]["value"], records[1]["difference"]) == ("w4a4", 0.5, -0.25)
    document = report.document()
    assert document["conditions"] == {"limit": 2}
    assert document["rows"][1]["scores"][0]["stderr"] == 0.05


def test_a_summary_is_short(report):
    assert report.rows[0].summary() == "quiz acc 0.7500, page bits_per_byte 2.5000"


class Given:
    """A harness that knows its scores."""

    tasks, num_fewshot, limit, batch_size, apply_chat_template = ["quiz"], None, 0.5, 8, False

    def run(self, model: str, tokenizer: str) -> list[Score]:
        assert tokenizer == f"tokenizer of {model}"
        return {"base": BASE, "other": WORSE}[model]


def test_every_model_is_run_and_conditions_are_kept():
    done: list[str] = []
    report = compare_on_tasks(
        ((name, name, f"tokenizer of {name}") for name in ("base", "other")),
        Given(),
        conditions={"dtype": "auto"},
        progress=lambda evaluation: done.append(evaluation.name),
    )
    assert [row.scores for row in report.rows] == [BASE, WORSE]
    assert done == ["base", "other"]
    found = report.conditions
    assert (found["dtype"], found["tasks"], found["limit"]) == ("auto", ["quiz"], 0.5)
    assert "torch" in found["versions"]


def test_no_models_are_an_error():
    with pytest.raises(ArgumentError, match="no model to evaluate"):
        compare_on_tasks([], Given())
