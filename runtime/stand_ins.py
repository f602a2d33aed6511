"""Stand-ins for a model's decoder layers, so that its own forward can be run around them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
"""How a layer was called: hidden states, further arguments, keyword arguments."""


class StandIn(nn.Module):
    """Takes a decoder layer's place: does what it is told to by its StandIns."""

    def __init__(self, layer: nn.Module, owner: "StandIns") -> None:
        super().__init__()
        object.__setattr__(self, "_real", layer)
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        # Models look at their layers (attention_type, is_sliding, ...) before calling them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_real"], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._owner.called(x, args, kwargs)


class Layers(nn.ModuleList):
    """A list that a slice of all of it is no copy of: models slice theirs at each call."""

    def __getitem__(self, index: Any) -> Any:
        whole = isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1)
        return self if whole else super().__getitem__(index)


class StandIns:
    """Stand-ins for all of a model's layers: they note how they were called, or give a result.

    Made once, since making modules takes longer than small models' calls. One thread at a time.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.modules = Layers(StandIn(layer, self) for layer in layers)
        self._calls: list[Call] = []
        self._result: Tensor | None = None

    def called(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._result is not None:
            return self._result
        self._calls.append((x, args, kwargs))
        return x

    def take_calls(self) -> list[Call]:
        """How the layers were called since the last time; each returned its input."""
        calls, self._calls = self._calls, []
        return calls

    @contextmanager
    def returning(self, result: Tensor) -> Iterator[None]:
        """Every layer gives `result` and notes nothing."""
        self._result = result
        try:
            yield
        finally:
            self._result = None


@contextmanager
def swapped(root: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts modules in the places that their dotted paths name, and the originals back."""
    originals = {path: root.get_submodule(path) for path in replacements}
    try:
        for path, module in replacements.items():
            root.set_submodule(path, module)
        yield
    finally:
        for path, module in originals.items():
            root.set_submodule(path, module)
