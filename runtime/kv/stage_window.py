"""A stage's slots on NVMe for KV pages that requests decode over: where they lie, and how many."""

from pathlib import Path
from typing import TYPE_CHECKING

from headrace.runtime.kv.window import NamelessFile, PageWindow
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.kv_format import FORMATS
from headrace.scheduler.memory import window_slot_bytes

if TYPE_CHECKING:
    from headrace.runtime.kv_log.stage_log import StageLog


def stage_directory(config: StageConfig) -> Path:
    """The stage's own folder for KV pages."""
    assert config.kv_log is not None
    return Path(config.kv_log.directory) / f"stage-{config.stage}"


def stage_page_bytes(config: StageConfig) -> dict[int, int]:
    """Bytes of a page of each of the stage's layers."""
    store, fmt = Store.open(Path(config.store)), FORMATS[config.plan.kv_format]
    layers = config.plan.placement.layers_of(config.stage)
    return {layer: store.layer_shapes[layer].page_bytes(fmt) for layer in layers}


def window_bytes(config: StageConfig) -> int:
    """What the slots take of the drive."""
    sizes = stage_page_bytes(config).values()
    return config.plan.window_pages * window_slot_bytes(sizes)


def open_window(config: StageConfig, log: "StageLog") -> PageWindow | None:
    """The slots that the plan has, in the folder of the stage's `log`; None where it has none.

    Raises DoesNotFitError when the drive has no room for them, KVLogError for an unusable folder.
    """
    if not config.plan.window_pages:
        return None
    assert config.kv_log is not None
    file = NamelessFile(log.directory, window_bytes(config))
    sizes, count = stage_page_bytes(config), config.plan.window_pages
    encrypted = not config.kv_log.plaintext
    return PageWindow(sizes, count, file, encrypted=encrypted, may_write=log.may_write)
