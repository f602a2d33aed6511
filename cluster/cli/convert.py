"""`headrace convert` and `headrace inspect`: a bar with bytes/s and ETA, tables of what is stored."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.progress import Progress as Bar
from rich.progress import TaskID
from rich.table import Table
from transformers import PretrainedConfig

from headrace.cluster.cli.calibration import roundings
from headrace.cluster.cli.progress import byte_bar
from headrace.runtime.calibration.calibrate import Calibration, convert_calibrated
from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.writer import CHANGES, REQUANTIZED, Progress
from headrace.runtime.expert_extents import split_block
from headrace.runtime.manifest import Block
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError

WORST = 3
"""Weights that are shown of those that were quantized again."""


def parse_policy(rules: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """ "*.down_proj.weight=int8" -> ("*.down_proj.weight", "int8"). Raises HeadraceError."""
    pairs = []
    for rule in rules:
        glob, found, fmt = rule.rpartition("=")
        if not (glob and found and fmt):
            raise HeadraceError(
                f"a policy rule is PATTERN=FORMAT, such as '*.down_proj.weight=int8', not {rule!r}"
            )
        pairs.append((glob, fmt))
    return tuple(pairs)


def run_convert(
    console: Console,
    source: Path,
    dest: Path,
    *,
    format: str,
    policy: Sequence[tuple[str, str]],
    double_quant: bool,
    group_size: int | None = None,
    requantize: bool = False,
    allow_missing_tokenizer: bool,
    self_check: Callable[[PretrainedConfig], bool] | None,
    calibration: Calibration | None = None,
) -> Store:
    """Converts behind a progress bar and prints what came out. Raises HeadraceError."""
    tally = None
    with byte_bar(console) as bar:
        run = partial(
            convert,
            format=format,
            policy=policy,
            double_quant=double_quant,
            group_size=group_size,
            requantize=requantize,
            progress=Meter(bar),
            self_check=self_check,
            allow_missing_tokenizer=allow_missing_tokenizer,
        )
        if calibration is None:
            store = run(source, dest)
        else:
            store, tally = convert_calibrated(source, dest, calibration, run)
    console.print(summary(store))
    if tally is not None and tally.counts:
        console.print(roundings(tally))
    if (store.path / CHANGES).exists():
        console.print(changes(store.path / CHANGES))
    return store


def changes(file: Path) -> RenderableType:
    """What quantizing again changed: the three weights that it changed most."""
    errors = json.loads(file.read_text())[REQUANTIZED]
    worst = sorted(errors.items(), key=lambda item: -item[1]["relative_rms"])[:WORST]
    table = Table("weight", "from", "to", "relative RMS error")
    for name, error in worst:
        table.add_row(name, error["from"], error["to"], f"{error['relative_rms']:.2%}")
    text = f"quantized again: {len(errors)} weights, those changed most (all are in {file.name})"
    return Group(text, table)


def run_inspect(console: Console, path: Path, *, verify: bool, as_json: bool) -> None:
    """Prints a store's layers, bytes and formats; `verify` checks every hash. Raises HeadraceError."""
    store = Store.open(path)
    if verify:
        with byte_bar(console) as bar:
            task = bar.add_task("verifying", total=None)
            store.verify(lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        console.print_json(data=describe(store, verified=verify))
        return
    console.print(Group(summary(store), layer_table(store)))
    if verify:
        blocks = store.present
        which = f"all {len(blocks)} blocks"
        if blocks != store.blocks:
            which = f"the {len(blocks)} of {len(store.blocks)} blocks that are here"
        console.print(f"verified: {which} are as they were written")


class Meter:
    """Turns a conversion's reports into a bar, whose speed leaves out what an earlier run wrote."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def __call__(self, report: Progress) -> None:
        if self._task is None:
            self._task = self._bar.add_task(
                report.block, total=report.total, completed=report.resumed
            )
        self._bar.update(self._task, completed=report.done, description=report.block)


def format_bytes(blocks: Iterable[Block]) -> dict[str, int]:
    """Stored bytes by format; raw tensors count under their type ("bf16")."""
    sizes: dict[str, int] = {}
    for block in blocks:
        for weight in block.weights.values():
            name = weight.format
            if name == "raw":
                name = weight.parts["data"].dtype.lower()
            sizes[name] = sizes.get(name, 0) + sum(p.nbytes for p in weight.parts.values())
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def describe(store: Store, *, verified: bool) -> dict[str, Any]:
    """What `headrace inspect --json` prints; sizes in bytes."""
    return {
        "path": str(store.path),
        "model_type": store.config["model_type"],
        "format": store.format,
        "dtype": store.dtype,
        "options": store.options,
        "tied": store.tied,
        "digest": store.digest,
        "nbytes": store.nbytes,
        "verified": verified,
        "origin": None if store.origin is None else str(store.origin),
        "blocks": [
            {
                "name": block.name,
                "nbytes": block.nbytes,
                "here": block.file.exists(),
                "formats": format_bytes([block]),
                "experts": experts_json(block),
            }
            for block in store.blocks
        ],
    }


def experts_json(block: Block) -> dict[str, int] | None:
    """How a block is split; None for one whose experts, if any, cannot be read alone."""
    parts = split_block(block)
    if parts is None:
        return None
    return {
        "count": len(parts.experts),
        "dense_bytes": parts.dense.nbytes,
        "expert_bytes": max(extent.nbytes for extent in parts.experts),
    }


def summary(store: Store) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    parameters = sum(shape.parameters for shape in store.layer_shapes)
    table.add_row("store", str(store.path))
    table.add_row("model", f"{store.config['model_type']}, {len(store.layers)} layers")
    table.add_row("format", f"{store.format}, the rest in {store.dtype.lower()}")
    table.add_row("size", decimal(store.nbytes))
    table.add_row("parameters", f"{parameters / 1e9:.2f} billion in the layers' matrices")
    table.add_row("digest", store.digest)
    if store.origin is not None:
        table.add_row("pulled from", str(store.origin))
        table.add_row("here", f"{len(store.present)} of {len(store.blocks)} blocks")
    return table


def layer_table(store: Store) -> Table:
    """One row for the embedding, each run of layers that are stored alike, and the head.

    Where experts can be read alone, what every token needs and the experts have a column.
    """
    table = Table("block", "bytes", "formats")
    runs = _runs(store.blocks)
    has_experts = any(experts_json(block) for _, _, block in runs)
    if has_experts:
        table.add_column("dense + experts")
    for first, last, block in runs:
        name = first if first == last else f"{first} ... {last}"
        formats = ", ".join(f"{fmt} {decimal(size)}" for fmt, size in format_bytes([block]).items())
        split = [_parts(block)] if has_experts else []
        each = " each" if first != last else ""
        table.add_row(name, decimal(block.nbytes) + each, formats, *split)
    return table


def _parts(block: Block) -> str:
    parts = experts_json(block)
    if parts is None:
        return "-"
    experts = f"{parts['count']} x {decimal(parts['expert_bytes'])}"
    return f"{decimal(parts['dense_bytes'])} + {experts}"


def _runs(blocks: Sequence[Block]) -> list[tuple[str, str, Block]]:
    runs: list[tuple[str, str, Block]] = []
    for block in blocks:
        if runs and _alike(runs[-1][2], block):
            runs[-1] = (runs[-1][0], block.name, block)
        else:
            runs.append((block.name, block.name, block))
    return runs


def _alike(one: Block, other: Block) -> bool:
    return one.nbytes == other.nbytes and format_bytes([one]) == format_bytes([other])
