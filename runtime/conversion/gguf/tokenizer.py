"""The tokenizer that a GGUF file describes.

Byte-level vocabularies are built from the file: it names how text is split before merges, as llama.cpp's
llama-vocab.cpp defines it. Those of SentencePiece are transformers', with llama.cpp's rule for the first space.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headrace.runtime.conversion.gguf.metadata import Metadata
from headrace.scheduler.errors import StoreError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(number: str) -> str:
    return rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(number: str, suffix: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}|{number}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_QWEN2 = ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan")
_STARCODER = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
_LIKE_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "mellum", "a.x-4.0")

SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_LLAMA3, "dbrx", "smaug-bpe"), (_words(r"\p{N}{1,3}"),)),
    **dict.fromkeys(_QWEN2, (_words(r"\p{N}"),)),
    **dict.fromkeys(_STARCODER, (r"\p{N}", _GPT2)),
    **dict.fromkeys(_LIKE_GPT2, (_GPT2,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (_cased(r"\p{N}{1,3}", f"{_SUFFIX}?"),)),
    "tekken": (_cased(r"\p{N}", ""),),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""By tokenizer.ggml.pre: what cuts text, one after the other, each within the pieces of those before it."""

WHOLE_WORDS = (*_LLAMA3, "tekken", "minerva-7b")
"""Vocabularies whose entries are tokens although no merges lead to them."""

BEGINNING = (*_LLAMA3, "tekken")
"""Vocabularies whose texts begin with a token of its own, where the file does not say."""

CONTROL, USER_DEFINED = 3, 4

UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
"""Tokens of Phi 3 that do not take the spaces behind them, as all its others do. Files do not say so."""

ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<end_of_turn>",
    "<EOT>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
"""Tokens that end a turn or a text, beside the one that a file names as its end; as llama.cpp takes them."""


def tokenizer_of(file: Path, metadata: Metadata) -> Any:
    """StoreError for one that cannot be made exactly."""
    if metadata.whole("tokenizer.ggml.model") == "gpt2":
        return _byte_level(file, metadata)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # whatever its readers of single tokenizers raise
        raise _unreadable(file, f"transformers cannot read its tokenizer: {error}") from error
    if not metadata.arch.startswith("gemma"):
        _keep_spaces(tokenizer.backend_tokenizer, metadata)
    if metadata.arch == "phi3":
        added = _added_tokens(metadata, rstrip=True)
        tokenizer.backend_tokenizer.add_tokens([t for t in added if t.content not in UNSTRIPPED])
    return tokenizer


def _added_tokens(metadata: Metadata, *, rstrip: bool = False) -> list[AddedToken]:
    tokens = metadata.whole("tokenizer.ggml.tokens", [])
    types = metadata.whole("tokenizer.ggml.token_type", [])
    return [
        AddedToken(token, normalized=False, rstrip=rstrip, special=kind == CONTROL)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (CONTROL, USER_DEFINED)
    ]


def _keep_spaces(backend: Tokenizer, metadata: Metadata) -> None:
    """A space before each text, and all of the text's own, which transformers takes for the same where it
    begins with them."""
    replaced = normalizers.Replace(" ", "▁")
    prefixed = metadata.whole("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend("▁")] if prefixed else []
    backend.normalizer = normalizers.Sequence([*before, replaced])
    backend.pre_tokenizer = None


def _byte_level(file: Path, metadata: Metadata) -> PreTrainedTokenizerFast:
    name = metadata.whole("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise _unreadable(file, f"its tokenizer splits text as {name}, which is not known here")
    tokens = metadata.whole("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ", 1)) for pair in metadata.whole("tokenizer.ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=name in WHOLE_WORDS)
    except Exception as error:  # tokenizers raises nothing more special
        raise _unreadable(
            file, f"its vocabulary and merges do not belong together: {error}"
        ) from error
    backend = Tokenizer(model)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(each), "isolated") for each in SPLITS[name]]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, whole])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(_added_tokens(metadata))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.whole("tokenizer.chat_template"),
        model_max_length=metadata.get("context_length"),
        add_bos_token=metadata.whole("tokenizer.ggml.add_bos_token", name in BEGINNING),
        add_eos_token=metadata.whole("tokenizer.ggml.add_eos_token", False),
        clean_up_tokenization_spaces=False,
        **_special_tokens(metadata, tokens),
    )


def _special_tokens(metadata: Metadata, tokens: list[str]) -> dict[str, str]:
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: metadata.whole(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}


def end_tokens(metadata: Metadata) -> list[int]:
    """Every token that ends what a model says: files name one, and models of chats have more."""
    named = (metadata.whole(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    added = {token.content for token in _added_tokens(metadata)}
    tokens = metadata.whole("tokenizer.ggml.tokens", [])
    known = {i for i, token in enumerate(tokens) if token in ENDS and token in added}
    return sorted(known | {i for i in named if i is not None})


def _unreadable(file: Path, why: str) -> StoreError:
    return StoreError(
        f"{file}: {why}. Put the original tokenizer.json and tokenizer_config.json beside the file"
    )
