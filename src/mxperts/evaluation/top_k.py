"""What the base says, short enough to be stored: the most likely tokens, and the mass of all the others together.

With P the base's distribution of the next token, Q another model's, S the base's K most likely tokens, and
R_P = 1 - P(S), R_Q = 1 - Q(S) the mass outside, the divergence that is computed from this is

    KL_K = sum over S of P ln(P / Q) + R_P ln(R_P / R_Q).

All tokens outside S count as one. By the log sum inequality KL_K <= KL, and the difference is R_P times the divergence
of the two distributions outside S from each other; with K the whole vocabulary there is none. Everything else, such as
the probability of the token that really comes and the most likely one, is stored apart and exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxperts.evaluation.divergence import TokenMetrics, at, log_softmax


@dataclass(frozen=True, eq=False, kw_only=True)
class TopStore:
    """The base's most likely tokens in every row.

    Attributes:
        ids: int32 [rows, K], the most likely first, those as likely as each other by number.
        log_probabilities: float32 [rows, K], theirs.
        rest: float64 [rows], the mass of all others.
        target: float64 [rows], the log-probability of the token that really comes.
        first: int32 [rows], the most likely token; of several that are as likely, the first in the vocabulary.
        vocabulary: logits that the base gives for a token.
    """

    ids: Tensor
    log_probabilities: Tensor
    rest: Tensor
    target: Tensor
    first: Tensor
    vocabulary: int

    @classmethod
    def empty(cls, rows: int, vocabulary: int, k: int) -> TopStore:
        """A store to be filled by ``keep``; there are at most as many most likely tokens as there are tokens."""
        k = min(k, vocabulary)
        return cls(
            ids=torch.empty(rows, k, dtype=torch.int32),
            log_probabilities=torch.empty(rows, k, dtype=torch.float32),
            rest=torch.empty(rows, dtype=torch.float64),
            target=torch.empty(rows, dtype=torch.float64),
            first=torch.empty(rows, dtype=torch.int32),
            vocabulary=vocabulary,
        )

    def keep(self, rows: slice, logits: Tensor, targets: Tensor) -> None:
        """Take what is kept of the base's logits [n, vocabulary] of some rows, and of the tokens that come [n]."""
        p = log_softmax(logits)
        ids = p.topk(self.ids.shape[1]).indices.sort().values
        values, order = p.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
        self.ids[rows], self.log_probabilities[rows] = ids.to("cpu", torch.int32), values.cpu()
        self.rest[rows] = _rest(p, ids).cpu()
        self.target[rows] = at(p, targets).cpu()
        self.first[rows] = p.argmax(-1).to("cpu", torch.int32)

    def compare(self, rows: slice, logits: Tensor, targets: Tensor) -> TokenMetrics:
        """The metrics of another model's logits [n, vocabulary] of some rows, and of the tokens that come [n].

        Equal logits give exactly 0 for ``kl`` and ``delta_p``.
        """
        device = logits.device
        ids, p = self.ids[rows].to(device, torch.int64), self.log_probabilities[rows].to(device)
        q = log_softmax(logits)
        differences = (p - q.gather(-1, ids)).masked_fill(p == -torch.inf, 0.0)
        kl = (p.exp() * differences).sum(-1, dtype=torch.float64)
        rest = self.rest[rows].to(device)
        outside = (rest * (rest.log() - _rest(q, ids).log())).masked_fill(rest == 0, 0.0)
        nll, base_nll = -at(q, targets), -self.target[rows].to(device)
        return TokenMetrics(
            nll=nll,
            base_nll=base_nll,
            kl=kl + outside,
            delta_p=(-nll).exp() - (-base_nll).exp(),
            same_top=q.argmax(-1) == self.first[rows].to(device),
        )

    def most_likely(self, row: int, count: int) -> list[tuple[int, float]]:
        """The base's most likely tokens in one row, at most K, and their probabilities."""
        probabilities = self.log_probabilities[row, :count].exp()
        return list(zip(self.ids[row, :count].tolist(), probabilities.tolist(), strict=True))


def _rest(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """The mass outside ``ids`` [n, K], float64 [n]: summed over these tokens, as 1 - P(S) would be rounded."""
    return log_probabilities.exp().scatter(-1, ids, 0.0).sum(-1, dtype=torch.float64)
