"""The tokens on which a model differs most from its base, in their context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mxperts.evaluation.divergence import TokenMetrics, log_softmax
from mxperts.evaluation.logits import LogitStore, most_likely
from mxperts.evaluation.top_k import TopStore
from mxperts.evaluation.windows import Windows

BEFORE, AFTER = 40, 12
"""Tokens of context on either side."""
PREDICTIONS = 5
"""Most likely tokens that are shown of each model."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A token that a model expects.

    Attributes:
        token: its number.
        text: what it stands for.
        probability: that it comes next.
    """

    token: int
    text: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class WorstToken:
    """A token of the text on whose prediction two models differ.

    Attributes:
        window, position: where it is.
        token: its number.
        before, text, after: the text up to it, its own, and the text that follows.
        kl: KL divergence from the base's prediction to the model's, in nats.
        base_probability, probability: that this token comes, as either model has it.
        base_predictions, predictions: what either model expects most.
    """

    window: int
    position: int
    token: int
    before: str
    text: str
    after: str
    kl: float
    base_probability: float
    probability: float
    base_predictions: Sequence[Prediction]
    predictions: Sequence[Prediction]


class WorstTokens:
    """Collects the ``count`` tokens of the largest KL divergence while a model runs; those without any are left out."""

    def __init__(self, windows: Windows, answers: LogitStore | TopStore, count: int) -> None:
        self.windows, self.answers, self.count = windows, answers, count
        self._found: list[tuple[float, int, WorstToken]] = []

    def add(self, first_row: int, logits: Tensor, metrics: TokenMetrics) -> None:
        """Take the rows from ``first_row`` on: the model's logits [n, vocabulary] and the metrics that they gave."""
        enough = self._found[-1][0] if len(self._found) == self.count else 0.0
        top = metrics.kl.topk(min(self.count, len(metrics.kl)))
        for kl, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            if kl > enough:
                self._found.append((kl, first_row + i, self._token(first_row + i, logits[i], metrics, i)))
        self._found = sorted(self._found, key=lambda found: (-found[0], found[1]))[: self.count]

    @property
    def tokens(self) -> list[WorstToken]:
        """The worst first."""
        return [token for _, _, token in self._found]

    def _token(self, row: int, logits: Tensor, metrics: TokenMetrics, i: int) -> WorstToken:
        windows = self.windows
        window, position = divmod(row, windows.context - windows.first_scored)
        position += windows.first_scored
        ids = windows.ids[window].tolist()
        return WorstToken(
            window=window,
            position=position,
            token=ids[position],
            before=windows.text(ids[max(0, position - BEFORE) : position]),
            text=windows.text(ids[position : position + 1]),
            after=windows.text(ids[position + 1 : position + 1 + AFTER]),
            kl=metrics.kl[i].item(),
            base_probability=(-metrics.base_nll[i]).exp().item(),
            probability=(-metrics.nll[i]).exp().item(),
            base_predictions=self._predictions(self.answers.most_likely(row, PREDICTIONS)),
            predictions=self._predictions(most_likely(log_softmax(logits), PREDICTIONS)),
        )

    def _predictions(self, found: list[tuple[int, float]]) -> list[Prediction]:
        return [Prediction(token=token, text=self.windows.text([token]), probability=p) for token, p in found]
