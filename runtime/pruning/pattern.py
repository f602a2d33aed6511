"""Which weights of a matrix become zero: the least of each row, or of each few neighbours in it.

Magnitude: the score of a weight is |w|. Wanda (Sun et al. 2023, arXiv:2306.11695): |w| ||x||_2, the norm of
its input feature over calibration tokens. Both compare weights of one output, that is of one row.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.scheduler.errors import HeadraceError


@dataclass(frozen=True, slots=True)
class Pattern:
    """`share` of each row becomes zero; where `of` is set, exactly `share * of` of each `of` neighbours."""

    share: float
    of: int = 0

    def __str__(self) -> str:
        if self.of:
            return f"{self.of - round(self.share * self.of)}:{self.of}"
        return f"{100 * self.share:g}%"

    def fits(self, columns: int) -> bool:
        """Whether a row of so many weights is made of whole groups."""
        return not self.of or columns % self.of == 0


def parse_pattern(text: str) -> Pattern:
    """ "50%", or "2:4" for two that stay of every four. Raises HeadraceError."""
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        kept, of = int(found[1]), int(found[2])
        if 0 < kept < of <= 32:
            return Pattern((of - kept) / of, of)
    elif (share := parse_share(text)) is not None:
        return Pattern(share)
    raise HeadraceError(
        f"--sparsity is a share of the weights such as 50%, or a pattern such as 2:4 (two of four stay), not "
        f"{text!r}"
    )


def parse_share(text: str) -> float | None:
    """ "25%" -> 0.25; None for what is no share between 0 and 100 %."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    share = float(found[1]) / 100 if found else 0.0
    return share if 0 < share < 1 else None


def zeroed(weight: Tensor, pattern: Pattern, norms: Tensor | None) -> Tensor:
    """The rows [rows, columns] with the weights of least score set to zero.

    `norms` [columns] are Wanda's ||x||_2; without them the score is the magnitude. Of equal scores
    those further left go.
    """
    scores = weight.float().abs()
    if norms is not None:
        scores = scores * norms
    if pattern.of:
        scores = scores.view(len(weight), -1, pattern.of)
    count = int(pattern.share * scores.shape[-1] + 1e-9)
    least = scores.argsort(dim=-1, stable=True)[..., :count]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, least, True)
    return weight.masked_fill(mask.view_as(weight), 0)
