"""AutoRound, which packs weights in the layouts of other tools and says in which. (auto_round/inference/backend.py.)"""

from collections.abc import Mapping
from typing import Any

from headrace.runtime.conversion.readers import awq, compressed_tensors, gptq
from headrace.runtime.conversion.readers.packing import UNREADABLE
from headrace.runtime.conversion.source import Imported, Tensors
from headrace.scheduler.errors import StoreError

GPTQ_FORMATS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
}


def read(tensors: Tensors, settings: Mapping[str, Any]) -> Imported:
    layout = settings.get("packing_format")
    if settings.get("rotation_config"):
        raise StoreError(
            "the checkpoint's weights are rotated (AutoRound's rotation_config), which is not undone here; convert"
            " the original, unquantized checkpoint"
        )
    if layout in GPTQ_FORMATS:
        return gptq.read(tensors, {**settings, "checkpoint_format": GPTQ_FORMATS[layout]})
    if layout == "auto_round:auto_awq":
        return awq.read(tensors, {**settings, "version": "gemm"})
    if layout == "auto_round:llm_compressor":
        return compressed_tensors.read(tensors, settings)
    known = ", ".join((*GPTQ_FORMATS, "auto_round:auto_awq", "auto_round:llm_compressor"))
    raise StoreError(f"AutoRound's format {layout!r} is not read here, only {known}; {UNREADABLE}")
