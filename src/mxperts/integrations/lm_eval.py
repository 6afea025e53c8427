"""EleutherAI's evaluation harness (lm-eval) on a model that is loaded already, its weights packed."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxperts.errors import ArgumentError, MxpertsError

_STDERR = "_stderr"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task, or of one group of tasks.

    Attributes:
        task: its name.
        metric: the harness's name of it; with a comma and the name of a filter, where the answers went through one.
        value: as the harness gives it.
        stderr: one standard error; None where the harness has none.
        higher_is_better: None where the task does not say.
        num_fewshot: examples in a prompt; None for a group.
        samples: documents that were asked; None for a group.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    samples: int | None


class Harness:
    """Tasks of lm-eval, found and loaded before any model is.

    Args:
        tasks: names, groups, tags or globs, as the harness knows them, or paths of YAML files.
        include_path: a folder with tasks of your own.
        num_fewshot: examples in a prompt; None: what each task says. The harness leaves tasks alone that say 0.
        limit: documents a task, from the first, or, below 1, their share; None: all.
        batch_size: requests a forward pass.
        apply_chat_template: make chats of the prompts.

    Raises:
        MxpertsError: lm-eval is not installed, or cannot load a task.
        ArgumentError: there is no such task, or ``limit`` is neither a number of documents nor a share.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        include_path: str | Path | None = None,
        num_fewshot: int | None = None,
        limit: float | None = None,
        batch_size: int = 8,
        apply_chat_template: bool = False,
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise MxpertsError("tasks need lm-eval; install it with: pip install 'mxperts[eval]'") from None
        if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
            raise ArgumentError(f"limit must be a whole number of documents or a share between 0 and 1, not {limit:g}")
        self.manager: Any = TaskManager(include_path=None if include_path is None else str(include_path))
        self.tasks = _names(tasks, self.manager.all_tasks)
        self.num_fewshot = num_fewshot
        self.limit = limit
        self.batch_size = batch_size
        self.apply_chat_template = apply_chat_template
        try:
            self.manager.load(self.tasks)
        except Exception as error:  # a task's data can fail in any way
            name = type(error).__name__
            raise MxpertsError(f"lm-eval cannot load {', '.join(self.tasks)}: {name}: {error}") from error

    def run(self, model: Any, tokenizer: Any) -> list[Score]:
        """Ask a model everything.

        Args:
            model: a causal language model of Transformers.
            tokenizer: its own.

        Returns:
            Groups, then tasks, each with its metrics by name; nothing in processes that are not the first of several.

        Raises:
            ArgumentError: ``apply_chat_template`` with a tokenizer that has no chat template.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        if self.apply_chat_template and not tokenizer.chat_template:
            raise ArgumentError(f"{tokenizer.name_or_path} has no chat template, which apply_chat_template needs")
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
            tasks=self.tasks,
            task_manager=self.manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            apply_chat_template=self.apply_chat_template,
            log_samples=False,
        )
        return [] if found is None else list(_scores(found))


def _names(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Globs replaced by the names that match them, without repetition."""
    names: dict[str, None] = {}
    for name in wanted:
        matching = fnmatch.filter(known, name) or [name for _ in range(Path(name).is_file())]
        if not matching:
            near = difflib.get_close_matches(name, known, n=5)
            advice = f"is it {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists what there is"
            raise ArgumentError(f"lm-eval knows no task {name!r}: {advice}")
        names |= dict.fromkeys(matching)
    return list(names)


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    """The numbers in the harness's results."""
    for task, metrics in {**found.get("groups", {}), **found["results"]}.items():
        samples = found.get("n-samples", {}).get(task)
        shots = found.get("n-shot", {}).get(task)
        better = found.get("higher_is_better", {}).get(task, {})
        for key, value in sorted(metrics.items()):
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith(_STDERR) or isinstance(value, str):
                continue
            stderr = metrics.get(f"{metric}{_STDERR},{filtered}")
            yield Score(
                task=task,
                metric=metric if filtered == "none" else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=better.get(metric),
                num_fewshot=shots if isinstance(shots, int) else None,
                samples=samples["effective"] if samples else None,
            )
