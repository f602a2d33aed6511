"""Files of clients: uploads, their limits and their end."""

import http.client
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from commands import wait_for
from served import EchoEngine, Served, serving

from headrace.cluster.serving.batches.file_store import FileLimits, FileStore
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.keys import add_key
from headrace.scheduler.errors import HeadraceError

LIMITS = FileLimits(total=300_000, each=200_000, ttl=40 * 3600)
EDGE = "boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={EDGE}"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return {name: add_key(tmp_path / "keys", name, None) for name in ("ann", "bob")}


@pytest.fixture
def served(tokenizer: Any, directory: Path) -> Iterator[Served]:
    with serving(EchoEngine(tokenizer), files=directory, limits=LIMITS) as made:
        yield made


def client_of(served: Served, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = "" if filename is None else f'; filename="{filename}"'
    head = f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{EDGE}--\r\n".encode()


PURPOSE, FILE = part("purpose", b"batch"), part("file", b"{}", "in.jsonl")


def contents(directory: Path) -> set[str]:
    return {
        str(path.relative_to(directory))
        for name in ("files", "uploads", "batches")
        for path in (directory / name).rglob("*")
    }


def test_a_file_comes_back_as_it_was_sent(served: Served, directory: Path) -> None:
    content = os.urandom(150_000)
    with client_of(served) as client:
        made = client.files.create(
            file=("a.jsonl", content),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert (made.filename, made.bytes, made.purpose) == ("a.jsonl", 150_000, "batch")
        assert made.expires_at == made.created_at + 3600
        assert client.files.retrieve(made.id) == made
        assert client.files.content(made.id).content == content
        assert [each.id for each in client.files.list()] == [made.id]
        for path in (directory, *directory.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path
        assert client.files.delete(made.id).deleted
        assert contents(directory) == set()
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        kept = client.files.create(file=b"", purpose="batch")
        assert kept.expires_at == kept.created_at + LIMITS.ttl


def test_lists_come_in_pages(served: Served) -> None:
    with client_of(served) as client:
        ids = [client.files.create(file=b"x", purpose="batch").id for _ in range(5)]
        page = client.files.list(limit=2)
        assert ([each.id for each in page.data], page.has_more) == ([ids[4], ids[3]], True)
        assert [each.id for each in client.files.list(limit=2)] == ids[::-1]
        assert [each.id for each in client.files.list(limit=2, order="asc")] == ids
        assert client.files.list(purpose="vision").data == []
        assert client.files.list(after="file-nowhere").data == []
        for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}):
            with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
                client.files.list(**wrong)  # type: ignore[arg-type]


def test_nobody_sees_anothers_files(
    tokenizer: Any, directory: Path, tmp_path: Path, keys: dict[str, str]
) -> None:
    engine = EchoEngine(tokenizer)
    with (
        serving(engine, files=directory, api_keys=tmp_path / "keys") as served,
        client_of(served, keys["ann"]) as ann,
        client_of(served, keys["bob"]) as bob,
    ):
        hers = ann.files.create(file=b"{}", purpose="batch").id
        batch = ann.batches.create(
            input_file_id=hers, endpoint="/v1/completions", completion_window="24h"
        ).id
        assert not bob.files.list().data
        assert not bob.batches.list().data
        calls: list[tuple[Callable[[str], Any], str]] = [
            (bob.files.retrieve, hers),
            (bob.files.content, hers),
            (bob.files.delete, hers),
            (bob.batches.retrieve, batch),
            (bob.batches.cancel, batch),
        ]
        for call, name in calls:
            with pytest.raises(openai.NotFoundError):
                call(name)
        with pytest.raises(openai.NotFoundError):
            bob.batches.create(
                input_file_id=hers, endpoint="/v1/completions", completion_window="24h"
            )
        assert ann.files.content(hers).content == b"{}"


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../../etc/passwd", "passwd"),
        ("/etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("..", "file"),
        ("a/", "file"),
        ("tab\there", "tabhere"),
        ("x" * 4000, "x" * 255),
        ("é世", "é世"),
    ],
)
def test_names_are_never_paths(served: Served, directory: Path, name: str, kept: str) -> None:
    body = form(PURPOSE, part("file", b"{}", name))
    status, answer, _ = served.ask("POST", "/v1/files", body, FORM)
    if status == 400:  # longer than a header may be
        assert len(name) == 4000
        return
    assert (status, answer["filename"]) == (200, kept)
    assert contents(directory) == {f"files/{answer['id']}"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "told"),
    [
        (b"{}", {}, 415, "multipart/form-data"),
        (b"{}", {"Content-Type": "multipart/form-data"}, 415, "boundary"),
        (b"", FORM, 400, "ends in the middle"),
        (form(PURPOSE, FILE)[:-20], FORM, 400, "ends in the middle"),
        (b"nothing of the kind" * 100, FORM, 400, "malformed"),
        (form(PURPOSE), FORM, 400, "no file"),
        (form(FILE), FORM, 400, "purpose"),
        (form(part("purpose", b"fine-tune"), FILE), FORM, 400, "purpose"),
        (form(FILE, PURPOSE, FILE), FORM, 400, "one file"),
        (form(PURPOSE, FILE, part("colour", b"red")), FORM, 400, "colour"),
        (form(PURPOSE, PURPOSE, FILE), FORM, 400, "too many fields"),
        (form(PURPOSE, part("file", b"{}")), FORM, 400, "filename"),
        (form(part("purpose", b"b" * 2000), FILE), FORM, 400, "too long"),
        (form(*[part(f"f{i}", b"") for i in range(100)]), FORM, 400, "too many fields"),
        (b"--boundary\r\n" + b"X-Y: z\r\n" * 5000, FORM, 400, "malformed"),
        (b"--boundary\r\nX: " + b"y" * 100_000, FORM, 400, "malformed"),
        (
            form(PURPOSE, FILE, part("expires_after[anchor]", b"created_at"),
                 part("expires_after[seconds]", b"10")),
            FORM, 400, "expires_after",
        ),
        (
            form(PURPOSE, FILE, part("expires_after[seconds]", str(41 * 3600).encode())),
            FORM, 400, "keeps files for 144000 seconds",
        ),
        (form(PURPOSE, FILE), {**FORM, "Origin": "http://evil.example"}, 403, "web pages"),
        (form(PURPOSE, part("file", b"x" * 200_001, "a")), FORM, 413, "200000 bytes"),
        (form(PURPOSE, part("file", b"x" * 900_000, "a")), FORM, 413, "200000 bytes"),
    ],
)  # fmt: skip
def test_forms_that_are_refused(
    served: Served, directory: Path, body: bytes, headers: dict[str, str], status: int, told: str
) -> None:
    found, answer, _ = served.ask("POST", "/v1/files", body, headers)
    assert found == status, answer
    assert told in json.dumps(answer), answer
    assert contents(directory) == set()


