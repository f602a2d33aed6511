"""Tokenizers of GGUF files, by what llama.cpp and the original tokenizers make of such vocabularies."""

from pathlib import Path
from typing import Any

import gguf
import pytest

from headrace.runtime.conversion.gguf.metadata import Metadata
from headrace.runtime.conversion.gguf.tokenizer import end_tokens, tokenizer_of
from headrace.scheduler.errors import StoreError

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
CONFIG = {
    "block_count": 1,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "attention.head_count": 1,
    "attention.head_count_kv": 1,
    "context_length": 64,
}


def written(
    path: Path, model: str, tokens: dict[str, int], arch: str = "llama", **more: Any
) -> tuple[Path, Metadata]:
    """A file of a vocabulary alone: tokens with their types."""
    writer = gguf.GGUFWriter(path / "model.gguf", arch)
    for key, value in CONFIG.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(tokens.values()))
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / "model.gguf", Metadata(gguf.GGUFReader(path / "model.gguf"))


def byte_level(path: Path, pre: str, *words: str, **more: Any) -> tuple[Path, Metadata]:
    letters = [chr(i) for i in range(33, 127)] + ["\u0120", "\u010a", "\u00c2", "\u00bd"]
    control = ["<|eot_id|>", "<\uff5cUser\uff5c>"]
    tokens = dict.fromkeys((*letters, *words), NORMAL) | dict.fromkeys(control, CONTROL)
    return written(path, "gpt2", tokens, tokenizer_pre=pre, **more)


def pieces(found: tuple[Path, Metadata], text: str) -> list[str]:
    tokenizer = tokenizer_of(*found)
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids))


@pytest.mark.parametrize(
    ("pre", "three", "half"),
    [("llama-bpe", True, True), ("qwen2", False, False), ("starcoder", False, False)],
)
def test_numbers_are_cut_as_the_file_says(
    pre: str, three: bool, half: bool, tmp_path: Path
) -> None:
    """After up to three digits, or after each; a fraction is a digit."""
    merges = ["1 2", "12 3", "123 4", "1 \u00c2", "1\u00c2 \u00bd"]
    words = ["12", "123", "1234", "1\u00c2", "1\u00c2\u00bd"]
    found = byte_level(tmp_path, pre, *words, token_merges=merges, add_bos_token=False)
    assert pieces(found, "1234") == (["123", "4"] if three else ["1", "2", "3", "4"])
    assert (pieces(found, "1\u00bd") == ["1\u00c2\u00bd"]) == half


def test_words_without_merges(tmp_path: Path) -> None:
    """Llama 3's vocabulary has some, which are tokens all the same."""
    more = {"token_merges": ["a b"], "add_bos_token": False}
    found = byte_level(tmp_path, "llama-bpe", "ab", "cde", **more)
    assert pieces(found, "cde") == ["cde"]
    assert pieces(byte_level(tmp_path, "gpt-2", "ab", "cde", **more), "cde") == ["c", "d", "e"]


def test_special_tokens(tmp_path: Path) -> None:
    """Those in letters of no byte stay whole; Llama 3's texts begin with one, where the file does not say."""
    more: dict[str, Any] = {"token_merges": ["a b"], "bos_token_id": 0, "eos_token_id": 1}
    found = byte_level(tmp_path, "llama-bpe", "ab", **more)
    assert pieces(found, "ab<\uff5cUser\uff5c>b") == ["!", "ab", "<\uff5cUser\uff5c>", "b"]
    assert [found[1].whole("tokenizer.ggml.tokens")[i] for i in end_tokens(found[1])] == [
        '"',
        "<|eot_id|>",
    ]
    assert tokenizer_of(*found).model_max_length == 64
    found = byte_level(tmp_path, "qwen2", "ab", **more)
    assert pieces(found, "ab") == ["ab"]


def test_splits_that_are_not_known_are_refused(tmp_path: Path) -> None:
    found = byte_level(tmp_path, "poro-chat", "ab", token_merges=["a b"])
    with pytest.raises(StoreError, match=r"as poro-chat, .* Put the original tokenizer\.json"):
        tokenizer_of(*found)


def sentencepiece(path: Path, arch: str = "llama", **more: Any) -> tuple[Path, Metadata]:
    tokens = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<|user|>": CONTROL}
    tokens |= {f"<0x{i:02X}>": BYTE for i in range(256)}
    words = {"\u2581": -4.0, "a": -3.0, "\u2581a": -1.0, "\u2581\u2581": -2.0}
    scores = [0.0] * len(tokens) + list(words.values())
    tokens |= dict.fromkeys(words, NORMAL)
    return written(path, "llama", tokens, arch, token_scores=scores, bos_token_id=1, **more)


@pytest.mark.parametrize("prefix", [True, False])
def test_spaces_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    """llama.cpp puts one before each text, also where it begins with spaces."""
    found = sentencepiece(tmp_path, add_space_prefix=prefix)
    mark = ["\u2581"] if prefix else []
    assert pieces(found, "a") == ["<s>", "\u2581a" if prefix else "a"]
    assert pieces(found, " ") == ["<s>", "\u2581\u2581" if prefix else "\u2581"]
    assert pieces(found, " a") == ["<s>", *mark, "\u2581a"]


def test_tokens_of_phi_3_take_spaces_behind_them(tmp_path: Path) -> None:
    found = sentencepiece(tmp_path, "phi3")
    assert pieces(found, "<|user|>\n a") == ["<s>", "<|user|>", "\u2581a"]
    assert pieces(found, "<s> a") == ["<s>", "<s>", "\u2581", "\u2581a"]
