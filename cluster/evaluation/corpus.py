"""Texts that models are evaluated on: files, cut into windows of tokens."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.cluster.given_files import read_text
from headrace.cluster.tokenizer import load_tokenizer
from headrace.runtime.evaluation.windows import Windows, cut_windows
from headrace.runtime.store import Store
from headrace.runtime.sweep.source import SweptModel
from headrace.scheduler.errors import HeadraceError

CHARACTERS = 32
"""Of a file are read so many for each token that is wanted of it: no usual text has longer tokens."""


class Corpus:
    """The first `tokens` tokens of each file, by the model's tokenizer.

    Raises HeadraceError when a file cannot be read or none holds text, StoreError without a tokenizer.
    """

    def __init__(self, model: SweptModel, files: Sequence[Path], tokens: int) -> None:
        if not files:
            raise HeadraceError(
                "there is no text to evaluate on: give one or more --text FILE (plain text that the model was "
                "not tuned on, some ten thousand words)"
            )
        self.files = files
        self.tokenizer = tokenizer_of(model)
        self._path, self._tokens = model.path, tokens
        self._texts = [read_text("--text", file, tokens * CHARACTERS) for file in files]
        self.prefix = special_prefix(self.tokenizer)
        self._ids = self._tokenized(self.tokenizer)

    def require_same(self, model: SweptModel) -> None:
        """HeadraceError when the model reads the texts as other tokens."""
        if model.path != self._path and self._tokenized(tokenizer_of(model)) != self._ids:
            raise HeadraceError(
                f"{model.path} and {self._path} tokenize the texts differently, so that their predictions cannot be "
                "compared: give a reference with the same tokenizer"
            )

    def windows(self, context: int) -> Windows:
        """Raises HeadraceError when there is no room for a token, or none to predict."""
        if context <= len(self.prefix):
            raise HeadraceError(
                f"--context {context} has no room for text after the tokenizer's {len(self.prefix)} special tokens"
            )
        windows = cut_windows(self._ids, self.prefix, context)
        if windows is None:
            names = ", ".join(map(str, self.files))
            raise HeadraceError(f"{names}: not two tokens of text to predict")
        return windows

    def _tokenized(self, tokenizer: Any) -> list[list[int]]:
        return [
            tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: self._tokens]
            for text in self._texts
        ]


def tokenizer_of(model: SweptModel) -> Any:
    """A GGUF file's is made of what the file says. StoreError when there is none."""
    if isinstance(model, Store) or (model.path / "config.json").exists():
        return load_tokenizer(model.path)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in model.companions().items():
            (Path(folder) / name).write_bytes(data)
        (Path(folder) / "config.json").write_text(json.dumps(model.config))
        return load_tokenizer(Path(folder))


def special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: a BOS, for many models, without which they predict badly."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole: list[int] = tokenizer("a").input_ids
    starts = range(len(whole) - len(bare) + 1)
    start = next((i for i in starts if whole[i : i + len(bare)] == bare), 0)
    return whole[:start]
