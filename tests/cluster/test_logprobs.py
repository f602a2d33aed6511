"""Log-probabilities of tokens that are parts of characters, in vocabularies of both kinds that have these."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headrace.cluster.logprobs import LogprobLists
from headrace.cluster.rows import Kind
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import SamplingParams

TEXT = "a 😀 é世b\n"


def byte_level() -> Any:
    """GPT-2's way: each byte has a character."""
    words = {each: i for i, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(words, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return SimpleNamespace(backend_tokenizer=core)


def byte_fallback() -> Any:
    """Llama 2's way: what is no token is bytes, and a text's first space is dropped."""
    words = ["<unk>", "▁", "▁a", "b", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)} | {"a": len(words)},
            [("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return SimpleNamespace(backend_tokenizer=core)


@pytest.fixture(params=["bundled", "byte_level", "byte_fallback"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "bundled":
        return request.getfixturevalue("tokenizer")
    return {"byte_level": byte_level, "byte_fallback": byte_fallback}[request.param]()


def sampled(tokenizer: Any, text: str) -> list[Sample]:
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.backend_tokenizer.decode(tokens) == text
    return [
        Sample(1, token, -1.0, ((token, -1.0), (tokens[i - 1], -2.0)))
        for i, token in enumerate(tokens)
    ]


def test_bytes_of_a_chat_are_its_text(any_tokenizer: Any) -> None:
    samples = sampled(any_tokenizer, TEXT)
    lists = LogprobLists(any_tokenizer, SamplingParams())
    content = lists.listed(Kind.CHAT, samples[:2])["content"]
    content += lists.listed(Kind.CHAT, samples[2:])["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == TEXT.encode()
    tokens = [entry["token"] for entry in content]
    assert r"\xf0" in tokens[2] and "\ufffd" not in "".join(tokens)
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in content)


def test_completions_name_bytes_and_count_characters(any_tokenizer: Any) -> None:
    samples = sampled(any_tokenizer, TEXT)
    lists = LogprobLists(any_tokenizer, SamplingParams())
    found = lists.listed(Kind.COMPLETION, samples)
    data = [_data(token) for token in found["tokens"]]
    assert b"".join(data) == TEXT.encode()
    before = [b"".join(data[:i]).decode("utf-8", "ignore") for i in range(len(data))]
    assert found["text_offset"] == [len(text) for text in before]
    tops = found["top_logprobs"]
    assert all(len(top) == 2 for top, token in zip(tops, data, strict=True) if token[0] >= 0xF0)
    assert all(token in top for token, top in zip(found["tokens"], tops, strict=True))


def test_a_replacement_character_is_its_own_text(any_tokenizer: Any) -> None:
    samples = sampled(any_tokenizer, "a\ufffd")
    content = LogprobLists(any_tokenizer, SamplingParams()).listed(Kind.CHAT, samples)["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "a\ufffd".encode()


def _data(token: str) -> bytes:
    """As a client reads it."""
    if not token.startswith("bytes:"):
        return token.encode()
    return token.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")
