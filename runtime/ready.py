"""Passes made ready: all work of the host that needs neither the device nor the pass before."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headrace.runtime.batch import Batch
from headrace.runtime.drawn_tokens import Tokens
from headrace.runtime.kv.cold_batch import ColdBatch
from headrace.scheduler.plan import AdapterLoad, MicroBatch, PageMove


@dataclass(frozen=True, slots=True)
class ReadyBatch:
    """A micro-batch and its Batch on the host, which holds more rows where a lane pads it.

    The tokens in the rows `unknown` are still to be drawn, by the requests `following`. `cold` where
    pages are brought from host RAM or NVMe; the Batch's page table is then of places in the ring.
    """

    micro_batch: MicroBatch
    batch: Batch
    for_lane: bool
    unknown: list[int]
    following: list[int]
    cold: ColdBatch | None = None

    @classmethod
    def build_cold(
        cls, micro_batch: MicroBatch, device: torch.device, *, quantized: bool, host_pages: int
    ) -> "ReadyBatch":
        """For a micro-batch with cold pages; `quantized`: newest pages are in tails. There are `host_pages`
        slots in host RAM."""
        pinned = device.type == "cuda"
        cold = ColdBatch.of(micro_batch, quantized=quantized, pinned=pinned, host_pages=host_pages)
        in_ring = cls.build(cold.in_ring, device)
        return replace(in_ring, micro_batch=micro_batch, cold=cold)

    @classmethod
    def build(
        cls,
        micro_batch: MicroBatch,
        device: torch.device,
        padded: MicroBatch | None = None,
        pages: int | None = None,
    ) -> "ReadyBatch":
        """For a lane when its `padded` micro-batch and `pages` are given."""
        rows = padded or micro_batch
        batch = Batch.on_host(rows, pinned=device.type == "cuda", pages=pages)
        unknown, following, end = [], [], 0
        for piece in rows.slices:
            end += len(piece.tokens)
            if piece.follows:
                unknown.append(end - 1)
                following.append(piece.request)
        return cls(micro_batch, batch, padded is not None, unknown, following)

    def complete(self, drawn: Tokens) -> None:
        """Fill in the tokens that were unknown."""
        if self.unknown:
            self.batch.tokens.numpy()[self.unknown] = [drawn[i] for i in self.following]


@dataclass(frozen=True, slots=True)
class Ready:
    """A Pass with its micro-batches made ready for one stage, for one run."""

    step: int
    follows: int | None
    batches: Sequence[ReadyBatch]
    moves: Sequence[PageMove]
    adapters: Sequence[AdapterLoad] = ()
