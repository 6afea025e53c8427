"""How far a model's next-token distributions are from those of its base.

The metrics and their conventions are those of llama.cpp's ``llama-perplexity --kl-divergence``, so that the figures
can be read side by side. P is the base's distribution of the next token, Q the other model's, t the token of the text:

- ln ratio: mean of ln P(t) - ln Q(t), which is ln(PPL(Q) / PPL(P)). Paired by token, so its error is far below that of
  either perplexity.
- KL divergence: sum of P ln(P / Q) over the vocabulary, in nats, base → other. It sees the whole distribution, so it
  shows differences that perplexity does not.
- Δp: Q(t) - P(t), the change of the probability of the token that really comes.
- same top-1: whether P and Q have the same most likely token.

Source: llama.cpp, tools/perplexity/perplexity.cpp and its README.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxperts.evaluation.statistics import Estimate, Histogram, mean, percentile, root_mean_square, share

PERCENTILES = (1.0, 5.0, 10.0, 50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
"""Of the KL divergence; the last is its maximum."""
DELTA_P_PERCENTILES = (0.0, 0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)
"""Of Δp; the first is its minimum, the last its maximum."""
DECADES = (-8, 2)
"""Powers of ten between which KL divergences are counted in bins."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenMetrics:
    """One number a scored token, all float64 [n] but the last, which is bool.

    Attributes:
        nll: -ln Q(t).
        base_nll: -ln P(t).
        kl: KL(P ‖ Q).
        delta_p: Q(t) - P(t).
        same_top: argmax P == argmax Q.
    """

    nll: Tensor
    base_nll: Tensor
    kl: Tensor
    delta_p: Tensor
    same_top: Tensor

    @classmethod
    def of(cls, logits: Tensor, base_logits: Tensor, targets: Tensor) -> TokenMetrics:
        """From logits [n, vocabulary] of both models and the tokens that really come, int64 [n].

        Log-probabilities are computed in float32 and summed over the vocabulary in float64. Equal logits give exactly
        0 for ``kl`` and ``delta_p``.
        """
        q, p = log_softmax(logits), log_softmax(base_logits)
        # A token that the base rules out (logit -Inf) contributes P ln(P / Q) = 0, whatever Q is.
        kl = (p.exp() * (p - q).masked_fill(p == -torch.inf, 0.0)).sum(-1, dtype=torch.float64)
        nll, base_nll = -at(q, targets), -at(p, targets)
        return cls(
            nll=nll,
            base_nll=base_nll,
            kl=kl,
            delta_p=(-nll).exp() - (-base_nll).exp(),
            same_top=p.argmax(-1) == q.argmax(-1),
        )

    @classmethod
    def concatenate(cls, parts: list[TokenMetrics]) -> TokenMetrics:
        """All parts, on the CPU."""
        names = cls.__dataclass_fields__
        return cls(**{name: torch.cat([getattr(part, name).cpu() for part in parts]) for name in names})


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The metrics of one model against its base, see the top of this file.

    Attributes:
        ln_ratio: ln(PPL / PPL of the base).
        kl: mean KL divergence, in nats.
        kl_percentiles: KL divergence by percentile, linearly interpolated; 100 is the maximum.
        kl_histogram: how many tokens have how much, four bins a decade.
        delta_p, rms_delta_p: mean and root mean square of Δp, as probabilities (0 … 1, not percent).
        delta_p_percentiles: Δp by percentile; 0 is the minimum, 100 the maximum.
        same_top: share of tokens with the same top-1.
    """

    ln_ratio: Estimate
    kl: Estimate
    kl_percentiles: dict[float, Estimate]
    kl_histogram: Histogram
    delta_p: Estimate
    rms_delta_p: Estimate
    delta_p_percentiles: dict[float, Estimate]
    same_top: Estimate

    @classmethod
    def of(cls, tokens: TokenMetrics) -> Divergence:
        """Aggregate over tokens."""
        return cls(
            ln_ratio=mean(tokens.nll - tokens.base_nll),
            kl=mean(tokens.kl),
            kl_percentiles={p: percentile(tokens.kl, p) for p in PERCENTILES},
            kl_histogram=Histogram.of(tokens.kl, decades=DECADES, a_decade=4),
            delta_p=mean(tokens.delta_p),
            rms_delta_p=root_mean_square(tokens.delta_p),
            delta_p_percentiles={p: percentile(tokens.delta_p, p) for p in DELTA_P_PERCENTILES},
            same_top=share(tokens.same_top),
        )


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float32."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def at(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each row's target, float64 [n]."""
    return log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1).to(torch.float64)