def begin_upload(served: Served, size: int) -> http.client.HTTPConnection:
    """A connection that has sent the head of a form with so many bytes of a file."""
    connection = http.client.HTTPConnection(*served.address, timeout=30)
    connection.putrequest("POST", "/v1/files")
    head, tail = PURPOSE + part("file", b"", "a")[:-2], b"\r\n" + form()
    connection.putheader("Content-Type", FORM["Content-Type"])
    connection.putheader("Content-Length", str(len(head) + size + len(tail)))
    connection.endheaders(head)
    return connection


def test_uploads_that_race_for_the_last_room(served: Served, directory: Path) -> None:
    size = 190_000
    uploads = [begin_upload(served, size) for _ in range(3)]
    statuses = []

    def send(connection: http.client.HTTPConnection) -> None:
        for _ in range(19):
            connection.send(b"x" * 10_000)
        connection.send(b"\r\n" + form())
        statuses.append(connection.getresponse().status)
        connection.close()

    threads = [threading.Thread(target=send, args=(each,)) for each in uploads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 413, 413]
    with client_of(served) as client:
        (kept,) = client.files.list()
        client.files.delete(kept.id)
        assert contents(directory) == set()
        client.files.create(file=b"x" * size, purpose="batch")  # all of the room is there again
        with pytest.raises(openai.APIStatusError, match="keeps 300000 bytes"):
            client.files.create(file=b"x" * size, purpose="batch")


