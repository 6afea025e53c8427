"""The base's answers in a file, so that it is run once for a text, and never taken for another's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mxperts.checkpoint.safetensors_file import Entry, read_header, write_file
from mxperts.errors import ArgumentError
from mxperts.evaluation.baseline import Baseline
from mxperts.evaluation.environment import environment
from mxperts.evaluation.evaluate import Evaluation
from mxperts.evaluation.logits import LogitStore
from mxperts.evaluation.size import Size
from mxperts.evaluation.statistics import Estimate
from mxperts.evaluation.top_k import TopStore
from mxperts.evaluation.windows import Windows

_KEY, _VERSION = "mxperts_base", 1
_CHOICES = "choices."
_LOGITS = "logits"
_TOP = ("ids", "log_probabilities", "rest", "target", "first")


@dataclass(frozen=True, kw_only=True)
class BaseFile:
    """A safetensors file with the answers of one base on one text.

    It holds what ``Baseline`` does: the most likely tokens of every distribution with the mass of the others, or all
    logits; and every router's choices. The same base, text and versions give the same bytes.

    Attributes:
        path: of the file.
        model: ``model_digest`` of the base.
        dtype: in which the base is run.
        top_k: the most likely tokens that are kept, 0 for all logits; None takes what a file has.
    """

    path: Path
    model: str
    dtype: str
    top_k: int | None = None

    def load(self, windows: Windows, *, name: str = "base") -> tuple[Evaluation, Baseline] | None:
        """What ``evaluate_base`` returned when the file was written; None if there is no file.

        Raises:
            CheckpointError: the file is damaged.
            ArgumentError: it holds something else, or the answers of another model, on another text, or of another kind
                than asked for.
        """
        if not self.path.exists():
            return None
        read_header(self.path)
        with safe_open(self.path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            if found.get("version") != _VERSION:
                raise ArgumentError(
                    f"{self.path} does not hold a base's answers as this version of mxperts writes them; name a file "
                    "that does not exist, and it will be written"
                )
            self._check(found, windows)
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        base = Baseline(
            text_hash=found["text"],
            answers=_answers(tensors, found["vocabulary"]),
            choices={key.removeprefix(_CHOICES): t for key, t in tensors.items() if key.startswith(_CHOICES)},
            values=Size(**found["values"]),
            environment=found["environment"],
        )
        row = dict(found["evaluation"])
        row |= {"perplexity": Estimate(*row["perplexity"]), "size": Size(**row["size"])}
        evaluation = Evaluation(
            **row,
            name=name,
            divergence=None,
            router_agreement=None,
            worst=(),
            seconds=None,
            tokens_per_second=None,
        )
        return evaluation, base

    def save(self, evaluation: Evaluation, base: Baseline, windows: Windows) -> None:
        """Write what ``evaluate_base`` returned, whole or not at all."""
        top_k, tensors = _tensors(base.answers)
        tensors |= {_CHOICES + name: index for name, index in base.choices.items()}
        e = evaluation
        about = {
            "version": _VERSION,
            **self._identity(windows),
            "top_k": top_k,
            "vocabulary": base.answers.vocabulary,
            "rest_mass": base.rest_mass,
            "values": dataclasses.asdict(base.values),
            "evaluation": {
                "tokens": e.tokens,
                "perplexity": dataclasses.astuple(e.perplexity),
                "load": e.load,
                "size": dataclasses.asdict(e.size),
                "expert_bits": e.expert_bits,
                "model_bits": e.model_bits,
            },
            "environment": environment(),
        }
        entries = [Entry(name=name, dtype=t.dtype, shape=tuple(t.shape)) for name, t in tensors.items()]
        write_file(self.path, entries, tensors.values(), {_KEY: json.dumps(about)})

    def _identity(self, windows: Windows) -> dict[str, Any]:
        """What a file must have been written for to be of use."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "context": windows.context,
            "stride": windows.stride,
            "text": windows.text_hash,
        }

    def _check(self, found: Mapping[str, Any], windows: Windows) -> None:
        wanted = self._identity(windows)
        differing = next((key for key, value in wanted.items() if found.get(key) != value), None)
        if differing is not None:
            what = {
                "model": "of another model",
                "text": "on other tokens: another text, amount of it, or tokenizer",
            }.get(differing, f"at {differing} {found.get(differing)}, not {wanted[differing]}")
            raise ArgumentError(f"{self.path} holds the base's answers {what}; name another file, or delete this one")
        if self.top_k is not None and min(self.top_k, found["vocabulary"]) != found["top_k"]:
            kept = f"the {found['top_k']} most likely tokens" if found["top_k"] else "all logits"
            raise ArgumentError(
                f"{self.path} holds {kept}, not {self.top_k or 'all'}; leave the number out to use it, or name "
                "another file"
            )


def _tensors(answers: LogitStore | TopStore) -> tuple[int, dict[str, Tensor]]:
    """How many most likely tokens are kept, 0 for all logits, and the tensors to store."""
    if isinstance(answers, LogitStore):
        return 0, {_LOGITS: answers.logits}
    return answers.ids.shape[1], {name: getattr(answers, name) for name in _TOP}


def _answers(tensors: Mapping[str, Tensor], vocabulary: int) -> LogitStore | TopStore:
    if _LOGITS in tensors:
        return LogitStore.of(tensors[_LOGITS])
    return TopStore(**{name: tensors[name] for name in _TOP}, vocabulary=vocabulary)
