"""Linear layers that multiply the same tensor, as q, k and v do: one launch computes them all."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from headrace.runtime.binding import Binding, ExpertStack, PackedLinear
from headrace.runtime.linear import QuantLinear
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.matmul.configs import Product
from headrace.runtime.matmul.few_rows import packing_of, scales_of

MOST = 3
"""Linears of a launch. More get a second one, so that their results need not be kept for long."""


class LinearGroup:
    """Linears of one layer, in the order of their calls, that are expected to get the same tensor.

    All are computed when the first is called. The others get their result if they are called with
    the very same tensor, and otherwise compute alone, so that a wrong expectation costs time only.
    """

    def __init__(self, linears: Sequence[QuantLinear]) -> None:
        self.linears = tuple(linears)
        self._x: Tensor | None = None
        self._results: dict[QuantLinear, Tensor] = {}
        for linear in linears:
            linear.group = self

    def take(self, linear: QuantLinear, x: Tensor) -> Tensor | None:
        """The linear's product, or None when it has to compute it alone."""
        if x is not self._x or linear not in self._results:
            self.forget()
            if linear is not self.linears[0]:
                return None
            self._multiply(x)
        found = self._results.pop(linear, None)
        if not self._results:
            self._x = None
        return found

    def _multiply(self, x: Tensor) -> None:
        weights = [linear.weight for linear in self.linears]
        bound = [weight for weight in weights if weight is not None]
        assert len(bound) == len(weights), "a layer ran before its weights were bound"
        biases = [linear.bias for linear in self.linears]
        products = bound[0].together(bound[1:], x, biases, self.linears[0].scratch)
        if products is not None:
            self._x, self._results = x, dict(zip(self.linears, products, strict=True))

    def forget(self) -> None:
        """Drop results that nobody took: their layer has run, or its weights are others now."""
        self._x = None
        self._results.clear()


def grouped(
    layer: nn.Module, shared: Iterable[Sequence[str]], bindings: Iterable[Binding]
) -> tuple[LinearGroup, ...]:
    """Groups of a layer's packed linears, from the names of those that get the same tensor."""
    specs = {b.module: b.spec for b in bindings if isinstance(b, PackedLinear)}
    made = []
    for names in shared:
        alike: dict[tuple[object, ...], list[QuantLinear]] = defaultdict(list)
        for module in map(layer.get_submodule, names):
            if isinstance(module, QuantLinear):
                spec = specs[module]
                alike[*_kind(spec), module.bias is None].append(module)
        for linears in alike.values():
            chunks = (linears[i : i + MOST] for i in range(0, len(linears), MOST))
            made += [LinearGroup(chunk) for chunk in chunks if len(chunk) > 1]
    return tuple(made)


def _kind(spec: WeightSpec) -> tuple[str, int, bool, torch.dtype]:
    """What weights of one launch have in common."""
    return spec.format, spec.blocksize, "zero" in spec.parts, scales_of(spec)


def _is_fused(spec: WeightSpec) -> bool:
    """Whether the few-row kernel multiplies by such a weight, if its sizes allow it."""
    return "order" not in spec.parts and packing_of(spec) is not None


def four_bit_products(bindings: Iterable[Binding]) -> Iterator[Product]:
    """A layer's products with 4-bit weights, a group's as one."""
    groups: dict[LinearGroup, list[WeightSpec]] = defaultdict(list)
    for binding in bindings:
        linear = binding.module if isinstance(binding, PackedLinear) else None
        for specs in _together(binding):
            if not all(map(_is_fused, specs)):
                continue
            if linear is not None and linear.group is not None:
                groups[linear.group] += specs
            else:
                yield _product(specs, linear)
    for group, members in groups.items():
        yield _product(members, group.linears[0])


def _together(binding: Binding) -> Iterator[tuple[WeightSpec, ...]]:
    """A binding's factors: an expert's gate and up as one where they are alike, others each alone."""
    specs = binding.factors
    if specs and isinstance(binding, ExpertStack):
        for enter in binding.specs.enter:
            if len(set(map(_kind, enter))) == 1:
                yield enter
            else:
                yield from ((spec,) for spec in enter)
        specs = binding.specs.leave
    yield from ((spec,) for spec in specs)


def _product(specs: Sequence[WeightSpec], linear: QuantLinear | None) -> Product:
    columns = tuple(spec.shape[-2] for spec in specs)
    biased = linear is not None and linear.bias is not None
    kind, group, zeros, scales = _kind(specs[0])
    return Product(kind, group, columns, specs[0].shape[-1], biased, zeros, scales)
