"""Text that is shown while it comes: never half a character, never a stop string, never another text."""

from typing import Any

import pytest
from commands import STORIES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from headrace.cluster.detokenize import HALF, StopStrings, TextDeltas, TextStream, decode
from headrace.cluster.tokenizer import load_tokenizer
from headrace.scheduler.request import SamplingParams

TEXTS = (
    "Once upon a time",
    "héllo wörld",
    "世界、こんにちは",
    "a 😀😃 b 👩‍👩‍👧",
    "\n\n  tabs\t",
    "end",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(STORIES)


class Bytes:
    """A tokenizer in the manner of Llama 2: characters that are no tokens are bytes."""

    def __init__(self) -> None:
        words = ["▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
        core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="b"))
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        self.backend_tokenizer = core

    def of(self, data: bytes) -> list[int]:
        return [2 + byte for byte in data]


def pieces(tokenizer: Any, token_ids: list[int], params: SamplingParams) -> list[str]:
    """As the server shows an answer that ended by its length or by a stop string."""
    deltas, stop = TextDeltas(tokenizer, params), StopStrings(tokenizer, params)
    shown = []
    for token in token_ids[:-1]:
        final = stop.push(token) if params.stop else None
        if final is not None:
            return [*shown, deltas.finish(final, [])]
        shown.append(deltas.push(token))
    final = stop.push(token_ids[-1]) if params.stop else None
    if final is not None:
        return [*shown, deltas.finish(final, [])]
    return [*shown, deltas.finish(decode(tokenizer, token_ids, params), token_ids[-1:])]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_end_between_characters(tokenizer: Any, text: str) -> None:
    shown = pieces(tokenizer, tokenizer(text)["input_ids"], SamplingParams())
    assert "".join(shown) == text
    assert not any(HALF in piece for piece in shown)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_pieces_of_any_tokens_are_the_whole_text(tokenizer: Any, data: st.DataObject) -> None:
    near = st.integers(
        60, 270
    )  # single bytes of this vocabulary, most of which are half characters
    tokens = data.draw(st.lists(near | st.integers(0, 4095), min_size=1, max_size=40))
    shown = pieces(tokenizer, tokens, SamplingParams())
    assert "".join(shown) == decode(tokenizer, tokens, SamplingParams())


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_a_stop_string_never_shows(tokenizer: Any, data: st.DataObject) -> None:
    text = data.draw(st.text("ab é😀", min_size=1, max_size=30))
    stops = data.draw(st.lists(st.text("ab é😀", min_size=1, max_size=4), min_size=1, max_size=3))
    tokens = tokenizer(text)["input_ids"]
    shown = "".join(pieces(tokenizer, tokens, SamplingParams(stop=tuple(stops))))
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not any(stop in text for stop in stops):
        assert shown == text


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back(tokenizer: Any) -> None:
    deltas = TextDeltas(tokenizer, SamplingParams(stop=("time.",)))
    shown = [deltas.push(token) for token in tokenizer("a time, a tim")["input_ids"]]
    assert "".join(shown) == "a time, a "
    assert deltas.finish("a time, a tim", []) == "tim"


def test_a_stop_string_that_is_kept_shows_whole(tokenizer: Any) -> None:
    params = SamplingParams(stop=("upon",), include_stop_str_in_output=True)
    shown = pieces(tokenizer, tokenizer("Once upon a time")["input_ids"], params)
    assert "".join(shown) == "Once upon"


def test_single_bytes_become_characters() -> None:
    tokenizer = Bytes()
    stream = TextStream(tokenizer, SamplingParams())
    shown = [stream.push(token) for token in tokenizer.of("é世😀".encode())]
    assert "".join(shown) == "é世😀"
    assert not any(HALF in piece for piece in shown)


def test_bytes_that_break_up_a_character_are_no_error() -> None:
    """Decoded at once, they take the character before them along."""
    tokenizer = Bytes()
    tokens = [0, *tokenizer.of("世".encode()), *tokenizer.of(b"\xff"), 1, *tokenizer.of(b"\xe4")]
    stream = TextStream(tokenizer, SamplingParams())
    assert [stream.push(token) for token in tokens] == [" a", "", "", "世", "", HALF + "b", ""]
    assert stream.flush() == HALF
    stop = StopStrings(tokenizer, SamplingParams(stop=("b",)))
    assert [stop.push(token) for token in tokens[:6]][-1] == " a世" + HALF


def test_bytes_that_never_become_text_are_not_held_for_ever() -> None:
    tokenizer = Bytes()
    stream = TextStream(tokenizer, SamplingParams())
    shown = [stream.push(token) for token in tokenizer.of(b"\xff" * 100)]
    assert len("".join(shown)) >= 70


def test_special_tokens_are_no_text_and_no_burden(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, SamplingParams())
    end = tokenizer.eos_token_id
    tokens = [*tokenizer("Once")["input_ids"], *[end] * 100, *tokenizer(" upon")["input_ids"]]
    assert "".join(map(stream.push, tokens)) == "Once upon"
    shown = TextStream(tokenizer, SamplingParams(skip_special_tokens=False))
    assert shown.push(end) == "<|endoftext|>"
