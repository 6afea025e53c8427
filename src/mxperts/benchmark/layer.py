"""``bench_layer``: load contenders, check them, and time them side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from mxperts.benchmark.check import Reference
from mxperts.benchmark.contenders.base import Bind, Contender, Run
from mxperts.benchmark.device import Device, Limit, device_of
from mxperts.benchmark.device.base import MATMUL, STREAM
from mxperts.benchmark.inputs import Inputs, Weights, make_layers
from mxperts.benchmark.problem import Problem, Shape, copies_needed
from mxperts.benchmark.roofline import Limits, work
from mxperts.benchmark.row import LayerRow, Measurement, Status
from mxperts.benchmark.timing import Plan, percentile
from mxperts.errors import ArgumentError
from mxperts.formats import Scheme

MEMORY_SHARE = 0.9
"""Of the free memory, that contenders may fill."""

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contender on its way through a benchmark.

    Attributes:
        contender: which.
        status, note: as in the row.
        copies, load_seconds: of what it has loaded.
        bind: of its layers; None if it has none.
        run: of a problem's inputs, checked; None if it is not to be timed.
        error: against the reference.
    """

    contender: Contender
    status: Status = Status.OK
    note: str = ""
    copies: int = 0
    load_seconds: float | None = None
    bind: Bind | None = None
    run: Run | None = None
    error: float | None = None


def bench_layer(
    shapes: Sequence[Shape],
    schemes: Sequence[Scheme],
    tokens: Sequence[int],
    contenders: Sequence[Contender],
    *,
    activation: str = "silu",
    device: str = "cpu",
    seed: int = 0,
    plan: Plan | None = None,
    cache: int | None = None,
    progress: Progress = lambda message: None,
) -> Iterator[list[LayerRow]]:
    """Time layers of every shape in every scheme with every number of tokens.

    Args:
        shapes, schemes, tokens: what to combine.
        contenders: what to compare; the first is what speed-ups refer to.
        activation: the activation function.
        device: "cpu" or "cuda".
        seed: of weights, hidden states and routings.
        plan: how long to time each combination; default: the device's.
        cache: bytes of the last-level cache, which the copies of a layer are to exceed; default: the machine's.
        progress: told what is being done.

    Yields:
        The rows of each combination, one a contender, in the order of ``contenders``.

    Raises:
        ArgumentError: a problem that cannot be: see ``Problem``; or weights that do not fit into memory.
    """
    groups = [
        [Problem(shape=shape, scheme=scheme, tokens=t, activation=activation, device=device, seed=seed) for t in tokens]
        for shape, scheme in product(shapes, schemes)
    ]
    where = device_of(device)
    cache = where.cache() if cache is None else cache
    plan = Plan(slice=where.slice) if plan is None else plan
    stream, matmul = where.stream(cache), where.matmul()
    layers: tuple[Weights, ...] = ()
    entries: list[Entry] = []
    made_for = None
    for group in groups:
        entries = []  # what was loaded before makes room first
        of = (group[0].shape, group[0].scheme.weight)
        if made_for != of:
            layers = ()
            layers, made_for = _make_layers(group[0], where, cache, progress), of
        entries = _load(group[0], layers, contenders, where, cache, progress)
        for problem in group:
            yield _bench(where.inputs(problem, layers), entries, where, stream, matmul, plan, progress)


def _make_layers(problem: Problem, device: Device, cache: int, progress: Progress) -> tuple[Weights, ...]:
    device.release()
    copies = copies_needed(problem.packed_bytes, cache)
    size, free = copies * problem.packed_bytes, device.free_memory()
    if free is not None and size > free:
        raise ArgumentError(
            f"{problem.shape.name} in {problem.scheme.weight} needs {size / 1e9:.1f} GB of memory, but only "
            f"{free / 1e9:.1f} GB are free; take a smaller shape"
        )
    progress(f"{problem.shape.name}, {problem.scheme.weight}: making {copies} x {problem.packed_bytes / 1e6:.1f} MB")
    return make_layers(problem, copies)


