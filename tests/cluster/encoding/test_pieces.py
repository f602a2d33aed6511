"""Texts tokenized in pieces have the tokens that they have whole, for every kind of tokenizer."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from commands import STORIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.tokenizer import load_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 1234 o'clock, we'll see!\r\n\r\nAnd   then?",
    "def f(x):\n    return x ** 2\n\n\nclass A:\n\tpass  # naïve Ünïcödé\n",
    "今天天气很好。\n我们去公园吧。 日本語 한국어 Привет мир 👩‍👩‍👧 e\u0301",
] * 20
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<unk>"]


def split(*patterns: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(each), "isolated") for each in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*parts, last])


def bpe(pre: Any, normalizer: Any = None, *, around: bool = False) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre
    core.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=ALPHABET, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    if around:
        ids = [(name, SPECIAL.index(name)) for name in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=ids
        )
    return core


def sentence_bpe(pre: Any, normalizer: Any = None) -> Tokenizer:
    """In the manner of SentencePiece: characters, spaces as U+2581, bytes for what is unknown."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer, core.normalizer = pre, normalizer
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    )
    return core


def word_piece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    core.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False),
    )
    return core


def unigram(pre: Any) -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def with_added(core: Tokenizer, **options: bool) -> Tokenizer:
    core.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    core.add_tokens([AddedToken("fox jumps\nover", **options)])
    return core


def gpt2(**options: bool) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


CUT: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: bpe(gpt2()),
    "roberta": lambda: bpe(gpt2(add_prefix_space=True), around=True),
    "llama3": lambda: bpe(split(LLAMA3), around=True),
    "qwen": lambda: bpe(split(LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
    "o200k": lambda: bpe(split(O200K)),
    "deepseek": lambda: bpe(
        split(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK)
    ),
    "added tokens": lambda: with_added(bpe(split(LLAMA3))),
    "metaspace": lambda: sentence_bpe(pre_tokenizers.Metaspace()),
    "metaspace, first": lambda: sentence_bpe(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace, nfkc": lambda: sentence_bpe(pre_tokenizers.Metaspace(), normalizers.NFKC()),
    "word piece": word_piece,
    "unigram": lambda: unigram(pre_tokenizers.Metaspace()),
}
WHOLE: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "llama2": (
        lambda: sentence_bpe(
            None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        ),
        "its normalizer Prepend",
    ),
    "gemma": (lambda: sentence_bpe(None, normalizers.Replace(" ", "▁")), "it does not split texts"),
    "unigram": (lambda: unigram(pre_tokenizers.Metaspace(split=False)), "it does not split texts"),
    "looks back": (lambda: bpe(split(r"(?<=a)b|\s+|\S+?(?=b)|\S+")), "its pattern looks at what"),
    "strips": (lambda: bpe(gpt2(), normalizers.Strip()), "its normalizer Strip"),
    "whole words": (lambda: with_added(bpe(gpt2()), single_word=True), "one of its added tokens"),
}


FRAGMENTS = [
    *(
        " ",
        "  ",
        "\n",
        "\r\n",
        "\n\n ",
        "\t",
        "a b",
        " the fox",
        "it's",
        "I'LL we've",
        ".\n",
        "/",
        "12345",
    ),
    *(
        "。\n",
        "你好",
        "한국",
        "\u1112\u1161",
        "e\u0301",
        "\n\u0301",
        "\u200d",
        "👩",
        "Ünï",
        "\u00a0",
        "\u2028",
    ),
    *("▁", " ▁a", "<mask>", "fox jumps", "\nover", "fox jumps\nover lazy", *SPECIAL, "</", "s>"),
]
fragments = st.one_of(
    st.text(max_size=12),
    st.sampled_from(FRAGMENTS),
    st.builds(
        str.__mul__, st.sampled_from([" ", "\n", "a", "7", "ab ", "字"]), st.integers(1, 300)
    ),
)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Some fragments over and over, in an order that does not repeat."""
    parts = draw(st.lists(fragments, min_size=1, max_size=12))
    order = Random(draw(st.integers(0, 9)))
    return "".join(order.choices(parts, k=draw(st.integers(1, 400))))[:5000]


def encoder(core: Tokenizer) -> Encoder:
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=core), window=400)


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    bundled = Encoder(load_tokenizer(STORIES), window=400)
    return {"bundled": bundled, **{name: encoder(make()) for name, make in CUT.items()}}


@given(text=texts())
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("kind", ["bundled", *CUT])
def test_tokens_are_those_of_the_whole_text(
    kind: str, encoders: dict[str, Encoder], text: str
) -> None:
    tested = encoders[kind]
    assert not tested.is_whole
    want = tested.tokenizer(text)["input_ids"]
    assert tested.encode(text).tolist() == want
    assert tested.encode(text).tolist() == want, "as it was kept"


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_be_cut_is_taken_whole_and_that_is_said(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = WHOLE[kind]
    tested = encoder(make())
    assert tested.is_whole
    assert f"takes long texts whole: {reason}" in caplog.text
    text = "\n".join(CORPUS)
    assert tested.encode(text).tolist() == tested.tokenizer(text)["input_ids"]


def test_pieces_are_as_long_as_the_text_allows(encoders: dict[str, Encoder]) -> None:
    """A text that goes on without a place to cut is exact, too."""
    text = "word " * 50 + "x" * 3000 + " word" * 200
    tested = encoders["llama3"]
    assert tested.encode(text).tolist() == tested.tokenizer(text)["input_ids"]
