"""Evaluations in a terminal: a bar, a table, files, and the gate's word."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from headrace.cluster.cli.evaluate_options import CorpusOptions, OutputOptions
from headrace.cluster.evaluation.evaluate import EvalOptions, evaluate
from headrace.cluster.evaluation.gate import Gate, misses, read_gate
from headrace.cluster.evaluation.page import render_page
from headrace.cluster.evaluation.results import Evaluation
from headrace.cluster.evaluation.summary import summary_rows
from headrace.runtime.evaluation.measure import Progress
from headrace.runtime.sweep.source import SweptModel, open_model
from headrace.scheduler.errors import HeadraceError

GATE_MISSED = 3
"""Exit code where a threshold is crossed: neither an error's (1) nor a wrong command line's (2)."""


def run_eval(
    console: Console,
    stores: Sequence[Path],
    reference: Path | None,
    corpus: CorpusOptions,
    outputs: OutputOptions,
) -> int:
    """Evaluates, prints and writes. The exit code. Raises HeadraceError."""
    gate = checked_gate(outputs.gate, reference, corpus)
    for file in filter(None, (outputs.json, outputs.html)):
        _refuse_unwritable(file)
    beside = None if reference is None else open_model(reference)
    found = measured(console, [open_model(path) for path in stores], beside, corpus)
    console.print(table(found))
    console.print(how(found), style="dim", highlight=False)
    if outputs.json is not None:
        text = json.dumps(found.as_json(), indent=2, allow_nan=False, ensure_ascii=False)
        outputs.json.write_text(text + "\n", encoding="utf-8")
    if outputs.html is not None:
        outputs.html.write_text(render_page(found), encoding="utf-8")
    return judge(console, gate, found)


def measured(
    console: Console,
    stores: Sequence[SweptModel],
    reference: SweptModel | None,
    corpus: CorpusOptions,
) -> Evaluation:
    """Evaluates behind a bar. Raises HeadraceError."""
    options = EvalOptions(
        text=tuple(corpus.text or ()),
        context=corpus.context,
        tokens=corpus.tokens,
        device=corpus.device.value,
        device_memory=corpus.memory_bytes,
        dtype=corpus.dtype.value,
        prompts=corpus.prompts,
        new_tokens=corpus.new_tokens,
    )
    with _bar(console) as progress:
        return evaluate(stores, reference, options, progress)


def checked_gate(file: Path | None, reference: Path | None, corpus: CorpusOptions) -> Gate | None:
    """The gate, before anything is computed that it could not judge. Raises HeadraceError."""
    if file is None:
        return None
    gate = read_gate(file)
    if gate.needs_reference and reference is None:
        raise HeadraceError(f"--gate {file} compares with a reference: give --reference")
    if gate.min_equal_tokens is not None and not corpus.prompts:
        raise HeadraceError(f"--gate {file} has min_equal_tokens, which --prompts 0 leaves out")
    return gate


def judge(console: Console, gate: Gate | None, found: Evaluation) -> int:
    """Prints what crosses the gate. The exit code."""
    if gate is None:
        return 0
    crossed = misses(gate, found)
    for line in crossed:
        console.print(f"[bold red]gate:[/] {line}", highlight=False, soft_wrap=True)
    if not crossed:
        console.print("gate: passed", highlight=False)
    return GATE_MISSED if crossed else 0


def table(found: Evaluation) -> Table:
    """A column for the reference and for each store."""
    columns = Table("")
    for model in found.models:
        columns.add_column(Path(model.path).name or model.path, justify="right", overflow="fold")
    for name, cells in summary_rows(found):
        columns.add_row(name, *cells)
    return columns


def how(found: Evaluation) -> str:
    """What the figures are of."""
    divergence = "KLD in nats, over the whole vocabulary; " if found.reference is not None else ""
    return (
        f"{found.size}; {divergence}{found.dtype} on {found.device}, micro-batches of up to "
        f"{found.micro_batch_tokens} tokens\n"
        "seconds a token: wall-clock time of this run over the texts' tokens, waiting for weights included"
    )


def _refuse_unwritable(file: Path) -> None:
    """HeadraceError before minutes of work, not after."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise HeadraceError(f"cannot write {file}: there is no folder for such a file")


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    """A line a step of the work; nothing where there is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report
