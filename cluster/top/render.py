"""Views of rings as text: for a terminal of 80 columns and more."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from headrace.cluster.top.view import PARTS, RecoveryView, RingView, StageView

_GLYPHS = {"compute": "█", "weights": "▓", "kv": "▒", "link": "░", "idle": "·"}
"""So that parts are told apart without colours, too."""

_STYLES = {
    "compute": "green",
    "weights": "red",
    "kv": "magenta",
    "link": "yellow",
    "idle": "bright_black",
}
_BOUNDS = {
    "nvme": "reading from NVMe",
    "pcie": "copying to the devices",
    "compute": "arithmetic",
    "hbm": "device memory traffic",
    "hops": "hops between stages",
}
_TIERS = {"device": "device", "host": "host RAM", "nvme": "NVMe"}
_PAGES = {"used": "green", "cached": "cyan", "coming": "yellow", "leaving": "yellow"}
_STATES = (*_PAGES, "free")
_WAITS = {"weights": "weights", "kv": "KV pages", "link": "other stages", "idle": "a pass"}

_WIDE = 100
"""Columns from which on there is room for what 80 columns have none for."""

_LATE_SECONDS = 3.0
_LATE_PASSES = 2
"""A pass that takes longer than so many usual ones, and so many seconds, is remarked upon."""

_LEAST_WAIT = 0.02
"""Less is not worth a name."""


class Bar:
    """Parts of a whole, side by side, in as many columns as there are."""

    def __init__(
        self, parts: Sequence[tuple[float, str, str]], width: int | None = None, rest: str = " "
    ) -> None:
        """`parts` have a share, a glyph and a style each; what is left is filled with `rest`."""
        self._parts, self._width, self._rest = parts, width, rest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self._width or options.max_width, options.max_width)
        done, end = 0, 0.0
        for share, glyph, style in self._parts:
            end += share
            upto = min(width, round(end * width))
            yield Segment(glyph * (upto - done), Style.parse(style))
            done = max(done, upto)
        yield Segment(self._rest * (width - done), Style.parse("bright_black"))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = self._width or options.max_width
        return Measurement(min(8, width), width)


def render(rings: Sequence[RingView], place: str, width: int, trouble: str = "") -> Group:
    """All rings of a place; `trouble` is why nothing newer is known."""
    head = Table.grid(expand=True)
    head.add_column(no_wrap=True, overflow="ellipsis")
    head.add_column(justify="right", no_wrap=True)
    head.add_row(Text.assemble(("headrace top", "bold"), f"  {place}"), time.strftime("%H:%M:%S"))
    parts: list[RenderableType] = [head]
    if trouble:
        parts.append(Text(trouble, style="bold red"))
    for ring in rings:
        parts += [Text(), *_ring(ring, width)]
    return Group(*parts)


def _ring(ring: RingView, width: int) -> list[RenderableType]:
    said: list[RenderableType] = [
        Text.assemble((ring.name, "bold"), "  ", *_doing(ring)),
        _share(ring, width),
        _figures(ring),
        Text(),
        _stages(ring, width),
        _legend(),
        Text(),
        _pages(ring, width),
    ]
    if any(ring.adapter_slots.values()):
        said.append(_adapters(ring))
    if ring.last is not None:
        said.append(_recovery(ring.recoveries, ring.last))
    return said


def _doing(ring: RingView) -> list[Any]:
    since = "" if ring.since_pass is None else f", no pass for {duration(ring.since_pass)}"
    if ring.troubled:
        states = ", ".join(f"stage {each.stage} {each.state}" for each in ring.troubled)
        return [(f"recovering: {states}{since}", "bold red")]
    if not ring.running and not ring.waiting:
        return [(f"idle{since}", "bright_black")]
    late = max(_LATE_SECONDS, _LATE_PASSES * (ring.pass_seconds or 0.0))
    if ring.since_pass is not None and ring.since_pass > late:
        return [(f"running{since}", "bold yellow")]
    return [("running", "green")]


def _share(ring: RingView, width: int) -> RenderableType:
    share = ring.share_of_bound
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(no_wrap=True)
    line.add_column(width=max(10, width // 4))
    line.add_column(no_wrap=True, overflow="ellipsis")
    bar = Bar([(min(1.0, share or 0.0), "█", "green")], rest="─")
    bound = f"bound by {_BOUNDS.get(ring.bound_by, ring.bound_by)}" if ring.bound_by else ""
    line.add_row(
        Text("share of the bound", style="bold"),
        bar,
        Text.assemble((percent(share), "bold"), f"  {bound}"),
    )
    return line


def _figures(ring: RingView) -> Text:
    rejected = sum(ring.rejected.values())
    figures = [
        ("tokens/s", number(ring.tokens_per_second)),
        ("pass", duration(ring.pass_seconds)),
        ("bubble", percent(ring.bubble)),
        ("running", f"{ring.running} of {ring.max_running}"),
        ("waiting", str(ring.waiting)),
        ("rejected", str(rejected) + (f" ({_most(ring.rejected)})" if rejected else "")),
    ]
    text = Text()
    for name, value in figures:
        text.append(f"{name} ", "bright_black")
        text.append(value, "bold")
        text.append("  ")
    text.rstrip()
    return text


def _most(counts: Mapping[str, int]) -> str:
    """The most frequent one, and that there are others."""
    first = max(counts, key=counts.__getitem__)
    return f"most {first}" if sum(map(bool, counts.values())) > 1 else first


def _stages(ring: RingView, width: int) -> Table:
    has_place = any(each.pid for each in ring.stages)
    with_node = has_place and (
        width >= _WIDE or len({each.node for each in ring.stages} - {""}) > 1
    )
    tiers = [name for name in _rate_names(ring) if width >= _WIDE or not name.startswith("KV")]
    table = Table(
        box=None, expand=True, padding=(0, 1, 0, 0), pad_edge=False, header_style="bright_black"
    )
    table.add_column("stage", no_wrap=True)
    if with_node:
        table.add_column("node", no_wrap=True)
    if has_place:
        table.add_column("pid", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("where its time goes", ratio=1, no_wrap=True)
    table.add_column("waits for", no_wrap=True)
    for name in tiers:
        table.add_column(f"{name}/s", justify="right", no_wrap=True)
    for each in ring.stages:
        cells: list[RenderableType] = [str(each.stage)]
        cells += [each.node or "-"] * with_node
        cells += [str(each.pid or "-")] * has_place
        rates = (rate(each.rates.get(t)) for t in tiers)
        table.add_row(*cells, _state(each), _bar(ring, each), _wait(each), *rates)
    return table


def _rate_names(ring: RingView) -> list[str]:
    """Tiers of weights, and those of KV pages that anything came from."""
    found = [name for each in ring.stages for name, rate in each.rates.items() if rate]
    return ["NVMe", "host", *(name for name in ("KV NVMe", "KV host") if name in found)]


def _state(stage: StageView) -> Text:
    if not stage.state:
        return Text("-")
    if stage.state == "serving":
        return Text("serving", style="green")
    since = "" if stage.seconds is None else f" {stage.seconds:.0f} s"
    return Text(f"{stage.state}{since}", style="bold red")


def _bar(ring: RingView, stage: StageView) -> RenderableType:
    if stage.parts is None:
        why = "no pass can be made" if ring.troubled else "no figures yet"
        return Text(why, style="bright_black")
    return Bar([(stage.parts[part], _GLYPHS[part], _STYLES[part]) for part in PARTS])


def _wait(stage: StageView) -> Text:
    wait = stage.longest_wait
    if wait is None or wait[1] < _LEAST_WAIT:
        return Text("-" if wait is None else "nothing")
    return Text(f"{_WAITS[wait[0]]} {percent(wait[1])}", style=_STYLES[wait[0]])


def _legend() -> Padding:
    names = {
        "compute": "computes",
        "weights": "waits for weights",
        "kv": "KV pages",
        "link": "other stages",
        "idle": "a pass",
    }
    text = Text()
    for part in PARTS:
        text.append(_GLYPHS[part], _STYLES[part])
        text.append(f" {names[part]}  ", "bright_black")
    text.rstrip()
    return Padding(text, (0, 0, 0, 6))


def _pages(ring: RingView, width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bright_black")
    table.add_column(width=max(10, width // 4))
    table.add_column()
    name = "KV pages"
    for tier, title in _TIERS.items():
        counts = ring.pages.get(tier, {})
        total = sum(counts.values())
        if not total:
            continue
        parts = [(counts.get(s, 0) / total, "█", style) for s, style in _PAGES.items()]
        told = ", ".join(f"{counts[state]} {state}" for state in _STATES if counts.get(state))
        table.add_row(f"{name}  {title:8}", Bar(parts, rest="·"), told)
        name = " " * len(name)
    return table


def _adapters(ring: RingView) -> Text:
    """What is in slots, and how many adapters wait for one."""
    told = ", ".join(f"{n} {state}" for state in _STATES if (n := ring.adapter_slots.get(state)))
    text = Text.assemble(("adapters  ", "bright_black"), f"slots: {told}")
    if ring.adapters_waiting:
        text.append(f", {ring.adapters_waiting} adapters wait for one", "bold yellow")
    return text


def _recovery(count: int, last: RecoveryView) -> Text:
    """All that is known of the last one, or of all."""
    what = ", ".join(last.kinds)
    if last.stages:
        what += f", stage {', '.join(map(str, last.stages))}"
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in last.phases.items())
    text = Text.assemble(("recoveries ", "bright_black"), (str(count), "bold"))
    if last.seconds_ago is None:
        text.append(f"  {what}, {last.seconds:.1f} s in all: {phases}")
        return text
    text.append(f"  the last {duration(last.seconds_ago)} ago: {what}")
    text.append(f", took {last.seconds:.1f} s: {phases}")
    if last.requests is not None:
        text.append(f"; {last.requests} requests computed again")
    if last.cause:
        # The first sentence: what Ray says of it fills a screen.
        text.append(f". {last.cause.partition('. ')[0]}", "bright_black")
    return text


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def rate(nbytes: float | None) -> str:
    """Bytes a second, without the second."""
    if nbytes is None:
        return "-"
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if nbytes < 999.5:
            break
        nbytes, unit = nbytes / 1e3, larger
    return f"{nbytes:.{1 if 0 < nbytes < 9.95 else 0}f} {unit}"


def duration(seconds: float | None) -> str:
    """In the unit that suits it."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
