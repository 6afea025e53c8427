"""Evaluate several models against the first of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from mxperts.errors import ArgumentError
from mxperts.evaluation.baseline import Baseline
from mxperts.evaluation.environment import environment
from mxperts.evaluation.evaluate import Evaluation, evaluate, evaluate_base
from mxperts.evaluation.logits import LogitStore
from mxperts.evaluation.report import Report
from mxperts.evaluation.windows import Windows


def compare(
    models: Iterable[tuple[str, nn.Module]],
    windows: Windows,
    *,
    batch_size: int = 8,
    stored: tuple[Evaluation, Baseline] | None = None,
    keep: Callable[[Evaluation, Baseline], None] = lambda evaluation, base: None,
    top_k: int = 0,
    conditions: Mapping[str, Any] | None = None,
    progress: Callable[[Evaluation], None] = lambda done: None,
) -> Report:
    """Evaluate models one after the other; the first is the base, unless its answers are there already.

    Args:
        models: name and model; an iterator that loads each model when it is asked for keeps only one in memory.
        windows: the text.
        batch_size: windows a forward pass.
        stored: what ``evaluate_base`` returned for the base, or ``BaseFile.load``; then no model is the base.
        keep: called with what ``evaluate_base`` returned, to store it.
        top_k: as ``evaluate_base`` takes it.
        conditions: what else the figures depend on; the environment and the text are added.
        progress: called with every finished evaluation.

    Returns:
        The report; the base's logits are gone.

    Raises:
        ArgumentError: no models, or they cannot be compared, as ``evaluate`` says.
    """
    rows: list[Evaluation] = [] if stored is None else [stored[0]]
    base = None if stored is None else stored[1]
    for name, model in models:
        if base is None:
            done, base = evaluate_base(model, windows, name=name, batch_size=batch_size, top_k=top_k)
            keep(done, base)
        else:
            done = evaluate(model, windows, base, name=name, batch_size=batch_size)
        del model  # before the next one is loaded
        rows.append(done)
        progress(done)
    if base is None:
        raise ArgumentError("there is no model to evaluate")
    text: dict[str, Any] = {
        "tokens": windows.scored,
        "context": windows.context,
        "stride": windows.stride,
        "batch_size": batch_size,
        "text_sha256": windows.text_hash,
        "base_top_k": 0 if isinstance(base.answers, LogitStore) else base.answers.ids.shape[1],
        "base_rest_mass": {"mean": base.rest_mass[0], "max": base.rest_mass[1]},
    }
    if base.environment is not None:
        text["base_environment"] = base.environment
    return Report(base=rows[0], others=rows[1:], conditions={**(conditions or {}), **text, **environment()})
