"""What calibration tokens say of layers, neurons, heads and inputs, gathered in one sweep of the whole model.

influence   of a layer: 1 - the mean cosine similarity of what goes in and what comes out
            (Men et al. 2024, ShortGPT, arXiv:2403.03853)
neurons     of an MLP: sums of |activation| [neurons]
groups      of attention heads: sums of a aT [groups, features, features] of the features a that they hand on
squares     of a linear's inputs: sums of x^2 [features], of which Wanda takes the root
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headrace.runtime.conversion.source import SourceWeight
from headrace.runtime.pruning.surgery import Subject
from headrace.runtime.pruning.units import Units
from headrace.runtime.sweep.sweep import Sweep

Note = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to gather, by layer: scores of neurons and groups of heads, squares of linears' inputs."""

    neurons: dict[int, Units] = field(default_factory=dict)
    groups: dict[int, Units] = field(default_factory=dict)
    linears: dict[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Statistics:
    """Of `tokens` calibration tokens, float32 on the host. `influence` is the layers', in order; `neurons` and
    `groups` are scores, by layer, `squares` sums by layer and linear."""

    tokens: int = 0
    influence: list[float] = field(default_factory=list)
    neurons: dict[int, Tensor] = field(default_factory=dict)
    groups: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def norms(self) -> dict[int, dict[str, Tensor]]:
        """||x||_2 of each input feature, by layer and linear."""
        return {
            layer: {name: squares.sqrt() for name, squares in linears.items()}
            for layer, linears in self.squares.items()
        }

    def save(self, file: Path) -> None:
        """Into a safetensors file, which is whole or not there."""
        tensors = {f"neurons {layer}": t for layer, t in self.neurons.items()}
        tensors |= {f"groups {layer}": t for layer, t in self.groups.items()}
        for layer, linears in self.squares.items():
            tensors |= {f"squares {layer} {name}": t for name, t in linears.items()}
        tensors["influence"] = torch.tensor(self.influence, dtype=torch.float64)
        described = {"tokens": str(self.tokens)}
        partial = file.with_name(file.name + ".tmp")
        save_file(tensors, partial, metadata=described)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> "Statistics":
        with safe_open(file, "pt") as stored:
            described = stored.metadata()
            found = cls(int(described["tokens"]), stored.get_tensor("influence").tolist())
            for name in stored.keys():  # noqa: SIM118 - no dict
                kind, _, rest = name.partition(" ")
                layer, _, linear = rest.partition(" ")
                if kind == "squares":
                    found.squares.setdefault(int(layer), {})[linear] = stored.get_tensor(name)
                elif kind in ("neurons", "groups"):
                    getattr(found, kind)[int(layer)] = stored.get_tensor(name)
        return found


def gather(
    sweep: Sweep,
    subject: Subject,
    tokens: Tensor,
    wanted: Wanted,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Statistics of tokens [sequences, length]; `progress` gets (layers done, layers)."""
    found = Statistics(tokens=tokens.numel())
    with sweep.embed(tokens) as states:
        for layer in sweep.layers():
            gatherer = _LayerSums(sweep.device)
            linears = layer.named()
            with ExitStack() as hooks:
                gatherer.influence(hooks, layer.module)
                if units := wanted.neurons.get(layer.index):
                    gatherer.neurons(hooks, linears[units.out], units)
                if units := wanted.groups.get(layer.index):
                    gatherer.groups(hooks, linears[units.out], units)
                for name in wanted.linears.get(layer.index, ()):
                    gatherer.squares(hooks, linears[name], name)
                layer.run(states)
            gatherer.put_into(found, subject, layer.index, wanted)
            if progress:
                progress(layer.index + 1, sweep.num_layers)
    return found


class _LayerSums:
    """Sums over the tokens of one layer, on the device while it runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0

    def _add(self, key: str, value: Tensor) -> None:
        found = self._sums.get(key)
        self._sums[key] = value if found is None else found.add_(value)

    def influence(self, hooks: ExitStack, module: nn.Module) -> None:
        def note(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            x, y = given[0], out[0] if isinstance(out, tuple) else out
            similar = F.cosine_similarity(x.float(), y.float(), dim=-1)
            self._add("similar", similar.double().sum())
            self._tokens += similar.numel()

        hooks.callback(module.register_forward_hook(note).remove)

    def neurons(self, hooks: ExitStack, out: nn.Module, units: Units) -> None:
        assert units.each == 1
        _on_input(hooks, out, lambda x: self._add("neurons", x.abs().sum(0)))

    def groups(self, hooks: ExitStack, out: nn.Module, units: Units) -> None:
        def note(x: Tensor) -> None:
            apart = x.view(-1, units.count, units.each).transpose(0, 1)
            self._add("groups", apart.transpose(1, 2) @ apart)

        _on_input(hooks, out, note)

    def squares(self, hooks: ExitStack, linear: nn.Module, name: str) -> None:
        _on_input(hooks, linear, lambda x: self._add(f"squares {name}", x.square().sum(0)))

    def put_into(self, found: Statistics, subject: Subject, layer: int, wanted: Wanted) -> None:
        """Scores are made of sums now, for those of all layers would be too many to keep."""
        means = {key: sums.cpu() / self._tokens for key, sums in self._sums.items()}
        found.influence.append(1 - means["similar"].item())
        if units := wanted.neurons.get(layer):
            weight = subject.weight(layer, units.out)
            found.neurons[layer] = neuron_scores(means["neurons"], weight)
        if units := wanted.groups.get(layer):
            weight = subject.weight(layer, units.out)
            found.groups[layer] = group_scores(means["groups"], weight, units)
        for name in wanted.linears.get(layer, ()):
            squares = self._sums[f"squares {name}"].cpu()
            found.squares.setdefault(layer, {})[name] = squares


def _on_input(hooks: ExitStack, module: nn.Module, note: Note) -> None:
    """`note` gets a linear's inputs [T, features] in float32."""

    def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
        note(given[0].detach().float().reshape(-1, given[0].shape[-1]))

    hooks.callback(module.register_forward_pre_hook(hook).remove)


def neuron_scores(mean: Tensor, out: SourceWeight) -> Tensor:
    """mean |activation| [neurons] times the norms of the columns of `out` that it is multiplied by."""
    squares = torch.zeros(out.shape[-1])
    for rows in out.data.rows():
        squares += rows.float().square().sum(0)
    return mean * squares.sqrt()


def group_scores(grams: Tensor, out: SourceWeight, units: Units) -> Tensor:
    """sqrt(mean ||W a||^2) [groups] of what each group adds to a token's state through its columns W of `out`.

    `grams` [groups, features, features] are means of a aT: ||W a||^2 = tr(W a aT WT).
    """
    total = torch.zeros(units.count)
    for rows in out.data.rows():
        apart = rows.float().view(len(rows), units.count, units.each).transpose(0, 1)
        total += ((apart @ grams) * apart).sum((1, 2))
    return total.clamp(min=0).sqrt()
