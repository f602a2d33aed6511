"""Three hosts on one machine, with a slow network between them and slow drives: what a ring does there.

    python benchmarks/hosts.py [--directory DIR] [--only ring splits machine long pair] [--json FILE]

As root, on Linux: hosts are namespaces, their networks 10 ms and 100 Mbit/s in a switch in user space
(hosts_switch.py), their drives this machine's as fast as a cgroup lets each host read. A store of random weights
(0.3 GB) is made in DIR.

- ring: a ring over all hosts gives the tokens that one host does, `headrace doctor` says what lies between hosts, and
  hidden states and the rendezvous keep to the interface that was asked for.
- splits: layers shared by what was measured, and evenly; expected and measured.
- machine, long: a host is cut off from the others for 20 s and for 90 s. pair: two hosts lose each other's hidden
  states for 90 s, while all else reaches them. Every answer is compared with one host's.
"""

import argparse
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosts_cluster import DATA, RAY, Cluster, cluster
from hosts_network import can_slow, missing
from what_if import CONFIG

from headrace.cluster.bench.random_store import write_store

DRIVES = (60e6, 60e6, 15e6)
"""Bytes a second. All hosts read from the same drive, which has to have that many for all; and so few that three
hosts' computing, on the same processors, hides behind them."""

TURNS = 3
SPLIT_TOKENS = 12

PORT = 29400
LINE_SECONDS = 400.0
PASSES_BEFORE_CUT = 4


@dataclass(frozen=True)
class Outage:
    """`cut` is called, and healed after so many seconds."""

    name: str
    seconds: float
    cut: Callable[[Cluster], None]


OUTAGES = (
    Outage("machine", 20.0, lambda hosts: hosts.cut_off(2)),
    Outage("long", 90.0, lambda hosts: hosts.cut_off(2)),
    Outage("pair", 90.0, lambda hosts: hosts.data.cut(1, 2)),
)


class Lines:
    """What a role of hosts_ring.py prints, as it comes."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.seen: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(b"{"):
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def next(self, what: str, count: int = 1) -> dict[str, Any]:
        """The `count`th line of the kind from now on. SystemExit when the process ends before."""
        while count:
            line = self._lines.get(timeout=LINE_SECONDS)
            if line is None:
                raise SystemExit(f"hosts_ring.py ended before {what!r}; see its messages above")
            self.seen.append(line)
            count -= line["what"] == what
        return self.seen[-1]

    def all(self, what: str) -> list[dict[str, Any]]:
        return [line for line in self.seen if line["what"] == what]


@contextmanager
def role(hosts: Cluster, name: str, store: Path, *more: str, over: bool = True) -> Iterator[Lines]:
    """A role of hosts_ring.py on the first host; `over` all hosts."""
    script = str(Path(__file__).with_name("hosts_ring.py"))
    network = ["--address", hosts.address, "--interface", DATA.cidr, "--rendezvous-port", str(PORT)]
    words = [sys.executable, script, name, str(store), *(network if over else []), *more]
    process = hosts.start(0, words, out=subprocess.PIPE)
    try:
        yield Lines(process)
        process.wait()
    finally:
        process.terminate()
        process.wait()


def expected_tokens(hosts: Cluster, store: Path) -> list[list[int]]:
    with role(hosts, "one-host", store, over=False) as lines:
        return list(lines.next("answers")["tokens"])


def run_ring(hosts: Cluster, store: Path, want: list[list[int]]) -> dict[str, Any]:
    """Bytes that each host's interfaces received and sent during the passes, and who was connected to whom."""
    with role(hosts, "ring", store) as lines:
        ready = lines.next("ready")
        before = [host.received() for host in hosts.hosts]
        lines.next("tokens", PASSES_BEFORE_CUT)
        sockets = [host.output("ss", "-tnpH", "state", "established") for host in hosts.hosts]
        same = lines.next("answers")["tokens"] == want
        after = [host.received() for host in hosts.hosts]
    traffic = [
        {name: (b[name][0] - a[name][0], b[name][1] - a[name][1]) for name in a}
        for a, b in zip(before, after, strict=True)
    ]
    words = [
        "headrace", "doctor", "--json", "--address", hosts.address, "--interface", DATA.cidr
    ]  # fmt: skip
    process = hosts.start(0, words, out=subprocess.PIPE)
    findings = json.loads(process.communicate()[0])
    links = [one for one in findings["nodes"]["cluster"] if one["area"] == "links"]
    return {
        "same": same,
        "layers": ready["layers"],
        "traffic": traffic,
        "rendezvous": sorted(_meeting(sockets)),
        "edges": sorted(_edges(sockets)),
        "links": [f"{one['check']}: {one['found']}" for one in links],
    }


def _meeting(sockets: list[str]) -> set[str]:
    """Local addresses of connections to and from the rendezvous."""
    found = set()
    for line in "\n".join(sockets).splitlines():
        words = line.split()
        if any(word.endswith(f":{PORT}") for word in words[2:4]):
            found.add(_address(words[2]))
    return found