def test_a_client_that_goes_away_leaves_nothing(served: Served, directory: Path) -> None:
    connection = begin_upload(served, 150_000)
    connection.send(b"x" * 100_000)
    wait_for(lambda: any((directory / "uploads").iterdir()), 10.0, lambda: "not begun")
    connection.close()
    wait_for(lambda: not contents(directory), 10.0, lambda: str(contents(directory)))
    with client_of(served) as client:
        client.files.create(file=b"x" * 190_000, purpose="batch")


def test_a_server_without_files_says_so(tokenizer: Any) -> None:
    with serving(EchoEngine(tokenizer)) as served, client_of(served) as client:
        for call in (client.files.list, client.batches.list):
            with pytest.raises(openai.NotFoundError, match="--files DIR"):
                call()
        with pytest.raises(openai.NotFoundError, match="--files DIR"):
            client.files.create(file=b"x", purpose="batch")


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def put(store: FileStore, content: bytes, seconds: int = 3600) -> str:
    upload = store.upload()
    upload.write(content)
    file = upload.finish("ann", "a", "batch", seconds)
    upload.close()
    return file.id


def test_files_end_when_their_time_is_over(directory: Path) -> None:
    clock = Clock()
    with FileStore(directory, LIMITS, clock) as store:
        first, second = put(store, b"x" * 10_000), put(store, b"y" * 10_000, 7200)
        assert store.space.used == 20_000
        clock.now += 3600
        with pytest.raises(ApiError):
            store.find("ann", first)
        store.expire()
        assert contents(directory) == {f"files/{second}"}
        assert store.space.used == 10_000
    clock.now += 3600
    with FileStore(directory, LIMITS, clock) as store:
        assert contents(directory) == set()
        assert store.space.used == 0


def test_an_upload_that_was_given_up_comes_to_nothing(directory: Path) -> None:
    """Whatever a thread was about to do with it."""
    with FileStore(directory, LIMITS) as store:
        upload = store.upload()
        upload.write(b"x" * 10_000)
        upload.close()
        late: list[Callable[[], object]] = [
            lambda: upload.write(b"y"),
            upload.sync,
            lambda: upload.finish("ann", "a", "batch", 3600),
        ]
        for call in late:
            with pytest.raises(ApiError, match="given up"):
                call()
        assert contents(directory) == set()
        assert store.space.used == 0


def test_what_a_crash_leaves_is_swept(directory: Path) -> None:
    with FileStore(directory, LIMITS) as store:
        kept, gone = put(store, b"x"), put(store, b"y")
        (directory / "uploads" / "half").write_bytes(b"z" * 1000)
        (directory / "files" / "file-unknown").write_bytes(b"z")
        (directory / "batches" / "batch_unknown").mkdir()
        (directory / "batches" / "batch_unknown" / "out.jsonl").write_bytes(b"z")
        (directory / "files" / gone).unlink()
    with FileStore(directory, LIMITS) as store:
        assert contents(directory) == {f"files/{kept}"}
        assert store.space.used == 4096
        with pytest.raises(ApiError):
            store.find("ann", gone)


def test_directories_that_are_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="No such file"):
        FileStore(tmp_path / "no" / "where", LIMITS)
    directory.mkdir(0o755)
    with pytest.raises(HeadraceError, match=r"mode 0755: .* Run `chmod 700"):
        FileStore(directory, LIMITS)
    directory.chmod(0o700)
    (directory / "mine.txt").write_text("mine")
    with pytest.raises(HeadraceError, match="choose an empty directory"):
        FileStore(directory, LIMITS)
    assert [path.name for path in directory.iterdir()] == ["mine.txt"]
    (directory / "mine.txt").unlink()
    with (
        FileStore(directory, LIMITS),
        pytest.raises(HeadraceError, match="another server uses"),
    ):
        FileStore(directory, LIMITS)
