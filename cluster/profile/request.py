"""What is to be run, and what was. Light to import: the driver's memory is measured before torch is in it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Load:
    """`rows` of a job, or else `sequences` random prompts that reach `context` tokens (None: what the plan
    has room for), for at most `seconds`."""

    rows: Path | None = None
    sequences: int | None = None
    context: int | None = None
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Done:
    """What was run: `finished` of `requests`, the longest of `longest` tokens, in `seconds`."""

    requests: int
    finished: int
    longest: int
    passes: int
    seconds: float
