"""A stored tensor and what it is in the weight that it encodes."""

from dataclasses import dataclass

from headrace.runtime.block_file import Entry


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor and its role in the weight; "state" and "layout" serve other readers only."""

    role: str
    entry: Entry
