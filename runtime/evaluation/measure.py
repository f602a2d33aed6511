"""Several models over the same windows in lock step, compared after every layer and at the end."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headrace.runtime.evaluation.windows import Windows
from headrace.runtime.sweep.states import States
from headrace.runtime.sweep.sweep import Sweep

Progress = Callable[[str, int, int], None]
"""What is done, how much of it, and of how much."""

ERROR_ROWS = 4096
"""Hidden states that are compared at a time."""


@dataclass
class Predictions:
    """One model's, each [W, L - 1], meant where `Windows.counted`.

    nll float32: -log p of the token that the text has, in nats.  top int32: the likeliest token, and top_nll
    float32 its -log p.  kld float32, in nats: sum over the vocabulary of p_ref log(p_ref / p), 0 for the reference itself.
    `layer_errors`: after each layer ||x - x_ref|| / ||x_ref|| over all hidden states of the windows. `seconds`:
    what this model took, waiting for its weights included.
    """

    nll: Tensor
    top: Tensor
    top_nll: Tensor
    kld: Tensor
    layer_errors: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def blank(cls, windows: Windows) -> "Predictions":
        size = windows.counted.shape
        top = torch.zeros(size, dtype=torch.int32)
        return cls(torch.zeros(size), top, torch.zeros(size), torch.zeros(size))


def measure(sweeps: Sequence[Sweep], windows: Windows, progress: Progress) -> list[Predictions]:
    """Each model's predictions, compared with the first one's, which is the reference.

    Every layer of every model is read once. Of nothing that has a vocabulary more than a few rows are there
    at a time. All models have the same vocabulary. One with another number of layers than the reference has no
    errors by layer.
    """
    found = [Predictions.blank(windows) for _ in sweeps]
    with ExitStack() as stack:
        states = []
        for sweep, one in zip(sweeps, found, strict=True):
            start = time.perf_counter()
            states.append(stack.enter_context(sweep.embed(windows.tokens)))
            one.seconds += time.perf_counter() - start
        _run_layers(sweeps, windows, states, found, progress)
        _predict(sweeps, windows, states, found, progress)
    return found


def _run_layers(
    sweeps: Sequence[Sweep],
    windows: Windows,
    states: Sequence[States],
    found: Sequence[Predictions],
    progress: Progress,
) -> None:
    layers = [sweep.layers() for sweep in sweeps]
    total = max(sweep.num_layers for sweep in sweeps)
    real = torch.arange(windows.context)[None] < torch.tensor(windows.lengths)[:, None]
    for index in range(total):
        progress("layers", index, total)
        for own, state, one in zip(layers, states, found, strict=True):
            start = time.perf_counter()
            layer = next(own, None)
            if layer is not None:
                layer.run(state)
            # States are on the host again, so that nothing is under way.
            one.seconds += time.perf_counter() - start
        for sweep, state, one in zip(sweeps[1:], states[1:], found[1:], strict=True):
            if sweep.num_layers != sweeps[0].num_layers:
                continue
            error = _relative_error(state.values, states[0].values, real, sweeps[0].device)
            one.layer_errors.append(error)
    progress("layers", total, total)
    for own in layers:
        own.close()


@torch.inference_mode()
def _relative_error(found: Tensor, reference: Tensor, real: Tensor, device: torch.device) -> float:
    """Of hidden states [W, L, hidden] where `real` [W, L]."""
    off = size = 0.0
    for rows in real.flatten().nonzero()[:, 0].split(ERROR_ROWS):
        one, other = (x.flatten(0, 1)[rows].to(device).float() for x in (found, reference))
        off += float((one - other).square().sum(dtype=torch.float64))
        size += float(other.square().sum(dtype=torch.float64))
    return math.sqrt(off / size) if size else 0.0


@torch.inference_mode()
def _predict(
    sweeps: Sequence[Sweep],
    windows: Windows,
    states: Sequence[States],
    found: Sequence[Predictions],
    progress: Progress,
) -> None:
    places = windows.counted.nonzero()
    done = 0
    for piece in places.split(sweeps[0].logit_rows):
        progress("predictions", done, len(places))
        window, at = piece.unbind(1)
        wanted = windows.tokens[window, at + 1].to(sweeps[0].device)
        reference: Tensor | None = None
        for sweep, state, one in zip(sweeps, states, found, strict=True):
            start = time.perf_counter()
            logs = sweep.logits(state.values[window, at]).log_softmax(-1)
            one.nll[window, at] = -logs.gather(1, wanted[:, None])[:, 0].cpu()
            one.seconds += time.perf_counter() - start
            top = logs.argmax(-1)
            one.top[window, at] = top.int().cpu()
            one.top_nll[window, at] = -logs.gather(1, top[:, None])[:, 0].cpu()
            if reference is None:
                reference = logs
            else:
                one.kld[window, at] = divergence(reference, logs).cpu()
        done += len(piece)
    progress("predictions", done, len(places))


def divergence(reference: Tensor, logs: Tensor) -> Tensor:
    """KL(reference || other) [R] in nats, of logarithms of probabilities [R, vocabulary].

    What the reference gives no probability adds nothing (0 log 0 = 0).
    """
    p = reference.exp()
    each = (reference - logs).mul_(p).masked_fill_(p == 0, 0)
    # Rounding may bring a sum of zero below it.
    return each.sum(-1).clamp_(min=0)
