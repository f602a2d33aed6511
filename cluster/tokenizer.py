"""The store's tokenizer, and which tokens end a text."""

import json
import logging
from pathlib import Path
from typing import Any

from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")

CHOOSING = ("model_type", "model_name", "tokenizer_class")
"""What AutoTokenizer looks at in a configuration when the tokenizer's own files name a class."""


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
        tokenizer = AutoTokenizer.from_pretrained(
            path, config=_choosing_config(path), local_files_only=True, use_fast=True
        )
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read the tokenizer in {path}: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise StoreError(f"{path} has no tokenizer.json: save the model's fast tokenizer there")
    return tokenizer


def _choosing_config(path: Path) -> Any:
    """What AutoTokenizer finds the class of the tokenizer in `path` by. None where the tokenizer's own files name none:
    then it takes the model's configuration, and with its class a second to import models' code."""
    tokenizer, model = (_read(path / name) for name in ("tokenizer_config.json", "config.json"))
    if "tokenizer_class" not in tokenizer or "auto_map" in tokenizer or not model:
        return None
    from transformers import PretrainedConfig

    chosen = {key: model[key] for key in CHOOSING if key in model}
    return PretrainedConfig(name_or_path=str(path), **chosen)


def _read(file: Path) -> dict[str, Any]:
    """Nothing of a file that is not there or damaged; AutoTokenizer says so."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


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
