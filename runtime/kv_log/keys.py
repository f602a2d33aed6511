"""Keys of encrypted KV pages: one a tenant, in memory only or in a file of mode 0600.

AES-256-GCM, a record at a time. **No nonce is used twice with a key**, because

- each segment has a key of its own, derived by HKDF-SHA256 from its tenant's key and 32 random bytes
  that are drawn when the segment is created and stand in its header, and
- the nonce is the record's number in its segment, counted up in the memory of the one process that
  created the segment. A number is never handed out again, not after a failed write either, and a
  segment is never added to after that process is gone: what is found at start is only read.

The head of a record is the associated data, so that a page cannot be moved to another key, cohort or
segment. Page keys are hashes of tokens: who can guess a prompt could look for it on the disk, so they
are encrypted, too, each as one block of AES under a second derived key. Nothing is left in clear but
sizes, times, cohort numbers and the names of tenants.

Deleting is forgetting the tenant's key. A key that was in a file is overwritten there before the file
is replaced, but a drive may keep what was overwritten: only keys that were never in a file are surely
gone with their process.
"""

import fcntl
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from headrace.runtime.private_file import check_private, explained
from headrace.scheduler.errors import HeadraceError

SALT_BYTES = 32
_KEY_BYTES = 32
_CHECK_BYTES = 16
_INFO = b"headrace kv segment 1"
_WHAT = "KV keys"


class SegmentCipher:
    """Encrypts and decrypts the records of one segment. May be used by several threads at once."""

    def __init__(self, key: bytes, salt: bytes) -> None:
        derived = HKDF(
            algorithm=SHA256(), length=2 * _KEY_BYTES + _CHECK_BYTES, salt=salt, info=_INFO
        ).derive(key)
        self._pages = AESGCM(derived[:_KEY_BYTES])
        # One block of random-looking bytes each, no two alike in a segment: all that ECB may be used for.
        self._names = Cipher(algorithms.AES(derived[_KEY_BYTES : 2 * _KEY_BYTES]), modes.ECB())
        self.check = derived[2 * _KEY_BYTES :]

    def encrypt(self, number: int, page: memoryview, head: bytes, stored: memoryview) -> None:
        """Fill `stored`, 16 bytes longer than `page`."""
        self._pages.encrypt_into(_nonce(number), page, head, stored)

    def decrypt(self, number: int, stored: memoryview, head: bytes, page: memoryview) -> bool:
        """Fill `page`; False if `stored` and `head` are not what was encrypted with this key."""
        try:
            self._pages.decrypt_into(_nonce(number), stored, head, page)
        except InvalidTag:
            return False
        return True

    def hide(self, keys: bytes) -> bytes:
        """Page keys of 16 bytes, one or several end to end, as they are stored."""
        return self._names.encryptor().update(keys)

    def reveal(self, keys: bytes) -> bytes:
        return self._names.decryptor().update(keys)


def new_key() -> bytes:
    """A tenant's."""
    return secrets.token_bytes(_KEY_BYTES)


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


class _Stored(msgspec.Struct):
    """The file, as JSON: keys by tenant, in base64."""

    version: int
    keys: dict[str, bytes]


class KeyRing:
    """Tenants' keys. With a `file` they outlive the process, and processes that share it agree.

    The file is created when first needed. Without one `keys` are those that another ring gave away.
    Raises HeadraceError for a file that others may read, or that is no file of keys.
    """

    def __init__(self, file: Path | None = None, keys: Mapping[str, bytes] | None = None) -> None:
        assert file is None or not keys
        self.file = file
        self._lock = threading.Lock()
        self._keys: dict[str, bytes] = dict(keys or {})
        if file is not None and file.exists():
            self._keys = _load(file)

    @property
    def is_persistent(self) -> bool:
        return self.file is not None

    def tenants(self) -> list[str]:
        with self._lock:
            return sorted(self._keys)

    def find(self, tenant: str) -> bytes | None:
        """None for a tenant that has no key. Never waits for the file."""
        return self._keys.get(tenant)

    def key(self, tenant: str) -> bytes:
        """The tenant's key; a new one for a new tenant."""
        with self._lock:
            if tenant not in self._keys:
                if self.file is None:
                    self._keys[tenant] = new_key()
                else:
                    with _changing(self.file) as keys:
                        keys.setdefault(tenant, new_key())
                    self._keys = keys
            return self._keys[tenant]

    def destroy(self, tenant: str) -> bool:
        """Forget a tenant's key, here and in the file; False if there was none."""
        with self._lock:
            had = self._keys.pop(tenant, None) is not None
            if self.file is not None and self.file.exists():
                with _changing(self.file) as keys:
                    had = keys.pop(tenant, None) is not None or had
            return had

    def give_away(self) -> dict[str, bytes]:
        """The keys that are in no file, for the ring of a process that goes on instead of this one."""
        with self._lock:
            return {} if self.is_persistent else dict(self._keys)

    def close(self) -> None:
        """Forget every key in memory; a file keeps them."""
        with self._lock:
            self._keys.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _changing(file: Path) -> Iterator[dict[str, bytes]]:
    """The file's keys, to be changed; written back when the block ends.

    The folder is locked meanwhile: a lock on the file would be one on what is being replaced.
    """
    with explained(file, _WHAT):
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = _load(file) if file.exists() else {}
        yield keys
        with explained(file, _WHAT):
            _replace(file, msgspec.json.encode(_Stored(1, keys)))
            os.fsync(folder)
    finally:
        os.close(folder)


def _replace(file: Path, content: bytes) -> None:
    new = file.with_name(file.name + ".new")
    with suppress(FileNotFoundError):
        new.unlink()  # of a process that was killed while it wrote
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as written:
        written.write(content)
        written.flush()
        os.fsync(descriptor)
    before = None
    with suppress(FileNotFoundError):
        before = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    new.rename(file)
    if before is not None:
        try:
            os.pwrite(before, bytes(os.fstat(before).st_size), 0)
            os.fsync(before)
        finally:
            os.close(before)


def _load(file: Path) -> dict[str, bytes]:
    with explained(file, _WHAT):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            check_private(file, status, _WHAT, _risk(file))
            content = opened.read()
    try:
        stored = msgspec.json.decode(content, type=_Stored)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise HeadraceError(
            f"{file} is no file of KV keys ({error}); name another, or a new one"
        ) from error
    if stored.version != 1 or any(len(key) != _KEY_BYTES for key in stored.keys.values()):
        raise HeadraceError(f"{file} holds keys that this version of headrace does not understand")
    return stored.keys


def _risk(file: Path) -> str:
    return (
        f"others could read the KV keys in it. If nobody has, run `chmod 600 {file}`; if in doubt,"
        " delete it, and with it all that it can decrypt"
    )
