"""What a user chooses of a shadow."""

from dataclasses import dataclass
from pathlib import Path

from headrace.scheduler.errors import HeadraceError


@dataclass(frozen=True, slots=True)
class ShadowOptions:
    """Answers of the ring over `store`, which computes in `dtype` over up to `context` tokens (None: the model's
    own), are compared with `reference`, a store or a checkpoint of the same model.

    `sample` is a share of all requests. Samples of `tokens` tokens wait at most. They are compared while nobody
    waits for answers, or in any case when the oldest one is older than `patience` seconds. `memory` bytes are for sweeps,
    on `device`. `max_kld`, in nats, is what the alert compares the mean divergence with.
    """

    store: Path
    reference: Path
    dtype: str = "float32"
    context: int | None = None
    sample: float = 0.01
    tokens: int = 200_000
    patience: float = 600.0
    memory: int = 4 << 30
    device: str = "cpu"
    max_kld: float = 0.1


def parse_share(text: str) -> float:
    """ "1%" or "0.01". Raises HeadraceError for what is no share above 0 and up to 1."""
    number, _, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if "%" in text else 1)
    except ValueError:
        share = 0.0
    if rest or not 0 < share <= 1:
        raise HeadraceError(
            f"--shadow-sample {text!r} is no share of all requests: write 1%, 100% or 0.01"
        )
    return share
