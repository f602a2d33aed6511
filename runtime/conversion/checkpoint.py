"""A Hugging Face checkpoint as it lies on disk: which tensors there are, and their bytes."""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from headrace.runtime.block_file import Entry, read_header
from headrace.runtime.conversion.quantize import PART_SUFFIXES, TORCH_DTYPES, Part
from headrace.scheduler.errors import StoreError

CHUNK_BYTES = 8 << 20
SAMPLES = 16
SAMPLE_BYTES = 4096

TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "*.tiktoken", "tekken.json",
)  # fmt: skip
COMPANIONS = (
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "chat_template*", "generation_config.json", "LICENSE*",
)  # fmt: skip


class TensorBytes(Protocol):
    """A tensor whose bytes come in pieces: as it lies in a file, or made of one that does."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...

    def chunks(self) -> Iterator[memoryview]: ...
    def read(self) -> bytes: ...
    def rows(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """`nbytes` bytes at `offset` of `file`, a tensor of this type and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in order, a bounded number at a time, never mapped into memory."""
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.offset)
                left = self.nbytes
                while left:
                    buffer = memoryview(bytearray(min(left, CHUNK_BYTES)))
                    yield buffer[: _fill(stream, buffer)]
                    left -= len(buffer)
                os.posix_fadvise(stream.fileno(), self.offset, self.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise StoreError(f"cannot read {self.file}: {error.strerror}") from error

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def rows(self) -> Iterator[Tensor]:
        """Runs of whole rows as tensors [rows, columns]; each but the last has 64 n rows."""
        columns = self.shape[-1] if self.shape else 1
        row_bytes = max(self.nbytes // max(prod(self.shape[:-1]), 1), 1)
        step = max(CHUNK_BYTES // row_bytes // 64, 1) * 64
        for first in range(0, self.nbytes, step * row_bytes):
            size = min(step * row_bytes, self.nbytes - first)
            part = SourceTensor(self.file, self.dtype, (), self.offset + first, size)
            flat = torch.frombuffer(bytearray(part.read()), dtype=TORCH_DTYPES[self.dtype])
            yield flat.reshape(-1, columns)


def _fill(stream: Any, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise StoreError(f"{stream.name} ended while it was read; is it being replaced?")
        done += count
    return done


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """A logical weight. `format` is "raw", "int8", "nf4" or "fp4"; `shape` is the logical one."""

    name: str
    format: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Part, TensorBytes], ...]
    state: Mapping[str, Any] | None = None

    @property
    def data(self) -> TensorBytes:
        return self.parts[0][1]


class Checkpoint:
    """A local directory with config.json and safetensors files, checked to be whole.

    A store is one, too, but is taken for a mistake unless `stores` are welcome. Raises StoreError, naming
    the file and what to do, when it is not.
    """

    def __init__(self, path: Path, *, stores: bool = False) -> None:
        self.path = path
        self._stores = stores
        self.config = self._read_config()
        self._tensors: dict[str, SourceTensor] = {}
        self._shards = self._find_shards()
        for shard in self._shards:
            specs, start = read_header(shard)
            for name, spec in specs.items():
                self._tensors[name] = SourceTensor(
                    shard, spec.dtype, spec.shape, start + spec.offset, spec.nbytes
                )
        self.weights = self._weights()
        self.dtype = self._main_dtype()

    def _read_config(self) -> dict[str, Any]:
        if not self.path.is_dir():
            raise StoreError(
                f"{self.path} is no directory; download the model first and give its path"
            )
        if not self._stores and (self.path / "headrace.json").exists():
            raise StoreError(f"{self.path} is a store already; convert the original checkpoint")
        file = self.path / "config.json"
        if not file.exists():
            raise StoreError(f"{self.path} has no config.json, so it is no Hugging Face checkpoint")
        try:
            config = json.loads(file.read_bytes())
        except ValueError as error:
            raise StoreError(f"{file} is not valid JSON ({error}); download it again") from error
        assert isinstance(config, dict)
        return config

    def _find_shards(self) -> tuple[Path, ...]:
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise StoreError(f"{index} is damaged ({error}); download it again") from error
            missing = [name for name in names if not (self.path / name).exists()]
            if missing:
                raise StoreError(
                    f"{self.path} lacks {len(missing)} of the {len(names)} files that its index "
                    f"names: {', '.join(missing[:5])}; finish the download"
                )
            return tuple(self.path / name for name in names)
        if single.exists():
            return (single,)
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pth")):
            raise StoreError(
                f"{self.path} holds its weights as pickles (.bin), not as safetensors; load it with "
                "transformers once and save_pretrained() it, which writes safetensors"
            )
        raise StoreError(f"{self.path} has no model.safetensors and no index of shards")

    def _weights(self) -> dict[str, SourceWeight]:
        sides: dict[str, list[tuple[Part, SourceTensor]]] = {}
        weights = dict(self._tensors)
        for name, tensor in self._tensors.items():
            owner, role = _owner(name, self._tensors)
            if owner:
                part = Part(role, Entry(name, tensor.dtype, tensor.shape))
                sides.setdefault(owner, []).append((part, tensor))
                del weights[name]
        return {
            name: _weight(name, tensor, sides.get(name, [])) for name, tensor in weights.items()
        }

    def _main_dtype(self) -> str:
        """The type that holds most of the unquantized weights, or the one 4-bit weights came from."""
        sizes: dict[str, int] = {}
        for weight in self.weights.values():
            dtype = weight.data.dtype
            if weight.state:
                dtype = {"bfloat16": "BF16", "float16": "F16"}.get(weight.state["dtype"], "F32")
            if dtype in ("F32", "F16", "BF16") and weight.format != "int8":
                sizes[dtype] = sizes.get(dtype, 0) + prod(weight.shape)
        if not sizes:
            raise StoreError(f"{self.path} has no weights in float32, float16 or bfloat16")
        return max(sizes, key=lambda dtype: sizes[dtype])

    def changed(self, config: dict[str, Any], weights: Mapping[str, SourceWeight]) -> "Checkpoint":
        """The checkpoint with another config.json and other weights; its other files are the same."""
        other = copy.copy(self)
        other.config, other.weights = config, dict(weights)
        return other

    def companions(self) -> tuple[Path, ...]:
        """Tokenizer, chat template and generation config: files that a store takes over as they are."""
        found = {file for pattern in COMPANIONS for file in self.path.glob(pattern)}
        return tuple(sorted(file for file in found if file.is_file()))

    @property
    def has_tokenizer(self) -> bool:
        return any(True for pattern in TOKENIZERS for _ in self.path.glob(pattern))

    def fingerprint(self) -> str:
        """Tells this checkpoint from others without reading it whole: config, headers and samples."""
        hasher = xxhash.xxh3_128(json.dumps(self.config, sort_keys=True).encode())
        for shard in self._shards:
            size = shard.stat().st_size
            hasher.update(f"{shard.name} {size}".encode())
            with shard.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
                hasher.update(stream.read(header))
                for i in range(SAMPLES):
                    stream.seek(8 + header + (size - 8 - header) * i // SAMPLES)
                    hasher.update(stream.read(SAMPLE_BYTES))
        return hasher.hexdigest()


def _owner(name: str, tensors: Mapping[str, SourceTensor]) -> tuple[str, str]:
    """The weight that a side tensor of bitsandbytes belongs to, and its role there."""
    for suffix, role in PART_SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), role
    for suffix, role in (("SCB", "scale"), ("weight_format", "layout")):
        stem = name.removesuffix(f".{suffix}")
        if stem != name and f"{stem}.weight" in tensors:
            return f"{stem}.weight", role
    return "", ""


def _weight(
    name: str, tensor: SourceTensor, sides: list[tuple[Part, SourceTensor]]
) -> SourceWeight:
    data = (Part("data", Entry(name, tensor.dtype, tensor.shape)), tensor)
    by_role = {part.role: (part, side) for part, side in sides}
    if not sides:
        return SourceWeight(name, "raw", tensor.shape, (data,))
    if "scale" in by_role:
        ordered = (data, *(by_role[role] for role in ("scale", "layout") if role in by_role))
        return SourceWeight(name, "int8", tensor.shape, ordered)
    if "state" not in by_role or tensor.dtype != "U8":
        raise StoreError(
            f"{name} is quantized in a way that is not read here (no bitsandbytes state, or stored "
            f"as {tensor.dtype} instead of U8); convert the original, unquantized checkpoint"
        )
    state = json.loads(by_role["state"][1].read())
    order = ("absmax", "nested_absmax", "nested_code", "code", "state")
    parts = (data, *(by_role[role] for role in order if role in by_role))
    return SourceWeight(name, state["quant_type"], tuple(state["shape"]), parts, state)
