"""The bundled model behind a server, and OpenAI's client of it. Files that need another server have their own."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from served import Served, serving, stories_engine


@pytest.fixture(scope="module")
def served(stories: Path) -> Iterator[Served]:
    with stories_engine(stories) as engine, serving(engine) as made:
        yield made


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as made:
        yield made
