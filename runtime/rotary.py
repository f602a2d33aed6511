"""Rotary embeddings in one kernel: transformers' own take ten for a layer's queries and keys.

transformers' attention modules call a function of their own file, by its global name. A module that
is ours becomes one of a subclass whose forward is the same code with that name bound to a `Rotary`;
nothing beside the module changes. Which rotation a function does is found by trying it, not by name. Where
transformers rounds products to the compute type before it adds them, the kernel rounds once.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

FUNCTIONS = "apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"
"""The field's names of functions that take q, k, cos and sin and return both rotated."""

TOKENS, Q_HEADS, KV_HEADS = 5, 3, 2
"""Of the random numbers that a function is tried with; all different, and none is 1."""

_TYPES = torch.float32, torch.bfloat16, torch.float16
_REFUSALS = AttributeError, LookupError, RuntimeError, TypeError, ValueError


class Pairs(Enum):
    """Where the two numbers of a pair are: apart by half of all, side by side, or in one place."""

    HALVES = "halves"
    NEIGHBOURS = "neighbours"
    SHARED = "shared"

    def step_and_gap(self, count: int) -> tuple[int, int]:
        """From one pair to the next, and from a pair's first number to its second."""
        return {Pairs.HALVES: (1, count), Pairs.NEIGHBOURS: (2, 1), Pairs.SHARED: (1, 0)}[self]

    def of(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Views of the first and of the second numbers of `count` pairs in x [..., D]."""
        step, gap = self.step_and_gap(count)
        span = step * (count - 1) + 1
        return x[..., :span:step], x[..., gap : gap + span : step]


@dataclass(frozen=True, slots=True)
class Form:
    """A rotation of pairs (a, b), angle by angle: a cos - b sin and b cos + a sin.

    Numbers after the last pair are passed through. `table` says where cosines and sines are that
    belong to a pair, `target` where the rotated pair goes.
    """

    pairs: int
    source: Pairs
    table: Pairs
    target: Pairs

    @property
    def layouts(self) -> tuple[Pairs, Pairs, Pairs]:
        return self.source, self.table, self.target

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, heads, T, D] and cos, sin [1, T, W] give a new [1, heads, T, D] in x's type."""
        a, b = self.source.of(x.float(), self.pairs)
        cos_a, cos_b = self.table.of(cos.float()[:, None], self.pairs)
        sin_a, sin_b = self.table.of(sin.float()[:, None], self.pairs)
        out = x.clone()
        out_a, out_b = self.target.of(out, self.pairs)
        out_a.copy_(a * cos_a - b * sin_a)
        out_b.copy_(b * cos_b + a * sin_b)
        return out


class Rotate(Protocol):
    """Rotates q [1, heads, T, D] and k [1, kv_heads, T, D] by cos and sin [1, T, W]."""

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form
    ) -> tuple[Tensor, Tensor]: ...


def rotate_on_cuda(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form
) -> tuple[Tensor, Tensor]:
    """One kernel. The results are laid out [1, T, heads, D] and transposed."""
    # Imported where it is needed: installations without a GPU have no Triton.
    from headrace.runtime import rotary_triton

    return rotary_triton.rotate(q, k, cos, sin, form)


