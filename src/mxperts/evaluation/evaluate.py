"""Run a model over a text, and compare it with its base."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxperts.errors import ArgumentError
from mxperts.evaluation import router, size
from mxperts.evaluation.baseline import Baseline, LogitStore
from mxperts.evaluation.divergence import Divergence, TokenMetrics, at, log_softmax
from mxperts.evaluation.size import Size
from mxperts.evaluation.statistics import Estimate, perplexity
from mxperts.evaluation.windows import Windows

_CHUNK = 2**24
"""Logits that are compared at a time, to bound the memory that the comparison takes."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on one text.

    Attributes:
        name: of the scheme or checkpoint, for the report.
        tokens: scored tokens.
        perplexity: over them.
        divergence: from the base; None for the base itself.
        router_agreement: by MoE layer, the share of the base's experts that are chosen too; None for the base.
        size: bytes of the weights.
        expert_bits, model_bits: bits a weight, over the experts and over the whole model; scales, biases and whatever
            else is stored with the weights included, all divided by the number of values of the base.
        seconds: spent in the model's forward passes.
        tokens_per_second: all tokens of all windows over ``seconds``.
    """

    name: str
    tokens: int
    perplexity: Estimate
    divergence: Divergence | None
    router_agreement: dict[str, float] | None
    size: Size
    expert_bits: float
    model_bits: float
    seconds: float
    tokens_per_second: float

    @property
    def mean_router_agreement(self) -> float | None:
        """Mean of ``router_agreement`` over layers; None for the base and for models without experts."""
        layers = self.router_agreement
        return sum(layers.values()) / len(layers) if layers else None

    def summary(self) -> str:
        """In a few words, how it came out."""
        kl = f", KLD {self.divergence.kl.value:.6f}" if self.divergence else ""
        return f"PPL {self.perplexity.value:.4f}{kl}"


def evaluate_base(
    model: nn.Module, windows: Windows, *, name: str = "base", batch_size: int = 8
) -> tuple[Evaluation, Baseline]:
    """Run the base model and keep its answers; do it once, then ``evaluate`` every other model against them.

    Args:
        model: a causal language model of Transformers, unquantised.
        windows: the text.
        name: for the report.
        batch_size: windows a forward pass.
    """
    run = _Run(model, windows, batch_size)
    logits: LogitStore | None = None
    nll: list[Tensor] = []
    for rows, answer, targets in run:
        if logits is None:
            logits = LogitStore(windows.scored, answer.shape[-1], answer.dtype)
        logits[rows] = answer.cpu()
        nll += [-at(log_softmax(answer[part]), targets[part]).cpu() for part in _parts(answer)]
    assert logits is not None, "windows are never empty"
    values = size.values(model)
    base = Baseline(text_hash=windows.text_hash, logits=logits, choices=run.choices, values=values)
    return run.evaluation(name, perplexity(torch.cat(nll)), values), base


def evaluate(
    model: nn.Module, windows: Windows, base: Baseline, *, name: str = "model", batch_size: int = 8
) -> Evaluation:
    """Run a model over the text and compare every next-token distribution with the base's.

    Args:
        model: a causal language model of Transformers with the base's vocabulary and layers.
        windows: the text, the same as the base's.
        base: what ``evaluate_base`` kept.
        name: for the report.
        batch_size: windows a forward pass.

    Raises:
        ArgumentError: the base was run on other windows, or has another vocabulary or other MoE layers.
    """
    if windows.text_hash != base.text_hash:
        raise ArgumentError("the base was run on another text, context or stride; run evaluate_base on these windows")
    run = _Run(model, windows, batch_size)
    parts: list[TokenMetrics] = []
    for rows, answer, targets in run:
        expected = base.logits[rows].to(answer.device)
        if expected.shape != answer.shape:
            raise ArgumentError(
                f"the base has a vocabulary of {expected.shape[-1]} tokens but {name} of {answer.shape[-1]}; "
                "models can be compared only over the same vocabulary"
            )
        parts += [TokenMetrics.of(answer[part], expected[part], targets[part]) for part in _parts(answer)]
    tokens = TokenMetrics.concatenate(parts)
    return run.evaluation(
        name,
        perplexity(tokens.nll),
        base.values,
        divergence=Divergence.of(tokens),
        router_agreement=router.agreement(run.choices, base.choices),
    )


class _Run:
    """One pass of a model over all windows; iterate it, then ask for what it measured."""

    def __init__(self, model: nn.Module, windows: Windows, batch_size: int) -> None:
        if batch_size < 1:
            raise ArgumentError(f"batch_size must be at least 1, not {batch_size}")
        if model.training:
            raise ArgumentError("the model is in training mode, where dropout is random; call model.eval() first")
        self.model, self.windows, self.batch_size = model, windows, batch_size
        self.seconds = 0.0
        self.choices: router.Choices = {}

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the rows of the scored tokens, their logits [n, vocabulary] and the tokens that really come [n]."""
        device = next(self.model.parameters()).device
        first, done = self.windows.first_scored, 0
        with router.recording(self.model) as seen:
            for ids in self.windows.batches(self.batch_size):
                ids = ids.to(device)
                start = time.perf_counter()
                with torch.inference_mode():
                    logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[:, first - 1 : -1]
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                self.seconds += time.perf_counter() - start
                rows = slice(done, done + logits.shape[0] * logits.shape[1])
                done = rows.stop
                yield rows, logits.flatten(0, 1), ids[:, first:].flatten()
        self.choices = router.choices(seen)

    def evaluation(
        self,
        name: str,
        perplexity: Estimate,
        values: Size,
        *,
        divergence: Divergence | None = None,
        router_agreement: dict[str, float] | None = None,
    ) -> Evaluation:
        """Everything that was measured."""
        nbytes = Size.of(self.model)
        return Evaluation(
            name=name,
            tokens=self.windows.scored,
            perplexity=perplexity,
            divergence=divergence,
            router_agreement=router_agreement,
            size=nbytes,
            expert_bits=nbytes.experts * 8 / values.experts if values.experts else 0.0,
            model_bits=nbytes.model * 8 / values.model,
            seconds=self.seconds,
            tokens_per_second=self.windows.ids.numel() / self.seconds,
        )


def _parts(logits: Tensor) -> list[slice]:
    """Slices of rows small enough to compare at a time."""
    step = max(1, _CHUNK // logits.shape[1])
    return [slice(i, i + step) for i in range(0, logits.shape[0], step)]
