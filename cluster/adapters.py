"""Adapters by the names that requests have for them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from headrace.cluster.engine_options import EngineOptions
from headrace.scheduler.errors import HeadraceError, RequestError
from headrace.scheduler.plan import Adapter

MAX_NAME = 128

DEFAULT_RANK = 16
"""Slots have room for, where no adapter is named when the engine starts."""

MOST_SLOTS = 8
"""Made unless more are asked for."""

HOST_BYTES = 256 << 20
"""Of each stage's host memory, unless another size is asked for."""


class Adapters:
    """Names that mean something now. One thread changes them, any thread asks."""

    def __init__(self, named: Mapping[str, Adapter] | None = None) -> None:
        self._named = dict(named or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def digests(self) -> dict[str, str]:
        return {name: adapter.digest for name, adapter in self._named.items()}

    def find(self, name: str) -> Adapter:
        """RequestError when there is none of that name."""
        found = self._named.get(name)
        if found is None:
            there = ", ".join(sorted(self._named)[:20])
            told = f"there is {there}" if there else "none is loaded"
            raise RequestError(f"there is no adapter {name[:80]!r} here; {told}", "adapter")
        return found

    def chosen(self, adapter: str | None, model: str | None) -> str | None:
        """The adapter that a request runs with: the one that it names, or that it names as its model."""
        as_model = model if model in self._named else None
        if adapter is None:
            return as_model
        self.find(adapter)
        if as_model not in (None, adapter):
            raise RequestError(
                f"model names the adapter {model!r}, and adapter {adapter!r}: give one of them",
                "adapter",
            )
        return adapter

    def add(self, name: str, adapter: Adapter) -> None:
        """HeadraceError for a name that is taken, or none."""
        self.check_free(name)
        self._named = {**self._named, name: adapter}

    def check_free(self, name: str) -> None:
        """HeadraceError when `add` would refuse it."""
        check_name(name)
        if name in self._named:
            raise HeadraceError(f"there is an adapter {name!r} already: unload it first")

    def remove(self, name: str) -> None:
        """Requests that run with it go on. RequestError when there is none of that name."""
        self.find(name)
        self._named = {other: each for other, each in self._named.items() if other != name}


def check_name(name: str) -> None:
    """HeadraceError for a name that an adapter cannot have."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise HeadraceError(
            f"an adapter's name has 1 to {MAX_NAME} printable characters, not {name[:MAX_NAME]!r}"
        )


def parse_adapter(text: str) -> tuple[str, Path]:
    """A name and a directory. HeadraceError when the text is not NAME=DIR."""
    name, is_pair, path = text.partition("=")
    if not (name and is_pair and path):
        raise HeadraceError(f"--adapter must be NAME=DIR, not {text!r}")
    check_name(name)
    return name, Path(path)


def parse_adapters(texts: list[str]) -> dict[str, Path]:
    """HeadraceError also for a name that is there twice."""
    found: dict[str, Path] = {}
    for name, path in map(parse_adapter, texts):
        if name in found:
            raise HeadraceError(f"--adapter {name} is given twice: choose another name")
        found[name] = path
    return found


def adapter_room(options: EngineOptions) -> tuple[int, int]:
    """How many slots there are for adapters on each stage's device, and for which rank: those that are asked for,
    or enough for the adapters that are named. StoreError where one of these cannot be applied."""
    slots, rank = options.adapter_slots, options.adapter_rank
    if slots is None:
        slots = min(len(options.adapters), MOST_SLOTS)
    if not slots:
        return 0, 0
    if rank is None:
        rank, _ = max(_ranks(options), default=(DEFAULT_RANK, ""))
    return slots, rank


def adapter_host_bytes(options: EngineOptions) -> int:
    """Of each stage's host memory."""
    if not (options.adapters if options.adapter_slots is None else options.adapter_slots):
        return 0
    return HOST_BYTES if options.adapter_host_memory is None else options.adapter_host_memory


def check_adapter_options(options: EngineOptions) -> None:
    """HeadraceError for adapters that cannot be had; nothing is read but what they are made of."""
    given = [("--adapter-slots", options.adapter_slots), ("--adapter-rank", options.adapter_rank)]
    for name, value in given:
        if value is not None and value < (1 if options.adapters else 0):
            raise HeadraceError(f"{name} must be at least 1, not {value}")
    slots, rank = adapter_room(options)
    needed, name = max(_ranks(options), default=(0, ""))
    if needed > rank:
        raise HeadraceError(
            f"--adapter-rank {rank} is too little: the adapter {name} has rank {needed}; give {needed} or more,"
            " or leave it out"
        )
    unused = (
        options.adapter_rank if options.adapter_host_memory is None else options.adapter_host_memory
    )
    if not slots and unused:
        raise HeadraceError(
            "--adapter-rank and --adapter-host-memory are of no use without adapters: name some"
            " (--adapter NAME=DIR), or make room for those to come (--adapter-slots)"
        )


def opened_adapters(options: EngineOptions) -> Adapters:
    """Those that are named when the engine starts. StoreError where one cannot be applied."""
    from headrace.runtime.adapters.directory import open_adapter

    return Adapters({name: open_adapter(path).adapter for name, path in options.adapters.items()})


def _ranks(options: EngineOptions) -> Iterator[tuple[int, str]]:
    """The largest rank of each that is named, and its name."""
    from headrace.runtime.adapters.directory import read_modules

    for name, path in options.adapters.items():
        check_name(name)
        yield max(factors.rank for factors in read_modules(path).values()), name
