"""`headrace prune`: a smaller store, and a table of what went and what it cost."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from headrace.cluster.evaluation.corpus import Corpus
from headrace.cluster.evaluation.evaluate import CONTEXT, EvalOptions, evaluate
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress as Bar
from rich.progress import TaskID
from rich.table import Table

from headrace.cluster.cli.convert import Meter
from headrace.cluster.cli.progress import byte_bar
from headrace.cluster.run_plan import resolve_device
from headrace.runtime.conversion.checkpoint import Checkpoint
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.conversion.selfcheck import check
from headrace.runtime.pruning.choice import Request
from headrace.runtime.pruning.prune import Calibration, Reporter, prune
from headrace.runtime.pruning.report import ColdTier, Perplexity, Report, write_report
from headrace.scheduler.errors import HeadraceError

FEWEST_TOKENS = 2
"""A window of one token has no attention to look at."""


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """`calibrate` and `text` are files of text, of which so many tokens are used in windows of the contexts
    (None: 1024, or what the model is made for); `device_memory` in bytes."""

    format: str = "keep"
    calibrate: tuple[Path, ...] = ()
    calibration_tokens: int = 16384
    calibration_context: int | None = None
    text: tuple[Path, ...] = ()
    tokens: int = 16384
    context: int | None = None
    device: str = "auto"
    device_memory: int | None = None
    allow_missing_tokenizer: bool = False


def run_prune(
    console: Console, source: Path, dest: Path, request: Request, options: PruneOptions
) -> Report:
    """Prunes behind a bar, evaluates where there is a text, and prints what came out. Raises HeadraceError."""
    _refuse_missing("--text", options.text)
    _refuse_missing("--calibrate", options.calibrate)
    with byte_bar(console) as bar:
        store, report = prune(
            source,
            dest,
            request,
            (lambda: calibration(source, options)) if options.calibrate else None,
            format=options.format,
            reporter=Reporter(_LayerMeter(bar), Meter(bar)),
            self_check=check,
            allow_missing_tokenizer=options.allow_missing_tokenizer,
        )
    if options.text:
        before, after = (_perplexity(console, path, options) for path in (source, dest))
        texts = tuple(str(file) for file in options.text)
        report = replace(report, perplexity=Perplexity(texts, options.tokens, before, after))
        write_report(dest, report)
    print_report(console, report, store.path)
    return report


def _refuse_missing(option: str, files: tuple[Path, ...]) -> None:
    for file in files:
        if not file.is_file():
            raise HeadraceError(f"{option} {file}: there is no such file")


def calibration(source: Path, options: PruneOptions) -> Calibration:
    """Whole windows of the texts, and the device that they run on."""
    checkpoint = Checkpoint(source, stores=True)
    device = torch.device(resolve_device(options.device))
    own = TORCH_DTYPES[checkpoint.dtype]
    most = int(checkpoint.config.get("max_position_embeddings") or CONTEXT)
    context = options.calibration_context or min(CONTEXT, most)
    corpus = Corpus(source, options.calibrate, options.calibration_tokens)
    windows = corpus.windows(max(context, FEWEST_TOKENS))
    # Padding would be counted like text.
    whole = [i for i, length in enumerate(windows.lengths) if length == windows.context]
    return Calibration(
        windows.tokens[whole],
        device,
        torch.float32 if device.type == "cpu" else own,
        options.device_memory,
    )


def _perplexity(console: Console, path: Path, options: PruneOptions) -> float:
    chosen = EvalOptions(
        text=options.text,
        context=options.context,
        tokens=options.tokens,
        device=options.device,
        device_memory=options.device_memory,
        prompts=0,
    )
    with byte_bar(console) as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"{path.name}: {what}", total=total)
            bar.update(tasks[what], completed=done)

        found = evaluate([path], None, chosen, report)
    return found.stores[0].model.perplexity


class _LayerMeter:
    """Layers that calibration tokens went through, as a bar."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._bar.add_task("calibrating", total=total)
        self._bar.update(self._task, completed=done)


def print_report(console: Console, report: Report, path: Path) -> None:
    """What went of which layer, bytes, zeros and perplexity."""
    if any(_went(report)):
        console.print(layer_table(report))
    console.print(summary(report, path))


def _went(report: Report) -> list[bool]:
    return [
        layer.became is None or bool(layer.neurons_gone or layer.groups_gone)
        for layer in report.layers
    ]


def layer_table(report: Report) -> Table:
    """One row for each layer of the whole model."""
    columns: list[tuple[str, Callable[..., str]]] = [("layer", lambda one: str(one.layer))]
    if any(one.influence is not None for one in report.layers):
        columns.append(("influence", lambda one: f"{one.influence:.4f}"))
    columns.append(("becomes", lambda one: "dropped" if one.became is None else str(one.became)))
    if any(one.neurons_gone for one in report.layers):
        columns.append(("neurons gone", lambda one: str(one.neurons_gone)))
    if any(one.groups_gone for one in report.layers):
        columns.append(
            ("groups of heads gone", lambda one: ", ".join(map(str, one.groups_gone)) or "-")
        )
    table = Table(*(name for name, _ in columns))
    for layer in report.layers:
        table.add_row(*(text(layer) for _, text in columns))
    return table


def summary(report: Report, path: Path) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("store", str(path))
    share = 1 - report.after / report.before
    table.add_row(
        "weights", f"{decimal(report.before)} -> {decimal(report.after)} ({100 * share:.1f}% less)"
    )
    if report.stored != report.after:
        table.add_row("stored", decimal(report.stored))
    if report.zeros is not None:
        for name, text in zeros_rows(report.zeros, report.cold_tier):
            table.add_row(name, text)
    if report.perplexity is not None:
        found = report.perplexity
        ratio = found.after / found.before
        table.add_row("perplexity", f"{found.before:.3f} -> {found.after:.3f} ({ratio:.3f} times)")
    table.add_row("report", str(path / "headrace-prune.json"))
    return table


def zeros_rows(zeros: str, cold: ColdTier | None) -> list[tuple[str, str]]:
    """What a pattern of zeros gives: nothing where weights are dense, something where they are compressed."""
    rows = [
        ("zeros", f"{zeros} of the layers' matrices, stored densely"),
        ("on devices", "no fewer bytes and no less arithmetic: zeros are weights like others"),
    ]
    if ":" in zeros:
        known = "2:4 has kernels on NVIDIA Ampere and later, of 16-bit and int8 weights; "
        rows.append(("", f"{known if zeros == '2:4' else ''}Headrace has none for it"))
    if cold is not None:
        layers = ", ".join(map(str, cold.layers))
        share = 1 - cold.with_zeros / cold.without
        text = (
            f"{decimal(cold.without)} -> {decimal(cold.with_zeros)} compressed ({100 * share:.1f}% less), "
            f"of {decimal(cold.nbytes)}, measured on layers {layers}"
        )
        rows.append(("in a cold tier", text))
    return rows
