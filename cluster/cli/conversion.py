"""What a conversion is told to make of weights: formats, and roundings that follow a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from headrace.cluster.cli.budget import Formats, checked, formats_by_budget, formats_of_recipe
from headrace.cluster.cli.calibrate_options import CalibrationOptions, Method
from headrace.cluster.cli.calibration import chosen, text_of
from headrace.cluster.cli.convert import parse_policy
from headrace.cluster.cli.evaluate_options import CorpusOptions
from headrace.cluster.cli.format_options import FormatOptions, MixOptions
from headrace.runtime.calibration.calibrate import Calibration
from headrace.runtime.calibration.encoding import CALIBRATED
from headrace.scheduler.errors import HeadraceError

DEFAULT = "nf4"


@dataclass(frozen=True, slots=True)
class Settled:
    format: str
    policy: Sequence[tuple[str, str]]
    group_size: int | None
    calibration: Calibration | None


def settle(
    console: Console,
    checkpoint: Path,
    asked: FormatOptions,
    mix: MixOptions,
    calibrate: CalibrationOptions,
    where: CorpusOptions,
) -> Callable[[], Settled]:
    """Finds mistakes in options and text now; what is given back may measure for minutes. Both raise HeadraceError."""
    reads = calibrate.calibrate is not None
    mixed = checked(mix, asked.used(), calibrate=reads, group_size=asked.group_size is not None)
    if calibrate.method is Method.NEAREST and mix.budget is None:
        raise HeadraceError(
            "--method nearest looks at no text: leave out --calibrate, or give --budget for formats that follow it"
        )
    if not mixed:
        policy = parse_policy(asked.policy or ())
        fmt = DEFAULT if asked.format is None else asked.format.value
        settled = chosen(calibrate, where, checkpoint, frozenset((fmt, *(f for _, f in policy))))
        return lambda: Settled(fmt, policy, asked.group_size, settled)
    if mix.recipe is not None:
        formats = formats_of_recipe(mix.recipe)
        settled = chosen(calibrate, where, checkpoint, frozenset(fmt for _, fmt in formats.policy))
        return lambda: _mixed(formats, settled)
    text = text_of(calibrate, where, checkpoint)

    def measured() -> Settled:
        formats = formats_by_budget(
            console, checkpoint, mix, text, asked.group_size, requantize=asked.requantize
        )
        return _mixed(formats, text.calibration())

    return measured


def _mixed(formats: Formats, calibration: Calibration | None) -> Settled:
    rounds = any(fmt in CALIBRATED for _, fmt in formats.policy)
    return Settled("keep", formats.policy, formats.group_size, calibration if rounds else None)
