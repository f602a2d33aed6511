"""What goes and what stays, from what was asked for and what calibration tokens say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headrace.runtime.pruning.pattern import Pattern, parse_pattern, parse_share
from headrace.runtime.pruning.statistics import Statistics, Wanted
from headrace.runtime.pruning.surgery import Stays, Subject
from headrace.runtime.pruning.units import head_groups, neurons
from headrace.scheduler.errors import HeadraceError

Method = Literal["magnitude", "wanda"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. `layers` is how many to drop, or which; `neurons` and `heads` the shares that go."""

    layers: int | tuple[int, ...] = ()
    neurons: float = 0.0
    heads: float = 0.0
    pattern: Pattern | None = None
    method: Method = "wanda"

    @property
    def needs_text(self) -> bool:
        """Whether activations decide."""
        counted = isinstance(self.layers, int)
        return counted or bool(self.neurons or self.heads) or self._is_wanda

    @property
    def _is_wanda(self) -> bool:
        return self.pattern is not None and self.method == "wanda"

    def as_json(self) -> dict[str, Any]:
        return {
            "drop_layers": self.layers if isinstance(self.layers, int) else list(self.layers),
            "mlp_neurons": self.neurons,
            "heads": self.heads,
            "sparsity": str(self.pattern) if self.pattern else None,
            "method": self.method if self.pattern else None,
        }

    def wanted(self, subject: Subject) -> Wanted:
        """What a sweep has to gather. Raises UnsupportedModelError where units cannot be told."""
        layers = range(len(subject.layers))
        every = [subject.layers[layer] for layer in layers]
        groups = subject.kv_heads
        return Wanted(
            {i: neurons(layer) for i, layer in enumerate(every)} if self.neurons else {},
            {i: head_groups(layer, groups) for i, layer in enumerate(every)} if self.heads else {},
            {layer: subject.linears(layer) for layer in layers} if self._is_wanda else {},
        )


def parse_request(
    drop_layers: str | None,
    mlp_neurons: str | None,
    heads: str | None,
    sparsity: str | None,
    method: Method | None,
) -> Request:
    """Raises HeadraceError, naming the option, for what cannot be understood."""
    if not (drop_layers or mlp_neurons or heads or sparsity):
        raise HeadraceError(
            "nothing is to be pruned: give --drop-layers, --mlp-neurons, --heads or --sparsity"
        )
    if method is not None and sparsity is None:
        raise HeadraceError(
            f"--method {method} says which weights --sparsity makes zero: give that, too"
        )
    return Request(
        () if drop_layers is None else _parse_layers(drop_layers),
        _parse_units("--mlp-neurons", mlp_neurons),
        _parse_units("--heads", heads),
        None if sparsity is None else parse_pattern(sparsity),
        method or "wanda",
    )


def _parse_layers(text: str) -> int | tuple[int, ...]:
    if text.strip().isdigit():
        return int(text)
    parts = text.removesuffix(",").split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise HeadraceError(
            f"--drop-layers is how many layers go, such as 2, or which, such as 3,7,8 (3, with a comma for "
            f"that one alone), not {text!r}"
        )
    return tuple(sorted({int(part) for part in parts}))


def _parse_units(option: str, text: str | None) -> float:
    share = 0.0 if text is None else parse_share(text)
    if share is None:
        raise HeadraceError(f"{option} is the share that goes, such as 25%, not {text!r}")
    return share


def check_request(request: Request, subject: Subject) -> None:
    """Raises HeadraceError, before anything is run, for shares and layers that the model has not."""
    count = len(subject.layers)
    if isinstance(request.layers, int):
        if not 0 < request.layers < count:
            raise HeadraceError(
                f"--drop-layers {request.layers}: the model has {count} layers, of which 1 to {count - 1} can go"
            )
    elif request.layers and (request.layers[-1] >= count or len(request.layers) >= count):
        raise HeadraceError(
            f"--drop-layers {','.join(map(str, request.layers))}: the model has layers 0 to {count - 1}, "
            "and one of them has to stay"
        )
    if request.heads:
        _number("--heads", "groups of heads that share keys", subject.kv_heads, request.heads)


def _number(option: str, what: str, count: int, share: float) -> int:
    """How many of `count` go."""
    gone = int(count * share + 1e-9)
    if not gone:
        least = f"{100 / count:.4g}%" if count > 1 else "none can go"
        raise HeadraceError(
            f"{option} {100 * share:g}% of {count} {what} is less than one (one is {least})"
        )
    return gone


def any_choice(request: Request, subject: Subject) -> Stays:
    """One of the shape that is asked for, whatever calibration tokens will say."""
    count = len(subject.layers)
    like = Statistics(1, [float(-layer) for layer in range(count)])
    wanted = request.wanted(subject)
    like.neurons = {layer: torch.zeros(units.count) for layer, units in wanted.neurons.items()}
    like.groups = {layer: torch.zeros(units.count) for layer, units in wanted.groups.items()}
    return choose(request, subject, like)


def choose(request: Request, subject: Subject, found: Statistics | None) -> Stays:
    """What stays; `found` is needed where the request needs a text."""
    gone = set(_dropped(request, found))
    layers = tuple(i for i in range(len(subject.layers)) if i not in gone)
    units: dict[str, dict[int, Tensor]] = {"neurons": {}, "groups": {}}
    for layer in layers if request.neurons else ():
        assert found is not None
        units["neurons"][layer] = _best(
            "--mlp-neurons", "neurons", found.neurons[layer], request.neurons
        )
    for layer in layers if request.heads else ():
        assert found is not None
        units["groups"][layer] = _best(
            "--heads", "groups of heads", found.groups[layer], request.heads
        )
    norms: Mapping[int, Mapping[str, Tensor]] = found.norms() if found is not None else {}
    return Stays(layers, units["neurons"], units["groups"], request.pattern, norms)


def _dropped(request: Request, found: Statistics | None) -> tuple[int, ...]:
    if not isinstance(request.layers, int):
        return request.layers
    assert found is not None
    order = sorted(range(len(found.influence)), key=lambda layer: found.influence[layer])
    return tuple(sorted(order[: request.layers]))


def _best(option: str, what: str, scores: Tensor, share: float) -> Tensor:
    """Indexes of those that stay, ascending; of equal scores the first go."""
    gone = _number(option, what, len(scores), share)
    return scores.argsort(stable=True)[gone:].sort().values
