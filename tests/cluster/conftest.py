"""The bundled model as a store, made once for all tests of the cluster layer."""

from pathlib import Path
from typing import Any

import pytest
from commands import STORIES

from headrace.cluster.tokenizer import load_tokenizer
from headrace.runtime.conversion.convert import convert


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/stories-9m in nf4. Tests that damage a store copy it first."""
    path = tmp_path_factory.mktemp("stories") / "stories.nf4"
    convert(STORIES, path, format="nf4")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(STORIES)
