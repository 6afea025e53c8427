"""A text as windows of tokens, and which of their tokens are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mxperts.errors import ArgumentError


@dataclass(frozen=True, eq=False, kw_only=True)
class Windows:
    """Windows of equal length over one text.

    Attributes:
        ids: int64 [windows, context].
        stride: tokens from the start of a window to the start of the next.
        text_hash: SHA-256 of the token ids and the windows' shape, so that results can be told to be comparable.
        decode: makes a text of token ids; None where no tokenizer is known.

    A window scores its last ``stride`` tokens, so every scored token is scored once and has seen at least
    ``context - stride`` others; with ``stride == context`` the windows do not overlap, and each scores all its tokens
    but the first, of which nothing is known. ``stride = context / 2`` is what ``llama-perplexity`` does.
    """

    ids: Tensor
    stride: int
    text_hash: str
    decode: Callable[[Sequence[int]], str] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        *,
        context: int,
        stride: int | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> Windows:
        """Cut tokens into windows; what does not fill the last window is left out.

        Args:
            tokens: of the whole text, without special tokens.
            context: tokens in a window. A text shorter than that is one shorter window.
            stride: 1 … context; default: context.
            decode: makes a text of token ids, for reports.

        Raises:
            ArgumentError: a length is out of range, or there are fewer than two tokens.
        """
        if len(tokens) < 2:
            raise ArgumentError(f"a text of {len(tokens)} tokens predicts nothing; at least two are needed")
        if context < 2:
            raise ArgumentError(f"context must be at least 2 tokens, not {context}")
        context = min(context, len(tokens))
        stride = context if stride is None else stride
        if not 1 <= stride <= context:
            raise ArgumentError(f"stride must be between 1 and the context of {context} tokens, not {stride}")
        ids = torch.tensor(tokens, dtype=torch.int64).unfold(0, context, stride)
        digest = hashlib.sha256(f"{context},{stride}:".encode() + ids.contiguous().numpy().astype("<i8").tobytes())
        return cls(ids=ids, stride=stride, text_hash=digest.hexdigest(), decode=decode)

    @classmethod
    def of_text(
        cls, text: str, tokenizer: Any, *, context: int, stride: int | None = None, max_tokens: int | None = None
    ) -> Windows:
        """Tokenise a text, without special tokens, and cut at most ``max_tokens`` of it into windows.

        Raises:
            ArgumentError: as ``of``.
        """
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return cls.of(tokens[:max_tokens], context=context, stride=stride, decode=tokenizer.decode)

    @property
    def context(self) -> int:
        """Tokens in a window."""
        return self.ids.shape[1]

    @property
    def first_scored(self) -> int:
        """Position of the first scored token of a window."""
        return max(1, self.context - self.stride)

    @property
    def scored(self) -> int:
        """Tokens that are scored, all windows together."""
        return self.ids.shape[0] * (self.context - self.first_scored)

    def batches(self, size: int) -> Iterator[Tensor]:
        """The windows, ``size`` at a time: int64 [<= size, context]."""
        yield from self.ids.split(size)

    def text(self, ids: Sequence[int]) -> str:
        """What these tokens stand for; their numbers in brackets where no tokenizer is known."""
        return "".join(f"[{i}]" for i in ids) if self.decode is None else self.decode(ids)