@torch.no_grad()
def _load(
    problem: Problem,
    layers: Sequence[Weights],
    contenders: Sequence[Contender],
    device: Device,
    cache: int,
    progress: Progress,
) -> list[Entry]:
    """Load every contender that is there, can run the problem and has room."""
    device.release()
    free, entries = device.free_memory(), []
    for contender in contenders:
        copies = contender.copies(problem, len(layers), cache)
        needed = contender.memory(problem, copies)
        why_not = contender.unavailable() or contender.refuses(problem)
        if why_not is None and free is not None and needed > MEMORY_SHARE * free:
            why_not = f"needs {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB are free"
        if why_not is not None:
            progress(f"{contender.name}: skipped: {why_not}")
            entries.append(Entry(contender=contender, status=Status.SKIPPED, note=why_not))
            continue
        free = None if free is None else free - needed
        start = time.perf_counter()
        try:
            bind = contender.load(problem, layers[:copies])
            device.finish()
        except device.failures as error:
            entries.append(_failed(Entry(contender=contender), "loading", error, progress))
            continue
        seconds = time.perf_counter() - start
        entries.append(Entry(contender=contender, bind=bind, copies=copies, load_seconds=seconds))
    return entries


@torch.no_grad()
def _bench(
    inputs: Inputs,
    loaded: Sequence[Entry],
    device: Device,
    stream: Limit,
    matmul: Limit,
    plan: Plan,
    progress: Progress,
) -> list[LayerRow]:
    """The rows of one problem."""
    problem, reference = inputs.problem, Reference(inputs, device.checked_weights)
    entries = []
    for entry in loaded:
        if entry.bind is not None:
            progress(f"{problem}: checking {entry.contender.name}")
            try:
                entry = _check(entry, entry.bind(inputs), problem, reference, device)
            except device.failures as error:
                entry = _failed(entry, "checking", error, progress)
        entries.append(entry)
    runs = {e.contender.name: e.run for e in entries if e.run is not None}
    w, timed = work(problem, inputs.calls), None
    if runs:
        progress(f"{problem}: timing {', '.join(runs)}")
        timed = device.time(runs, inputs, stream, matmul, plan)
        limits = Limits(
            stream=stream.amount / percentile(timed.timings.seconds(STREAM), 0.5),
            matmul=matmul.amount / percentile(timed.timings.seconds(MATMUL), 0.5),
        )
    rows = []
    for entry in entries:
        name, measured, note = entry.contender.name, None, entry.note
        details: Mapping[str, Any] = dict.fromkeys(device.details)
        if timed is not None and name in runs:
            note, details = timed.notes.get(name, ""), timed.details.get(name, details)
            measured = Measurement.of(
                name,
                timed.timings,
                w,
                limits,
                stream=STREAM,
                stream_bytes=stream.amount,
                baseline=entries[0].contender.name,
            )
        rows.append(
            LayerRow(
                problem=problem,
                contender=name,
                version=entry.contender.version(),
                how=entry.contender.how(problem) if entry.run is not None else "",
                status=entry.status,
                note=note,
                threads=torch.get_num_threads(),
                copies=entry.copies,
                load_seconds=entry.load_seconds,
                error=entry.error,
                error_limit=entry.contender.limit,
                work=w,
                measured=measured,
                details=details,
            )
        )
    return rows


def _check(entry: Entry, run: Run, problem: Problem, reference: Reference, device: Device) -> Entry:
    """The entry with its run, if that computes what it should."""
    contender = entry.contender
    error = max(reference.error(result, contender.activation(problem)) for result in device.results(run))
    if error <= contender.limit:
        return replace(entry, run=run, error=error)
    note = f"relative rms error {error:.2g} exceeds {contender.limit:g}; not timed"
    return replace(entry, status=Status.WRONG, note=note, error=error)


def _failed(entry: Entry, doing: str, error: Exception, progress: Progress) -> Entry:
    first_line = f"{error}".strip().partition("\n")[0]
    note = f"failed in {doing}: {type(error).__name__}: {first_line}"
    progress(f"{entry.contender.name}: {note}")
    return replace(entry, status=Status.FAILED, note=note)
