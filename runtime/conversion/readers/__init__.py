"""Quantized checkpoints of other tools, each read into a store's formats without loss."""

from collections.abc import Callable, Mapping
from typing import Any

from headrace.runtime.conversion.readers import (
    auto_round,
    awq,
    compressed_tensors,
    fp8,
    gptq,
    modelopt,
    mxfp4,
)
from headrace.runtime.conversion.source import Imported, Tensors

Reader = Callable[[Tensors, Mapping[str, Any]], Imported]
"""Takes a checkpoint's tensors and its quantization_config."""

READERS: Mapping[str, Reader] = {
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fp8": fp8.read,
    "fbgemm_fp8": fp8.read_fbgemm,
    "auto-round": auto_round.read,
    "mxfp4": mxfp4.read,
    "modelopt": modelopt.read,
}
"""By quant_method."""
