"""``bench_model``: prompt processing and generation of whole models, one contender after another."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from mxperts.benchmark.machine import peak_memory, reset_peak_memory
from mxperts.benchmark.model.contenders import LoadedModel, ModelContender
from mxperts.benchmark.model.row import ModelRow
from mxperts.benchmark.model.subject import ModelTest, Subject
from mxperts.benchmark.row import Status
from mxperts.benchmark.timing import ATTEMPTS, OTHERS_LIMIT, Others, percentile

CHECK_TOKENS = 16
QUICK = 1.0
"""Seconds; a contender whose warm-up on a few tokens takes longer is not warmed up on a whole prompt."""

Progress = Callable[[str], None]


@torch.no_grad()
def bench_model(
    subject: Subject,
    contenders: Sequence[ModelContender],
    tests: Sequence[ModelTest],
    *,
    repetitions: int = 5,
    time_budget: float = 30.0,
    seed: int = 0,
    progress: Progress = lambda message: None,
) -> list[ModelRow]:
    """Load each contender in turn, check its logits and run every test.

    Args:
        subject: the model.
        contenders: the first is what the others' logits and rates are compared with.
        tests: what to time, on random tokens.
        repetitions: undisturbed runs of a test.
        time_budget: seconds after which a test is not run again, and generation stops.
        seed: of the tokens.
        progress: told what is being done.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max([CHECK_TOKENS, *(test.tokens for test in tests)])
    tokens = torch.randint(subject.vocabulary, (longest,), generator=generator)
    rows: list[ModelRow] = []
    expected: Tensor | None = None
    for contender in contenders:
        limit = contender.error_limit
        fields: dict[str, Any] = {"contender": contender.name, "version": contender.version, "error_limit": limit}
        if contender.why_not:
            progress(f"{contender.name}: skipped: {contender.why_not}")
            rows += [_row(subject, test, fields, status=Status.SKIPPED, note=contender.why_not) for test in tests]
            continue
        progress(f"{contender.name}: loading")
        contender.prepare()
        gc.collect()
        reset_peak_memory()
        start = time.perf_counter()
        model = contender.load()
        fields["load_seconds"] = time.perf_counter() - start
        found = model.logits(tokens[:CHECK_TOKENS])
        if expected is None:
            expected = found
        else:
            fields["error"] = logits_error(found, expected)
        if limit is not None and fields.get("error", 0.0) > limit:
            note = f"relative error of logits {fields['error']:.2g} exceeds {limit:g}; not timed"
            rows += [_row(subject, test, fields, status=Status.WRONG, note=note) for test in tests]
            continue
        timed = [
            _time(model, test, tokens[: test.tokens], repetitions, time_budget, contender.name, progress)
            for test in tests
        ]
        fields["peak_bytes"] = peak_memory()
        del model
        for test, of_test in zip(tests, timed, strict=True):
            base = next((r.mean for r in rows if r.contender == contenders[0].name and r.test == str(test)), None)
            if contender is contenders[0]:
                base = of_test["mean"]
            rows.append(_row(subject, test, fields | of_test, speedup=of_test["mean"] / base if base else None))
    return rows


def logits_error(found: Tensor, expected: Tensor) -> float:
    """Relative rms error of the logits of a token, the median of all tokens; infinite if one is no number."""
    errors = (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    return float(errors.nan_to_num(torch.inf).median())


def _time(
    model: LoadedModel,
    test: ModelTest,
    tokens: Tensor,
    repetitions: int,
    time_budget: float,
    name: str,
    progress: Progress,
) -> dict[str, Any]:
    """The fields of a row that come of timing."""
    progress(f"{name}: {test}")
    _warm_up(model, test, tokens)
    start = time.perf_counter()
    quiet: list[float] = []
    disturbed: list[float] = []
    processed = len(tokens)
    while len(quiet) < repetitions and len(disturbed) < ATTEMPTS * repetitions:
        if quiet + disturbed and time.perf_counter() - start > time_budget:
            break
        watch, before, done = Others(), time.perf_counter(), len(tokens)
        if test.kind == "tg":
            done = model.decode(tokens, start + time_budget)
        else:
            model.prefill(tokens)
        rate, share = done / (time.perf_counter() - before), watch.share()
        if done < processed and quiet + disturbed:
            break  # the time budget ended this run, but not those before
        processed = done
        (quiet if share is None or share <= OTHERS_LIMIT else disturbed).append(rate)
    rates = quiet or disturbed
    return {
        "tokens": processed,
        "mean": mean(rates),
        "deviation": stdev(rates) if len(rates) > 1 else 0.0,
        "median": percentile(rates, 0.5),
        "p20": percentile(rates, 0.2),
        "p80": percentile(rates, 0.8),
        "samples": len(rates),
        "disturbed": not quiet,
    }


def _warm_up(model: LoadedModel, test: ModelTest, tokens: Tensor) -> None:
    start = time.perf_counter()
    if test.kind == "tg":
        model.decode(tokens[:4], start + QUICK)
        return
    model.prefill(tokens[:8])
    if time.perf_counter() - start < QUICK:
        model.prefill(tokens)


def _row(subject: Subject, test: ModelTest, fields: dict[str, Any], **more: Any) -> ModelRow:
    unset: dict[str, Any] = dict.fromkeys(
        ("mean", "deviation", "median", "p20", "p80", "peak_bytes", "load_seconds", "error", "speedup")
    )
    known: dict[str, Any] = {
        "model": subject.name,
        "scheme": subject.scheme,
        "bytes": subject.bytes,
        "test": str(test),
        "tokens": test.tokens,
        "threads": torch.get_num_threads(),
        "dtype": subject.dtype,
        "device": "cpu",
        "status": Status.OK,
        "note": "",
        "samples": 0,
        "disturbed": False,
    }
    return ModelRow(**(unset | known | fields | more))
