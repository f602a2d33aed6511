"""Which files and batches there are, in an SQLite database: what it says survives any crash."""

import os
import sqlite3
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from headrace.cluster.serving.batches.records import Batch, StoredFile
from headrace.scheduler.errors import HeadraceError

VERSION = 1

_TABLES = """
create table if not exists files (
    number integer primary key autoincrement, id text not null unique, owner text not null,
    purpose text not null, expires_at integer not null, record blob not null);
create table if not exists batches (
    number integer primary key autoincrement, id text not null unique, owner text not null,
    input_file_id text not null, is_open integer not null, removed_at integer, record blob not null);
create index if not exists files_by_owner on files (owner, number);
create index if not exists files_by_end on files (expires_at);
create index if not exists batches_by_owner on batches (owner, number);
create index if not exists batches_by_end on batches (removed_at);
create index if not exists open_batches on batches (input_file_id) where is_open;
"""


@dataclass(frozen=True, slots=True)
class Query:
    """A page of a list: what comes behind the id `after`, the newest first unless `ascending`."""

    limit: int
    after: str | None = None
    ascending: bool = False
    purpose: str | None = None


class Catalog:
    """Owned by one thread at a time. HeadraceError when the database cannot be opened."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            found = self._db.execute("pragma user_version").fetchone()[0]
            if found not in (0, VERSION):
                raise HeadraceError(
                    f"{path} is of version {found}, and this release reads {VERSION}: choose another"
                    " --files"
                )
            self._db.executescript(_TABLES)
            self._db.execute(f"pragma user_version = {VERSION}")
        except sqlite3.Error as error:
            self._db.close()
            raise HeadraceError(f"cannot use the catalog {path}: {error}") from error
        except HeadraceError:
            self._db.close()
            raise

    def close(self) -> None:
        """Safe to call twice."""
        self._db.close()

    def transaction(self) -> AbstractContextManager[Any]:
        """All changes of the block, or none."""
        self._db.execute("begin immediate")
        return self._db  # commits at the block's end, or rolls back

    def add_file(self, file: StoredFile) -> None:
        row = (file.id, file.owner, file.purpose, file.expires_at, msgspec.json.encode(file))
        names = "id, owner, purpose, expires_at, record"
        self._db.execute(f"insert into files ({names}) values (?, ?, ?, ?, ?)", row)

    def file(self, file_id: str) -> StoredFile | None:
        found = self._db.execute("select record from files where id = ?", (file_id,)).fetchone()
        return None if found is None else _file(found)

    def files(self, owner: str, query: Query) -> list[StoredFile]:
        return [_file(row) for row in self._page("files", owner, query)]

    def all_files(self) -> list[StoredFile]:
        return [_file(row) for row in self._db.execute("select record from files")]

    def expired_files(self, now: int) -> list[StoredFile]:
        """Those whose time is over and that no unfinished batch reads."""
        wanted = """select record from files where expires_at <= ? and not exists (
            select 1 from batches where is_open and input_file_id = files.id)"""
        return [_file(row) for row in self._db.execute(wanted, (now,))]

    def remove_file(self, file_id: str) -> None:
        self._db.execute("delete from files where id = ?", (file_id,))

    def is_read(self, file_id: str) -> bool:
        """Whether an unfinished batch needs it."""
        wanted = "select 1 from batches where is_open and input_file_id = ?"
        return self._db.execute(wanted, (file_id,)).fetchone() is not None

    def put_batch(self, batch: Batch) -> None:
        """Add it, or write what has become of it."""
        self._db.execute(
            """insert into batches (id, owner, input_file_id, is_open, removed_at, record)
            values (?, ?, ?, ?, ?, ?) on conflict (id) do update set
            is_open = excluded.is_open, removed_at = excluded.removed_at, record = excluded.record""",
            (
                batch.id,
                batch.owner,
                batch.input_file_id,
                not batch.status.has_ended,
                batch.removed_at,
                msgspec.json.encode(batch),
            ),
        )

    def batch(self, batch_id: str) -> Batch | None:
        found = self._db.execute("select record from batches where id = ?", (batch_id,)).fetchone()
        return None if found is None else _batch(found)

    def batches(self, owner: str, query: Query) -> list[Batch]:
        return [_batch(row) for row in self._page("batches", owner, query)]

    def open_batches(self, owner: str | None = None) -> list[Batch]:
        """Unfinished ones, the oldest first."""
        whose = "" if owner is None else "and owner = ?"
        rows = self._db.execute(
            f"select record from batches where is_open {whose} order by number",
            () if owner is None else (owner,),
        )
        return [_batch(row) for row in rows]

    def num_batches(self) -> int:
        return int(self._db.execute("select count(*) from batches").fetchone()[0])

    def remove_batches(self, now: int) -> int:
        """Forget those whose time is over; returns how many they were."""
        return self._db.execute("delete from batches where removed_at <= ?", (now,)).rowcount

    def _page(self, table: str, owner: str, query: Query) -> Iterable[tuple[bytes]]:
        """Empty behind an id that is none of the owner's."""
        conditions, values = ["owner = ?"], [owner]
        if query.purpose is not None:
            conditions.append("purpose = ?")
            values.append(query.purpose)
        if query.after is not None:
            sign = ">" if query.ascending else "<"
            conditions.append(
                f"number {sign} (select number from {table} where id = ? and owner = ?)"
            )
            values += [query.after, owner]
        order = "asc" if query.ascending else "desc"
        where = " and ".join(conditions)
        wanted = f"select record from {table} where {where} order by number {order} limit ?"
        rows: Iterable[tuple[bytes]] = self._db.execute(wanted, (*values, query.limit))
        return rows


def _file(row: tuple[bytes]) -> StoredFile:
    return msgspec.json.decode(row[0], type=StoredFile)


def _batch(row: tuple[bytes]) -> Batch:
    return msgspec.json.decode(row[0], type=Batch)
