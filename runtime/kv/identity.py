"""What the pages of a stage are good for: where their bytes mean the same."""

from dataclasses import dataclass, fields
from pathlib import Path

from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.kv_format import FORMATS

_PAGES = 1
"""Of how bytes lie in a page; pages of another version are of no use."""


@dataclass(frozen=True, slots=True)
class PageIdentity:
    """Pages of two stages can take each other's place if these are equal.

    `store` is the store's digest, `dtype` the compute type, `device` its kind: on another one the same
    numbers are rounded otherwise, so that pages of it would not give just the same tokens.
    `page_bytes` are those of a page of each of the `layers`.
    """

    version: int
    store: str
    kv_format: str
    dtype: str
    device: str
    layers: tuple[int, ...]
    page_bytes: tuple[int, ...]

    @classmethod
    def of(cls, config: StageConfig) -> "PageIdentity":
        store, plan = Store.open(Path(config.store)), config.plan
        layers = plan.placement.layers_of(config.stage)
        fmt = FORMATS[plan.kv_format]
        return cls(
            version=_PAGES,
            store=store.digest,
            kv_format=plan.kv_format,
            dtype=config.dtype,
            device=config.device.partition(":")[0],
            layers=layers,
            page_bytes=tuple(store.layer_shapes[layer].page_bytes(fmt) for layer in layers),
        )

    def differences(self, other: "PageIdentity") -> list[str]:
        """What `other` has otherwise, for people."""
        names = [field.name for field in fields(self)]
        return [
            f"{name} {_shown(getattr(other, name))}, not {_shown(getattr(self, name))}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]

    def __str__(self) -> str:
        layers, sizes = self.layers, list(self.page_bytes)
        parts = (self.version, self.store, self.kv_format, self.dtype, self.device, layers, sizes)
        return " ".join(map(str, parts))


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
