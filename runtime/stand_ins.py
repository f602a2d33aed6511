"""Stand-ins for a model's decoder layers, so that its own forward can be run around them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
"""How a layer was called: hidden states, further arguments, keyword arguments."""


class StandIn(nn.Module):
    """Takes a decoder layer's place: notes how it was called, or returns what it was told to."""

    def __init__(
        self,
        layer: nn.Module,
        note: Callable[[Call], None] | None,
        result: Tensor | None = None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_real", layer)
        self._note = note
        self._result = result

    def __getattr__(self, name: str) -> Any:
        # Models look at their layers (attention_type, is_sliding, ...) before calling them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_real"], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._note is not None:
            self._note((x, args, kwargs))
        return x if self._result is None else self._result


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