def _edges(sockets: list[str]) -> set[str]:
    """Local addresses of stages' connections to stages: of one process of that name on both sides."""
    ends = {}
    for host, text in enumerate(sockets):
        for line in text.splitlines():
            words = line.split()
            if len(words) > 4 and "ray::" in words[4] and f":{PORT}" not in line:
                ends[words[2], words[3]] = host
    return {_address(a) for a, b in ends if (b, a) in ends and ends[a, b] != ends[b, a]}


def _address(end: str) -> str:
    return end.rpartition(":")[0].strip("[]").removeprefix("::ffff:")


def run_splits(hosts: Cluster, store: Path) -> dict[str, Any]:
    with role(hosts, "splits", store, "--turns", str(TURNS), "--new", str(SPLIT_TOKENS)) as lines:
        while len(lines.all("split")) < 2 * TURNS:
            lines.next("split")
        found = lines.all("split")
    return {
        name: {
            "expected": statistics.median(one["expected"] for one in some),
            "measured": statistics.median(seconds for one in some for seconds in one["rounds"]),
            "medians": [one["median"] for one in some],
            "layers": [dict(zip(one["nodes"], one["layers"], strict=True)) for one in some],
            "drives": [dict(zip(one["nodes"], one["drives"], strict=True)) for one in some],
            "hops": [one["hops"] for one in some],
        }
        for name in ("planned", "even")
        for some in [[one for one in found if one["name"] == name]]
    }


def run_outage(hosts: Cluster, store: Path, want: list[list[int]], one: Outage) -> dict[str, Any]:
    with role(hosts, "ring", store) as lines:
        lines.next("tokens", PASSES_BEFORE_CUT)
        one.cut(hosts)
        cut = time.monotonic()
        healing = threading.Timer(one.seconds, hosts.heal)
        healing.start()
        noticed = lines.next("told")
        try:
            passed = lines.next("tokens")
            same = lines.next("answers")["tokens"] == want
            recoveries = lines.next("recoveries")["found"]
        finally:
            healing.join()
            hosts.heal()
    hosts.await_nodes()
    return {
        "same": same,
        "noticed": noticed["at"] - cut,
        "again": passed["at"] - cut - one.seconds,
        "outage": one.seconds,
        "told": [line["text"] for line in lines.all("told")],
        "replaced": [recovery["stages"] for recovery in recoveries],
        "rounds": [recovery["rounds"] for recovery in recoveries],
    }


def report(name: str, found: dict[str, Any]) -> None:
    if name == "ring":
        print(f"ring: same tokens as one host: {found['same']}; layers {found['layers']}")
        for host, traffic in enumerate(found["traffic"]):
            counts = ", ".join(
                f"{k} {a / 1e6:.2f} / {b / 1e6:.2f}" for k, (a, b) in traffic.items()
            )
            print(f"  host{host + 1} received / sent, MB: {counts}")
        print(
            f"  rendezvous at {', '.join(found['rendezvous'])}; edges at {', '.join(found['edges'])}"
        )
        print("\n".join(f"  {line}" for line in found["links"]))
    elif name == "splits":
        for split, one in found.items():
            off = one["expected"] / one["measured"] - 1
            print(
                f"{split} split: expected {one['expected']:.2f} s, measured {one['measured']:.2f} s"
                f" ({off:+.0%}), medians {[round(s, 2) for s in one['medians']]}, layers {one['layers'][0]}"
            )
        planned, even = found["planned"], found["even"]
        print(
            f"  the planned split is {even['measured'] / planned['measured']:.2f} times as fast, expected"
            f" {even['expected'] / planned['expected']:.2f}"
        )
    else:
        print(
            f"{name}: cut for {found['outage']:.0f} s, noticed after {found['noticed']:.1f} s; the next pass"
            f" {found['again']:.1f} s after healing; same tokens: {found['same']}; replaced"
            f" {found['replaced']} in rounds {found['rounds']}"
        )
        print("\n".join(f"  {line[:160]}" for line in found["told"]))
    sys.stdout.flush()


def main() -> int:
    names = ["ring", "splits", *(one.name for one in OUTAGES)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    why = missing() or (
        None if can_slow() else "there is no blkio cgroup (v1) to slow a drive with"
    )
    if why is None and shutil.which("headrace") is None:
        why = "headrace is not on the PATH"
    if why is not None:
        print(f"skipped: {why}")
        return 77
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-hosts-", dir=given.directory) as folder:
        store = write_store(Path(folder) / "store", CONFIG, "bf16").path
        print(f"networks: {RAY}, {DATA}; drives: {DRIVES}; {os.cpu_count()} processors", flush=True)
        with cluster(Path(folder), DRIVES) as hosts:
            want = expected_tokens(hosts, store) if {*given.only} - {"splits"} else []
            for name in names:
                if name not in given.only:
                    continue
                if name == "ring":
                    results[name] = run_ring(hosts, store, want)
                elif name == "splits":
                    results[name] = run_splits(hosts, store)
                else:
                    outage = next(one for one in OUTAGES if one.name == name)
                    results[name] = run_outage(hosts, store, want, outage)
                report(name, results[name])
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1))
    return 0 if all(one.get("same", True) for one in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
