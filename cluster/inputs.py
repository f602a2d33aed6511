"""The input of a batch job: a JSONL or Parquet file, read as a stream, in a stable order.

A row is named by its number: the physical line of a JSONL file, the row of a Parquet file, both
from 1. Numbers mean the same rows in every run because a job is bound to its input's digest.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from headrace.cluster.row_models import COLUMNS
from headrace.scheduler.errors import JobError

CHUNK = 1 << 20
PARQUET_ROWS = 256


class Input(Protocol):
    """Rows that can be read again. `digest` identifies the bytes, `total` counts the rows."""

    digest: str
    total: int

    def __iter__(self) -> Iterator[tuple[int, bytes | Mapping[str, Any]]]:
        """Yield (row number, JSON bytes or the decoded row) in file order."""
        ...


class JsonlInput:
    """One JSON object a line; blank lines are no rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        state = hashlib.blake2b(digest_size=16)
        self.total = 0
        with path.open("rb") as file:
            for line in file:
                state.update(line)
                self.total += not line.isspace()
        self.digest = state.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, bytes | Mapping[str, Any]]]:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line.strip()


class ParquetInput:
    """A table with the columns of a native row: id, prompt or messages, and parameters.

    A null is a value that was not given. Raises JobError when pyarrow is missing, when the file is
    no Parquet file and when a column has no meaning here.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise JobError(f"reading {path} needs pyarrow: pip install pyarrow") from error
        self._open: Callable[[Path], Any] = pyarrow.parquet.ParquetFile
        try:
            with self._open(path) as file:
                self.total: int = file.metadata.num_rows
                unknown = [name for name in file.schema_arrow.names if name not in COLUMNS]
        except pyarrow.ArrowException as error:
            raise JobError(f"{path} is not a readable Parquet file: {error}") from error
        if unknown:
            raise JobError(
                f"{path} has columns that mean nothing here: {', '.join(unknown)}; "
                f"drop them, or use some of: {', '.join(sorted(COLUMNS))}"
            )
        self.digest = _digest(path)

    def __iter__(self) -> Iterator[tuple[int, bytes | Mapping[str, Any]]]:
        number = 0
        with self._open(self._path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}


def open_input(path: Path) -> Input:
    """`*.parquet` is Parquet, anything else JSONL. Raises JobError when it cannot be read."""
    if path.exists() and not path.is_file():
        raise JobError(f"--input {path} is not a regular file, which a resumable job needs")
    try:
        return ParquetInput(path) if path.suffix == ".parquet" else JsonlInput(path)
    except OSError as error:
        raise JobError(f"cannot read --input {path}: {error.strerror}") from error


def _digest(path: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()
