from typing import Any

import pytest
from commands import STORIES

from headrace.cluster.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(STORIES)
