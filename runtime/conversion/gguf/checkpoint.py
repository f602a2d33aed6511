"""A GGUF file as a checkpoint: the weights that conversion reads, and the files that it writes beside them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
import xxhash
from torch import Tensor
from transformers import PretrainedConfig

from headrace.runtime.block_file import Entry
from headrace.runtime.conversion.checkpoint import companions_in, has_tokenizer_in
from headrace.runtime.conversion.gguf.blocks import BLOCK_TYPES, BlockType, unpack
from headrace.runtime.conversion.gguf.config import ROPE_TENSORS, read_config
from headrace.runtime.conversion.gguf.files import parts_of
from headrace.runtime.conversion.gguf.metadata import Metadata
from headrace.runtime.conversion.gguf.naming import PLUS_ONE, as_trained, heads_of, names_of
from headrace.runtime.conversion.gguf.tokenizer import end_tokens, tokenizer_of
from headrace.runtime.conversion.part import Part
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.conversion.source import (
    Repacking,
    Rounding,
    SourceTensor,
    SourceWeight,
    rows_at_once,
)
from headrace.runtime.dtypes import name_of
from headrace.runtime.skeleton import Skeleton
from headrace.scheduler.errors import StoreError

PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
SAMPLES = 64
SAMPLE_BYTES = 4096
DECODED = "F16"
"""What quantized tensors become that are no matrices of layers: their scales are float16."""


class GGUFCheckpoint:
    """One file, or all parts of one that was split, with the interface of conversion.checkpoint.Checkpoint.

    Tokenizer and chat template come from the file's metadata, unless there are tokenizer files beside it.
    Raises StoreError when it is damaged, a part is missing, or it is of a kind that is not read here.
    """

    method = "gguf"

    def __init__(self, file: Path) -> None:
        self._files = parts_of(file)
        self.path = self._files[0]
        readers = [_read(part) for part in self._files]
        self._reader = readers[0]  # which has all metadata
        self._tensors = {
            tensor.name: _Placed(part, tensor)
            for part, reader in zip(self._files, readers, strict=True)
            for tensor in reader.tensors
        }
        self._metadata = Metadata(self._reader)
        count = self._metadata.whole("split.tensors.count", len(self._tensors))
        if count != len(self._tensors):
            raise StoreError(
                f"{self.path} and its other parts have {len(self._tensors)} tensors of {count}: they are not parts"
                " of one file; download them again"
            )
        config = read_config(
            self.path,
            self._metadata,
            {name: placed.tensor for name, placed in self._tensors.items()},
        )
        skeleton = Skeleton(config, torch.bfloat16)
        self._names = names_of(config, skeleton.model)
        self._model_type, self._config = config.model_type, config
        self._router = {n for n in self._tensors if ".ffn_gate_inp" in n}
        self.dtype = self._main_dtype()
        self.config = {**self._config_dict(config), "dtype": name_of(TORCH_DTYPES[self.dtype])}
        self.weights = {
            weight.name: weight
            for name, tensor in self._tensors.items()
            if name not in ROPE_TENSORS
            for weight in self._weights_of(name, tensor)
        }

    @staticmethod
    def _config_dict(config: PretrainedConfig) -> dict[str, Any]:
        found: dict[str, Any] = config.to_dict()
        found.pop("quantization_config", None)
        return {name: value for name, value in found.items() if not name.startswith("_")}

    def _main_dtype(self) -> str:
        """That of most plain matrices, else bfloat16: quantized models were trained in that, or nearly."""
        sizes: dict[str, int] = {}
        for tensor in (placed.tensor for placed in self._tensors.values()):
            dtype = PLAIN.get(tensor.tensor_type.name)
            if dtype is not None and len(tensor.shape) > 1 and tensor.name not in self._router:
                sizes[dtype] = sizes.get(dtype, 0) + int(tensor.n_bytes)
        return max(sizes, key=lambda dtype: sizes[dtype], default="BF16")

    def _weights_of(self, name: str, placed: "_Placed") -> Iterator[SourceWeight]:
        tensor = placed.tensor
        named, shape = self._names.get(name), _shape_of(tensor)
        if named is None:
            raise StoreError(
                f"{placed.file} holds a tensor {name}, which {self._model_type} does not have here"
            )
        if not named.experts:
            if name.endswith("ffn_gate_inp_shexp.weight"):
                shape = (1, *shape[-1:])
            yield self._weight(name, named.name, placed, shape, 0, int(tensor.n_bytes))
            return
        each = int(tensor.n_bytes) // shape[0]
        for expert in range(shape[0]):
            one = named.name.format(expert)
            yield self._weight(name, one, placed, shape[1:], expert * each, each)

    def _weight(
        self,
        there: str,
        name: str,
        placed: "_Placed",
        shape: tuple[int, ...],
        offset: int,
        nbytes: int,
    ) -> SourceWeight:
        file, tensor = placed.file, placed.tensor
        kind, first = tensor.tensor_type.name, int(tensor.data_offset) + offset
        rows = _Rows(SourceTensor(file, "U8", (nbytes,), first, nbytes), shape)
        heads = heads_of(there, self._config)
        if kind in PLAIN:
            source = SourceTensor(file, PLAIN[kind], shape, first, nbytes)
            return _plain(name, source, heads, minus_one=self._is_plus_one(there))
        if kind not in BLOCK_TYPES:
            raise StoreError(
                f"{there} of {file} is {kind}, which is not read here: there are"
                f" {', '.join((*PLAIN, *BLOCK_TYPES))}. Make the file anew with one of them (llama-quantize), or"
                " convert the original checkpoint"
            )
        if there.startswith("token_embd") or there in self._router:
            return _decoded(name, kind, rows)
        return _affine(name, kind, rows, heads)

    def _is_plus_one(self, name: str) -> bool:
        return self._model_type in PLUS_ONE and name.endswith("norm.weight")

    def companions(self) -> dict[str, bytes]:
        beside = self.path.parent
        if has_tokenizer_in(beside) or not self._has_own_tokenizer:
            return companions_in(beside)
        ends = {"eos_token_id": end_tokens(self._metadata)}
        with TemporaryDirectory(prefix="headrace-gguf-") as folder:
            tokenizer_of(self.path, self._metadata).save_pretrained(folder)
            (Path(folder) / "generation_config.json").write_text(json.dumps(ends))
            return companions_in(Path(folder))

    @property
    def has_tokenizer(self) -> bool:
        return has_tokenizer_in(self.path.parent) or self._has_own_tokenizer

    @property
    def _has_own_tokenizer(self) -> bool:
        return self._metadata.whole("tokenizer.ggml.model") is not None

    def fingerprint(self) -> str:
        """Tells this file from others without reading it whole: metadata and samples."""
        hasher = xxhash.xxh3_128()
        for file in self._files:
            size = file.stat().st_size
            start = int(self._reader.data_offset) if file == self.path else 0
            hasher.update(f"{size}".encode())
            with file.open("rb") as stream:
                while start > 0 and (chunk := stream.read(min(start, 1 << 20))):
                    hasher.update(chunk)
                    start -= len(chunk)
                for i in range(SAMPLES):
                    stream.seek(size * i // SAMPLES)
                    hasher.update(stream.read(SAMPLE_BYTES))
        return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor, and the part that holds it."""

    file: Path
    tensor: gguf.ReaderTensor


