"""A real Prometheus with the shipped configuration, told where a run's metrics are."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml
from commands import wait_for

from headrace.cluster.serving.addresses import bind

SHIPPED = Path(__file__).parents[1] / "cluster" / "prometheus"
ABSENT = "Prometheus is not installed (Debian: apt-get install prometheus)"


def installed() -> bool:
    return bool(shutil.which("prometheus") and shutil.which("promtool"))


def free_port() -> int:
    with bind("127.0.0.1", 0) as taken:
        return int(taken.getsockname()[1])


@dataclass(frozen=True)
class Prometheus:
    url: str

    def get(self, path: str, **arguments: str) -> Any:
        query = f"?{urlencode(arguments)}" if arguments else ""
        with urlopen(f"{self.url}/api/v1/{path}{query}", timeout=10.0) as answer:
            return json.load(answer)["data"]

    def ask(self, expr: str) -> dict[tuple[str, ...], float]:
        """The values of a query, by their labels' values in the order of their names."""
        found = {}
        for each in self.get("query", query=expr)["result"]:
            labels = sorted(each["metric"].items())
            found[tuple(value for _, value in labels)] = float(each["value"][1])
        return found

    def one(self, expr: str) -> float:
        (value,) = self.ask(expr).values()
        return value


def _configuration(folder: Path, targets: Mapping[str, str]) -> Path:
    """The shipped one, looking every second at these targets of its jobs, beside its rules."""
    made = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    made["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    jobs = {job["job_name"]: job for job in made["scrape_configs"]}
    for job, target in targets.items():
        assert jobs[job].pop("static_configs")
        jobs[job]["static_configs"] = [{"targets": [target]}]
    made["scrape_configs"] = [jobs[name] for name in targets]
    for name in made["rule_files"]:
        shutil.copy(SHIPPED / name, folder)
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(made))
    return file


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """Runs while the block does; `targets` are addresses by job."""
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={_configuration(folder, targets)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as run:
        try:
            made = Prometheus(f"http://127.0.0.1:{port}")
            wait_for(lambda: _is_up(made), 20.0, log.read_text)
            yield made
        finally:
            run.terminate()


def _is_up(made: Prometheus) -> bool:
    try:
        return bool(made.get("status/runtimeinfo"))
    except OSError:
        return False
