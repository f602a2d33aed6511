"""A GGUF file as a checkpoint: the weights that conversion reads, and the files that it writes beside them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
import xxhash
from transformers import PretrainedConfig

from headrace.runtime.conversion.checkpoint import companions_in, has_tokenizer_in
from headrace.runtime.conversion.gguf.blocks import BLOCK_TYPES, MXFP4
from headrace.runtime.conversion.gguf.config import ROPE_TENSORS, read_config
from headrace.runtime.conversion.gguf.files import parts_of
from headrace.runtime.conversion.gguf.metadata import Metadata
from headrace.runtime.conversion.gguf.naming import PLUS_ONE, heads_of, names_of, parts_of_fused
from headrace.runtime.conversion.gguf.tokenizer import end_tokens, tokenizer_of
from headrace.runtime.conversion.gguf.weights import PLAIN, Rows, affine, mxfp4, plain
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.conversion.source import SourceTensor, SourceWeight
from headrace.runtime.dtypes import name_of
from headrace.runtime.skeleton import Skeleton
from headrace.scheduler.errors import StoreError

SAMPLES = 64
SAMPLE_BYTES = 4096


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
        shape = _shape_of(tensor)
        if name.endswith("ffn_gate_inp_shexp.weight"):
            shape = (1, *shape)
        parts = {name: shape[-2 if len(shape) > 1 else 0]}
        if name not in self._names:
            parts = parts_of_fused(name, self._config) or parts
        for part in parts:
            if part not in self._names:
                raise StoreError(
                    f"{placed.file} holds a tensor {name}, which {self._model_type} does not have here"
                )
        experts = shape[0] if len(shape) > 2 else 1
        row_bytes = int(tensor.n_bytes) // experts // sum(parts.values())
        offset = 0
        for expert in range(experts):
            for part, rows in parts.items():
                own, nbytes = self._names[part].format(expert), rows * row_bytes
                one = (rows, *shape[-1:]) if len(shape) > 1 else (rows,)
                yield self._weight(part, own, placed, one, offset, nbytes)
                offset += nbytes

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
        rows = Rows(SourceTensor(file, "U8", (nbytes,), first, nbytes), shape)
        heads = heads_of(there, self._config)
        if kind in PLAIN:
            source = SourceTensor(file, PLAIN[kind], shape, first, nbytes)
            return plain(name, source, heads, minus_one=self._is_plus_one(there))
        if kind == MXFP4:
            return mxfp4(name, rows, heads)
        if kind not in BLOCK_TYPES:
            raise StoreError(
                f"{there} of {file} is {kind}, which is not read here: there are"
                f" {', '.join((*PLAIN, *BLOCK_TYPES, MXFP4))}. Make the file anew with one of them (llama-quantize), or"
                " convert the original checkpoint"
            )
        return affine(name, kind, rows, heads)

    def _is_plus_one(self, name: str) -> bool:
        return self._model_type in PLUS_ONE and name.endswith("norm.weight")

    def companions(self) -> dict[str, bytes]:
        beside = self.path.parent
        if has_tokenizer_in(beside) or not self._has_own_tokenizer:
            return companions_in(beside)
        ends = {"eos_token_id": end_tokens(self._metadata)}
        with TemporaryDirectory(prefix="headrace-gguf-") as folder:
            tokenizer_of(self.path, self._metadata).save_pretrained(folder)
            if ends["eos_token_id"]:
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
