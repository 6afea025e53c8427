"""Whether the operations give the golden bits on this machine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mxperts.errors import ArgumentError, BackendUnavailable, MxpertsError
from mxperts.formats import BLOCK_FORMATS, MXFP4, PRESETS, BlockFormat
from mxperts.formats import format as lookup
from mxperts.formats.naming import normalize, suggest
from mxperts.ops.dispatch import BACKENDS, Problem, resolve
from mxperts.verification.case import Case
from mxperts.verification.cases import cases
from mxperts.verification.definition import Bits
from mxperts.verification.golden import digest, digests

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Check:
    """What came of one operation in one format under one preset, or with one activation format.

    Attributes:
        backend, device: what ran it, and where.
        format, operation, preset, activation: see ``Case``.
        numbers: how many were compared.
        wrong: how many differ.
        first: where the first of them stands, its input, what was expected and what was found; or the error that the
            operation ended in, which leaves all of its numbers wrong.
    """

    backend: str
    device: str
    format: str
    operation: str
    preset: str
    activation: str
    numbers: int
    wrong: int
    first: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """A backend and a device that it runs on."""

    backend: str
    device: str


def places(backend: str = "auto", device: str = "auto") -> list[Place]:
    """Where to verify.

    Args:
        backend: a backend's name; "auto" for the one that "auto" takes on the device; "all" for all that run there.
        device: a device; "auto" for the backend's own, or a GPU if there is one; with "all", for each there is.

    Raises:
        ArgumentError: no such backend or device.
        BackendUnavailable: the backend cannot run there.
    """
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if backend != ALL:
        own = next((b.device for b in BACKENDS if b.name == backend), None)
        device = (own or there[-1]) if device == "auto" else device
        return [Place(backend=resolve(backend, _problem(device)).backend.name, device=device)]
    return [
        Place(backend=b.name, device=d)
        for d in (there if device == "auto" else [device])
        for b in BACKENDS
        if b.refuses(_problem(d)) is None
    ]


def _problem(device: str) -> Problem:
    """What every backend for a device can run, if PyTorch can use the device."""
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ArgumentError(f"unknown device {device!r}; expected auto, cpu, cuda, cuda:1 …") from None
    try:
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise BackendUnavailable(f"PyTorch cannot use {device} here: {error}") from None
    return Problem(op="fused_experts", device=where, dtype=torch.bfloat16, weight=MXFP4)


def named_formats(name: str) -> list[BlockFormat]:
    """The format of a name, or all of them.

    Raises:
        FormatError: no such format.
    """
    return list(BLOCK_FORMATS) if name == ALL else [lookup(name)]


def named_presets(name: str) -> list[str]:
    """The preset of a name, or all of them.

    Raises:
        ArgumentError: no such preset.
    """
    key = normalize(name)
    if key == ALL:
        return list(PRESETS)
    if key not in PRESETS:
        raise ArgumentError(f"unknown preset {name!r}; {suggest(key, [ALL, *PRESETS])}")
    return [key]


def verify(
    place: Place,
    *,
    formats: Sequence[BlockFormat] = BLOCK_FORMATS,
    presets: Sequence[str] = tuple(PRESETS),
    progress: Callable[[int, int], None] | None = None,
) -> list[Check]:
    """Run every case on one backend and compare its bits.

    Args:
        place: from ``places``.
        formats, presets: which; layers run for every activation format.
        progress: called with cases done and in total.

    Returns:
        A check for each operation in each format under each preset, or with each activation format.

    Raises:
        MxpertsError: the installed golden bytes are not what the definition gives.
    """
    everything = list(cases(formats, presets))
    run = _Runs(place)
    groups: dict[tuple[str, ...], list[_Outcome]] = {}
    for done, case in enumerate(everything):
        if progress is not None:
            progress(done, len(everything))
        group = groups.setdefault((case.format, case.operation, case.preset, case.activation), [])
        group.append(run.outcome(case))
    return [
        Check(
            backend=place.backend,
            device=place.device,
            format=fmt,
            operation=operation,
            preset=preset,
            activation=activation,
            numbers=sum(outcome.numbers for outcome in group),
            wrong=sum(outcome.wrong for outcome in group),
            first=next((outcome.first for outcome in group if outcome.first), ""),
        )
        for (fmt, operation, preset, activation), group in groups.items()
    ]


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What came of a case: as in ``Check``."""

    numbers: int
    wrong: int = 0
    first: str = ""


class _Runs:
    """Runs cases on one backend, equal ones once, and compares digests; numbers only where these differ."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.seen: dict[Hashable, tuple[int, dict[str, str]]] = {}

    def outcome(self, case: Case) -> _Outcome:
        found: Mapping[str, Bits] | None = None
        try:
            if case.work not in self.seen:
                found = case.run(self.place.backend, self.place.device)
                self.seen[case.work] = sum(d.size for d in found.values()), {p: digest(d) for p, d in found.items()}
            numbers, parts = self.seen[case.work]
            if all(digests()[f"{case.name}.{part}"] == sha for part, sha in parts.items()):
                return _Outcome(numbers=numbers)
            found = found or case.run(self.place.backend, self.place.device)
        except BackendUnavailable:
            raise
        except Exception as error:  # a kernel that does not run here is what this is to find
            numbers = sum(data.size for data in _answer(case).values())
            return _Outcome(numbers=numbers, wrong=numbers, first=f"{case.name}: {type(error).__name__}: {error}")
        return _compare(case, found)


def _compare(case: Case, found: Mapping[str, Bits]) -> _Outcome:
    """Count what differs, number by number."""
    wrong, first = 0, ""
    for part, expected in _answer(case).items():
        if found[part].shape != expected.shape:
            wrong += expected.size
            first = first or f"{case.name}: shape {expected.shape} expected, {found[part].shape} found"
            continue
        differs = np.argwhere(found[part] != expected)
        wrong += len(differs)
        if len(differs) and not first:
            index = tuple(differs[0])
            was, is_ = (case.shown(part, int(data[index])) for data in (expected, found[part]))
            first = f"{case.where(part, [int(i) for i in index])}: expected {was}, found {is_}"
    numbers = sum(data.size for data in found.values())
    return _Outcome(numbers=numbers, wrong=wrong or 1, first=first or f"{case.name}: other bits from run to run")


def _answer(case: Case) -> Mapping[str, Bits]:
    """The exact answer, which must be the one whose digests are shipped."""
    answer = case.answer()
    for part, data in answer.items():
        name = f"{case.name}.{part}"
        if digest(data) != digests()[name]:
            raise MxpertsError(
                f"{name}: this machine's own exact arithmetic does not give the golden bytes; mxperts or NumPy is not "
                "installed as it should be"
            )
    return answer
