"""What a GGUF file says beside its tensors."""

from typing import Any

import gguf
import numpy as np


class Metadata:
    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._fields = reader.fields
        self.arch: str = self.whole("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        """Of the model: the key is without its architecture's name."""
        return self.whole(f"{self.arch}.{key}", default)

    def whole(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else shortest(field.contents())


def shortest(value: Any) -> Any:
    """Floats as the shortest decimals that are the same in float32, which files hold: 1e-6 reads as such."""
    if isinstance(value, dict):
        return {name: shortest(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shortest(each) for each in value]
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value
