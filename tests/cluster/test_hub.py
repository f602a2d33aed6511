"""Checkpoints named as on the Hugging Face Hub."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import STORIES
from hub import COMMIT, hub
from huggingface_hub import constants

from headrace.cluster.hub import local_checkpoint
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError


def test_a_model_is_converted_by_its_name(stories: Path, tmp_path: Path) -> None:
    """The command line opens the network, which it closes otherwise, for that."""
    with hub({"some/stories-9m": STORIES}) as (address, fetched):
        env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        env.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "headrace.cluster.cli.main", "convert", "some/stories-9m"]
        subprocess.run([*command, str(tmp_path / "store")], timeout=120, env=env, check=True)
    assert "model.safetensors.index.json" in fetched
    assert Store.open(tmp_path / "store").digest == Store.open(stories).digest


@dataclass
class Asked:
    """A Hub with some models, which can be closed, and what was fetched from it."""

    models: Mapping[str, Path]
    patch: pytest.MonkeyPatch
    fetched: list[str] = field(default_factory=list)
    broken: str = ""

    def __call__(self, name: str) -> Path:
        with hub(self.models, gated="org/gated", broken=self.broken) as (address, fetched):
            self.of(address)
            try:
                return local_checkpoint(Path(name))
            finally:
                self.fetched += fetched

    def of(self, address: str) -> None:
        self.patch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        self.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    names = {
        "org/split": ("big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "small.gguf", "README.md"),
        "org/pickles": ("config.json", "pytorch_model.bin"),
        "org/plain": ("config.json", "model.safetensors", "consolidated.safetensors"),
        "org/gated": ("config.json", "model.safetensors"),
    }  # fmt: skip
    for name, files in names.items():
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text(f"{name} {file}")
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return Asked({name: tmp_path / name for name in names}, monkeypatch)


def test_only_what_is_read_is_fetched_and_only_once(found: Asked) -> None:
    assert {p.name for p in found("org/plain").iterdir()} == {"config.json", "model.safetensors"}
    file = found("org/split/big-00001-of-00002.gguf")
    parts = ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf"]
    assert file.name == parts[0] and sorted(path.name for path in file.parent.iterdir()) == parts
    assert found(f"org/plain@{COMMIT}") == found("org/plain@main") == found("org/plain")
    assert sorted(found.fetched) == [*parts, "config.json", "model.safetensors"]


def test_without_a_network_what_was_fetched_does(found: Asked) -> None:
    there = found("org/plain")
    found.of("http://127.0.0.1:1")
    assert local_checkpoint(Path("org/plain")) == there
    with pytest.raises(HeadraceError, match=r"no such path here, and the Hub .* cannot be reached"):
        local_checkpoint(Path("org/pickles"))
    found.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    found.patch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HeadraceError, match="is not asked, since HF_HUB_OFFLINE is set"):
        found("org/pickles")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/none", r"no such path here and no such model on the Hub .*HF_TOKEN"),
        ("org/gated@main", r"accept its conditions at http://\S+/org/gated; .*`hf auth login`"),
        ("org/plain@v9", "the Hub has the model, but not this revision"),
        ("org/split", r"name one: org/split/big-00001-of-00002.gguf, or big-.*small.gguf$"),
        ("org/split/none.gguf", "has no file none.gguf"),
        ("org/pickles", "has neither model.safetensors, nor .*index.json, nor GGUF files"),
    ],
)
def test_what_cannot_be_had_is_said(found: Asked, name: str, said: str) -> None:
    with pytest.raises(HeadraceError, match=said):
        found(name)


def test_what_breaks_on_the_way_is_said_and_goes_on(found: Asked) -> None:
    found.broken = "model.safetensors"
    with pytest.raises(
        HeadraceError, match=r"^org/plain: fetching it .* failed: .*run the same[^\n]*$"
    ):
        found("org/plain")
    found.broken = ""
    assert (found("org/plain") / "model.safetensors").exists()
    assert sorted(found.fetched) == ["config.json", "model.safetensors"]


def test_a_small_disk_is_found_before_weights_are_fetched(
    found: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=24))
    with pytest.raises(
        HeadraceError, match=r"takes .* more in .*, where 24 B are free: set HF_HOME"
    ):
        found("org/plain")


@pytest.mark.parametrize("given", ["/no/where", "../no/where", "nowhere", "no/where.gguf", "a/b/c"])
def test_paths_are_not_asked_for(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert local_checkpoint(Path(given)) == Path(given)
