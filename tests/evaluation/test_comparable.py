import types

import pytest

from mxperts.errors import ArgumentError
from mxperts.evaluation.comparable import check_same_tokens, check_same_vocabulary


class Words:
    """A tokenizer whose tokens are words, or letters of unknown ones."""

    def __init__(self, *words: str) -> None:
        self.words = {word: i for i, word in enumerate(words)}

    def get_vocab(self) -> dict[str, int]:
        return self.words

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [self.words[word] for word in text.split()]}


class Reversed(Words):
    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        first, *rest = text.split()
        return super().__call__(" ".join([first, *reversed(rest)]))


NAMES = {"base_name": "base", "name": "other"}


def test_the_same_tokenizers_pass():
    check_same_tokens(Words("a", "b"), Words("a", "b"), "a b a", **NAMES)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Words("a", "c"), "'b' is token 1 in base and none in other"),
        (Words("b", "a"), "'a' is token 0 in base and 1 in other"),
        (Words("a", "b", "c"), "'c' is token none in base and 2 in other"),
        (Reversed("a", "b"), "split the text differently from token 1 on"),
    ],
)
def test_others_are_refused(other, message):
    with pytest.raises(ArgumentError, match=message):
        check_same_tokens(Words("a", "b"), other, "a b a", **NAMES)


def test_vocabularies_have_the_same_size():
    def config(size):
        return types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(vocab_size=size))

    check_same_vocabulary(config(7), config(7), **NAMES)
    with pytest.raises(ArgumentError, match="base has a vocabulary of 7 tokens but other of 8"):
        check_same_vocabulary(config(7), config(8), **NAMES)
