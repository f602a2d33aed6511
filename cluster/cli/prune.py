"""`headrace prune`: a smaller store, and a table of what went and what it cost."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress as Bar
from rich.progress import TaskID
from rich.table import Table

from headrace.cluster.cli.convert import Meter
from headrace.cluster.cli.evaluate import checked_gate, how, judge, measured, table
from headrace.cluster.cli.evaluate_options import CorpusOptions
from headrace.cluster.cli.progress import byte_bar
from headrace.cluster.cli.prune_options import TextOptions
from headrace.cluster.evaluation.corpus import Corpus
from headrace.cluster.evaluation.evaluate import CONTEXT
from headrace.cluster.evaluation.gate import Gate
from headrace.cluster.evaluation.results import Evaluation
from headrace.cluster.run_plan import resolve_device, resolve_dtype
from headrace.runtime.conversion.destination import hold_back, release
from headrace.runtime.conversion.selfcheck import check
from headrace.runtime.pruning.choice import Request
from headrace.runtime.pruning.prune import Calibration, Reporter, prune
from headrace.runtime.pruning.report import ColdTier, Cost, Report, write_report
from headrace.runtime.sweep.source import open_model
from headrace.scheduler.errors import HeadraceError


def run_prune(
    console: Console,
    source: Path,
    dest: Path,
    request: Request,
    texts: TextOptions,
    corpus: CorpusOptions,
    *,
    format: str,
    gate: Path | None,
    allow_missing_tokenizer: bool,
) -> int:
    """Prunes behind a bar, compares where there is a text, and prints what came out. The exit code.

    Raises HeadraceError.
    """
    judged = _checked(source, gate, texts, corpus)
    with byte_bar(console) as bar:
        store, report = prune(
            source,
            dest,
            request,
            (lambda: calibration(source, texts, corpus)) if texts.calibrate else None,
            format=format,
            reporter=Reporter(_LayerMeter(bar), Meter(bar)),
            self_check=check,
            allow_missing_tokenizer=allow_missing_tokenizer,
        )
    print_report(console, report, store.path)
    if not corpus.text:
        return 0
    if judged is not None:
        hold_back(dest)
    found = measured(console, [store], open_model(source), corpus)
    write_report(dest, replace(report, cost=_cost(found)))
    console.print(table(found))
    console.print(how(found), style="dim", highlight=False)
    return _decided(console, dest, judged, found)


def _decided(console: Console, dest: Path, gate: Gate | None, found: Evaluation) -> int:
    """What does not pass is no store yet, as of `headrace convert --gate`. The exit code."""
    code = judge(console, gate, found)
    if code:
        console.print(
            f"{dest} is held back: run the same command without --gate to take it as it is, or delete it",
            highlight=False,
            soft_wrap=True,
        )
    elif gate is not None:
        release(dest)
    return code


def _checked(
    source: Path, gate: Path | None, texts: TextOptions, corpus: CorpusOptions
) -> Gate | None:
    """The gate. Raises HeadraceError for mistakes that would show late."""
    _refuse_missing("--text", corpus.text or ())
    _refuse_missing("--calibrate", texts.calibrate or ())
    if gate is not None and not corpus.text:
        raise HeadraceError(f"--gate {gate} judges what pruning costs on a text: give --text FILE")
    return checked_gate(gate, source, corpus)


def _refuse_missing(option: str, files: Sequence[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise HeadraceError(f"{option} {file}: there is no such file")


def calibration(source: Path, asked: TextOptions, corpus: CorpusOptions) -> Calibration:
    """Whole windows of the texts, and where they are run."""
    model = open_model(source)
    device = torch.device(resolve_device(corpus.device.value))
    dtype = resolve_dtype(corpus.dtype.value, device.type, model)
    most = int(model.config.get("max_position_embeddings") or CONTEXT)
    texts = Corpus(model, tuple(asked.calibrate or ()), asked.calibration_tokens)
    windows = texts.windows(asked.calibration_context or min(CONTEXT, most))
    # Padding would be counted like text.
    whole = [i for i, length in enumerate(windows.lengths) if length == windows.context]
    return Calibration(windows.tokens[whole], device, getattr(torch, dtype), corpus.memory_bytes)


def _cost(found: Evaluation) -> Cost:
    [store] = found.stores
    assert found.reference is not None and store.divergence is not None
    return Cost(
        texts=tuple(found.texts),
        predicted=found.predicted,
        perplexity_before=found.reference.perplexity,
        perplexity_after=store.model.perplexity,
        mean_kld=store.divergence.mean,
        top1=store.divergence.top1,
    )


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
    rows = Table.grid(padding=(0, 2))
    rows.add_row("store", str(path))
    share = 1 - report.after / report.before
    rows.add_row(
        "weights", f"{decimal(report.before)} -> {decimal(report.after)} ({100 * share:.1f}% less)"
    )
    if report.stored != report.after:
        rows.add_row("stored", decimal(report.stored))
    if report.zeros is not None:
        for name, text in zeros_rows(report.zeros, report.cold_tier):
            rows.add_row(name, text)
    rows.add_row("report", str(path / "headrace-prune.json"))
    return rows


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
