"""What can be learnt of a decoder layer without weights: its kind, its sizes, the shape of its KV."""

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from headrace.runtime import names, plugs
from headrace.scheduler.errors import UnsupportedModelError


def signature(layer: nn.Module) -> tuple[object, ...]:
    """Equal for layers of one kind: same modules, shapes and settings.

    Fractions are left out: they are strengths (scales, dropouts), not kinds, and some models derive
    them from a layer's index.
    """
    plain = (bool, int, str, type(None))
    facts: list[object] = []
    for name, module in layer.named_modules():
        attributes = sorted(
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, plain) and key not in ("layer_idx", "_layer_idx", "layer_id")
        )
        facts.append((name, type(module), *((k, repr(v)) for k, v in attributes)))
        facts.extend((key, p.shape) for key, p in module.named_parameters(recurse=False))
    return tuple(facts)


def sizes(layer: nn.Module, config: PretrainedConfig) -> tuple[int, int, int]:
    """(parameters, active parameters, largest matrix) of a layer's matrices, in elements."""
    total = active = largest = 0
    for module in layer.modules():
        experts = plugs.num_experts(module)
        chosen = min(experts, names.experts_per_token(config)) if experts > 1 else 1
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2:
                size = parameter.numel() // experts
                total += parameter.numel()
                active += size * chosen
                largest = max(largest, size)
    return total, active, largest


class _Reached(Exception):
    """Carries the KV shape out of a layer that need not run any further."""

    def __init__(self, kv_heads: int, k_dim: int, v_dim: int) -> None:
        super().__init__()
        self.shape = kv_heads, k_dim, v_dim


def kv_shape(
    layer: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int, int]:
    """(kv_heads, k_dim, v_dim), learnt by running a layer on the meta device up to its attention.

    x [1, hidden], args and kwargs are what the model gives the layer. Raises UnsupportedModelError
    when the layer attends in a way that transformers' attention interface does not see.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        raise _Reached(k.shape[1], k.shape[2], v.shape[2])

    name = type(layer).__name__
    try:
        with plugs.attending(plugs.attention_modules(layer), attend):
            layer(_to_meta(x[None]), *_to_meta(args), **_to_meta(kwargs))
    except _Reached as reached:
        return reached.shape
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{name} cannot be run on its own: {error}") from error
    raise UnsupportedModelError(
        f"{name} has no attention that transformers' attention interface reaches "
        "(a linear-attention or state-space layer needs state that Headrace does not keep)"
    )


def _to_meta(value: Any) -> Any:
    """The value with every tensor in it on the meta device."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(item) for item in value)
    if isinstance(value, dict):
        return {key: _to_meta(item) for key, item in value.items()}
    return value
