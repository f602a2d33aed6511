"""What tests of the cluster layer share: the bundled model as a store, Ray, and the command line."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from commands import STORIES, Refused

from headrace.cluster.cli.main import main
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


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """One Ray for all tests of a file that ask for it: engines use a connection that is there already."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run the command line, which must refuse; what it said, on one line."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: object, code: int = 1) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        said = capfd.readouterr().err
        assert exit_.value.code == code, said
        assert "Traceback" not in said
        assert said.count("error:") == (code == 1), said
        return " ".join(said.split())

    return run
