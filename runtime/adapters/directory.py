"""A directory with a LoRA adapter, as PEFT's save_pretrained leaves it: checked without reading its weights."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from headrace.scheduler.errors import StoreError
from headrace.scheduler.plan import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model."
"""Before each module's own name, in the names of tensors."""

_PLAIN: Mapping[str, tuple[object, str]] = {
    "use_dora": (False, "DoRA scales whole matrices by their norms"),
    "bias": ("none", "it has biases of its own"),
    "lora_bias": (False, "its matrices have biases"),
    "modules_to_save": (None, "it replaces whole modules"),
    "target_parameters": (None, "it changes parameters that are no linear layers, such as fused experts"),
    "trainable_token_indices": (None, "it changes rows of the embedding"),
    "layer_replication": (None, "its model has other layers"),
    "alora_invocation_tokens": (None, "it is active only behind certain tokens"),
    "use_qalora": (False, "QA-LoRA averages its inputs in groups"),
    "use_bdlora": (None, "its matrices are made of blocks"),
    "arrow_config": (None, "it chooses between other adapters"),
    "kasa_config": (None, "KaSA changes the model's own matrices"),
    "monteclora_config": (None, "it draws its matrices"),
    "velora_config": (None, "it changes what layers get"),
}  # fmt: skip
"""What each of PEFT's settings must be, unless it is absent or empty, and what the adapter does otherwise."""

_TENSOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


class Factors(NamedTuple):
    """Of one module: what is added to x W^T [tokens, N] is scale * (x A^T) B^T, with A [rank, K] and B [N, rank];
    the names of both in the file."""

    a: str
    b: str
    rank: int
    inputs: int
    outputs: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter on disk: what it changes, by the names of the model's modules in transformers, and what it calls the
    model that it was made for."""

    adapter: Adapter
    modules: Mapping[str, Factors]
    base: str = ""

    @property
    def weights(self) -> Path:
        return Path(self.adapter.path) / WEIGHTS


def open_adapter(path: Path) -> AdapterFiles:
    """What is in the directory `path`. StoreError, with the reason, when that is no adapter that can be applied."""
    modules = read_modules(path)
    base = str(_read_config(path).get("base_model_name_or_path") or "no name")
    return AdapterFiles(Adapter(digest_of(path), str(path.absolute())), modules, base)


def read_modules(path: Path) -> dict[str, Factors]:
    """What the adapter in a directory changes, by module. StoreError as for `open_adapter`."""
    config = _read_config(path)
    _check_config(path, config)
    file = path / WEIGHTS
    if not file.is_file():
        raise StoreError(f"the adapter {path} has no {WEIGHTS}: save it as safetensors")
    try:
        with safe_open(file, "np") as opened:
            names = opened.keys()
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    return _modules(path, config, shapes)


def digest_of(path: Path) -> str:
    """Of all that an adapter's results depend on, in hexadecimal. StoreError when its files cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for name in (CONFIG, WEIGHTS):
            with (path / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    except OSError as error:
        raise StoreError(f"the adapter {path} cannot be read: {error}") from error
    return digest.hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        # Which raises OSError for names that are too long.
        if not path.is_dir():
            raise StoreError(f"the adapter {path} is no directory: name one that PEFT has saved")
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path} is no adapter: it has no {CONFIG}, which PEFT saves") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise StoreError(f"{file} must hold a JSON object")
    return config


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise StoreError(f"the adapter {path} is of type {kind!r}: only LORA can be applied")
    for name, (plain, otherwise) in _PLAIN.items():
        value = config.get(name)
        if value and value != plain:
            raise StoreError(f"the adapter {path} cannot be applied: {name} is set; {otherwise}")


def _modules(
    path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Factors]:
    sides: dict[str, dict[str, str]] = {}
    for name in shapes:
        found = _TENSOR.match(name.removeprefix(PREFIX))
        if found is None or len(shapes[name]) != 2:
            raise StoreError(
                f"the adapter {path} has a tensor {name} of shape {list(shapes[name])}, which is no matrix of"
                " LoRA on a linear layer: embeddings, convolutions and whole weights cannot be applied"
            )
        sides.setdefault(found["module"], {})[found["side"]] = name
    if not sides:
        raise StoreError(f"the adapter {path} changes nothing: {WEIGHTS} is empty")
    return {module: _factors(path, config, module, own, shapes) for module, own in sides.items()}


def _factors(
    path: Path,
    config: Mapping[str, Any],
    module: str,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Factors:
    if len(names) != 2:
        raise StoreError(f"the adapter {path} has only lora_{next(iter(names))} of {module}")
    (rank, inputs), (outputs, other) = shapes[names["A"]], shapes[names["B"]]
    told = _of_module(config.get("rank_pattern"), module, config.get("r"))
    if not rank == other == told:
        raise StoreError(
            f"the adapter {path}: {module} has matrices of ranks {rank} and {other}, and {CONFIG} says {told}"
        )
    alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    # peft.tuners.lora.LoraLayer.update_layer
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(names["A"], names["B"], rank, inputs, outputs, scale)


def _of_module(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """As peft.utils.get_pattern_key chooses: the first key that the end of the module's name matches."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise
