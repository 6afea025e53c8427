"""Ways to run a whole model, behind one interface."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ERROR_LIMIT = 0.1
"""Of the logits of most tokens. Rounding alone lets routers choose other experts now and then; a fault hits all."""


class LoadedModel(ABC):
    """A model that can be run."""

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [T, vocabulary] of every one of ``tokens`` [T]."""

    @abstractmethod
    def prefill(self, tokens: Tensor) -> None:
        """Process a prompt [T], computing the logits of its last token only."""

    @abstractmethod
    def decode(self, tokens: Tensor, until: float) -> int:
        """Process tokens [T] one by one, each with the ones before in the cache, until a time of ``perf_counter``.

        Returns:
            How many were processed, at least one.
        """


@dataclass(frozen=True, kw_only=True)
class ModelContender:
    """One way to run a model.

    Attributes:
        name: in the table.
        load: loads it.
        prepare: is called before, and not counted: what is done once for a model, such as converting it.
        version: of the software behind it, if it is not mxperts.
        why_not: why it cannot run, if it cannot.
        error_limit: the largest error, as ``logits_error`` measures it, of one that is timed; None for one that
            computes something else, so that its error is shown but means nothing.
    """

    name: str
    load: Callable[[], LoadedModel]
    prepare: Callable[[], None] = lambda: None
    version: str | None = None
    why_not: str = ""
    error_limit: float | None = ERROR_LIMIT


class TransformersModel(LoadedModel):
    """A causal language model of Transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0].float()
        return result

    def prefill(self, tokens: Tensor) -> None:
        self.model(input_ids=tokens.unsqueeze(0), use_cache=True, logits_to_keep=1)

    def decode(self, tokens: Tensor, until: float) -> int:
        cache = None
        for done, token in enumerate(tokens, start=1):
            cache = self.model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
            if time.perf_counter() > until:
                return done
        return len(tokens)
