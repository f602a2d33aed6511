"""The embedding table, which stays in host memory: a pass needs a few of its rows."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from headrace.runtime.memory.held import Holding, named
from headrace.runtime.streaming.tiers import register, unregister


class EmbeddingTable:
    """Rows of `table` [vocabulary, hidden] on `device`, in `dtype`.

    A CUDA device reads them from the table itself, which is pinned for it in the background, 0.6 s
    per GB: no host thread gathers what a pass waits for, and it does not queue behind the weights
    that are being copied. On a CPU nothing is pinned and there is nothing to close.
    """

    def __init__(self, table: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self._table, self._device, self._dtype = table, device, dtype
        self._pinning: Future[None] | None = None
        if device.type == "cuda":
            thread = ThreadPoolExecutor(1, "headrace-pin")
            self._pinning = thread.submit(self._pin)
            thread.shutdown(wait=False)

    def _pin(self) -> None:
        with torch.cuda.device(self._device):
            register(self._table)

    def rows(self, tokens: Tensor, onto: Tensor | None = None) -> Tensor:
        """The rows of `tokens` [T] (int64, on the host): [T, hidden], written `onto` if it is given.

        On CUDA queued on the current stream, which reads `tokens`, too: they are pinned, and are to be
        kept until it has. Raises DoesNotFitError when the table cannot be pinned.
        """
        if self._pinning is None:
            found = self._table.index_select(0, tokens)
            return found.to(self._dtype) if onto is None else onto.copy_(found)
        # Imported where it is needed: installations without a GPU have no Triton.
        from headrace.runtime.zero_copy import gather

        self._pinning.result()
        if onto is None:
            shape = len(tokens), self._table.shape[1]
            onto = torch.empty(shape, dtype=self._dtype, device=self._device)
        assert tokens.is_pinned()
        gather(self._table, tokens, onto)
        return onto

    def memory(self) -> Iterator[Holding]:
        return named("embed", [self._table])

    def close(self) -> None:
        """Unpin the table, when the device has done with it. Safe to call twice."""
        pinning, self._pinning = self._pinning, None
        if pinning is not None and pinning.exception() is None:
            unregister(self._table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
