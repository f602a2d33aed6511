"""A Hugging Face Hub with a few models, on the loopback: what huggingface_hub asks of one."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = sha1(b"the only one").hexdigest()


@contextmanager
def hub(
    models: Mapping[str, Path], *, gated: str = "", broken: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Serves these folders as models by their names: its address, and the files that were fetched until now. Files of a
    `gated` one are not to be had, nor those of a `broken` name."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                parts = parts[2:]
            name, (kind, revision, *file) = "/".join(parts[:2]), parts[2:]
            if name == gated and kind == "resolve":  # everybody may see what there is
                self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            elif broken and file == [broken] and self.command == "GET":
                self._send(500, b"")
            elif name not in models:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif kind == "revision":
                self._send(200, _json({"id": name, "sha": COMMIT, "siblings": []}))
            elif kind == "tree":
                self._send(
                    200, _json([_entry(each, models[name]) for each in _files(models[name])])
                )
            else:
                data = (models[name] / Path(*file)).read_bytes()
                if self.command == "GET":
                    fetched.append("/".join(file))
                tags = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self._send(200, data, tags)

        def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", fetched
        finally:
            server.shutdown()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    data = file.read_bytes()
    oid = sha1(data).hexdigest()
    return {"type": "file", "path": str(file.relative_to(folder)), "size": len(data), "oid": oid}
