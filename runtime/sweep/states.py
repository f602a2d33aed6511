"""Hidden states of all sequences between two layers: in host RAM, or in a file where they are too many."""

import os
import tempfile
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from headrace.runtime.streaming.page_cache import available_memory
from headrace.scheduler.errors import HeadraceError

HOST_SHARE = 4
"""By default, states of at most one part in so many of what memory is free stay in it."""


class States:
    """`values` [sequences, length, hidden] of `tokens` [sequences, length]; beyond `host_memory` bytes they lie in a file without a name
    in `directory` (by default the system's for temporary files), which is gone with this.

    Raises HeadraceError where that disk has no room.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        tokens: Tensor,
        *,
        host_memory: int | None = None,
        directory: Path | None = None,
    ) -> None:
        self.tokens = tokens
        nbytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        limit = available_memory() // HOST_SHARE if host_memory is None else host_memory
        self.in_file = nbytes > limit
        if self.in_file:
            self.values = _mapped(nbytes, directory).view(dtype).view(shape)
        else:
            self.values = torch.empty(shape, dtype=dtype)

    def beside(self, values: Tensor) -> "States":
        """Others of the same tokens, with a copy of `values`."""
        sequences, length, hidden = values.shape
        states = States((sequences, length, hidden), values.dtype, self.tokens)
        states.values.copy_(values)
        return states

    @property
    def sequences(self) -> int:
        return self.values.shape[0]

    @property
    def length(self) -> int:
        return self.values.shape[1]

    def close(self) -> None:
        self.values = torch.empty(0, 0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mapped(nbytes: int, directory: Path | None) -> Tensor:
    """uint8 [nbytes] over a new file, whose name goes at once and whose blocks go with the tensor."""
    with tempfile.NamedTemporaryFile(prefix="headrace-states-", dir=directory) as file:
        try:
            # All of it now: a full disk would kill the process when a page is written back.
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise HeadraceError(
                f"{nbytes:,} bytes of hidden states have no room in host memory nor in "
                f"{Path(file.name).parent} ({error.strerror}): set TMPDIR to a larger disk, or take fewer "
                "tokens"
            ) from error
        return torch.from_file(file.name, shared=True, size=nbytes, dtype=torch.uint8)
