"""What came after the last few tokens before, whatever the text, in bounded memory."""

import random
import sys
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.scheduler.drafter import LEAST_RATE, Drafter
from headrace.scheduler.ngrams import LONGEST, REMEMBERED, SHORTEST, NgramIndex


def taken(tokens: Sequence[int]) -> NgramIndex:
    index = NgramIndex()
    index.extend(tokens, len(tokens))
    return index


def longest_before(tokens: Sequence[int]) -> int:
    """Of the ends that occurred before, the tokens of the longest, by looking everywhere."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        end = tokens[-length:]
        places = range(length, len(tokens))
        if len(tokens) > length and any(tokens[p - length : p] == end for p in places):
            return length
    return 0


@settings(max_examples=200, deadline=None, database=None)
@given(tokens=st.lists(st.integers(0, 3), max_size=40), count=st.integers(1, 9))
def test_a_guess_is_what_followed_the_end_before(tokens: list[int], count: int) -> None:
    guess = taken(tokens).continuation(tokens, count)
    if not guess:
        assert longest_before(tokens) < 3  # of pairs, it looks at the newest places only
        return
    assert len(guess) == count
    # Somewhere before, at least two tokens of the end were followed by the guess, as it goes round.
    whole = tokens + guess
    assert any(
        whole[p - SHORTEST : p + count] == whole[-count - SHORTEST :]
        for p in range(SHORTEST, len(tokens))
    )


def test_the_longest_end_decides_and_then_the_newest() -> None:
    index = taken(tokens := [1, 2, 3, 9, 5, 2, 3, 7, 4, 2, 3, 8, 1, 2, 3])
    assert index.continuation(tokens, 3) == [9, 5, 2]
    index = taken(tokens := [2, 3, 9, 2, 3, 7, 0, 2, 3])
    assert index.continuation(tokens, 2) == [7, 0]


def test_tokens_are_taken_in_a_few_at_a_time() -> None:
    draw = random.Random(1)
    tokens = [draw.randrange(50) for _ in range(3000)]
    index = NgramIndex()
    while index.num_tokens < len(tokens):
        assert 0 < index.extend(tokens, 130) <= 130
    assert index.continuation(tokens, 8) == taken(tokens).continuation(tokens, 8)


def test_memory_is_bounded_and_the_newest_are_found() -> None:
    draw = random.Random(1)
    tokens = [draw.randrange(3, 1000) for _ in range(2 * REMEMBERED)]
    whole = [*tokens, 1, 2, 7, 8, *tokens[:500], 1, 2]
    index = taken(whole)
    assert index.continuation(whole, 2) == [7, 8]
    assert sum(map(sys.getsizeof, (index._heads, index._links))) < 8 * REMEMBERED + 1000
    forgotten = tokens + tokens[:20]
    far = taken(forgotten).continuation(forgotten, 4)
    assert far != tokens[20:24]


def test_a_request_is_drafted_while_guesses_come_true() -> None:
    drafter, tokens = Drafter(8), [1, 2, 3, 4, 5] * 3
    drafter.learn(tokens, 1000)
    assert drafter.num_wanted == 4 and drafter.drafts(4) == [1, 2, 3, 4]
    for _ in range(4):
        tokens += [1, 2, 3, 4, 5]
        drafter.learn(tokens, 1000)
    assert drafter.num_wanted == 8 and drafter.gain > 2
    for other in range(20):
        tokens += [100 + other, 1, 2]  # which is never followed by what followed it before
        drafter.learn(tokens, 1000)
    assert drafter.rate < LEAST_RATE and drafter.num_wanted == 0 and drafter.gain == 0
    # It goes on guessing, to see when the text can be guessed again.
    for token in [1, 2, 3, 4, 5] * 8:
        tokens.append(token)
        drafter.learn(tokens, 1000)
    assert drafter.num_wanted == 8


def test_a_long_prompt_is_not_guessed_from_before_it_has_been_taken_in() -> None:
    drafter, tokens = Drafter(8), [1, 2, 3, 4] * 100
    assert drafter.learn(tokens, 300) == 300
    assert drafter.num_wanted == 0
    tokens.append(1)
    assert drafter.learn(tokens, 300) == 101
    assert drafter.drafts(3) == [2, 3, 4]
