"""Writes what a plan says: blocks, then what surrounds them, and the manifest last."""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headrace.runtime.block_file import BlockWriter, write_durably
from headrace.runtime.conversion.described import WeightPlan
from headrace.runtime.conversion.encoder import Encoder
from headrace.runtime.conversion.journal import Journal, journal_line
from headrace.runtime.conversion.plan import BlockPlan, ConversionPlan
from headrace.runtime.conversion.quantize import encode_rows, weight_spec
from headrace.runtime.conversion.requantize import in_memory, loaded, relative_error, values
from headrace.runtime.conversion.source import AnyCheckpoint, bytes_of
from headrace.runtime.manifest import MANIFEST, Block, WeightSpec, block_from_json, block_to_json
from headrace.scheduler.errors import StoreError

log = logging.getLogger(__name__)

CHANGES = "headrace-changes.json"
"""In a store with weights that were quantized again: {"requantized": {name: {"from": format, "to":
format, "relative_rms": error relative to the weight's root mean square}}}."""

REQUANTIZED = "requantized"


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes of the store are written; `resumed` of them by an earlier run."""

    block: str
    done: int
    total: int
    resumed: int


class StoreWriter:
    """Carries out a plan: writes the blocks that the journal lacks, then what surrounds them."""

    def __init__(
        self,
        checkpoint: AnyCheckpoint,
        dest: Path,
        plan: ConversionPlan,
        journal: Journal,
        progress: Callable[[Progress], None] | None,
        encoder: Encoder | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._dest = dest
        self._plan = plan
        self._journal = journal
        self._progress = progress
        self._encoder = encoder
        self._missing = [block for block in plan.blocks if block.name not in journal.done]
        self._resumed = plan.nbytes - sum(block.layout.file_bytes for block in self._missing)
        self._written = self._resumed
        self._errors: dict[str, dict[str, Any]] = {}  # of the block that is being written

    def run(self, identity: dict[str, Any]) -> None:
        for stale in self._dest.glob("*.tmp"):
            stale.unlink()
        self._refuse_small_disk()
        try:
            if self._encoder is not None:
                done = (block_from_json(self._dest, each) for each in self._journal.done.values())
                self._encoder.start(self._plan, {block.name: block for block in done})
            for block in self._missing:
                self._write_block(block)
            self._write_surroundings()
            self._write_changes()
            self._write_manifest(identity)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            left = sum(
                block.layout.file_bytes
                for block in self._missing
                if block.name not in self._journal.done
            )
            raise StoreError(
                f"the disk of {self._dest} is full: {left:,} more bytes are needed; free that much "
                "and run the same command again, which keeps the blocks that are finished"
            ) from error

    def _refuse_small_disk(self) -> None:
        disk = os.statvfs(self._dest)
        needed, free = self._plan.nbytes - self._resumed, disk.f_bavail * disk.f_frsize
        if needed > free:
            raise StoreError(
                f"the store needs {needed:,} more bytes at {self._dest}, where {free:,} are free; "
                f"free {needed - free:,} bytes or choose another disk"
            )

    def _write_block(self, block: BlockPlan) -> None:
        file = self._dest / f"{block.name}.safetensors"
        before, weights = self._written, {}
        self._errors = {}
        encoded = {} if self._encoder is None else self._encoder.encode(block)
        with BlockWriter(file, block.layout) as writer:
            for weight in block.weights:
                name = weight.source.name
                pieces = _bytes_of_all(encoded[name]) if name in encoded else stored_bytes(weight)
                weights[name] = self._write_weight(block, weight, pieces, writer)
            written = writer.finish()
        self._report(block.name, before + block.layout.file_bytes - self._written)
        log.debug("wrote %s: %d bytes", file, block.layout.file_bytes)
        whole = Block(
            name=block.name,
            file=file,
            data_offset=len(block.layout.header),
            nbytes=block.layout.nbytes,
            xxh3_64=written.data_hash,
            weights=weights,
        )
        self._journal.record(
            block_to_json(whole, written.header_hash) | {REQUANTIZED: self._errors}
        )
        if self._encoder is not None:
            self._encoder.written(whole)

    def _write_weight(
        self,
        block: BlockPlan,
        weight: WeightPlan,
        pieces: Iterable[tuple[str, memoryview]],
        writer: BlockWriter,
    ) -> WeightSpec:
        source = weight.source
        state = None if weight.encoded else source.state
        state_name = next((p.entry.name for p in weight.parts if p.role == "state"), None)
        written: list[tuple[str, memoryview]] = []
        for name, data in pieces:
            writer.write(name, data)
            self._report(block.name, len(data))
            if weight.encoded and name == state_name:
                state = json.loads(bytes(data))
            if weight.is_requantized:
                written.append((name, data))
        if weight.is_requantized:
            self._note_error(weight, written, state)
        return weight_spec(weight.format, source.shape, weight.parts, block.layout.tensors, state)

    def _note_error(
        self,
        weight: WeightPlan,
        written: list[tuple[str, memoryview]],
        state: Mapping[str, Any] | None,
    ) -> None:
        source = weight.source
        after = in_memory(weight.format, source.shape, weight.parts, written, state)
        self._errors[source.name] = {
            "from": source.format,
            "to": weight.format,
            "relative_rms": relative_error(loaded(source), after),
        }

    def _report(self, block: str, count: int) -> None:
        self._written += count
        if self._progress:
            self._progress(Progress(block, self._written, self._plan.nbytes, self._resumed))

    def _write_surroundings(self) -> None:
        """config.json, the index that transformers reads, and the checkpoint's other small files."""
        for name, data in self._checkpoint.companions().items():
            write_durably(self._dest / name, data)
        places = {
            part.entry.name: f"{block.name}.safetensors"
            for block in self._plan.blocks
            for weight in block.weights
            for part in weight.parts
        }
        size = sum(block.layout.nbytes for block in self._plan.blocks)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_durably(self._dest / "model.safetensors.index.json", _pretty(index))
        write_durably(self._dest / "config.json", _pretty(self._plan.config))

    def _entries(self) -> list[dict[str, Any]]:
        return [self._journal.done[block.name] for block in self._plan.blocks]

    def _write_changes(self) -> None:
        """How far each weight that was quantized again is from what it was."""
        errors = [entry.get(REQUANTIZED, {}) for entry in self._entries()]
        changes = {name: error for block in errors for name, error in block.items()}
        if changes:
            write_durably(self._dest / CHANGES, _pretty({REQUANTIZED: changes}))

    def _write_manifest(self, identity: dict[str, Any]) -> None:
        plan = self._plan
        manifest = {
            **identity,
            "format": plan.format,
            "dtype": plan.dtype,
            "tied": plan.tied,
            "layer_shapes": [asdict(shape) for shape in plan.layer_shapes],
            "settings": asdict(plan.settings),
            "blocks": [
                {k: v for k, v in entry.items() if k != REQUANTIZED} for entry in self._entries()
            ],
        }
        write_durably(self._dest / MANIFEST, journal_line(manifest))


def _pretty(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def stored_bytes(weight: WeightPlan) -> Iterator[tuple[str, memoryview]]:
    """(stored name, bytes) in stored order, a bounded number of bytes at a time."""
    source = weight.source
    if not weight.encoded:
        yield from source.stream()
        return
    whole = weight.is_requantized or source.repacking is not None
    runs = values(source) if whole else source.data.rows()
    for name, piece in encode_rows(runs, weight.parts, weight.dtype, source.shape, weight.format):
        yield name, bytes_of(piece)


def _bytes_of_all(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, memoryview]]:
    for name, tensor in tensors:
        yield name, bytes_of(tensor)