class Rotary:
    """Called in place of one of transformers' functions, `original`, with the same arguments.

    What is not on a device of type `device`, or not of a known form, goes to the original.
    """

    def __init__(
        self, original: Callable[..., tuple[Tensor, Tensor]], rotate: Rotate, device: str
    ) -> None:
        self._original, self._rotate, self._device = original, rotate, device
        self._forms: dict[tuple[object, ...], Form | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not kwargs and len(args) == 4:
            q, k, cos, sin = args
            form = self._form(q, k, cos, sin)
            if form is not None:
                return self._rotate(q, k, cos, sin, form)
        return self._original(*args, **kwargs)

    def _form(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Form | None:
        if any(x.device.type != self._device for x in (q, k, cos, sin)):
            return None
        if q.dim() != 4 or q.dtype not in _TYPES:
            return None
        batch, _, tokens, dim = q.shape
        width = cos.shape[-1]
        shapes = (batch, *k.shape[:1], *k.shape[2:]), cos.shape, sin.shape
        if shapes != ((1, 1, tokens, dim), (1, tokens, width), (1, tokens, width)):
            return None
        key = dim, width, q.dtype, k.dtype, cos.dtype, sin.dtype
        if key not in self._forms:
            self._forms[key] = find_form(self._original, *key)
        return self._forms[key]


class FusedRotary:
    """Has attention modules rotate queries and keys by one call of `rotate`.

    Tensors that are not on a device of type `device` are rotated by transformers, as before.
    """

    def __init__(self, rotate: Rotate = rotate_on_cuda, device: str = "cuda") -> None:
        self._rotate, self._device = rotate, device
        self._subclasses: dict[type[nn.Module], type[nn.Module] | None] = {}

    def install(self, module: nn.Module) -> bool:
        """Whether the module's forward calls a rotary function by name, and now calls ours.

        A forward that is wrapped, or not its class's, is left alone.
        """
        kind = type(module)
        if "forward" in vars(module):
            return False
        if kind not in self._subclasses:
            self._subclasses[kind] = self._subclass(kind)
        made = self._subclasses[kind]
        if made is not None:
            # A forward set on the module would refer to it, and keep its weights until collected.
            module.__class__ = made
        return made is not None

    def _subclass(self, kind: type[nn.Module]) -> type[nn.Module] | None:
        """A subclass whose forward calls ours; None when there is nothing to replace."""
        forward = kind.forward
        if not isinstance(forward, FunctionType):
            return None
        known = forward.__globals__
        named = {n: known.get(n) for n in FUNCTIONS if n in forward.__code__.co_names}
        ours = {
            name: Rotary(function, self._rotate, self._device)
            for name, function in named.items()
            if callable(function) and not isinstance(function, Rotary)
        }
        if not ours:
            return None
        made = FunctionType(
            forward.__code__, known | ours, None, forward.__defaults__, forward.__closure__
        )
        made.__kwdefaults__ = forward.__kwdefaults__
        functools.update_wrapper(made, forward)
        names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "forward": made}
        return type(kind.__name__, (kind,), names)


@torch.inference_mode()
def find_form(
    function: Callable[..., tuple[Tensor, Tensor]],
    dim: int,
    width: int,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    cos_dtype: torch.dtype,
    sin_dtype: torch.dtype,
) -> Form | None:
    """The form of a function's rotation of heads of `dim` with tables of `width`; None: of none.

    It is tried on the CPU with random numbers, in float32 and in the types that it is called with.
    """
    exact = _random(dim, width)
    dtypes = q_dtype, k_dtype, cos_dtype, sin_dtype
    rounded = tuple(x.to(dtype) for x, dtype in zip(exact, dtypes, strict=True))
    try:
        wanted, in_type = function(*exact), function(*rounded)
        for form in _forms(dim, width):
            if _agree(wanted, exact, form, 1e-6) and _agree(in_type, rounded, form, 3e-2):
                return form
    except _REFUSALS:
        pass
    return None


def _random(dim: int, width: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(dim)
    shapes = (Q_HEADS, TOKENS, dim), (KV_HEADS, TOKENS, dim), (TOKENS, width), (TOKENS, width)
    return tuple(torch.rand(1, *s, generator=generator, device="cpu") * 2 - 1 for s in shapes)


def _forms(dim: int, width: int) -> Iterator[Form]:
    apart = Pairs.HALVES, Pairs.NEIGHBOURS
    for rotated, source, table, target in itertools.product(
        (width, 2 * width), apart, Pairs, apart
    ):
        if rotated % 2 == 0 and rotated <= dim and (rotated == width or table is Pairs.SHARED):
            yield Form(rotated // 2, source, table, target)


def _agree(
    wanted: tuple[Tensor, Tensor], given: tuple[Tensor, ...], form: Form, tolerance: float
) -> bool:
    q, k, cos, sin = given
    for theirs, x in zip(wanted, (q, k), strict=True):
        if theirs.dtype != x.dtype or theirs.shape != x.shape:
            return False
        mine = form.rotated(x, cos, sin)
        if not torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance):
            return False
    return True
