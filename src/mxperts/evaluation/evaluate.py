"""Run a model over a text, and compare it with its base."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxperts.errors import ArgumentError
from mxperts.evaluation import router, size
from mxperts.evaluation.baseline import Baseline, answers_store
from mxperts.evaluation.divergence import Divergence, TokenMetrics, at, log_softmax
from mxperts.evaluation.logits import LogitStore
from mxperts.evaluation.size import Size
from mxperts.evaluation.statistics import Estimate, perplexity
from mxperts.evaluation.top_k import TopStore
from mxperts.evaluation.windows import Windows
from mxperts.evaluation.worst import WorstToken, WorstTokens

WORST = 10
"""Tokens on which a model differs most from its base that are kept with their context."""

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
        load: by MoE layer, how many tokens each expert got.
        worst: the tokens on which it differs most from the base, the worst first; none for the base.
        size: bytes of the weights.
        expert_bits, model_bits: bits a weight, over the experts and over the whole model; scales, biases and whatever
            else is stored with the weights included, all divided by the number of values of the base.
        seconds: spent in the model's forward passes; None for a base that was not run but read from a file.
        tokens_per_second: all tokens of all windows over ``seconds``; None likewise.
    """

    name: str
    tokens: int
    perplexity: Estimate
    divergence: Divergence | None
    router_agreement: dict[str, float] | None
    load: dict[str, list[int]]
    worst: Sequence[WorstToken]
    size: Size
    expert_bits: float
    model_bits: float
    seconds: float | None
    tokens_per_second: float | None

    @property
    def mean_router_agreement(self) -> float | None:
        """Mean of ``router_agreement`` over layers; None for the base and for models without experts."""
        layers = self.router_agreement
        return sum(layers.values()) / len(layers) if layers else None

    @property
    def dead_experts(self) -> dict[str, list[int]]:
        """By MoE layer, the experts that no token was sent to; layers without such are left out."""
        dead = {name: [e for e, tokens in enumerate(load) if tokens == 0] for name, load in self.load.items()}
        return {name: experts for name, experts in dead.items() if experts}

    def summary(self) -> str:
        """In a few words, how it came out."""
        kl = f", KLD {self.divergence.kl.value:.6f}" if self.divergence else ""
        return f"PPL {self.perplexity.value:.4f}{kl}"


