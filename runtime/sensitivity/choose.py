"""From what matrices cost in each format to formats that cost least within so many bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace.runtime.conversion.affine import BITS
from headrace.runtime.conversion.plan import Options, plan_conversion
from headrace.runtime.sensitivity.candidates import KEEP, Candidates
from headrace.runtime.sensitivity.measure import Group, Sensitivity
from headrace.scheduler.allocation import Choice, allocate
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.sizes import format_size

Rule = tuple[str, str]
"""A pattern over names of tensors, and their format."""


@dataclass(frozen=True, slots=True)
class Mix:
    """A format for each group of `sensitivity`. `nbytes` are all blocks' files, `kld` is what divergences add up to,
    in nats a token; no formats of so many bytes have less than `bound`."""

    sensitivity: Sensitivity
    formats: tuple[str, ...]
    nbytes: int
    kld: float
    bound: float


def choose(candidates: Candidates, sensitivity: Sensitivity, limit: int) -> Mix:
    """Of at most `limit` bytes. Raises HeadraceError, with the least that can be had, where that is more."""
    groups = sensitivity.groups
    refuse_too_little(candidates, limit)
    items = [[Choice(g.nbytes[fmt], g.kld[fmt]) for fmt in candidates.formats] for g in groups]
    smallest = (candidates.smallest,) * len(groups)
    nbytes = stored_bytes(candidates, groups, smallest)
    # Beside the groups there are what has no choice, headers and padding; the latter differ a little.
    least = sum(group.nbytes[candidates.smallest] for group in groups)
    room = max(limit - nbytes + least, least)
    while True:
        found = allocate(items, room)
        formats = tuple(candidates.formats[pick] for pick in found.picks)
        nbytes = stored_bytes(candidates, groups, formats)
        if nbytes <= limit:
            return Mix(sensitivity, formats, nbytes, found.cost, found.bound)
        room = max(min(room, found.nbytes) - (nbytes - limit), least)


def refuse_too_little(candidates: Candidates, limit: int) -> None:
    """Raises HeadraceError where no formats do with `limit` bytes."""
    least = candidates.plan.nbytes
    if least <= limit:
        return
    count = candidates.parameters
    fixed = sum(
        part.entry.nbytes
        for block in candidates.plan.blocks
        for weight in block.weights
        if not weight.encoded
        for part in weight.parts
    )
    # Rounded up, so that what is named does.
    bits = -(-800 * least // count) / 100
    raise HeadraceError(
        f"the budget is {limit:,} bytes ({8 * limit / count:.2f} bits a weight), and the least for {candidates.checkpoint.path} "
        f"is {least:,} ({format_size(least, up=True)}, {bits:.2f} bits): {format_size(fixed)} of that are weights that are "
        f"stored as they are, all others have the format {candidates.smallest}; give at least --budget {bits:.2f}bits"
    )


def rules_of(groups: Sequence[Group], formats: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    """Patterns for each group's names, and its format."""
    return [(patterns(group.names), fmt) for group, fmt in zip(groups, formats, strict=True)]


def patterns(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names, with those of many experts as one pattern each."""
    found: dict[str, None] = {}
    for name in names:
        head, split, tail = name.partition(".experts.")
        number, dot, rest = tail.partition(".")
        pattern = f"{head}{split}*{dot}{rest}" if number.isdigit() and rest else name
        found[pattern] = None
    return tuple(found)


def options_of(
    rules: Iterable[tuple[tuple[str, ...], str]], group_size: int | None
) -> tuple[list[Rule], int | None]:
    """A conversion's policy, and its group size where it needs one."""
    policy = [(name, fmt) for names, fmt in rules if fmt != KEEP for name in names]
    return policy, group_size if any(fmt in BITS for _, fmt in policy) else None


def stored_bytes(candidates: Candidates, groups: Sequence[Group], formats: Sequence[str]) -> int:
    """Of the blocks' files of such a store."""
    policy, group_size = options_of(rules_of(groups, formats), candidates.group_size)
    options = Options(KEEP, tuple(policy), group_size=group_size, requantize=candidates.requantize)
    return plan_conversion(candidates.checkpoint, options, expand=True).nbytes
