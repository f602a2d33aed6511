"""Latent attention: pages keep what a token's keys and values are made from, not what is made.

In DeepSeek's attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) all heads' keys and values come
from one latent c of a token. Head h's key is [K_h c, r], where r is rotated and all heads share it, and
its value is V_h c. Since

    [q, p] . [K_h c, r]  =  [K_h^T q, p] . [c, r]      and      sum_i w_i V_h c_i  =  V_h sum_i w_i c_i,

K_h can be multiplied with queries, and V_h with what attention gives, once for each token. Attention
then sees one key head: keys [c, r] and values c. DeepSeek-V3's are 576 numbers a token, its expanded
keys and values 40960. A query costs more for it: 576 + 512 products with each key and head, not 192 + 128.

transformers' modules expand latents in a method of their own. A module that is ours becomes one of a
subclass whose method hands on what it is given. That this comes to the same is found by trying it.
"""

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from headrace.runtime import plugs
from headrace.runtime.linear import QuantLinear
from headrace.runtime.product import product_by_head

log = logging.getLogger(__name__)

EXPAND, MATRIX = "expand_kv", "kv_b_proj"
"""The field's names of the method that expands c and r, and of the linear [heads * (K, V), rank] in it."""

SHARED = "qk_rope_head_dim"
"""The field's name of how many numbers r has."""

TOKENS = 5
"""Random tokens that an expansion is tried with."""

_REFUSALS = AttributeError, LookupError, RuntimeError, TypeError, ValueError


@dataclass(frozen=True, slots=True)
class Latents:
    """Numbers of a latent c (`rank`), of r (`shared`), and of what a head's key and value are of c."""

    heads: int
    rank: int
    shared: int
    key: int
    value: int

    def around(self, module: nn.Module, attend: plugs.Attend) -> plugs.Attend:
        """Takes and gives what the module's attention does, queries [T, heads, key + shared] and
        [T, heads, value], with r [T, 1, shared] for keys and c [T, 1, rank] for values."""
        return partial(self._attend, module, attend)

    def _attend(
        self,
        module: nn.Module,
        attend: plugs.Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        **rule: Any,
    ) -> Tensor:
        # Attention dequantizes nothing, so that what is in the scratch stays.
        weight = _values(getattr(module, MATRIX), q.dtype)
        keys, values = weight.view(self.heads, -1, self.rank).split([self.key, self.value], dim=1)
        absorbed = q.new_empty(*q.shape[:2], self.rank + self.shared)
        absorbed[..., : self.rank] = product_by_head(q[..., : self.key], keys.mT)
        absorbed[..., self.rank :] = q[..., self.key :]
        return product_by_head(attend(absorbed, k, v, **rule), values)


def _values(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of the linear, which is transformers' until it is bound."""
    if isinstance(linear, QuantLinear):
        return linear.values(dtype)
    assert isinstance(linear, nn.Linear)
    return linear.weight


def install(layers: Iterable[nn.Module]) -> None:
    """Has attentions of the layers hand latents on; each kind of module is tried once.

    Modules may be on the meta device.
    """
    learnt: dict[tuple[object, ...], Latents | None] = {}
    subclasses: dict[type[nn.Module], type[nn.Module]] = {}
    for module in chain.from_iterable(map(plugs.attention_modules, layers)):
        linear, shared = getattr(module, MATRIX, None), getattr(module, SHARED, None)
        if type(linear) is not nn.Linear or not isinstance(shared, int):
            continue
        kind = type(module)
        key = kind, linear.weight.shape, linear.bias is None, shared
        if key not in learnt:
            learnt[key] = find_latents(module, linear, shared)
            if learnt[key] is None:
                log.warning(
                    "%s: pages keep expanded keys and values, which take more", kind.__name__
                )
        found = learnt[key]
        if found is not None:
            if kind not in subclasses:
                names = {"__module__": kind.__module__, "__doc__": kind.__doc__, EXPAND: _hand_on}
                subclasses[kind] = type(kind.__name__, (kind,), names)
            module.__class__ = subclasses[kind]
            vars(module)[plugs.LATENTS] = found


def _hand_on(_: nn.Module, c: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the place of EXPAND: r for keys and c for values, [1, 1, T, numbers] both."""
    return r, c


def keeps_latents(layer: nn.Module) -> bool:
    """Whether an attention of this layer hands latents on."""
    return any(hasattr(module, plugs.LATENTS) for module in plugs.attention_modules(layer))


def is_expansion(root: nn.Module, path: str) -> bool:
    """Whether the linear at `path` belongs to a module that hands latents on, and is multiplied here."""
    parent, _, name = path.rpartition(".")
    return name == MATRIX and hasattr(root.get_submodule(parent), plugs.LATENTS)


@torch.no_grad()
def find_latents(module: nn.Module, linear: nn.Linear, shared: int) -> Latents | None:
    """How a module expands latents; None: not as described above.

    It is tried on the CPU with random numbers in float32, by attending both ways.
    """
    tried: Any = copy.deepcopy(module)
    if linear.bias is not None or not hasattr(tried, EXPAND):
        return None
    rows, rank = linear.weight.shape
    random = torch.Generator().manual_seed(rank)
    weight = torch.randn(rows, rank, generator=random, device="cpu") * rank**-0.5
    tried.kv_b_proj.weight = plugs.no_grad_parameter(weight)
    c, r = (torch.randn(1, 1, TOKENS, n, generator=random, device="cpu") for n in (rank, shared))
    try:
        k, v = tried.expand_kv(c, r)
        heads, key, value = k.shape[1], k.shape[3] - shared, v.shape[3]
        found = Latents(heads, rank, shared, key, value)
        q = torch.randn(TOKENS, heads, key + shared, generator=random, device="cpu")
        k, v, r, c = (x[0].transpose(0, 1) for x in (k, v, r, c))
        rule: dict[str, Any] = {"scaling": q.shape[2] ** -0.5, "sliding_window": None}
        rule |= {"softcap": None, "sinks": None}
        wanted = _attention(q, k, v, **rule)
        mine = found.around(tried, _attention)(q, r, c, **rule)
    except _REFUSALS:
        return None
    return found if torch.allclose(mine, wanted, rtol=1e-4, atol=1e-4) else None


def _attention(q: Tensor, k: Tensor, v: Tensor, *, scaling: float, **_: object) -> Tensor:
    """Plain attention of all to all; with keys [c, r] where queries are wider than keys r."""
    if q.shape[-1] != k.shape[-1]:
        k = torch.cat([v, k], dim=-1)
    scores = torch.einsum("qhd,khd->hqk", q, k.expand(-1, q.shape[1], -1)) * scaling
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.expand(-1, q.shape[1], -1))
