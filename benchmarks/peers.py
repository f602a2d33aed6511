"""The same job on what users would run instead: accelerate's offload, AirLLM, and Headrace.

    python benchmarks/peers.py /mnt/peers --json peers.json
    python benchmarks/peers.py /mnt/peers --json peers.json --peers airllm-bf16 headrace-nf4-host

One job: greedy continuation of 128 random prompts of 128 tokens by a few tokens each, an 8B shape
with random weights, the GPU held to 10 GiB, everybody in a process of its own. Results are merged
into the JSON file, so that a long comparison can be run in parts. A peer that is not installed,
fails or does not end in time is a row that says so.

Device memory is all that the process takes on the GPU, its CUDA context included (for peers, the
limit is on PyTorch's allocator; Headrace gets the limit less CONTEXT_BYTES). Host memory is the
anonymous memory of the process and its children: pages of mapped files are the page cache's.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from headrace.cluster.bench.driver import DeviceMeter
from headrace.cluster.bench.random_store import write_checkpoint, write_store
from headrace.cluster.bench.shapes import SHAPES, config_of
from headrace.cluster.cli.sizes import parse_size

CONTEXT_BYTES = 600 << 20
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Peer:
    """`package` must be importable; `runs` names the worker's function, `options` are its own."""

    package: str
    runs: str
    options: dict[str, Any] = field(default_factory=dict)


PEERS = {
    "accelerate-disk-bf16": Peer("accelerate", "accelerate", {"host": 1 << 30}),
    "accelerate-cpu-bf16": Peer("accelerate", "accelerate", {"host": 64 << 30}),
    "accelerate-disk-nf4": Peer("accelerate", "accelerate", {"host": 1 << 30, "nf4": True}),
    "airllm-bf16": Peer("airllm", "airllm", {"compression": None}),
    "airllm-4bit": Peer("airllm", "airllm", {"compression": "4bit"}),
    "headrace-bf16-nvme": Peer("headrace", "headrace", {"format": "bf16", "host": 0}),
    "headrace-bf16-host": Peer("headrace", "headrace", {"format": "bf16", "host": 64 << 30}),
    "headrace-nf4-nvme": Peer("headrace", "headrace", {"format": "nf4", "host": 0}),
    "headrace-nf4-host": Peer("headrace", "headrace", {"format": "nf4", "host": 64 << 30}),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="for the checkpoint, stores and offloaded files")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=8, help="tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device-memory", type=parse_size, default=10 << 30)
    parser.add_argument("--limit", type=float, default=420.0, help="seconds for each")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def prepared(arguments: argparse.Namespace, peer: Peer) -> Path:
    """What the peer reads, written unless it is there."""
    config = config_of(arguments.shape, arguments.layers)
    what = f"{arguments.shape}-{config['num_hidden_layers']}"
    if peer.runs == "headrace":
        fmt = peer.options["format"]
        return write_store(arguments.folder / f"{what}-{fmt}-store", config, fmt).path
    path: Path = arguments.folder / f"{what}-checkpoint"
    write_checkpoint(path, config)
    return path


class HostMeter:
    """Highest memory of a process and its descendants, in bytes."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.anonymous = self.rss = 0

    def sample(self) -> None:
        anonymous = rss = 0
        try:
            family = [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                info = process.memory_info()
            except psutil.NoSuchProcess:
                continue
            rss += info.rss
            anonymous += info.rss - info.shared
        self.anonymous, self.rss = max(self.anonymous, anonymous), max(self.rss, rss)


def run_peer(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    peer = PEERS[name]
    if importlib.util.find_spec(peer.package) is None:
        return {"error": f"{peer.package} is not installed"}
    job = {
        "runs": peer.runs,
        "options": peer.options,
        "path": str(prepared(arguments, peer)),
        "batch": arguments.batch,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "vocabulary": config_of(arguments.shape)["vocab_size"],
        "device": arguments.device,
        "device_memory": arguments.device_memory,
        "context_bytes": CONTEXT_BYTES if arguments.device == "cuda" else 0,
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        return run_worker(Path(folder), job, arguments.limit)


def run_worker(folder: Path, job: dict[str, Any], limit: float) -> dict[str, Any]:
    """The worker's result and what it took, or the end of what it said before it failed."""
    result, log = folder / "result.json", folder / "log.txt"
    device = DeviceMeter()
    text = json.dumps({**job, "scratch": str(folder / "scratch"), "result": str(result)})
    worker = Path(__file__).with_name("peer_worker.py")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(worker), text],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        host, deadline = HostMeter(process.pid), time.monotonic() + limit
        while process.poll() is None:
            device.sample()
            host.sample()
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return {"error": f"did not end within {limit:.0f} s"}
            time.sleep(POLL_SECONDS)
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    measured = {
        "device_bytes": device.most,
        "host_bytes": host.anonymous,
        "host_rss_bytes": host.rss,
    }
    if not result.exists():
        return {"error": last_words(log, process.returncode), **measured}
    return {**json.loads(result.read_text()), **measured}


def last_words(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1].strip()[-200:] if lines else "nothing"
    return f"failed (exit code {code}): {said}"


def table(arguments: argparse.Namespace, results: dict[str, dict[str, Any]]) -> Table:
    found = Table(
        title=f"{arguments.shape}: {arguments.batch} sequences, {arguments.prompt} + {arguments.new}"
        f" tokens, {arguments.device_memory / 2**30:.1f} GiB of device memory"
    )
    columns = ("peer", "s/pass", "tok/s", "prefill s", "start s", "GPU GiB", "host GiB", "")
    for name in columns:
        found.add_column(name, justify="left" if name in ("peer", "") else "right")
    for name, result in results.items():
        if "error" in result:
            found.add_row(name, *[""] * 6, result["error"])
            continue
        passing = result["pass_seconds"]
        found.add_row(
            name,
            "-" if passing is None else f"{passing:.3f}",
            f"{result['tokens_per_second']:.1f}",
            "-" if passing is None else f"{result['prefill_seconds']:.2f}",
            f"{result['start_seconds']:.1f}",
            f"{result['device_bytes'] / 2**30:.2f}",
            f"{result['host_bytes'] / 2**30:.2f}",
            result.get("note", ""),
        )
    return found


def merge(file: Path | None, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Old results that were not run again, then the new ones; in the order of PEERS."""
    old = json.loads(file.read_text()) if file and file.exists() else {}
    merged = {name: (old | results)[name] for name in PEERS if name in old or name in results}
    if file:
        file.write_text(json.dumps(merged, indent=1))
    return merged


def compare(arguments: argparse.Namespace, names: Sequence[str], console: Console) -> None:
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        console.print(f"{name} ...", highlight=False)
        results[name] = run_peer(arguments, name)
        merge(arguments.json, results)
    console.print(table(arguments, merge(arguments.json, results)))


def main() -> None:
    arguments = parse()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    compare(arguments, arguments.peers, Console(width=None if Console().is_terminal else 180))


if __name__ == "__main__":
    main()
