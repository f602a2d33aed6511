"""Looks at a source every second and shows what it says, until somebody has seen enough."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live

from headrace.cluster.top.render import render
from headrace.cluster.top.view import RingView, Source
from headrace.scheduler.errors import HeadraceError

PERIOD = 1.0


def look_once(source: Source, sleep: Callable[[float], None] = time.sleep) -> list[RingView]:
    """All rings, with their rates. HeadraceError when there are none."""
    rings = source.look()
    end = time.monotonic() + source.warm_up
    while rings and time.monotonic() < end and not all(_is_known(ring) for ring in rings):
        sleep(PERIOD)
        rings = source.look()
    return _some(rings, source)


def _some(rings: list[RingView], source: Source) -> list[RingView]:
    if not rings:
        raise HeadraceError(
            f"no ring runs ({source.place}), or only since a few seconds: start one with `headrace serve` or"
            " `headrace generate`"
        )
    return rings


def _is_known(ring: RingView) -> bool:
    """Whether what the ring does is known, down to its stages, or it does nothing."""
    if not ring.running and not ring.waiting:
        return True
    return ring.tokens_per_second is not None and all(each.parts for each in ring.stages)


def as_json(rings: list[RingView], place: str) -> dict[str, Any]:
    """For scripts: seconds, bytes a second and shares."""
    return {
        "place": place,
        "rings": [{**asdict(ring), "bubble": ring.bubble} for ring in rings],
    }


class _Picture:
    """What is shown, laid out for as many columns as the terminal has then."""

    def __init__(self, source: Source, rings: list[RingView]) -> None:
        self._source, self.rings = source, rings
        self.trouble = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        made: RenderableType = render(
            self.rings, self._source.place, options.max_width, self.trouble
        )
        yield made


def watch(source: Source, console: Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """Until Ctrl-C. HeadraceError when there is nothing to watch at first; what goes away later stays in the
    picture, which says since when nothing was heard of it."""
    picture = _Picture(source, _some(source.look(), source))
    heard = time.monotonic()
    with Live(picture, console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.refresh()
            sleep(PERIOD)
            try:
                rings = source.look()
                if not rings:
                    raise HeadraceError(f"no ring runs any more ({source.place}).")
            except HeadraceError as error:
                silent = time.monotonic() - heard
                picture.trouble = f"as it was {silent:.0f} s ago. {error} Ctrl-C ends this."
                continue
            picture.rings, picture.trouble, heard = rings, "", time.monotonic()


def show_once(source: Source, console: Console) -> None:
    """Print what is known after at most the source's `warm_up`."""
    with suppress(BrokenPipeError):
        console.print(render(look_once(source), source.place, console.width))
