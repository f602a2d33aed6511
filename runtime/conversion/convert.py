"""Any Hugging Face checkpoint -> a store: one block at a time, resumable, never half done.

The destination holds a journal while a conversion is under way: one line says from what and how,
then one line is added for every block file that is complete and durable. The manifest, which makes
the directory a store, is written when all blocks are, and the journal goes after it. So a conversion
killed at any instant goes on where it was, and writes the same bytes.
"""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from headrace.runtime.block_file import BlockWriter, sync_directory, write_durably
from headrace.runtime.conversion.described import WeightPlan
from headrace.runtime.conversion.encoder import STATES, Encoder
from headrace.runtime.conversion.journal import Journal, journal_line
from headrace.runtime.conversion.opening import open_checkpoint
from headrace.runtime.conversion.plan import (
    BlockPlan,
    ConversionPlan,
    Options,
    plan_conversion,
)
from headrace.runtime.conversion.quantize import encode_rows, weight_spec
from headrace.runtime.conversion.requantize import in_memory, loaded, relative_error, values
from headrace.runtime.conversion.source import AnyCheckpoint, bytes_of
from headrace.runtime.skeleton import parse_config
from headrace.runtime.store import (
    HELD,
    JOURNAL,
    MANIFEST,
    VERSION,
    Block,
    Store,
    WeightSpec,
    block_from_json,
    block_to_json,
)
from headrace.scheduler.errors import StoreError

CHANGES = "headrace-changes.json"
"""In a store with weights that were quantized again: {"requantized": {name: {"from": format, "to":
format, "relative_rms": error relative to the weight's root mean square}}}."""

REQUANTIZED = "requantized"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes of the store are written; `resumed` of them by an earlier run."""

    block: str
    done: int
    total: int
    resumed: int


def convert(
    source: Path | str,
    dest: Path | str,
    *,
    format: str = "nf4",
    policy: Sequence[tuple[str, str]] = (),
    double_quant: bool = False,
    group_size: int | None = None,
    requantize: bool = False,
    progress: Callable[[Progress], None] | None = None,
    self_check: Callable[[PretrainedConfig], bool] | None = None,
    allow_missing_tokenizer: bool = False,
    encoder: Encoder | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> Store:
    """Converts the checkpoint in `source` into a store in `dest` and opens it.

    `format` is "keep" (bytes as they are), "bf16", "int8", "nf4" or "int4"; the last three apply to
    the matrices of linear layers and experts, with `group_size` columns a scale in int4 (64), `policy` overrides by glob: (pattern, format) pairs, of
    which the first match decides. A checkpoint that is quantized already is kept, or, with
    `requantize`, brought into another format; headrace-changes.json then says what that changed.
    `self_check` may refuse the architecture before anything is
    written, and says whether pages may keep latents. Needs memory for a few row chunks of one matrix,
    and of a quantized one that changes its layout or format all codes, whatever the model's size.

    `encoder` may decide other bytes for layers' weights, as `calibration` describes in the manifest.

    Run again with the same arguments, it resumes; on a finished store it returns at once.
    Raises StoreError or UnsupportedModelError for whatever cannot be converted, and when the disk
    is full or another conversion is writing to `dest`.
    """
    pairs = tuple((glob, fmt) for glob, fmt in policy)
    options = Options(format, pairs, double_quant, group_size, requantize)
    checkpoint = open_checkpoint(Path(source))
    refuse_missing_tokenizer(checkpoint, allow_missing_tokenizer)
    described = {"calibration": calibration} if calibration else {}
    identity = identity_of(checkpoint, options.as_json() | described)
    with locked(Path(dest)):
        return write_store(checkpoint, Path(dest), options, identity, progress, self_check, encoder)


def refuse_missing_tokenizer(checkpoint: AnyCheckpoint, allowed: bool) -> None:
    if not (checkpoint.has_tokenizer or allowed):
        raise StoreError(
            f"{checkpoint.path} has no tokenizer (tokenizer.json, tokenizer.model, ...), without which the "
            "store cannot read or write text; copy it there, or say --allow-missing-tokenizer to feed "
            "token ids"
        )


def identity_of(checkpoint: AnyCheckpoint, options: dict[str, Any]) -> dict[str, Any]:
    """What tells a store, and an unfinished one, from others in the same place."""
    return {"version": VERSION, "source": checkpoint.fingerprint(), "options": options}


def write_store(
    checkpoint: AnyCheckpoint,
    dest: Path,
    options: Options,
    identity: dict[str, Any],
    progress: Callable[[Progress], None] | None = None,
    self_check: Callable[[PretrainedConfig], bool] | None = None,
    encoder: Encoder | None = None,
) -> Store:
    """The store of this identity in `dest`, which is locked: written, finished or found finished.

    Raises what `convert` does.
    """
    finished = finished_store(dest, identity)
    if finished is not None:
        return finished
    config = parse_config(checkpoint.config, str(checkpoint.path))
    latents = self_check is None or self_check(config)
    plan = plan_conversion(checkpoint, options, expand=not latents)
    with Journal(dest, identity) as journal:
        _Conversion(checkpoint, dest, plan, journal, progress, encoder).run(identity)
    _remove_notes(dest)
    return Store.open(dest)


@contextmanager
def locked(dest: Path) -> Iterator[None]:
    """Creates the directory and keeps other conversions out of it."""
    try:
        dest.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(dest, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StoreError(f"cannot write a store to {dest}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise StoreError(f"another conversion is writing to {dest}; wait until it ends") from error
    finally:
        os.close(descriptor)


def hold_back(dest: Path) -> None:
    """From now on a finished store is none, though nothing of it is lost; it survives a power cut."""
    (dest / MANIFEST).replace(dest / HELD)
    sync_directory(dest)


def release(dest: Path) -> None:
    """Makes what was held back a store again."""
    (dest / HELD).replace(dest / MANIFEST)
    sync_directory(dest)


def _refuse_other_held(dest: Path, identity: dict[str, Any]) -> None:
    try:
        held = json.loads((dest / HELD).read_bytes())
        same = all(held[key] == value for key, value in identity.items())
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise StoreError(
            f"{dest} holds another conversion, which has not passed its gate; delete it or choose another "
            "directory"
        )


def finished_store(dest: Path, identity: dict[str, Any]) -> Store | None:
    """The store in `dest`, also one that is held back, which it is no more; None where there is none yet.

    StoreError when it is another one than that of this identity.
    """
    if (dest / HELD).exists():
        _refuse_other_held(dest, identity)
        release(dest)
    if not (dest / MANIFEST).exists():
        return None
    store = Store.open(dest)
    if (store.source, store.options) != (identity["source"], identity["options"]):
        raise StoreError(
            f"{dest} is already a store, made from another checkpoint or with other options "
            f"({store.options}); delete it or choose another directory"
        )
    _remove_notes(dest)
    return store


def _remove_notes(dest: Path) -> None:
    """What only an unfinished conversion needs."""
    for states in dest.glob(STATES):
        states.unlink()
    (dest / JOURNAL).unlink(missing_ok=True)


class _Conversion:
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
