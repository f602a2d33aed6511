"""A Hugging Face checkpoint as it lies on disk: which tensors there are, and their bytes."""

import copy
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from headrace.runtime.block_file import Entry, read_header
from headrace.runtime.conversion.part import Part
from headrace.runtime.conversion.quantize import PART_SUFFIXES
from headrace.runtime.conversion.readers import READERS
from headrace.runtime.conversion.source import Imported, SourceTensor, SourceWeight
from headrace.scheduler.errors import StoreError

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


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def weight_files(path: Path) -> list[str]:
    """The files of a checkpoint that hold weights: those that its index names, or the one of those without."""
    index = path / INDEX
    if not index.exists():
        return [SINGLE]
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"{index} is damaged ({error}); download it again") from error


def companions_in(path: Path) -> dict[str, bytes]:
    """Tokenizer, chat template and generation config in a directory, by name."""
    found = {file for pattern in COMPANIONS for file in path.glob(pattern)}
    return {file.name: file.read_bytes() for file in sorted(found) if file.is_file()}


def has_tokenizer_in(path: Path) -> bool:
    return any(True for pattern in TOKENIZERS for _ in path.glob(pattern))


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
        self.method = self._quantization.get("quant_method", "bitsandbytes")
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
        # Older releases of Model Optimizer say what they quantized in a file of its own.
        beside = self.path / "hf_quant_config.json"
        if "quantization_config" not in config and beside.exists():
            said = json.loads(beside.read_bytes())["quantization"]
            config["quantization_config"] = {"quant_method": "modelopt", **said}
        return config

    @property
    def _quantization(self) -> Mapping[str, Any]:
        return self.config.get("quantization_config") or {}

    def _find_shards(self) -> tuple[Path, ...]:
        if (self.path / INDEX).exists():
            names = weight_files(self.path)
            missing = [name for name in names if not (self.path / name).exists()]
            if missing:
                raise StoreError(
                    f"{self.path} lacks {len(missing)} of the {len(names)} files that its index "
                    f"names: {', '.join(missing[:5])}; finish the download"
                )
            return tuple(self.path / name for name in names)
        if (self.path / SINGLE).exists():
            return (self.path / SINGLE,)
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pth")):
            raise StoreError(
                f"{self.path} holds its weights as pickles (.bin), not as safetensors; load it with "
                "transformers once and save_pretrained() it, which writes safetensors"
            )
        raise StoreError(f"{self.path} has no model.safetensors and no index of shards")

    def _weights(self) -> dict[str, SourceWeight]:
        sides: dict[str, list[tuple[Part, SourceTensor]]] = {}
        imported = Imported((), frozenset())
        if self.method in READERS:
            imported = READERS[self.method](self._tensors, self._quantization)
        weights = {n: t for n, t in self._tensors.items() if n not in imported.used}
        for name, tensor in list(weights.items()):
            owner, role = _owner(name, self._tensors)
            if owner:
                part = Part(role, Entry(name, tensor.dtype, tensor.shape))
                sides.setdefault(owner, []).append((part, tensor))
                del weights[name]
        plain = (_weight(name, tensor, sides.get(name, [])) for name, tensor in weights.items())
        return {weight.name: weight for weight in (*plain, *imported.weights)}

    def _main_dtype(self) -> str:
        """The type that holds most of the unquantized weights, or the one 4-bit weights came from."""
        sizes: dict[str, int] = {}
        for weight in self.weights.values():
            dtype = weight.data.dtype
            if weight.state and "dtype" in weight.state:
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

    def companions(self) -> dict[str, bytes]:
        """Tokenizer, chat template and generation config: files that a store takes over, by name."""
        return companions_in(self.path)

    @property
    def has_tokenizer(self) -> bool:
        return has_tokenizer_in(self.path)

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
