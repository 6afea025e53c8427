"""Models side by side on the tasks of lm-eval."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mxperts.errors import ArgumentError
from mxperts.evaluation.environment import environment, versions
from mxperts.evaluation.report import with_error
from mxperts.evaluation.statistics import Estimate
from mxperts.integrations.lm_eval import Harness, Score

_ARROWS = {True: " ↑", False: " ↓", None: ""}


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """One model on all tasks.

    Attributes:
        name: of the scheme or checkpoint, for the report.
        scores: of groups and tasks.
        seconds: that the harness took.
    """

    name: str
    scores: Sequence[Score]
    seconds: float

    def summary(self) -> str:
        """In a few words, how it came out."""
        return ", ".join(f"{score.task} {score.metric} {score.value:.4f}" for score in self.scores[:3])


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """Several models on the same tasks.

    Attributes:
        rows: the base, then the others as they were given.
        conditions: what the figures depend on, such as versions, threads, models and tasks; JSON carries it.
    """

    LEFT: ClassVar[int] = 3
    """Columns of the table that are text."""

    rows: Sequence[TaskEvaluation]
    conditions: Mapping[str, Any]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text, the models below each other for each metric; all columns but the first ``LEFT`` are
        numbers.
        """
        header = ["task", "metric", "scheme", "n-shot", "samples", "value", "difference"]
        rows = []
        for i, record in enumerate(self.records()):
            error, metric = record["stderr"], record["metric"] + _ARROWS[record["higher_is_better"]]
            counts = ["" if record[name] is None else str(record[name]) for name in ("num_fewshot", "samples")]
            value = f"{record['value']:.4f}" if error is None else with_error(Estimate(record["value"], error))
            difference = f"{record['difference']:+.4f}" if i % len(self.rows) else ""
            rows.append([record["task"], metric, record["scheme"], *counts, value, difference])
        return (header, rows) if len(self.rows) > 1 else (header[:-1], [row[:-1] for row in rows])

    @property
    def note(self) -> str:
        """What the columns mean, to print below the table."""
        difference = f" difference: from {self.rows[0].name}." if len(self.rows) > 1 else ""
        return f"± is one standard error, as lm-eval gives it; ↑: higher is better.{difference}"

    def records(self) -> list[dict[str, Any]]:
        """One flat dictionary a metric and model, all with the same keys: raw numbers, for CSV."""
        base = self.rows[0].scores
        return [
            {"scheme": row.name, **dataclasses.asdict(row.scores[i]), "difference": row.scores[i].value - score.value}
            for i, score in enumerate(base)
            for row in self.rows
        ]

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"conditions": dict(self.conditions), "rows": [dataclasses.asdict(row) for row in self.rows]}


def compare_on_tasks(
    models: Iterable[tuple[str, nn.Module, Any]],
    harness: Harness,
    *,
    conditions: Mapping[str, Any] | None = None,
    progress: Callable[[TaskEvaluation], None] = lambda done: None,
) -> TaskReport:
    """Run models through the harness one after the other; the first is the base.

    Args:
        models: name, model and tokenizer; an iterator that loads each when it is asked for keeps only one in memory.
        harness: the tasks.
        conditions: what else the figures depend on; the environment and the harness's settings are added.
        progress: called with every model that is done.

    Raises:
        ArgumentError: no models.
    """
    rows = []
    for name, model, tokenizer in models:
        start = time.perf_counter()
        scores = harness.run(model, tokenizer)
        del model  # before the next one is loaded
        rows.append(TaskEvaluation(name=name, scores=scores, seconds=time.perf_counter() - start))
        progress(rows[-1])
    if not rows:
        raise ArgumentError("there is no model to evaluate")
    settings = {
        "tasks": harness.tasks,
        "num_fewshot": harness.num_fewshot,
        "limit": harness.limit,
        "batch_size": harness.batch_size,
        "apply_chat_template": harness.apply_chat_template,
        "lm_eval": versions(("lm_eval",))["lm_eval"],
    }
    return TaskReport(rows=rows, conditions={**(conditions or {}), **settings, **environment()})
