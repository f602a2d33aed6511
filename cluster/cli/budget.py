"""`headrace convert --budget` and `--recipe`: which formats a conversion gets."""

import re
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from headrace.cluster.cli.calibration import Text
from headrace.cluster.cli.format_options import MixOptions
from headrace.cluster.cli.recipe import read_recipe, recipe_of, refuse_taken, write_recipe
from headrace.cluster.cli.sizes import parse_size
from headrace.runtime.conversion.opening import open_checkpoint
from headrace.runtime.sensitivity.candidates import Candidates
from headrace.runtime.sensitivity.choose import Mix, choose, refuse_too_little
from headrace.runtime.sensitivity.layer import Rounding
from headrace.runtime.sensitivity.measure import measure
from headrace.scheduler.errors import HeadraceError

_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*bits?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Formats:
    """Of a conversion."""

    policy: list[tuple[str, str]]
    group_size: int | None


def checked(mix: MixOptions, own: dict[str, bool], *, calibrate: bool, group_size: bool) -> bool:
    """Whether formats are chosen here. Raises HeadraceError for options that do not go together: `own` are other ways to
    say formats, and whether they were used."""
    if mix.budget is None and mix.recipe is None:
        if mix.write_recipe is not None:
            raise HeadraceError("--write-recipe writes what --budget chose: give --budget with it")
        return False
    which = "--recipe" if mix.budget is None else "--budget"
    if mix.budget is not None and mix.recipe is not None:
        raise HeadraceError("--budget chooses formats and --recipe has them: give one of the two")
    taken = [name for name, used in own.items() if used]
    if mix.recipe is not None:
        taken += ["--group-size"] * group_size + ["--write-recipe"] * bool(mix.write_recipe)
    if taken:
        raise HeadraceError(f"{which} says which formats weights get: leave out {', '.join(taken)}")
    if mix.budget is not None and not calibrate:
        raise HeadraceError(
            "--budget measures what formats change when a text is read: give --calibrate TEXT with it "
            "(--method nearest, if roundings are not to follow the text)"
        )
    if mix.write_recipe is not None:
        refuse_taken(mix.write_recipe)
    return True


def budget_bytes(text: str, parameters: int) -> int:
    """ "4.5bits" a weight, or a size. Raises HeadraceError."""
    match = _BITS.fullmatch(text)
    if match is None:
        try:
            return parse_size(text)
        except HeadraceError as error:
            raise HeadraceError(
                f"--budget {text!r} is neither a size nor bits a weight: write 40GB, 12GiB or 4.5bits"
            ) from error
    return int(Decimal(match[1]) * parameters / 8)


def formats_of_recipe(file: Path) -> Formats:
    return Formats(*read_recipe(file).options())


def formats_by_budget(
    console: Console,
    checkpoint: Path,
    mix: MixOptions,
    text: Text,
    group_size: int | None,
    *,
    requantize: bool,
) -> Formats:
    """Measures behind a bar, chooses, says what, and writes the recipe where one is asked for. Raises HeadraceError."""
    assert mix.budget is not None
    candidates = Candidates(open_checkpoint(checkpoint), group_size, requantize=requantize)
    limit = budget_bytes(mix.budget, candidates.parameters)
    refuse_too_little(candidates, limit)
    with _bar(console) as bar:
        task = bar.add_task("measuring layers", total=None)
        sensitivity = measure(
            candidates,
            text.tokens,
            text.method,
            text.device,
            device_memory=text.device_memory,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    found = choose(candidates, sensitivity, limit)
    console.print(chosen_formats(found, candidates))
    recipe = recipe_of(found, candidates, _made(found, candidates, mix, text))
    if mix.write_recipe is not None:
        write_recipe(mix.write_recipe, recipe)
    return Formats(*recipe.options())


def _bar(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, console=console, transient=True)


def _made(mix: Mix, candidates: Candidates, options: MixOptions, text: Text) -> dict[str, Any]:
    return {
        "checkpoint": candidates.checkpoint.fingerprint(),
        "budget": options.budget,
        "bytes": mix.nbytes,
        "bits": round(8 * mix.nbytes / candidates.parameters, 3),
        "kld": float(f"{mix.kld:.4g}"),
        "measured": mix.sensitivity.rounding,
        "text": text.digest,
        "tokens": mix.sensitivity.sample,
    }


def chosen_formats(mix: Mix, candidates: Candidates) -> RenderableType:
    """How many matrices got which format, and what that is predicted to change."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for group, fmt in zip(mix.sensitivity.groups, mix.formats, strict=True):
        sizes[fmt] += group.nbytes[fmt]
        counts[fmt] += len(group.names)
    table = Table("format", "matrices", "bytes")
    for fmt in filter(counts.__getitem__, candidates.formats):
        table.add_row(fmt, f"{counts[fmt]:,}", decimal(sizes[fmt]))
    bits = 8 * mix.nbytes / candidates.parameters
    text = (
        f"{mix.nbytes:,} bytes, {bits:.3f} bits a weight with embeddings and head; predicted KL divergence {mix.kld:.3g} nats "
        f"a token, no choice of these formats has less than {mix.bound:.3g} (measured over {mix.sensitivity.sample:,} tokens, "
        f"{_ROUNDINGS[mix.sensitivity.rounding]})"
    )
    return Group(table, text)


_ROUNDINGS: dict[Rounding, str] = {
    "nearest": "rounded to nearest",
    "gptq": "rounded by gptq",
    "awq": "rounded by awq without scales of channels",
}
