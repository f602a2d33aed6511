"""What tokenizing a long text takes, and what is kept of it."""

import json
import subprocess
import sys
import time
from array import array

import pytest
from commands import STORIES

from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.encoding.piece_cache import Piece, PieceCache
from headrace.cluster.rows import chat_tokens, prompt_tokens
from headrace.cluster.tokenizer import load_tokenizer
from headrace.scheduler.errors import ContextLengthError, RequestError

STORY = "One day, Tom and his dog went to the lake. It was cold, and they had no boat.\n"
PEAK = """
import json, re, sys
from array import array
from pathlib import Path
from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.tokenizer import load_tokenizer

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

tokenizer = load_tokenizer(Path(sys.argv[1]))
encoder, line = Encoder(tokenizer), sys.argv[2]
encoder.encode("warm " * 10000)
parts = ["".join(f"{part} {i}: {line}" for i in range((1 << 20) // len(line))) for part in range(50)]
text = "".join(parts)
del parts
Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
before = peak()
token_ids = encoder.encode(text)
more = peak() - before
head = text[: 5 << 20]  # whole, 50 MB take 10 GB of memory
same = encoder.encode(head) == array("i", tokenizer(head)["input_ids"])
print(json.dumps({"more": more, "text": len(text), "tokens": len(token_ids), "same": same}))
"""


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer(STORIES))


def test_a_prompt_that_is_too_long_is_refused_before_its_end_is_read(encoder: Encoder) -> None:
    start = time.perf_counter()
    with pytest.raises(ContextLengthError, match="more than 1000 tokens") as refused:
        prompt_tokens(encoder, STORY * 1_000_000, context=1000)
    assert refused.value.param == "prompt"
    with pytest.raises(ContextLengthError, match="more than 1000 tokens") as refused:
        messages = [{"role": "user", "content": STORY * 100_000}]
        chat_tokens(encoder, messages, context=1000)
    assert refused.value.param == "messages"
    assert time.perf_counter() - start < 3  # 80 MB take a minute


def test_a_conversation_is_what_its_template_makes_of_it(encoder: Encoder) -> None:
    messages = [{"role": "user", "content": STORY * 200}, {"role": "assistant", "content": "Yes."}]
    want = encoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert chat_tokens(encoder, messages) == list(want["input_ids"])
    with pytest.raises(RequestError, match="may not set max_length, truncation"):
        chat_tokens(encoder, messages, {"truncation": True, "max_length": 9})


def test_the_cache_keeps_to_its_bytes() -> None:
    cache = PieceCache(100_000)
    piece = Piece(array("i", range(500)), 1000, array("i"))
    for name in "abcdefghijklmnopqrstuvwxyz":
        cache.put("ann", name * 4000, piece)
        cache.get("ann", "a" * 4000)
        assert cache.num_bytes <= 100_000
    assert cache.get("ann", "a" * 4000) is piece, "used all the time"
    assert cache.get("ann", "b" * 4000) is None
    assert cache.get("bob", "a" * 4000) is None
    cache.put("ann", "z" * 20_000, piece)
    assert cache.get("ann", "z" * 20_000) is None, "more than its share"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_megabytes_take_less_than_two_hundred_more() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(STORIES), STORY],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["text"] > 50e6 and found["tokens"] > 10_000_000
    assert found["more"] < 200e6, "beside the text, tokens and all"
    assert found["same"]
