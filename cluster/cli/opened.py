"""A store as commands open it, with a word about what stages are going to fetch."""

from pathlib import Path

import typer
from rich.filesize import decimal

from headrace.cluster.hydration import cold_model, open_store
from headrace.runtime.store import Store


def opened_store(path: Path, cold: str | None) -> Store:
    """The store, after what the driver needs of it has come. Raises HeadraceError."""
    source = cold_model(path, cold)
    store = open_store(path, source)
    if source is not None and store.present != store.blocks:
        typer.echo(f"{path} has {here(store)}; stages fetch what they need from {source}", err=True)
    return store


def here(store: Store) -> str:
    """How much of a store is in its directory."""
    present = store.present
    if present == store.blocks:
        return f"all {len(present)} blocks, {decimal(store.nbytes)}"
    size = decimal(sum(block.nbytes for block in present))
    return f"{len(present)} of {len(store.blocks)} blocks, {size} of {decimal(store.nbytes)}"
