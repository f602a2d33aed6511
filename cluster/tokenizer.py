"""The store's tokenizer, and which tokens end a text."""

import json
import logging
from pathlib import Path
from typing import Any

from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def check_tokenizer(path: Path) -> None:
    """StoreError when there is no tokenizer in `path`; takes no time."""
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise StoreError(
            f"{path} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy the model's "
            "tokenizer files into it"
        )


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer in `path`. StoreError when there is none."""
    check_tokenizer(path)
    from transformers import AutoTokenizer  # seconds to import: only when a model is opened

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, use_fast=True)
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read the tokenizer in {path}: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise StoreError(f"{path} has no tokenizer.json: save the model's fast tokenizer there")
    return tokenizer


def stop_ids(store: Store, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a text: the generation config's, the config's and the tokenizer's."""
    found: set[int] = set()
    generation = store.path / "generation_config.json"
    configs = [store.config]
    if generation.exists():
        configs.append(json.loads(generation.read_text()))
    for config in configs:
        ids = config.get("eos_token_id")
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(found)
