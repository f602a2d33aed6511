"""The table of `headrace bench serve`."""

from collections.abc import Callable, Sequence

from rich.table import Table

from headrace.cluster.bench.serve_load import Load
from headrace.cluster.bench.serve_report import Quantiles, Report


def serve_table(url: str, reports: Sequence[Report]) -> Table:
    load = reports[0].load
    what = f"{load.prompt} + {load.output} tokens, {load.duration:g} s each, seed {load.seed}"
    table = Table(title=f"{url}: {what}", title_justify="left")
    table.add_column("", no_wrap=True)
    for each in reports:
        table.add_column(name_of(each.load), justify="right", no_wrap=True)
    rows: list[tuple[str, Callable[[Report], str]]] = [
        ("requests", lambda r: f"{r.requests:,}"),
        ("answered", lambda r: f"{r.answered:,}"),
        ("first token, s", lambda r: _seconds(r.first)),
        ("between pieces, s", lambda r: _seconds(r.between)),
        ("whole answer, s", lambda r: _seconds(r.whole)),
        ("until a 429, s", lambda r: _seconds(r.refused)),
        ("tokens/s", lambda r: f"{r.tokens_per_second:,.1f}"),
        ("requests/s", lambda r: f"{r.requests_per_second:,.2f}"),
    ]
    if load.max_ttft_ms is not None or load.deadline_ms is not None:
        rows += [
            (
                "let in that came in time",
                lambda r: "-" if r.in_time is None else f"{r.in_time:.1%}",
            ),
            ("goodput, requests/s", lambda r: f"{r.good_requests_per_second:,.2f}"),
            ("goodput, tokens/s", lambda r: f"{r.good_tokens_per_second:,.1f}"),
        ]
    for name, show in rows:
        table.add_row(name, *map(show, reports))
    for reason in sorted({reason for each in reports for reason in each.reasons}):
        table.add_row(reason, *(f"{each.reasons.get(reason, 0):,}" for each in reports))
    if len(load.keys) > 1:
        table.add_section()
        for key in range(len(load.keys)):
            shares = (each.tokens_per_second_by_key[key] for each in reports)
            table.add_row(f"tokens/s of key {key + 1}", *(f"{share:,.1f}" for share in shares))
    table.caption = "seconds are p50 / p95 / p99"
    return table


def name_of(load: Load) -> str:
    return f"{load.rate:g}/s" if load.rate else f"{load.concurrency} at once"


def _seconds(found: Quantiles | None) -> str:
    return "-" if found is None else f"{found.p50:.3g} / {found.p95:.3g} / {found.p99:.3g}"
