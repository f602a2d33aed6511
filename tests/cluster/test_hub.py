"""Checkpoints named as on the Hugging Face Hub."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import STORIES
from hub import COMMIT, hub
from huggingface_hub import constants

from headrace.cluster.hub import local_checkpoint
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError


def convert(name: str, store: Path, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace.cluster.cli.main", "convert", name, str(store)]
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(store.parent / "home")}
    env |= {"COLUMNS": "400", "NO_COLOR": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=env, check=False
    )


def test_a_model_is_converted_by_its_name(stories: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(STORIES, tmp_path / "model"))
    (model / "pytorch_model.bin").write_bytes(b"what nobody reads")
    with hub({"some/stories-9m": model}) as (address, fetched):
        done = convert("some/stories-9m", tmp_path / "store", address)
        assert done.returncode == 0, done.stderr
        assert "model.safetensors.index.json" in fetched and "pytorch_model.bin" not in fetched
        assert Store.open(tmp_path / "store").digest == Store.open(stories).digest
        assert convert("some/stories-9m", tmp_path / "again", address).returncode == 0
        assert len(fetched) == len(set(fetched))
    # What was fetched does where the Hub cannot be reached; where nothing was, it says so.
    assert convert("some/stories-9m", tmp_path / "offline", address).returncode == 0
    failed = convert("some/other", tmp_path / "other", address)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "there is no such path here, and the Hub" in failed.stderr
    assert "cannot be reached" in failed.stderr and "Traceback" not in failed.stderr


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Asks a Hub with some models."""
    names = {
        "org/split": ("big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "small.gguf", "README.md"),
        "org/pickles": ("config.json", "pytorch_model.bin"),
        "org/plain": ("config.json", "model.safetensors", "consolidated.pth"),
        "org/gated": ("config.json",),
    }  # fmt: skip
    for name, files in names.items():
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text(f"{name} {file}")
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def ask(name: str) -> Path:
        with hub({name: tmp_path / name for name in names}, gated="org/gated") as (address, _):
            monkeypatch.setattr(constants, "ENDPOINT", address)
            template = address + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            return local_checkpoint(Path(name))

    return ask


def test_only_what_is_read_is_fetched(found: Callable[[str], Path]) -> None:
    assert {p.name for p in found("org/plain").iterdir()} == {"config.json", "model.safetensors"}
    file = found("org/split/big-00001-of-00002.gguf")
    assert file.name == "big-00001-of-00002.gguf"
    parts = {"big-00001-of-00002.gguf", "big-00002-of-00002.gguf"}
    assert {path.name for path in file.parent.iterdir()} == parts
    assert found(f"org/plain@{COMMIT}") == found("org/plain@main") == found("org/plain")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/none", r"no such path here and no such model on the Hub .*HF_TOKEN"),
        ("org/gated", r"accept its conditions at http://\S+/org/gated; .*`hf auth login`"),
        ("org/plain@v9", "the Hub has the model, but not this revision"),
        ("org/split", r"name one: org/split/big-00001-of-00002.gguf, or big-.*small.gguf$"),
        ("org/split/none.gguf", "has no file none.gguf"),
        ("org/pickles", "has neither safetensors nor GGUF files"),
    ],
)
def test_what_cannot_be_had_is_said(found: Callable[[str], Path], name: str, said: str) -> None:
    with pytest.raises(HeadraceError, match=said):
        found(name)


def test_a_small_disk_is_found_before_anything_is_fetched(
    found: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(
        HeadraceError, match=r"takes .* more in .*, where 10 B are free: set HF_HOME"
    ):
        found("org/plain")


@pytest.mark.parametrize("given", ["/no/where", "../no/where", "nowhere", "no/where.gguf", "a/b/c"])
def test_paths_are_not_asked_for(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert local_checkpoint(Path(given)) == Path(given)
