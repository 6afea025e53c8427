"""Which contenders run a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mxperts.benchmark.contenders import INSTALLED
from mxperts.benchmark.contenders.packed import PACKED
from mxperts.benchmark.emulation import NAME as BASELINE
from mxperts.benchmark.model.contenders import LoadedModel, ModelContender, TransformersModel
from mxperts.benchmark.model.llama_cpp import llama_cpp
from mxperts.benchmark.model.subject import Subject
from mxperts.errors import ArgumentError, MxpertsError
from mxperts.formats.naming import suggest
from mxperts.ops.dispatch import resolve


def choose_models(subject: Subject, backends: Sequence[str], peers: Sequence[str]) -> list[ModelContender]:
    """The contenders of a benchmark of one model.

    Args:
        subject: the model.
        backends: of mxperts, the baseline's among them.
        peers: names; "installed" takes every peer, whether it can run the model or not, and a peer that is named must
            be able to.

    Raises:
        ArgumentError: unknown peer or backend.
        BackendUnavailable: a backend that cannot run here.
        MxpertsError: a named peer cannot run the model.
    """
    chosen = []
    for name in dict.fromkeys(backends):
        resolve(name, PACKED)
        label = name if name == BASELINE else f"mxperts {name}"
        chosen.append(ModelContender(name=label, load=partial(load_transformers, subject, name)))
    for name in dict.fromkeys(peers):
        if name == INSTALLED:
            chosen += [peer(subject) for other, peer in MODEL_PEERS.items() if other not in peers]
            continue
        if name not in MODEL_PEERS:
            raise ArgumentError(f"unknown peer {name!r}; {suggest(name, [INSTALLED, 'none', *MODEL_PEERS])}")
        contender = MODEL_PEERS[name](subject)
        if contender.why_not:
            raise MxpertsError(f"peer {name!r} cannot run {subject.name}: {contender.why_not}")
        chosen.append(contender)
    return chosen


def load_transformers(subject: Subject, backend: str | None) -> LoadedModel:
    """The model by ``mx.load``; unquantised without a backend."""
    import transformers

    import mxperts as mx

    messages: Any = transformers.utils.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    scheme = None if backend is None else subject.on_the_fly
    model: Any = mx.load(subject.path, scheme=scheme, backend=backend or "auto")
    return TransformersModel(model.eval())


def unquantised(subject: Subject) -> ModelContender:
    """The model as it is before it is quantised."""
    why_not = "" if subject.on_the_fly is not None else "the checkpoint has no unquantised experts"
    load = partial(load_transformers, subject, None)
    return ModelContender(name="bf16", load=load, why_not=why_not, error_limit=None)


MODEL_PEERS: dict[str, Callable[[Subject], ModelContender]] = {"bf16": unquantised, "llama.cpp": llama_cpp}
"""Other ways to run a model, by name."""
