"""The on-disk checkpoint, laid out so that one layer is one aligned read into one slot.

A store is a directory that any safetensors reader opens:

    config.json, tokenizer files, generation_config.json   copied or extended from the checkpoint
    model.safetensors.index.json                           where transformers finds each tensor
    embed.safetensors, layer-00000.safetensors, ..., head.safetensors
    headrace.json                                          the manifest; written last, atomically

Each .safetensors file is a *block*: its JSON header is padded with spaces so that the data section
starts on a 4096-byte boundary, tensors lie in consumption order, each on a 256-byte boundary (filled
with pad tensors), all tensors of one expert adjacent, and the file ends on a 4096-byte boundary.
So the data section is one O_DIRECT extent, and every tensor is a view of the slot it is read into.
A directory without headrace.json is not a store: nothing half-written ever looks complete.

A store that was pulled from a cold tier (runtime/cold/) has a headrace-origin.json, too, and may lack
blocks: a node needs those of its stages only. Whoever reads a block asks `require` for it first.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from headrace.runtime.cold.ranges import ranges
from headrace.runtime.cold.source import PEERS, read_origin
from headrace.runtime.manifest import (
    MANIFEST,
    VERSION,
    Block,
    LayerShape,
    ModelSettings,
    block_from_json,
)
from headrace.scheduler.errors import StoreError

JOURNAL = "headrace-convert.jsonl"
HELD = "headrace.held.json"
"""The manifest of a store that a gate holds back: whole, but no store until it has its name again."""
READ_BYTES = 8 << 20


class Store:
    """A finished store, opened for reading. Opening reads the manifest and the files' sizes only.

    `config` is config.json, `layers` are in order, `tied` says that the head multiplies with the
    table in `embed` (`head` then holds what comes before it, the final norm). `format` is what the
    store was converted to, `dtype` (safetensors' name) the type of what is not quantized, `source`
    the fingerprint of the checkpoint it was made from, `origin` the cold tier it was pulled from: None
    for a store that was made here, which is whole. `settings` are None in stores that were made before
    manifests had them.
    """

    def __init__(self, path: Path, config: dict[str, Any], manifest: dict[str, Any]) -> None:
        blocks = tuple(block_from_json(path, entry) for entry in manifest["blocks"])
        self.path = path
        self.config = config
        self.embed, self.head = blocks[0], blocks[-1]
        self.layers = blocks[1:-1]
        self.layer_shapes = tuple(LayerShape(**shape) for shape in manifest["layer_shapes"])
        settings = manifest.get("settings")
        self.settings = None if settings is None else ModelSettings(**settings)
        self.format: str = manifest["format"]
        self.dtype: str = manifest["dtype"]
        self.tied: bool = manifest["tied"]
        self.source: str = manifest["source"]
        self.options: dict[str, Any] = manifest["options"]
        self.origin = read_origin(path)
        self._header_hashes = {entry["name"]: entry["header"] for entry in manifest["blocks"]}

    @classmethod
    def open(cls, path: Path | str) -> "Store":
        """Raises StoreError when `path` is no complete store, saying what it is and what to do.

        One that was pulled may lack blocks.
        """
        store = cls.described(path)
        for block in store.blocks if store.origin is None else store.present:
            store.check_size(block)
        return store

    @classmethod
    def described(cls, path: Path | str) -> "Store":
        """The store that the manifest in `path` describes, whatever block files are there."""
        path = Path(path)
        manifest = _read_manifest(path)
        try:
            return cls(path, _read_json(path / "config.json"), manifest)
        except (KeyError, TypeError, IndexError) as error:
            raise StoreError(
                f"{path / MANIFEST} is damaged ({error!r}); convert the checkpoint again"
            ) from error

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (self.embed, *self.layers, self.head)

    @property
    def present(self) -> tuple[Block, ...]:
        """The blocks that have files here."""
        return tuple(block for block in self.blocks if block.file.exists())

    def blocks_of(self, layers: Collection[int], *, first: bool, last: bool) -> tuple[Block, ...]:
        """What a stage with these layers reads; `first` and `last` say that it embeds, and samples."""
        table = first or (last and self.tied) or len(self.embed.weights) > 1
        chosen = [self.layers[layer] for layer in sorted(layers)]
        return (
            *((self.embed,) if table else ()),
            *chosen,
            *((self.head,) if last else ()),
        )

    def require(self, blocks: Iterable[Block]) -> None:
        """StoreError, with the command that brings them, when files of these blocks are not here."""
        missing = [block for block in blocks if not block.file.exists()]
        if missing:
            raise StoreError(self._what_is_missing(missing))

    def _what_is_missing(self, missing: Sequence[Block]) -> str:
        indices = [i for i, layer in enumerate(self.layers) if layer in missing]
        ends = [block.name for block in (self.embed, self.head) if block in missing]
        names = [*ends, *([f"layers {ranges(indices)}"] if indices else [])]
        lacks = (
            f"the store at {self.path} on {os.uname().nodename} lacks {' and '.join(names)} "
            f"({sum(block.nbytes for block in missing):,} bytes), which are needed here: "
        )
        if self._is_of_peers:
            return f"{lacks}give --from-peers, or --cold URL"
        layers = self._layers_with(missing)
        return f"{lacks}run headrace pull {self.origin} {self.path} --layers {layers} there, or give --cold URL"

    @property
    def _is_of_peers(self) -> bool:
        return self.origin is not None and self.origin.url == PEERS

    def _layers_with(self, blocks: Collection[Block]) -> str:
        """Layers that a pull has to name to bring these blocks: the ends come with the layers beside them."""
        chosen = {i for i, layer in enumerate(self.layers) if layer in blocks}
        chosen |= {0} if self.embed in blocks else set()
        return ranges(chosen | ({len(self.layers) - 1} if self.head in blocks else set()))

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def digest(self) -> str:
        """Identifies the model: its configuration and every byte of its weights."""
        hasher = xxhash.xxh3_128(json.dumps(self.config, sort_keys=True).encode())
        for block in self.blocks:
            hasher.update(
                f"{block.name} {block.xxh3_64} {self._header_hashes[block.name]}".encode()
            )
        return hasher.hexdigest()

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads every byte and compares hashes; `progress` gets (bytes checked, bytes in all).

        Raises StoreError naming the first damaged block. Of a store that was pulled, those that are here.
        """
        done, blocks = 0, self.blocks if self.origin is None else self.present
        total = sum(block.nbytes for block in blocks)

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress:
                progress(done, total)

        for block in blocks:
            self.check_size(block)
            part = self.damaged_part(block, block.file, count)
            if part is not None:
                raise StoreError(
                    f"block {block.name!r} is damaged: the {part} of {block.file} has changed since "
                    f"it was written; {self._cure}"
                )

    def damaged_part(
        self, block: Block, file: Path, progress: Callable[[int], None] | None = None
    ) -> str | None:
        """ "header" or "data", if `file` holds another one than the block's; `progress` gets bytes read."""
        hasher = xxhash.xxh3_64()
        with file.open("rb", buffering=0) as stream:
            header = xxhash.xxh3_64_hexdigest(stream.read(block.data_offset))
            while chunk := stream.read(READ_BYTES):
                hasher.update(chunk)
                if progress:
                    progress(len(chunk))
        if hasher.hexdigest() != block.xxh3_64:
            return "data"
        return None if header == self._header_hashes[block.name] else "header"

    def check_size(self, block: Block) -> None:
        """StoreError when the block's file is not there, or not of its size."""
        expected = block.data_offset + block.nbytes
        try:
            found = block.file.stat().st_size
        except OSError as error:
            raise StoreError(
                f"block {block.name!r} is missing: cannot read {block.file} ({error.strerror})"
            ) from error
        if found != expected:
            raise StoreError(
                f"block {block.name!r} is truncated or damaged: {block.file} has {found} bytes instead "
                f"of {expected}; {self._cure}"
            )

    @property
    def _cure(self) -> str:
        if self.origin is None:
            return "copy the file again, or delete the store and convert again"
        if self._is_of_peers:
            return "delete the file, and run with --from-peers again"
        some = "" if self.present == self.blocks else f" --layers {self._layers_with(self.present)}"
        return f"run headrace pull {self.origin} {self.path}{some} --verify"

    def read_block(self, block: Block) -> bytearray:
        """The block's data section, through the page cache."""
        data = bytearray(block.nbytes)
        with block.file.open("rb") as stream:
            stream.seek(block.data_offset)
            if stream.readinto(data) != block.nbytes:
                raise StoreError(f"{block.file} ended while it was read; is it being replaced?")
        return data


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise StoreError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise StoreError(f"{file} is damaged ({error}); convert the checkpoint again") from error
    if not isinstance(value, dict):
        raise StoreError(f"{file} is damaged (no JSON object); convert the checkpoint again")
    return value


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise StoreError(f"there is no store at {path}: no such directory")
    if not (path / MANIFEST).exists():
        raise StoreError(_why_no_store(path))
    manifest = _read_json(path / MANIFEST)
    version = manifest.get("version")
    if version != VERSION:
        raise StoreError(
            f"{path} is a store of version {version}, this release reads version {VERSION}; "
            "update headrace, or convert the checkpoint again"
        )
    return manifest


def _why_no_store(path: Path) -> str:
    if (path / JOURNAL).exists():
        done = max((path / JOURNAL).read_bytes().count(b"\n") - 1, 0)
        return (
            f"{path} is an unfinished conversion ({done} blocks are done); "
            "run the same headrace convert (or prune) again to resume it"
        )
    if (path / HELD).exists():
        return (
            f"{path} is a finished conversion that has not passed its --gate; run the same headrace convert "
            "(or prune) again to judge it anew, or without --gate to take it as it is"
        )
    if (path / "config.json").exists():
        return (
            f"{path} is a Hugging Face checkpoint, not a store; run headrace convert {path} STORE "
            "first and give STORE"
        )
    return f"{path} is not a store: it has no {MANIFEST}"
