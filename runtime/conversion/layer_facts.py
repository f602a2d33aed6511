"""What can be learnt of a decoder layer without weights: its kind, its sizes, the shape of its KV."""

import logging
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from headrace.runtime import names, plugs
from headrace.scheduler.errors import UnsupportedModelError

log = logging.getLogger(__name__)


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


def shared_inputs(
    layer: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[str, ...], ...]:
    """Names of the linears that get the very same tensor, two or more each, in the order of calls.

    Learnt by running the layer, whose parameters are on the meta device, as far as that goes; the
    arguments are those of `kv_shape`.
    """
    calls: list[tuple[str, Tensor, int]] = []
    hooks = [
        module.register_forward_pre_hook(partial(_note, calls, name))
        for name, module in layer.named_modules()
        if type(module) is nn.Linear
    ]

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[1], v.shape[2])

    try:
        # Tensors made in inference mode do not count how often they were written to.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            plugs.attending(plugs.attention_modules(layer), attend),
        ):
            layer(_to_meta(x[None]), *_to_meta(args), **_to_meta(kwargs))
    except Exception as error:  # noqa: BLE001 - what needs values cannot run; what precedes it has
        log.debug("%s was run in part only: %s", type(layer).__name__, error)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, given, version in calls:
        found[id(given), version].append(name)
    return tuple(tuple(dict.fromkeys(names)) for names in found.values() if len(set(names)) > 1)


def _note(
    calls: list[tuple[str, Tensor, int]], name: str, _: nn.Module, given: tuple[Any, ...]
) -> None:
    """Remember a linear's input, with how often it was written to; it is kept, so its id is its own."""
    if given:
        calls.append((name, given[0], given[0]._version))


def _to_meta(value: Any) -> Any:
    """The value with every tensor in it on the meta device."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(item) for item in value)
    if isinstance(value, dict):
        return {key: _to_meta(item) for key, item in value.items()}
    return value
