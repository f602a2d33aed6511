"""Who may use a server: names with hashes of secrets, one a line in a file that nobody else can read."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.runtime.private_file import check_private, explained
from headrace.scheduler.errors import HeadraceError

PREFIX = "hr-"

_LINE = re.compile(
    r"""([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})
    (?::([1-9][0-9]{0,5})?
    (?::([1-9][0-9]{0,2})?
    (?::([1-9][0-9]{0,5})?
    (?::([1-9][0-9]{0,8})?
    (?::(operator)
    )?)?)?)?)?(?<!:)""",
    re.VERBOSE,
)

_WHAT = "API keys"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`digest` is the secret's SHA-256; at most `limit` requests at once, and so many requests and tokens a
    minute, None any number. Where keys are short of something their shares of it are as their `weight`. An
    `operator` may also have the ring recorded, and see where its processes are."""

    name: str
    digest: bytes
    limit: int | None = None
    weight: int = 1
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    operator: bool = False

    @property
    def line(self) -> str:
        weight = None if self.weight == 1 else self.weight
        numbers = (self.limit, weight, self.requests_per_minute, self.tokens_per_minute)
        fields = ["" if number is None else str(number) for number in numbers]
        fields.append("operator" if self.operator else "")
        return ":".join([self.name, self.digest.hex(), *fields]).rstrip(":")


class ApiKeys:
    """The keys of a server. Secrets are long and random, so that a plain hash protects them."""

    def __init__(self, keys: list[ApiKey]) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(self._keys)

    def find(self, secret: str) -> ApiKey | None:
        """The key that a client has shown. Takes the same time for any secret."""
        digest = hashlib.sha256(secret.encode("utf-8", "replace")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def load_keys(file: Path) -> ApiKeys:
    """HeadraceError for a file that is missing, open to others, malformed or without keys."""
    with explained(file, _WHAT), file.open("rb") as opened:
        check_private(file, os.fstat(opened.fileno()), _WHAT, _risk(file))
        keys = _parse(file, opened.read())
    if not keys:
        raise HeadraceError(
            f"{file} has no API keys: make one with `headrace serve-key NAME --file {file}`"
        )
    return ApiKeys(keys)


def add_key(
    file: Path,
    name: str,
    limit: int | None,
    weight: int = 1,
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    operator: bool = False,
) -> str:
    """Add a key to a file, which is made if need be; returns its secret, which is nowhere else.

    HeadraceError for a name that is taken or is none, and for a file that cannot be used.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).digest()
    key = ApiKey(name, digest, limit, weight, requests_per_minute, tokens_per_minute, operator)
    if not _LINE.fullmatch(key.line):
        raise HeadraceError(
            f"{name!r} is no name for a key: use up to 64 letters, digits, dots, dashes, underscores"
        )
    with explained(file, _WHAT):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b") as opened:
            check_private(file, os.fstat(descriptor), _WHAT, _risk(file))
            content = opened.read()
            if any(other.name == name for other in _parse(file, content)):
                raise HeadraceError(f"{file} has a key named {name!r} already: choose another name")
            seam = "\n" if content and not content.endswith(b"\n") else ""
            opened.write(f"{seam}{key.line}\n".encode())
    return secret


def _parse(file: Path, content: bytes) -> list[ApiKey]:
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise HeadraceError(
                f"{file}, line {number}: not NAME:SHA256[:[REQUESTS][:[WEIGHT][:[RPM][:[TPM][:operator]]]]], the"
                " hash in 64 small hex digits, at most 999999 requests at once, a weight of 1 to 999, and at"
                " most 999999 requests and 999999999 tokens a minute"
            )
        if match[1] in keys:
            raise HeadraceError(f"{file}, line {number}: there are two keys named {match[1]!r}")
        limit, weight, requests, tokens = (
            int(field) if field else None for field in match.groups()[2:6]
        )
        digest, operator = bytes.fromhex(match[2]), match[7] is not None
        keys[match[1]] = ApiKey(match[1], digest, limit, weight or 1, requests, tokens, operator)
    return list(keys.values())


def _risk(file: Path) -> str:
    return f"others could use it. Run `chmod 600 {file}`"
