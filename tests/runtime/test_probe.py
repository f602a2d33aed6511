import json
import os
from pathlib import Path

import pytest
import torch

from headrace.runtime.probe import VERSION, measure_disk, probe_device
from headrace.scheduler.errors import StoreError

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "store"
    directory.mkdir()
    (directory / "layer-00000.safetensors").write_bytes(os.urandom(9 << 20))
    (directory / "embed.safetensors").write_bytes(os.urandom(5000))
    return directory


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "headrace").iterdir())


def test_measures_once_and_remembers(store: Path, tmp_path: Path) -> None:
    profile = probe_device(CPU, store)
    assert profile.kind == "cpu"
    assert profile.nvme_gbps > 0 and profile.host_gbps > 0.1 and profile.tflops > 0.001
    assert profile.hbm_gbps == pytest.approx(2 * profile.host_gbps)
    (file,) = cached(tmp_path)
    assert file.name.startswith("probe-") and file.suffix == ".json"
    assert probe_device(CPU, store / "embed.safetensors") == profile  # same device and drive

    record = json.loads(file.read_text())
    record["profile"]["tflops"] = 123.0
    file.write_text(json.dumps(record))
    assert probe_device(CPU, store).tflops == 123.0
    assert probe_device(CPU, store, refresh=True).tflops < 123.0


@pytest.mark.parametrize("text", ["", f'{{"version": {VERSION}, "profile": {{}}}}'])
def test_an_unusable_cache_is_measured_again(store: Path, tmp_path: Path, text: str) -> None:
    first = probe_device(CPU, store)
    (file,) = cached(tmp_path)
    file.write_text(text)
    assert probe_device(CPU, store).kind == first.kind
    assert json.loads(file.read_text())["version"] == VERSION
    assert cached(tmp_path) == [file]


def test_a_cache_that_cannot_be_written_is_no_failure(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    assert probe_device(CPU, store).tflops > 0
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("size", [1, 5000, 4096, (4 << 20) + 1])
def test_reads_files_of_any_size(tmp_path: Path, size: int) -> None:
    file = tmp_path / "block"
    file.write_bytes(bytes(size))
    assert measure_disk(file, seconds=0.02).gbps > 0


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no \.safetensors file"):
        probe_device(CPU, tmp_path)
    with pytest.raises(StoreError, match="cannot be read"):
        measure_disk(tmp_path / "missing")


@pytest.mark.gpu
def test_cuda(store: Path) -> None:
    profile = probe_device(torch.device("cuda", 0), store)
    assert profile.kind == "cuda"
    assert profile.hbm_gbps > profile.host_gbps > 0.5 and profile.tflops > 1
