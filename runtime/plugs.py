"""The two functions that transformers calls in place of its own: attention and experts.

Both are found by name through transformers' registries and told what to do per call or per module,
so they keep no state. Two more plugs replace modules: QuantLinear in linear.py and, but for float32
on CPUs, FusedNorm in norms.py. Two replace what attention modules call: their method that expands
latents (latents.py) and, on CUDA, the function that rotates (rotary.py).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from headrace.scheduler.errors import UnsupportedModelError

ATTENTION = "headrace_paged"
EXPERTS = "headrace"
ATTEND = "headrace_attend"
"""Name of the attribute of an attention module that holds its `Attend` while its layer runs."""
LATENTS = "headrace_latents"
"""Name of the attribute of an attention module that holds its `Absorb`, where it hands latents on."""
EXPERT_WEIGHTS = "headrace_experts"
"""Name of the attribute of an experts module that holds its `Experts`."""


class Attend(Protocol):
    """Writes keys and values to pages, then attends causally.

    q [tokens, heads, k_dim], k [tokens, kv_heads, k_dim], v [tokens, kv_heads, v_dim] give
    [tokens, heads, v_dim]. `sinks` [heads] are extra logits that take part in the softmax only.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor: ...


class Absorb(Protocol):
    """Makes of an `Attend` for latents one that takes the module's queries and gives its values."""

    def around(self, module: nn.Module, attend: Attend) -> Attend: ...


class Experts(Protocol):
    """Runs the tokens [T, H] through the experts chosen for them, indices and weights [T, top_k]."""

    def __call__(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor: ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, T, dim] in, [1, T, heads, v_dim] out."""
    attend: Attend | None = getattr(module, ATTEND, None)
    if attend is None:
        raise UnsupportedModelError(f"{type(module).__name__} does not know its layer's index")
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} builds an attention mask of its own")
    latents: Absorb | None = getattr(module, LATENTS, None)
    if latents is not None:
        attend = latents.around(module, attend)
    out = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def _experts(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    if x.is_meta:
        return x
    experts: Experts | None = getattr(module, EXPERT_WEIGHTS, None)
    assert experts is not None, f"{type(module).__name__} ran before its experts were bound"
    return experts(module, x.reshape(-1, x.shape[-1]), index, weight).view_as(x)


def attention_modules(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of a decoder layer that may call the attention function."""
    return tuple(module for module in layer.modules() if "layer_idx" in vars(module))


@contextmanager
def attending(modules: Iterable[nn.Module], attend: Attend) -> Iterator[None]:
    """Has the modules attend through `attend`.

    Keyword arguments would do for most architectures, but some layers do not hand them on.
    """
    # An attribute set by nn.Module is first looked for among parameters, buffers and modules.
    places = [vars(module) for module in modules]
    try:
        for place in places:
            place[ATTEND] = attend
        yield
    finally:
        for place in places:
            place[ATTEND] = None


def register() -> None:
    """Makes both names known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(ATTENTION, _attention)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches this module's forward through its experts interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def num_experts(module: Any) -> int:
    """How many experts an experts module has; 1 for any other module."""
    return int(module.num_experts) if is_experts(module) else 1


def no_grad_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
