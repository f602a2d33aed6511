"""What cannot work is refused with one message and an exit code, never with a traceback."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from architectures import tiny_config
from commands import STORIES, Refused
from leftovers import our_threads
from transformers import AutoModelForCausalLM

from headrace.cluster.job_files import JobFiles
from headrace.runtime.store import Store
from headrace.scheduler.request import SamplingParams


@pytest.fixture
def store(stories: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(stories, tmp_path / "copy.nf4"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORIES, tmp_path / "checkpoint"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "a", "prompt": "Once upon a time"}\n')
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB, where the store takes 6.8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_truncated_layer(refused: Refused, store: Path) -> None:
    layer = Store.open(store).layers[3].file
    os.truncate(layer, layer.stat().st_size - 4096)
    said = refused("inspect", store)
    assert "block 'layer-00003' is truncated" in said and "convert again" in said
    assert said == refused("plan", store, "--device", "cpu")


def test_a_kv_format_that_there_is_not(refused: Refused, store: Path) -> None:
    said = refused("plan", store, "--device", "cpu", "--kv-format", "fp8", code=2)
    assert "'fp8' is not one of 'auto', 'bf16', 'int8', 'int4'" in said


def test_a_flipped_bit(refused: Refused, store: Path) -> None:
    layer = Store.open(store).layers[3].file
    data = bytearray(layer.read_bytes())
    data[-5000] ^= 1
    layer.write_bytes(data)
    said = refused("inspect", store, "--verify")
    assert "block 'layer-00003' is damaged" in said and "convert again" in said


def test_no_tokenizer(refused: Refused, store: Path, checkpoint: Path, rows: Path) -> None:
    for folder in (store, checkpoint):
        for file in folder.glob("tokenizer*"):
            file.unlink()
    output = store.parent / "out.jsonl"
    said = refused("generate", store, "--input", rows, "--output", output, "--device", "cpu")
    assert "has no tokenizer" in said and "copy the model's tokenizer files into it" in said
    assert "has no tokenizer" in refused("convert", checkpoint, store.parent / "new")


@pytest.mark.slow
def test_a_damaged_tokenizer(refused: Refused, store: Path, rows: Path) -> None:
    """Found while Ray starts, and told when what was started is gone."""
    (store / "tokenizer.json").write_text("{")
    output = store.parent / "out.jsonl"
    said = refused("generate", store, "--input", rows, "--output", output, "--device", "cpu")
    assert "tokenizer" in said and str(store) in said
    assert not ray.is_initialized()
    assert not any(t.name.startswith("headrace-start") for t in our_threads())


def test_an_unknown_architecture(refused: Refused, checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "nonsense"}))
    said = refused("convert", checkpoint, tmp_path / "new")
    assert "model_type 'nonsense' is unknown" in said


def test_an_architecture_that_would_be_wrong(refused: Refused, tmp_path: Path) -> None:
    source = tmp_path / "phimoe"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("phimoe")).save_pretrained(source)
    shutil.copy(STORIES / "tokenizer.json", source)
    said = refused("convert", source, tmp_path / "new")
    assert "phimoe is not supported" in said and "logits are off" in said
    assert not (tmp_path / "new" / "headrace.json").exists()


def test_paths_that_are_something_else(refused: Refused, stories: Path, tmp_path: Path) -> None:
    assert "no store at" in refused("plan", tmp_path / "none")
    assert "headrace convert" in refused("plan", STORIES)
    assert "is a store already" in refused("convert", stories, tmp_path / "new")
    assert "download the model first" in refused("convert", tmp_path / "none", tmp_path / "new")


def test_a_disk_that_is_full(refused: Refused, small_disk: Path) -> None:
    said = refused("convert", STORIES, small_disk / "store")
    assert str(small_disk) in said
    assert "No space left" in said or "free" in said


def test_a_model_beyond_every_budget(refused: Refused, stories: Path) -> None:
    options = ("--device", "cpu", "--context", "256")
    said = refused("plan", stories, *options, "--device-memory", "1MiB")
    assert "stage 0 of 1 needs at least" in said and "has 1.00 MiB" in said
    assert "--device-memory at least" in said and "--context" in said
    assert "--stages 99 cannot share 12 layers" in refused("plan", stories, "--stages", 99)
    options = ("--device", "cpu", "--device-memory", "60MiB")
    said = refused("plan", stories, *options, "--host-memory", 0, "--kv-host-memory", "1MiB")
    assert "--kv-host-memory 1.00 MiB is not within the 0 B of host memory" in said
    said = refused("plan", stories, *options, "--kv-host-memory", "1KiB")
    assert "--kv-host-memory 1.00 KiB holds no KV page" in said


def test_sizes_and_devices(refused: Refused, stories: Path, rows: Path, tmp_path: Path) -> None:
    assert "'lots' is not a size" in refused("plan", stories, "--device-memory", "lots")
    job = ("generate", stories, "--input", rows, "--output", tmp_path / "out.jsonl")
    assert "top_p must be" in refused(*job, "--top-p", "2")
    unreachable = refused(*job, "--device", "cpu", "--address", "127.0.0.1:1")
    assert "cannot reach --address 127.0.0.1:1: Connection refused" in unreachable
    if not torch.cuda.is_available():
        assert "PyTorch sees no CUDA device" in refused(*job, "--device", "cuda")
        assert "PyTorch sees no CUDA device" in refused("plan", stories, "--device", "cuda")


def test_cuda_graphs_without_cuda(refused: Refused, stories: Path) -> None:
    said = refused("plan", stories, "--device", "cpu", "--graphs")
    assert "--graphs makes CUDA graphs" in said and "leave it out" in said


def test_an_output_that_cannot_be_written(
    refused: Refused, stories: Path, rows: Path, tmp_path: Path
) -> None:
    job = ("generate", stories, "--input", rows, "--device", "cpu", "--output")
    (tmp_path / "folder").mkdir()
    assert "Is a directory: choose an --output" in refused(*job, tmp_path / "folder")
    assert "does not exist; make it" in refused(*job, tmp_path / "none" / "out.jsonl")
    assert "cannot open /proc/out.jsonl" in refused(*job, "/proc/out.jsonl")
    assert "is the --input: choose another --output" in refused(*job, rows)
    assert rows.read_text()


def test_an_input_that_cannot_be_read(refused: Refused, stories: Path, tmp_path: Path) -> None:
    job = ("generate", stories, "--device", "cpu", "--output", tmp_path / "out.jsonl", "--input")
    assert "cannot read --input" in refused(*job, tmp_path / "none.jsonl")
    assert "is not a regular file" in refused(*job, tmp_path)


def test_a_second_job_on_an_output(
    refused: Refused, stories: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    defaults = SamplingParams(max_tokens=256)
    with JobFiles(rows, output, Store.open(stories).digest, defaults):
        said = refused("generate", stories, "--input", rows, "--output", output, "--device", "cpu")
    assert f"another job is writing {output}: wait for it or choose another --output" in said


def test_usage_errors(refused: Refused, stories: Path) -> None:
    assert "Missing option" in refused("generate", stories, "--input", "in.jsonl", code=2)
    assert "Invalid value for '--stages'" in refused("plan", stories, "--stages", "x", code=2)
    assert "'q9' is not one of 'keep'" in refused("convert", "a", "b", "--format", "q9", code=2)
    assert "No such command" in refused("chat", code=2)
    assert "Missing argument" in refused("serve", code=2)
    assert "No such option" in refused("plan", stories, "--speed", "high", code=2)
