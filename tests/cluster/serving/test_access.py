"""Who is let in: keys, their limits, and addresses that others can reach."""

import http.client
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from certificates import make_certificate
from commands import wait_for
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from served import MODEL, EchoEngine, Served, serving
from typer.testing import CliRunner

from headrace.cluster.cli.main import app, main
from headrace.cluster.serving.keys import add_key, load_keys
from headrace.cluster.serving.server import Listener, ServerOptions
from headrace.scheduler.errors import HeadraceError

BODY = {"model": MODEL, "prompt": "a b c", "max_tokens": 2}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def engine(tokenizer: Any) -> Iterator[EchoEngine]:
    made = EchoEngine(tokenizer)
    yield made
    made.gate.set()


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_a_key_is_printed_once_and_kept_as_a_hash(keys: Path) -> None:
    runner = CliRunner()
    secret = runner.invoke(app, ["serve-key", "ann", "--file", str(keys)]).stdout.strip()
    limited = ["serve-key", "bob", "--file", str(keys), "--requests", "2"]
    other = runner.invoke(app, limited).stdout.strip()
    assert keys.stat().st_mode & 0o777 == 0o600
    assert secret not in keys.read_text()
    loaded = load_keys(keys)
    found = [loaded.find(each) for each in (secret, other, secret + "x", "", "ann")]
    assert [None if key is None else (key.name, key.limit) for key in found] == [
        ("ann", None),
        ("bob", 2),
        None,
        None,
        None,
    ]


def test_key_files_that_are_refused(keys: Path) -> None:
    with pytest.raises(HeadraceError, match="No such file"):
        load_keys(keys)
    add_key(keys, "ann", None)
    line = keys.read_text()
    for taken in ("ann", "a:b", "", "ä", "x" * 65):
        with pytest.raises(HeadraceError, match="name"):
            add_key(keys, taken, None)
    for content, why in (
        ("", "has no API keys"),
        ("# nobody\n", "has no API keys"),
        (line + line, "line 2: there are two keys named 'ann'"),
        (line + "bob:secret", "line 2: not NAME:SHA256"),
        (line.strip() + ":0", "line 1: not NAME:SHA256"),
    ):
        keys.write_text(content)
        with pytest.raises(HeadraceError, match=why):
            load_keys(keys)
    keys.write_text(line)
    keys.chmod(0o640)
    for use in (lambda: load_keys(keys), lambda: add_key(keys, "bob", None)):
        with pytest.raises(HeadraceError, match=r"mode 0640: others could use it. Run `chmod 600"):
            use()


def test_nothing_but_health_without_a_key(keys: Path, engine: EchoEngine) -> None:
    secret = add_key(keys, "ann", None)
    with serving(engine, api_keys=keys) as served:
        for path in ("/v1/models", "/metrics", "/nowhere"):
            assert served.ask("GET", path)[0] == 401
        assert served.ask("GET", "/health/live")[0] == 200
        wrong = [{}, bearer("hr-wrong"), bearer(""), {"Authorization": f"Basic {secret}"}]
        for headers in wrong:
            status, answer, found = served.ask("POST", "/v1/completions", BODY, headers)
            assert status == 401
            assert answer["error"]["code"] in ("missing_api_key", "invalid_api_key")
            assert found["www-authenticate"] == "Bearer"
        assert served.ask("POST", "/v1/completions", BODY, bearer(secret))[0] == 200
        with (
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="hr-wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key=secret) as client:
            assert client.completions.create(**BODY).choices[0].text == "a b"
    assert engine.tenants == ["ann", "ann"]


def test_a_key_has_so_many_requests_at_once(keys: Path, engine: EchoEngine) -> None:
    few, many = add_key(keys, "few", 1), add_key(keys, "many", None)
    answers = []
    with serving(engine, api_keys=keys) as served:

        def ask(secret: str) -> int:
            return served.ask("POST", "/v1/completions", BODY, bearer(secret))[0]

        engine.gate.clear()
        first = threading.Thread(target=lambda: answers.append(ask(few)))
        first.start()
        wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
        status, answer, headers = served.ask("POST", "/v1/completions", BODY, bearer(few))
        assert (status, answer["error"]["code"]) == (429, "too_many_requests")
        assert int(headers["retry-after"]) > 0
        assert served.ask("GET", "/v1/models", headers=bearer(many))[0] == 200
        engine.gate.set()
        first.join()
        assert answers == [200]
        assert ask(few) == 200


def https(served: Served, certificate: Path, path: str) -> int:
    context = ssl.create_default_context(cafile=certificate)
    connection = http.client.HTTPSConnection(*served.address, timeout=30, context=context)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        json.loads(answer.read())
    finally:
        connection.close()
    return answer.status


def test_https(certificate: tuple[Path, Path], engine: EchoEngine) -> None:
    cert, key = certificate
    with serving(engine, tls_cert=cert, tls_key=key) as served:
        assert served.url.startswith("https://127.0.0.1:")
        assert https(served, cert, "/v1/models") == 200


def listen(**options: Any) -> None:
    Listener(ServerOptions(**{"model_name": MODEL, "port": 0, **options})).close()


def test_other_addresses_need_keys_and_tls(keys: Path, certificate: tuple[Path, Path]) -> None:
    add_key(keys, "ann", None)
    tls = dict(zip(("tls_cert", "tls_key"), certificate, strict=True))
    with pytest.raises(
        HeadraceError, match=r"give --api-keys FILE .* and --tls-cert and --tls-key"
    ):
        listen(host="0.0.0.0")
    with pytest.raises(HeadraceError, match="give --tls-cert and --tls-key, or --insecure"):
        listen(host="::", api_keys=keys)
    with pytest.raises(HeadraceError, match="give --api-keys FILE"):
        listen(host="0.0.0.0", **tls)
    for host in ("127.0.0.1", "localhost", "127.1.2.3"):
        listen(host=host)
    listen(host="0.0.0.0", api_keys=keys, **tls)
    listen(host="0.0.0.0", insecure=True)


def test_certificates_that_are_refused(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with pytest.raises(HeadraceError, match="go together"):
        listen(tls_cert=cert)
    with pytest.raises(HeadraceError, match="cannot use --tls-cert"):
        listen(tls_cert=cert, tls_key=tmp_path / "missing")
    with pytest.raises(HeadraceError, match="cannot use --tls-cert"):
        listen(tls_cert=key, tls_key=cert)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(HeadraceError, match="cannot use --tls-cert"):
        listen(tls_cert=cert, tls_key=locked)


def test_an_insecure_server_takes_any_name(engine: EchoEngine) -> None:
    with serving(engine, insecure=True) as served:
        assert served.ask("GET", "/v1/models", headers={"Host": "a.example"})[0] == 200


def test_mistakes_are_found_before_the_model_is_loaded(
    stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Listener(ServerOptions(MODEL, port=0)) as taken:
        taken.socket.listen()
        port = taken.socket.getsockname()[1]
        for arguments, why in (
            (["--port", str(port)], "Address already in use"),
            (["--host", "0.0.0.0"], "lets other machines in"),
            (["--insecure", "--host", "no such host"], "cannot serve at --host no such host"),
            (["--max-body", "much"], "is not a size"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(["serve", str(stories), *arguments])
            assert ended.value.code == 1
            assert why in capsys.readouterr().err
