"""What a conversion will write: every weight's format and place, settled before the first byte."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from headrace.runtime.block_file import Layout, lay_out
from headrace.runtime.conversion.affine import BITS, GROUP_SIZE, GROUP_SIZES, group_of
from headrace.runtime.conversion.described import WeightPlan, described, main_format
from headrace.runtime.conversion.quantize import QUANTIZED, TORCH_DTYPES, parts_of
from headrace.runtime.conversion.readers import READERS
from headrace.runtime.conversion.source import AnyCheckpoint, SourceWeight
from headrace.runtime.manifest import LayerShape, ModelSettings
from headrace.runtime.settings import model_settings
from headrace.runtime.skeleton import BlockKey, Role, Skeleton, parse_config
from headrace.scheduler.errors import StoreError

log = logging.getLogger(__name__)

FORMATS = ("keep", "bf16", "int8", "nf4", "int4", "int3")
FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
FOUR_BIT = ("nf4", "fp4")


@dataclass(frozen=True, slots=True)
class Options:
    """`format` for the matrices of layers (and for everything when it is "keep" or "bf16").

    `policy` pairs a glob over tensor names with the format of what it matches; the first match
    decides. `double_quant` quantizes NF4's scales to 8 bits, `group_size` is the number of columns
    that share a scale in int4 and int3. `requantize`: what is quantized in another format gets this one all
    the same. Raises StoreError on unknown formats.
    """

    format: str
    policy: tuple[tuple[str, str], ...] = ()
    double_quant: bool = False
    group_size: int | None = None
    requantize: bool = False

    def __post_init__(self) -> None:
        for name in self._formats:
            if name not in FORMATS:
                raise StoreError(f"unknown format {name!r}; choose among {', '.join(FORMATS)}")
        if self.double_quant and "nf4" not in self._formats:
            raise StoreError(f"double quantization is part of nf4, not of {self.format}")
        if self.group_size is None:
            return
        if not self._grouped:
            raise StoreError(f"a group size is part of int4 and int3, not of {self.format}")
        if self.group_size not in GROUP_SIZES:
            known = ", ".join(map(str, GROUP_SIZES))
            raise StoreError(
                f"{self._grouped[0]} has groups of {known} columns, not of {self.group_size}"
            )

    @property
    def _formats(self) -> tuple[str, ...]:
        return (self.format, *(fmt for _, fmt in self.policy))

    @property
    def _grouped(self) -> list[str]:
        return [fmt for fmt in BITS if fmt in self._formats]

    def as_json(self) -> dict[str, Any]:
        policy = [list(pair) for pair in self.policy]
        options: dict[str, Any] = {
            "format": self.format,
            "policy": policy,
            "double_quant": self.double_quant,
        }
        if self._grouped:
            options["group_size"] = self.group_size or GROUP_SIZE
        if self.requantize:
            options["requantize"] = True
        return options


@dataclass(frozen=True, slots=True)
class BlockPlan:
    name: str
    weights: tuple[WeightPlan, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """`format` and `dtype` describe the result, `config` is its config.json, blocks in order."""

    format: str
    dtype: str
    tied: bool
    config: dict[str, Any]
    layer_shapes: tuple[LayerShape, ...]
    settings: ModelSettings
    blocks: tuple[BlockPlan, ...]

    @property
    def nbytes(self) -> int:
        return sum(block.layout.file_bytes for block in self.blocks)


def plan_conversion(
    checkpoint: AnyCheckpoint, options: Options, *, expand: bool = False
) -> ConversionPlan:
    """For a model that is to `expand` its latents, or not.

    Raises StoreError or UnsupportedModelError when the checkpoint cannot be converted so.
    """
    _refuse_other_quantization(checkpoint)
    config = parse_config(checkpoint.config, str(checkpoint.path))
    skeleton = Skeleton(config, TORCH_DTYPES[checkpoint.dtype], expand=expand)
    roles = _used_roles(checkpoint, skeleton)
    _refuse_missing(checkpoint, skeleton, roles)
    plans = _Chooser(checkpoint, skeleton, options).plan(roles)
    keys: list[BlockKey] = ["embed", *range(len(skeleton.layers)), "head"]
    dtype = "BF16" if options.format == "bf16" else checkpoint.dtype
    return ConversionPlan(
        format=main_format(plans.values()) or FLOATS[dtype],
        dtype=dtype,
        tied=skeleton.tied,
        config=described(checkpoint, skeleton, roles, plans, dtype),
        layer_shapes=skeleton.layer_shapes(),
        settings=model_settings(config),
        blocks=tuple(_block(key, roles, plans) for key in keys),
    )


def _refuse_other_quantization(checkpoint: AnyCheckpoint) -> None:
    known = ("bitsandbytes", "gguf", *READERS)
    if checkpoint.method not in known:
        raise StoreError(
            f"{checkpoint.path} is quantized with {checkpoint.method!r}, which cannot be converted; "
            f"use the original checkpoint, or one that is quantized with {', '.join(known)}"
        )


def _used_roles(checkpoint: AnyCheckpoint, skeleton: Skeleton) -> dict[str, Role]:
    roles = skeleton.classify(checkpoint.weights)
    copy = checkpoint.weights.get(_head_name(skeleton))
    table = checkpoint.weights.get(skeleton.embedding_name)
    if skeleton.tied and copy and table:
        if any(a != b for a, b in zip(copy.data.chunks(), table.data.chunks(), strict=False)):
            raise StoreError(
                f"{copy.name} differs from {table.name}, but config.json has tie_word_embeddings "
                "true; set it to false if the head has weights of its own"
            )
        roles.pop(copy.name)
    unused = sorted(name for name, role in roles.items() if role.kind == "unused")
    if unused:
        log.warning("left out %d tensors that the model does not use: %s", len(unused), unused[:5])
    return {name: role for name, role in roles.items() if role.kind != "unused"}


def _refuse_missing(
    checkpoint: AnyCheckpoint, skeleton: Skeleton, roles: Mapping[str, Role]
) -> None:
    found: dict[str, set[tuple[int | None, int | None]]] = {}
    for role in roles.values():
        found.setdefault(role.target, set()).add((role.expert, role.part))
    missing = []
    for name, _ in skeleton.model.named_parameters(remove_duplicate=False):
        if name not in found and not (skeleton.tied and name == _head_name(skeleton)):
            missing.append(name)
        elif any(expert is not None for expert, _ in found.get(name, ())):
            experts = skeleton.model.get_submodule(name.rpartition(".")[0]).num_experts
            parts = {part for _, part in found[name]}
            if len(found[name]) < experts * (1 if parts == {None} else 2):
                missing.append(f"experts of {name}")
    if missing:
        raise StoreError(
            f"{checkpoint.path} lacks {len(missing)} of the weights that {checkpoint.config['model_type']}"
            f" needs: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; "
            "finish the download, or check that config.json belongs to these weights"
        )


def _head_name(skeleton: Skeleton) -> str:
    """The LM head's weight; "" when the model has none that can be quantized."""
    is_linear = type(skeleton.model.get_output_embeddings()) is nn.Linear
    return skeleton.head_name if is_linear else ""


class _Chooser:
    """Decides every weight's format, and remembers which patterns of the policy were of use."""

    def __init__(self, checkpoint: AnyCheckpoint, skeleton: Skeleton, options: Options) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._ends = _head_name(skeleton), skeleton.embedding_name
        self._regrouped: dict[int, int] = {}
        self._quantized = next(
            (w.format for w in checkpoint.weights.values() if w.format != "raw"), None
        )
        if options.requantize and not self._quantized:
            raise StoreError(f"{checkpoint.path} is not quantized: leave out --requantize")
        if self._quantized and not (options.requantize or self._is_kept(options.format)):
            raise StoreError(
                f"{checkpoint.path} is already quantized to {self._quantized}; making it "
                f"{options.format} would add a second error: use the format keep, which stores it as it "
                "is, convert the original checkpoint, or say --requantize to accept the error"
            )

    def _is_kept(self, fmt: str) -> bool:
        same = self._quantized == fmt or (fmt == "nf4" and self._quantized in FOUR_BIT)
        return fmt == "keep" or same

    def plan(self, roles: Mapping[str, Role]) -> dict[str, WeightPlan]:
        matched: set[str] = set()
        plans = {}
        for name, role in roles.items():
            pattern, fmt = next(
                (pair for pair in self._options.policy if fnmatchcase(name, pair[0])), (None, None)
            )
            if pattern is not None:
                matched.add(pattern)
            plans[name] = self._plan_weight(self._checkpoint.weights[name], role, fmt)
        for pattern, _ in self._options.policy:
            if pattern not in matched:
                raise StoreError(
                    f"policy pattern {pattern!r} decides about no tensor; names look like "
                    f"{', '.join(sorted(roles)[:3])}"
                )
        for columns, group in sorted(self._regrouped.items()):
            log.warning("rows of %d columns have groups of %d in int4 and int3", columns, group)
        return plans

    def _plan_weight(self, weight: SourceWeight, role: Role, asked: str | None) -> WeightPlan:
        fmt = asked or self._default(weight, role)
        if weight.format != "raw":
            return self._plan_quantized(weight, role, fmt)
        if fmt in QUANTIZED:
            self._refuse_unquantizable(weight, role, fmt)
            return self._encoded(weight, fmt, weight.data.dtype)
        if fmt == "bf16" and weight.data.dtype in FLOATS and weight.data.dtype != "BF16":
            return self._encoded(weight, "raw", "BF16")
        return _kept(weight)

    def _plan_quantized(self, weight: SourceWeight, role: Role, fmt: str) -> WeightPlan:
        if fmt == "keep" or weight.format == fmt or {weight.format, fmt} <= set(FOUR_BIT):
            return _kept(weight)
        if not self._options.requantize:
            raise StoreError(
                f"{weight.name} is {weight.format} already and cannot become {fmt} without --requantize"
            )
        if fmt == "bf16":
            return self._encoded(weight, "raw", "BF16")
        self._refuse_unquantizable(weight, role, fmt)
        return self._encoded(weight, fmt, self._checkpoint.dtype)

    def _default(self, weight: SourceWeight, role: Role) -> str:
        fmt = self._options.format
        if fmt in QUANTIZED:
            asked = not self._quantized or (self._options.requantize and weight.format != "raw")
            return fmt if asked and role.kind in ("linear", "expert") else "keep"
        if weight.format != "raw":
            return fmt
        # What a checkpoint stores with more precision than the rest needs it (routers' biases).
        return fmt if weight.data.dtype == self._checkpoint.dtype else "keep"

    def _refuse_unquantizable(self, weight: SourceWeight, role: Role, fmt: str) -> None:
        if role.kind not in ("linear", "expert") and role.target not in self._ends:
            raise StoreError(
                f"{weight.name} cannot be stored as {fmt}: only the matrices of linear layers, of "
                "experts and of the LM head, and the embedding table can; use keep or bf16 for it"
            )
        if weight.format == "raw" and weight.data.dtype not in FLOATS:
            raise StoreError(f"{weight.name} is {weight.data.dtype} and cannot be stored as {fmt}")

    def _encoded(self, weight: SourceWeight, fmt: str, dtype: str) -> WeightPlan:
        group_size = self._options.group_size or GROUP_SIZE
        if fmt in BITS and group_of(weight.shape[-1], group_size) != group_size:
            self._regrouped[weight.shape[-1]] = group_of(weight.shape[-1], group_size)
        parts = parts_of(
            weight.name,
            dtype,
            weight.shape,
            fmt,
            double_quant=self._options.double_quant,
            group_size=group_size,
        )
        return WeightPlan(weight, fmt, True, parts, dtype)


def _kept(weight: SourceWeight) -> WeightPlan:
    return WeightPlan(weight, weight.format, False, weight.stored)


def _block(key: BlockKey, roles: Mapping[str, Role], plans: Mapping[str, WeightPlan]) -> BlockPlan:
    names = sorted(
        (name for name, role in roles.items() if role.block == key),
        key=lambda name: (roles[name].order, name),
    )
    weights = tuple(plans[name] for name in names)
    layout = lay_out(part.entry for weight in weights for part in weight.parts)
    return BlockPlan(key if isinstance(key, str) else f"layer-{key:05d}", weights, layout)
