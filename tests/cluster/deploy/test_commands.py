"""Every command in the deployment files and their documentation is read by the real command line."""

import os
import shlex
import ssl
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from deployment import (
    DEPLOY,
    ROOT,
    TEXTS,
    UNITS,
    Unit,
    documents,
    headrace_lines,
    parse_headrace,
    shipped_variables,
)
from ray.scripts.scripts import cli as ray_cli


def parse_ray(words: list[str]) -> dict[str, Any]:
    assert words[:2] == ["ray", "start"]
    start: Any = ray_cli.commands["start"]
    given: dict[str, Any] = start.make_context("ray start", words[2:]).params
    return given


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_in_texts_are_taken(file: Path) -> None:
    for arguments in headrace_lines(file.read_text()):
        parse_headrace(arguments)


def test_commands_in_texts_are_found() -> None:
    found = [line for file in TEXTS for line in headrace_lines(file.read_text())]
    assert len(found) >= 13
    assert {line[0] for line in found} >= {"convert", "generate", "job", "plan", "serve"}
    text = "As `headrace plan` does:\n  headrace plan /m \\\n --stages ${N:-2} | less # quick"
    assert [*headrace_lines(text)] == [["plan", "/m", "--stages", "2"]]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.file.name)
def test_a_unit_runs_a_command_that_is_taken(unit: Unit) -> None:
    words = unit.command(shipped_variables(), Path("/run/credentials/x"))
    program, rest = Path(words[0]).name, words[1:]
    if program == "headrace":
        given = parse_headrace(rest)
        assert given["grace"] < float(unit.one("TimeoutStopSec")) - 20
    else:
        assert parse_ray([program, *rest])["block"]
    secret = [path.partition(":")[0] for path in unit.values("LoadCredential")]
    assert "ray-token" in secret
    assert unit.environment(Path("/c"))["RAY_AUTH_MODE"] == "token"
    assert unit.one("KillMode") == "mixed"


def test_compose_runs_commands_that_are_taken() -> None:
    [compose] = documents(DEPLOY / "compose" / "compose.yaml")
    services = compose["services"]
    head, worker = (parse_ray(services[name]["command"]) for name in ("head", "worker"))
    assert head["head"] and worker["address"] == "head:6379"
    script = services["serve"]["command"][2]
    for name, value in {"HEADRACE_STORE:-store": "store", "HEADRACE_STAGES:-2": "2"}.items():
        script = script.replace(f"${{{name}}}", value)
    joining, serving = (shlex.split(line) for line in script.strip().splitlines())
    parse_ray(joining)
    given = parse_headrace(serving[2:])
    [network] = compose["networks"]["ring"]["ipam"]["config"]
    assert given["interface"] == network["subnet"]


@pytest.mark.parametrize("file", sorted((DEPLOY / "ray-up").glob("*.yaml")), ids=lambda f: f.name)
def test_ray_up_starts_ray_with_options_that_it_has(file: Path) -> None:
    [config] = documents(file)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        words = shlex.split(config[key][1])
        parse_ray(words[words.index("ray") :])


@pytest.mark.parametrize("script", sorted(DEPLOY.rglob("*.sh")), ids=lambda script: script.name)
def test_a_script_is_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_development_certificates_are_trusted_by_their_authority(tmp_path: Path) -> None:
    script = DEPLOY / "certs" / "make-dev-certs.sh"
    for _ in range(2):  # a second time it makes another certificate of the same authority
        subprocess.run(["bash", script, tmp_path, "localhost", "127.0.0.1"], check=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "tls-cert.pem", tmp_path / "tls-key.pem")
    for name in ("localhost", "127.0.0.1"):
        client = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        near = client.wrap_bio(to_client, to_server, server_hostname=name)
        far = server.wrap_bio(to_server, to_client, server_side=True)
        for _ in range(3):
            for end in (near, far):
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        assert near.version() == "TLSv1.3"
    for key in tmp_path.glob("*key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
