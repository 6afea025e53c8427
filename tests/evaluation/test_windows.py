import pytest

from mxperts.errors import ArgumentError
from mxperts.evaluation import Windows


def scored(windows: Windows) -> list[int]:
    """Positions in the text that are scored, if the text is 0, 1, 2, …"""
    return windows.ids[:, windows.first_scored :].flatten().tolist()


def test_windows_that_do_not_overlap_score_all_but_their_first_token():
    windows = Windows.of(range(13), context=4)
    assert windows.ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert scored(windows) == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert windows.scored == 9


def test_overlapping_windows_score_every_token_once():
    windows = Windows.of(range(14), context=6, stride=2)
    assert scored(windows) == list(range(4, 14))
    assert windows.scored == 10


def test_a_short_text_is_one_short_window():
    windows = Windows.of([5, 6, 7], context=512)
    assert windows.ids.tolist() == [[5, 6, 7]]


def test_batches_cover_all_windows():
    assert [len(b) for b in Windows.of(range(20), context=4).batches(2)] == [2, 2, 1]


def test_hash_depends_on_tokens_and_windows():
    hashes = {
        Windows.of(range(12), context=4).text_hash,
        Windows.of(range(1, 13), context=4).text_hash,
        Windows.of(range(12), context=4, stride=2).text_hash,
        Windows.of(range(12), context=3).text_hash,
    }
    assert len(hashes) == 4
    assert Windows.of(range(12), context=4).text_hash == Windows.of(range(12), context=4).text_hash


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "message"),
    [
        ([1], 4, None, "text of 1 tokens"),
        (range(9), 1, None, "context must be at least 2"),
        (range(9), 4, 5, "stride must be between 1 and"),
        (range(9), 4, 0, "stride must be between 1 and"),
    ],
)
def test_lengths_out_of_range(tokens, context, stride, message):
    with pytest.raises(ArgumentError, match=message):
        Windows.of(tokens, context=context, stride=stride)
