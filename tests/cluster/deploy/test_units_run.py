"""The units' own commands on this machine, started and stopped as systemd does: a head with a token, a server on it,
and jobs.

systemd itself is not there: its part is replayed. KillMode=mixed is SIGTERM to the main process alone; what is left
when that has ended would be killed, and here fails the test.
"""

import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from commands import Command, headrace, python, wait_for
from deployment import DEPLOY, UNITS, Unit

from headrace.cluster.serving.addresses import bind
from headrace.cluster.serving.keys import add_key

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = Path(__file__).parents[3] / "examples" / "prompts.jsonl"
VENV = Path(sys.executable).parent
HEAD, SERVE = (
    next(unit for unit in UNITS if unit.file.name == f"headrace-{name}.service")
    for name in ("ray-head", "serve")
)
PORT = re.compile(r"(?<=port=)\d+")


def own_address() -> str:
    """One that is not the loopback's, where there is one."""
    found = [
        address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and name != "lo"
    ]
    return (found or ["127.0.0.1"])[0]


def free_ports(count: int) -> list[int]:
    taken = [bind("127.0.0.1", 0) for _ in range(count)]
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


@dataclass(frozen=True)
class Machine:
    """Where a unit's files are for once: `folder` for /var/lib/headrace, credentials of it, and ports by theirs."""

    folder: Path
    address: str
    ports: dict[str, int]

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports['8265']}"

    @property
    def gcs(self) -> str:
        return f"{self.address}:{self.ports['6379']}"

    def environment(self, unit: Unit) -> dict[str, str]:
        given = unit.environment(self.folder)
        return given | {
            "HOME": str(self.folder),
            "PATH": given["PATH"].replace("/opt/headrace/bin", str(VENV)),
        }

    def words(self, unit: Unit, **variables: str) -> list[str]:
        """ExecStart, without the program, here."""
        words = unit.command(variables, self.folder)[1:]
        there = [PORT.sub(lambda m: str(self.ports.get(m.group(), m.group())), w) for w in words]
        return [word.replace("/var/lib/headrace", str(self.folder)) for word in there]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A head that runs as its unit says, stopped as its unit says."""
    folder = Path(tempfile.mkdtemp(prefix="hr-", dir="/tmp"))  # sockets have short names
    (folder / "ray-token").write_text("5b1d" * 16 + "\n")
    (folder / "ray-token").chmod(0o600)
    used = [port for port in PORT.findall(HEAD.one("ExecStart")) if not port.startswith("20")]
    at = Machine(folder, own_address(), dict(zip(used, free_ports(len(used)), strict=True)))
    words = at.words(
        HEAD,
        NODE_IP=at.address,
        RAY_OPTIONS="--labels=headrace.dev/nvme=local --num-cpus=2 --object-store-memory=100000000"
        f" --ray-client-server-port={free_ports(1)[0]}",
    )
    try:
        with python(folder, VENV / "ray", *words, **at.environment(HEAD)) as head:
            wait_for(lambda: listens(at.ports["8265"]), 120.0, lambda: head.stderr)
            yield at
            stop(head, HEAD)
    finally:
        shutil.rmtree(folder)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def stop(command: Command, unit: Unit) -> None:
    """SIGTERM to the main process: it ends well and in time, and so does all that it started."""
    command.process.terminate()
    well = {"0", *unit.values("SuccessExitStatus")}
    assert str(command.wait(float(unit.one("TimeoutStopSec")))) in well, command.stderr
    wait_for(lambda: not command.processes(), 15.0, lambda: str(command.processes()))


def test_nobody_gets_in_without_the_token(machine: Machine, stories: Path) -> None:
    nobody = {"HOME": str(machine.folder / "nobody")}
    wrong = machine.folder / "wrong"
    wrong.write_text("0" * 64)
    asked = ("job", "status", "x", "--address", machine.dashboard)
    token = {"RAY_AUTH_TOKEN_PATH": str(machine.folder / "ray-token")}
    for given, told in (
        (nobody, "did not accept the token"),
        (nobody | {"RAY_AUTH_TOKEN_PATH": str(wrong)}, "did not accept the token"),
        (nobody | token, "has no job x"),  # it was let in
    ):
        with headrace(machine.folder, *asked, **given) as command:
            assert command.wait(60.0) == 1
            assert told in command.stderr
    rows = ("--input", PROMPTS, "--output", machine.folder / "none.jsonl", "--device", "cpu")
    run = ("generate", stories, *rows, "--address", machine.gcs)
    with headrace(machine.folder, *run, **nobody) as command:
        assert command.wait(180.0) == 1
        assert "cannot join the Ray cluster" in command.stderr
        assert "RAY_AUTH_TOKEN_PATH" in command.stderr


def test_a_job_ends_as_its_rows_do_and_goes_on_when_it_was_cancelled(
    machine: Machine, stories: Path
) -> None:
    folder = machine.folder
    lines = PROMPTS.read_text().splitlines()[:24]
    (folder / "in.jsonl").write_text("".join(line + "\n" for line in lines))
    client = {
        "RAY_API_SERVER_ADDRESS": machine.dashboard,
        "RAY_AUTH_TOKEN_PATH": str(folder / "ray-token"),
        "HOME": str(folder / "nobody"),
    }
    [port] = free_ports(1)
    network = ("--interface", f"{machine.address}/32", "--rendezvous-port", port)
    size = ("--stages", 2, "--device", "cpu", "--device-memory", "24MiB", "--host-memory", 0)
    work = ("--context", 256, "--max-sequences", 4, "--max-tokens", 60, *size, *network)
    rows = ("--input", folder / "in.jsonl", "--output", folder / "out.jsonl", *work)
    with headrace(
        folder, "job", "submit", "--id", "one", "--", stories, *rows, **client
    ) as command:
        assert command.wait(60.0) == 0, command.stderr
        assert command.stdout == "one\n"
    output = folder / "out.jsonl"
    wait_for(lambda: output.exists() and output.stat().st_size > 0, 180.0, lambda: "no row yet")
    assert (machine.address, port) in listening()
    with headrace(folder, "job", "cancel", "one", **client) as command:
        assert command.wait(120.0) == 0, command.stderr
        assert "one has ended: STOPPED" in command.stdout
    with headrace(folder, "job", "logs", "one", **client) as command:
        assert command.wait(60.0) == 0
        assert "rows are left. Finished rows are safe" in command.stdout
    assert 0 < len(output.read_text().splitlines()) < len(lines)
    with headrace(folder, "job", "submit", "--follow", "--", stories, *rows, **client) as command:
        assert command.wait(400.0) == 0, command.stderr
        assert f"{len(lines)} of {len(lines)} answered" in command.stdout
    found = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert sorted(found) == sorted(json.loads(line)["id"] for line in lines)
    bad = ("--input", folder / "nowhere.jsonl", "--output", folder / "o", *size)
    with headrace(folder, "job", "submit", "-f", "--id", "bad", "--", stories, *bad, **client) as c:
        assert c.wait(120.0) == 1
        assert "nowhere.jsonl" in c.stdout and "bad has ended: FAILED" in c.stderr


def listening() -> set[tuple[str, int]]:
    found = psutil.net_connections("tcp")
    return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}


def test_the_server_of_a_unit_lets_requests_finish(machine: Machine, stories: Path) -> None:
    folder = machine.folder
    key = add_key(folder / "api-keys", "me", None)
    certificates = DEPLOY / "certs" / "make-dev-certs.sh"
    subprocess.run(["bash", certificates, folder, "127.0.0.1"], check=True, capture_output=True)
    http, grpc, meet = free_ports(3)
    options = (
        f"--address {machine.gcs} --interface {machine.address}/32 --rendezvous-port {meet} --stages 2"
        " --device cpu --device-memory 24MiB --host-memory 0 --context 256"
        f" --files {folder}/files --port {http} --grpc-port {grpc}"
    )
    words = machine.words(SERVE, STORE=str(stories), SERVE_OPTIONS=options)
    trusted = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    url = f"https://127.0.0.1:{http}"

    def ask(path: str, body: object = None) -> dict[str, object]:
        request = urllib.request.Request(
            url + path,
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60, context=trusted) as answer:
            return dict(json.load(answer))

    with headrace(folder, *words, **machine.environment(SERVE)) as server:
        wait_for(lambda: "is served at" in server.stdout, 180.0, lambda: server.stderr)
        asked = {"prompt": "Once", "max_tokens": 5, "temperature": 0}
        assert ask("/v1/completions", asked)["usage"]["completion_tokens"] == 5  # type: ignore[index]
        arguments = " ".join(psutil.Process(server.process.pid).cmdline())
        for secret in (key, (folder / "ray-token").read_text().strip()):
            assert secret not in arguments + server.stdout + server.stderr
        started = time.monotonic()
        stop(server, SERVE)
        assert time.monotonic() - started < 60.0
