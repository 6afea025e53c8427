"""What the base model says about a text, kept so that every other model can be compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mxperts.evaluation.logits import LogitStore
from mxperts.evaluation.router import Choices
from mxperts.evaluation.size import Size
from mxperts.evaluation.top_k import TopStore


@dataclass(frozen=True, eq=False, kw_only=True)
class Baseline:
    """The base model's answers on one text.

    Attributes:
        text_hash: of the windows it was run on.
        answers: its distribution of every scored token: all of it, or the most likely tokens.
        choices: of every router, for every token.
        values: number of weights, in the experts and in the whole model.
        environment: where they were stored, if they come from a file.
    """

    text_hash: str
    answers: LogitStore | TopStore
    choices: Choices = field(repr=False)
    values: Size
    environment: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def rest_mass(self) -> tuple[float, float]:
        """The probability that is kept as one number only: the mean over tokens, and the largest; 0 if all is kept."""
        if isinstance(self.answers, LogitStore):
            return 0.0, 0.0
        return self.answers.rest.mean().item(), self.answers.rest.max().item()


def answers_store(rows: int, vocabulary: int, dtype: torch.dtype, top_k: int) -> LogitStore | TopStore:
    """Room for the answers on ``rows`` tokens: all logits, in ``dtype``, if ``top_k`` is 0."""
    return TopStore.empty(rows, vocabulary, top_k) if top_k else LogitStore(rows, vocabulary, dtype)
