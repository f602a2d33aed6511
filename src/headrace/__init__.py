"""Headrace runs language models that do not fit, on pools of GPUs that stream their weights."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "StructuredOutputsParams", "__version__"]

if TYPE_CHECKING:
    from headrace.cluster.llm import LLM
    from headrace.scheduler.request import SamplingParams
    from headrace.scheduler.structured import StructuredOutputsParams


def __getattr__(name: str) -> Any:
    # Lazy, so that `import headrace.scheduler` loads neither torch nor Ray.
    if name == "LLM":
        from headrace.cluster.llm import LLM

        return LLM
    if name == "SamplingParams":
        from headrace.scheduler.request import SamplingParams

        return SamplingParams
    if name == "StructuredOutputsParams":
        from headrace.scheduler.structured import StructuredOutputsParams

        return StructuredOutputsParams
    if name == "client":
        from importlib import import_module

        return import_module("headrace.client")
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