def _read(file: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise StoreError(f"{file} is no whole GGUF file ({error}): download it again") from error


def _shape_of(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """Outermost first."""
    return tuple(int(n) for n in reversed(tensor.shape))


class _Rows:
    """The bytes of a quantized matrix, some rows at a time."""

    def __init__(self, data: SourceTensor, shape: tuple[int, ...]) -> None:
        self.data, self.shape = data, shape
        self.count = prod(shape[:-1])
        self.row_bytes = data.nbytes // self.count

    def runs(self, rows_together: int = 1) -> Iterator[Tensor]:
        """uint8 [rows, row_bytes]; every run but the last has 64 n rows, and whole groups of `rows_together`."""
        step = rows_at_once(self.row_bytes)
        step = -(-step // rows_together) * rows_together
        for first in range(0, self.count, step):
            size = min(step, self.count - first) * self.row_bytes
            offset = self.data.offset + first * self.row_bytes
            part = SourceTensor(self.data.file, "U8", (size,), offset, size)
            yield part.tensor().view(-1, self.row_bytes)


def _plain(name: str, source: SourceTensor, heads: int, *, minus_one: bool) -> SourceWeight:
    part = Part("data", Entry(name, source.dtype, source.shape))
    if not heads and not minus_one:
        return SourceWeight(name, "raw", source.shape, ((part, source),))

    def pieces() -> Iterator[tuple[str, Tensor]]:
        values = source.tensor()
        yield "data", as_trained(values, heads) if heads else values - 1

    return SourceWeight(
        name, "raw", source.shape, ((part, source),), None, Repacking((part,), pieces)
    )


def _decoded(name: str, kind: str, rows: _Rows) -> SourceWeight:
    """As float16 values."""
    part = Part("data", Entry(name, DECODED, rows.shape))
    source = SourceTensor(rows.data.file, DECODED, rows.shape, rows.data.offset, rows.data.nbytes)
    rounding = Rounding(kind)

    def pieces() -> Iterator[tuple[str, Tensor]]:
        rounding.clear()
        for run in rows.runs():
            values = unpack(BLOCK_TYPES[kind], run).values()
            rounded = values.half()
            rounding.add(float(values.square().sum()), float((rounded - values).square().sum()))
            yield "data", rounded

    repacking = Repacking((part,), pieces, rounding)
    return SourceWeight(name, "raw", rows.shape, ((part, source),), None, repacking)


def _affine(name: str, kind: str, rows: _Rows, heads: int) -> SourceWeight:
    block = BLOCK_TYPES[kind]
    each = (rows.count, rows.shape[-1] // block.group)
    data = Entry(name, "U8", (prod(rows.shape) // 2, 1))
    if block.bits == 8:
        data = Entry(name, "I8", (rows.count, rows.shape[-1]))
    parts = [Part("data", data), Part("scale", Entry(f"{name}.scale", "F16", each))]
    if block.has_offset:
        parts.append(Part("offset", Entry(f"{name}.offset", "F16", each)))
    source = ((parts[0], rows.data),)
    rounding = Rounding(kind)
    repacking = Repacking(tuple(parts), partial(_pieces, block, rows, heads, rounding), rounding)
    fmt = "int4" if block.bits == 4 else "int8g"
    return SourceWeight(name, fmt, rows.shape, source, None, repacking)


def _pieces(
    kind: BlockType, rows: _Rows, heads: int, rounding: Rounding
) -> Iterator[tuple[str, Tensor]]:
    rounding.clear()
    scales, offsets = [], []
    together = rows.count // heads if heads else 1
    for run in rows.runs(together):
        some = as_trained(run, len(run) // together) if heads else run
        found = unpack(kind, some)
        if found.scale.dtype == torch.float32:
            rounding.add(*found.squares())
        scales.append(found.scale.half())
        if found.offset is not None:
            offsets.append(found.offset.half())
        pairs = found.codes.reshape(-1, 2)
        yield "data", (pairs[:, :1] << 4 | pairs[:, 1:]) if kind.bits == 4 else found.codes
    yield "scale", torch.cat(scales)
    if offsets:
        yield "offset", torch.cat(offsets)
