"""Whether two models can be compared token by token, found out before either is loaded."""

from __future__ import annotations

from typing import Any

from mxperts.errors import ArgumentError


def check_same_tokens(base: Any, other: Any, text: str, *, base_name: str, name: str) -> None:
    """Check that two tokenizers have the same vocabulary and make the same tokens of a text.

    Args:
        base, other: tokenizers of Transformers.
        text: that the models are to be compared on.
        base_name, name: of the models, for the message.

    Raises:
        ArgumentError: they differ.
    """
    ours, theirs = base.get_vocab(), other.get_vocab()
    advice = "models can be compared only over the same tokens"
    if ours != theirs:
        token = min(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))[0]
        found = " and ".join(
            f"{vocabulary.get(token, 'none')} in {n}" for vocabulary, n in ((ours, base_name), (theirs, name))
        )
        raise ArgumentError(f"the tokenizers of {base_name} and {name} differ: {token!r} is token {found}; {advice}")
    a, b = (t(text, add_special_tokens=False, verbose=False)["input_ids"] for t in (base, other))
    if a != b:
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        raise ArgumentError(
            f"the tokenizers of {base_name} and {name} split the text differently from token {place} on; {advice}"
        )


def check_same_vocabulary(base: Any, other: Any, *, base_name: str, name: str) -> None:
    """Check that the configs of two models have vocabularies of the same size.

    Raises:
        ArgumentError: they have not.
    """
    ours, theirs = (getattr(config.get_text_config(), "vocab_size", None) for config in (base, other))
    if ours != theirs:
        raise ArgumentError(
            f"{base_name} has a vocabulary of {ours} tokens but {name} of {theirs}; models can be compared only over "
            "the same vocabulary"
        )
