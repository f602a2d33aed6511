"""What `headrace explain` prints: what bound a run, and what each change would buy."""

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace.cluster.cli.plan import describe
from headrace.cluster.cli.terms import TERMS
from headrace.cluster.explain.explanation import MUCH, NEAR, Explanation, Gain


def render(found: Explanation) -> RenderableType:
    return Group(_facts(found), _gains(found))


def _facts(found: Explanation) -> Table:
    report, prediction = found.report, found.plan.prediction
    table = Table.grid(padding=(0, 2))
    state = "finished" if report.finished else "not finished"
    table.add_row("run", f"{report.model}, {state}: {report.output_tokens:,} tokens")
    table.add_row("placement", describe(found.plan))
    if found.measured is None:
        table.add_row("measured", "no pass had decodes only, so that there is nothing to compare")
    else:
        rate = found.sequences / found.measured
        load = found.load
        waited = "while others waited" if load.waited else "none waited"
        table.add_row(
            "sequences",
            f"{load.sequences} at once of {load.context} tokens on average, {waited};"
            f" {load.requests:,} requests in all",
        )
        table.add_row(
            "measured",
            Text(f"{rate:,.1f} tokens/s: {found.sequences} every {_time(found.measured)}", "bold"),
        )
        off = found.ratio - 1.0
        slower = "longer" if off > 0 else "less"
        table.add_row("expected", f"{_time(found.expected)}; it took {abs(off):.0%} {slower}")
    if found.blamed:
        table.add_row("", f"put down to {found.blamed}")
    table.add_row("bound by", f"{TERMS[prediction.bound_by]}, by the plan")
    for name, seconds in sorted(prediction.terms.items(), key=lambda item: -item[1]):
        if seconds:
            table.add_row("", f"{_time(seconds):>9}  {TERMS[name]}")
    if found.measured is not None:
        loads = found.waits["weights"] >= MUCH
        pace = "loads" if loads else "computing, and what is around it"
        table.add_row("set the pace", TERMS[prediction.bound_by] if found.ratio < NEAR else pace)
    waited = ", ".join(f"{share:.0%} for {name}" for name, share in found.waits.items() if share)
    table.add_row("stages waited", waited or "for nothing")
    if found.streamed_gbps:
        table.add_row("streamed", f"{found.streamed_gbps:.2f} GB/s over all passes")
    return table


def _gains(found: Explanation) -> RenderableType:
    if not found.gains:
        return Text("No change that was looked at would gain more than 2 %.")
    table = Table(title="What would change that", title_justify="left")
    table.add_column("change")
    table.add_column("gain", justify="right", no_wrap=True)
    table.add_column("at once", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("then bound by")
    for gain in found.gains:
        rate = f"{gain.tokens_per_second:,.1f}"
        table.add_row(gain.what, _factor(gain), f"{gain.sequences:,}", rate, TERMS[gain.bound_by])
    return table


def _factor(gain: Gain) -> str:
    least, most = f"{gain.factor:.2f}", f"{gain.at_most:.2f}"
    return f"{least}x" if least == most else f"{least} to {most}x"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def explain_json(found: Explanation) -> dict[str, Any]:
    prediction = found.plan.prediction
    return {
        "model": found.report.model,
        "finished": found.report.finished,
        "load": asdict(found.load),
        "measured_seconds": found.measured,
        "expected_seconds": found.expected,
        "measured_by_expected": found.ratio if found.measured else None,
        "bound_by": prediction.bound_by,
        "terms": prediction.terms,
        "blamed": found.blamed,
        "waits": found.waits,
        "streamed_gbps": found.streamed_gbps,
        "gains": [asdict(gain) for gain in found.gains],
    }
