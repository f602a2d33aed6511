"""NVIDIA's Model Optimizer: NVFP4, MXFP4 and FP8 matrices, one kind or several in a checkpoint.

    X.weight          U8 [rows, columns / 2] (four bits) or F8_E4M3 [rows, columns]
    X.weight_scale    F8_E4M3 [rows, columns / 16] (NVFP4), U8 [rows, columns / 32] (MXFP4), else F32 [] or [rows]
    X.weight_scale_2  F32 [], what all scales of an NVFP4 weight are multiplied by
    X.input_scale     F32 [], of activations

(modelopt/torch/export/quant_utils.py.)
"""

from collections.abc import Mapping
from typing import Any

from headrace.runtime.conversion.readers import fp4, fp8
from headrace.runtime.conversion.readers.packing import UNREADABLE, needed
from headrace.runtime.conversion.source import Imported, Tensors
from headrace.scheduler.errors import StoreError


def read(tensors: Tensors, settings: Mapping[str, Any]) -> Imported:
    algorithm = settings.get("quant_algo")
    weights, used = [], set()
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind in ("pre_quant_scale", "svdquant_lora_a"):
            raise StoreError(
                f"the checkpoint has {name}, by which inputs are changed before the product (Model Optimizer's"
                f" {algorithm}), which is not done here; {UNREADABLE} with NVFP4 or FP8"
            )
        if kind != "weight" or tensor.dtype not in ("U8", "I8", "F8_E4M3"):
            continue
        scale = needed(tensors, f"{name}_scale", "quantized")
        common = tensors.get(f"{name}_scale_2")
        if tensor.dtype == "F8_E4M3":
            fp8_rows = f"{stem}.input_scale" in tensors or algorithm == "FP8_PER_CHANNEL_PER_TOKEN"
            weights.append(fp8.weight(name, tensor, scale, None, fp8_rows))
        elif tensor.dtype == "U8" and (common is not None or scale.dtype == "U8"):
            factor = None if common is None else common.tensor
            weights.append(fp4.weight(name, tensor, scale, factor))
        else:
            raise StoreError(
                f"{name} is {tensor.dtype} with scales in {scale.dtype}: Model Optimizer's {algorithm} is not read here,"
                f" only NVFP4, MXFP4 and FP8; {UNREADABLE} with one of them"
            )
        used |= {name, f"{name}_scale", f"{name}_scale_2"}
    return Imported(weights, frozenset(used | fp8.activation_scales(tensors)))
