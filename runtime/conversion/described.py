"""What becomes of a weight, and how a store's config.json tells it to other readers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from headrace.runtime.conversion.part import Part
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.conversion.source import AnyCheckpoint, SourceWeight
from headrace.runtime.dtypes import name_of
from headrace.runtime.skeleton import Role, Skeleton

BITSANDBYTES = ("nf4", "fp4", "int8")
OWN_METHOD = "headrace"


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """One weight: its bytes are copied, or encoded when `encoded`, into `parts`.

    `dtype` is the type that an encoded weight's values have, or are taken to have.
    """

    source: SourceWeight
    format: str
    encoded: bool
    parts: tuple[Part, ...]
    dtype: str = ""

    @property
    def is_requantized(self) -> bool:
        return self.encoded and self.source.format != "raw"


def main_format(plans: Iterable[WeightPlan]) -> str:
    """The quantized format of most weights; empty when none is quantized."""
    counts: dict[str, int] = {}
    for plan in plans:
        if plan.format != "raw":
            counts[plan.format] = counts.get(plan.format, 0) + 1
    return max(counts, key=lambda fmt: counts[fmt], default="")


def described(
    checkpoint: AnyCheckpoint,
    skeleton: Skeleton,
    roles: Mapping[str, Role],
    plans: Mapping[str, WeightPlan],
    dtype: str,
) -> dict[str, Any]:
    """The checkpoint's config.json, saying what from_pretrained must know about types and formats."""
    config = dict(checkpoint.config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = name_of(TORCH_DTYPES[dtype])
    fmt = main_format(plans.values())
    if not fmt:
        config.pop("quantization_config", None)
        return config
    quantized = {roles[name].module for name, plan in plans.items() if plan.format != "raw"}
    skipped = [
        name
        for name, module in skeleton.model.named_modules()
        if type(module) is nn.Linear and name not in quantized
    ]
    table = any(
        plan.encoded and plan.format != "raw" and roles[name].target == skeleton.embedding_name
        for name, plan in plans.items()
    )
    if table or not {plan.format for plan in plans.values()} <= {"raw", *BITSANDBYTES}:
        # No other reader knows these formats, or tables in them. With a name that none has, they all refuse to try.
        config["quantization_config"] = {"quant_method": OWN_METHOD, "format": fmt}
        return config
    known = _quantization(fmt, plans, config[key])
    if checkpoint.method == "bitsandbytes":
        known = checkpoint.config.get("quantization_config") or known
    config["quantization_config"] = {**known, "llm_int8_skip_modules": skipped}
    return config


def _quantization(fmt: str, plans: Mapping[str, WeightPlan], dtype: str) -> dict[str, Any]:
    if fmt == "int8":
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            # Only weights are int8 here. bitsandbytes rounds activations, too, except in columns
            # above the threshold: below every activation, it multiplies by the weights as they are.
            "llm_int8_threshold": 1e-3,
        }
    double_quant = any(
        part.role == "nested_absmax" for plan in plans.values() for part in plan.parts
    )
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": fmt,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }
