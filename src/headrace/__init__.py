"""Headrace runs language models that do not fit, on pools of GPUs that stream their weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "StructuredOutputsParams", "__version__"]

if TYPE_CHECKING:
    from headrace.cluster.llm import LLM
    from headrace.scheduler.request import SamplingParams
    from headrace.scheduler.structured import StructuredOutputsParams


_HOMES = {
    "LLM": "headrace.cluster.llm",
    "SamplingParams": "headrace.scheduler.request",
    "StructuredOutputsParams": "headrace.scheduler.structured",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import headrace.scheduler` loads neither torch nor Ray.
    if name == "client":
        return import_module("headrace.client")
    if name not in _HOMES:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