def evaluate_base(
    model: nn.Module, windows: Windows, *, name: str = "base", batch_size: int = 8, top_k: int = 0
) -> tuple[Evaluation, Baseline]:
    """Run the base model and keep its answers; do it once, then ``evaluate`` every other model against them.

    Args:
        model: a causal language model of Transformers, unquantised.
        windows: the text.
        name: for the report.
        batch_size: windows a forward pass.
        top_k: keep this many most likely tokens of every distribution, and the mass of the rest, by which KL
            divergences become lower bounds; 0 keeps all.

    Raises:
        ArgumentError: the model is in training mode, or its logits are no numbers; or ``top_k`` is negative.
    """
    if top_k < 0:
        raise ArgumentError(f"top_k must be a number of tokens, or 0 for all, not {top_k}")
    run = _Run(model, windows, batch_size, name)
    answers: LogitStore | TopStore | None = None
    nll: list[Tensor] = []
    for first, logits, targets in run:
        if answers is None:
            answers = answers_store(windows.scored, logits.shape[-1], logits.dtype, top_k)
        rows = slice(first, first + len(logits))
        answers.keep(rows, logits, targets)
        nll.append(-at(log_softmax(logits), targets).cpu())
    assert answers is not None, "windows are never empty"
    values = size.values(model)
    base = Baseline(text_hash=windows.text_hash, answers=answers, choices=run.choices, values=values)
    return run.evaluation(perplexity(torch.cat(nll)), values), base


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
        ArgumentError: the base was run on other windows, or has another vocabulary or other MoE layers; the model is in
            training mode, or its logits are no numbers.
    """
    if windows.text_hash != base.text_hash:
        raise ArgumentError("the base was run on another text, context or stride; run evaluate_base on these windows")
    run = _Run(model, windows, batch_size, name)
    worst = WorstTokens(windows, base.answers, WORST)
    parts: list[TokenMetrics] = []
    for first, logits, targets in run:
        if logits.shape[-1] != base.answers.vocabulary:
            raise ArgumentError(
                f"the base has a vocabulary of {base.answers.vocabulary} tokens but {name} of {logits.shape[-1]}; "
                "models can be compared only over the same vocabulary"
            )
        parts.append(base.answers.compare(slice(first, first + len(logits)), logits, targets))
        worst.add(first, logits, parts[-1])
    tokens = TokenMetrics.concatenate(parts)
    return run.evaluation(
        perplexity(tokens.nll),
        base.values,
        divergence=Divergence.of(tokens),
        router_agreement=router.agreement(run.choices, base.choices),
        worst=worst.tokens,
    )


class _Run:
    """One pass of a model over all windows; iterate it, then ask for what it measured."""

    def __init__(self, model: nn.Module, windows: Windows, batch_size: int, name: str) -> None:
        if batch_size < 1:
            raise ArgumentError(f"batch_size must be at least 1, not {batch_size}")
        if model.training:
            raise ArgumentError("the model is in training mode, where dropout is random; call model.eval() first")
        self.model, self.windows, self.batch_size, self.name = model, windows, batch_size, name
        self.seconds = 0.0
        self.choices: router.Choices = {}

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the first row of some scored tokens, their logits [n, vocabulary] and what really comes [n].

        They are few enough at a time that whatever is computed of them takes little memory.
        """
        device = next(self.model.parameters()).device
        start_of, done = self.windows.first_scored, 0
        with router.recording(self.model) as seen:
            for ids in self.windows.batches(self.batch_size):
                ids = ids.to(device)
                start = time.perf_counter()
                with torch.inference_mode():
                    answer: Tensor = self.model(input_ids=ids, use_cache=False).logits[:, start_of - 1 : -1]
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                self.seconds += time.perf_counter() - start
                logits, targets = answer.flatten(0, 1), ids[:, start_of:].flatten()
                step = max(1, _CHUNK // logits.shape[1])
                for i in range(0, len(logits), step):
                    self._check(done + i, logits[i : i + step])
                    yield done + i, logits[i : i + step], targets[i : i + step]
                done += len(logits)
        self.choices = router.choices(seen)

    def _check(self, first: int, logits: Tensor) -> None:
        """The largest logit of a row is NaN if one of them is, and infinite if they give no distribution."""
        bad = (~logits.amax(-1).isfinite()).nonzero()
        if len(bad):
            window, position = divmod(first + int(bad[0]), self.windows.context - self.windows.first_scored)
            raise ArgumentError(
                f"{self.name}: its logits are NaN or infinite in window {window} after position "
                f"{position + self.windows.first_scored - 1}; the model is damaged, or overflows in "
                f"{logits.dtype}: `mxperts verify` looks for bad numbers in a checkpoint"
            )

    def evaluation(
        self,
        perplexity: Estimate,
        values: Size,
        *,
        divergence: Divergence | None = None,
        router_agreement: dict[str, float] | None = None,
        worst: Sequence[WorstToken] = (),
    ) -> Evaluation:
        """Everything that was measured."""
        nbytes, processes = Size.of(self.model), size.processes(self.model)
        experts = {n: m.num_experts * processes for n, m in router.experts_modules(self.model).items()}
        return Evaluation(
            name=self.name,
            tokens=self.windows.scored,
            perplexity=perplexity,
            divergence=divergence,
            router_agreement=router_agreement,
            load=router.load(self.choices, experts),
            worst=worst,
            size=nbytes,
            expert_bits=nbytes.experts * 8 / values.experts if values.experts else 0.0,
            model_bits=nbytes.model * 8 / values.model,
            seconds=self.seconds,
            tokens_per_second=self.windows.ids.numel() / self.seconds,
        )
