"""What a server and its shadow's process tell each other: msgpack behind its length in four bytes."""

from dataclasses import dataclass

from headrace.cluster.wire import encode
from headrace.runtime.evaluation.answers import Answer, AnswerFigures

LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Setup:
    """What is compared, and how; the first message. Sizes in tokens: sequences have `longest` at most, those of a
    batch `padded` together when each is as long as the longest, and micro-batches `micro_batch`. `memory` in bytes,
    `tie` in nats;
    `latents` is what the self-check of a checkpoint found, which takes seconds."""

    store: str
    reference: str
    device: str
    dtype: str
    memory: int
    longest: int
    padded: int
    micro_batch: int
    tie: float
    latents: bool


@dataclass(frozen=True, slots=True)
class Order:
    """To the process: a batch to begin, if any, and whether to hold between two layers."""

    batch: tuple[Answer, ...] | None
    hold: bool


@dataclass(frozen=True, slots=True)
class Report:
    """From the process, for each batch: figures, or why there are none."""

    figures: AnswerFigures | None = None
    error: str | None = None


def framed(message: Setup | Order | Report) -> bytes:
    payload = encode(message)
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload
