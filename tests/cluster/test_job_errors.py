"""`headrace job` when there is nothing to talk to: one message each, before anything is started."""

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Refused, headrace

ARGUMENTS = ("/store", "--input", "/in.jsonl", "--output", "/out.jsonl")


@pytest.fixture
def web() -> Iterator[str]:
    """A web server that is no dashboard."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_wrong_address(refused: Refused, tmp_path: Path, web: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nobody = refused("job", "status", "x", "--address", f"http://127.0.0.1:{port}")
    assert "Connection refused" in nobody and "port 8265" in nobody
    assert "is no URL of a Ray dashboard" in refused("job", "logs", "x", "--address", "head:6379")
    # What this process was told of a token by a Ray that it started is not its own.
    own = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    with headrace(tmp_path, "job", "cancel", "x", "--address", web, **own) as command:
        assert command.wait(60.0) == 1, command.stderr
        other = " ".join(command.stderr.split())
    assert f"{web} does not answer as a Ray dashboard does" in other
    assert "Traceback" not in other


def test_a_command_that_could_not_run_is_not_submitted(refused: Refused) -> None:
    """Nothing is connected to: there is no dashboard here."""
    assert "Missing option '--output'" in refused("job", "submit", "--", *ARGUMENTS[:3], code=2)
    unknown = refused("job", "submit", "--", *ARGUMENTS, "--stagse", "2", code=2)
    assert "No such option: --stagse" in unknown
    relative = refused("job", "submit", "--", *ARGUMENTS, "--trace", "t.json")
    assert "t.json must be an absolute path" in relative
