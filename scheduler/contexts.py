"""What stages hold for requests, by ids that are the same on all of them."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ContextIds:
    """Device pages, tails of newest pages where full ones are quantized, host slots, and slots of the
    window on NVMe, which go with the process that has them."""

    pages: tuple[int, ...] = ()
    tails: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    window: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.pages) + len(self.tails) + len(self.slots) + len(self.window)

    def plus(self, other: "ContextIds") -> "ContextIds":
        return ContextIds(
            self.pages + other.pages,
            self.tails + other.tails,
            self.slots + other.slots,
            self.window + other.window,
        )


@dataclass(frozen=True, slots=True)
class Taken:
    """What a stage took over from another one: so many bytes, all but what was `lost` on the way."""

    nbytes: int = 0
    lost: ContextIds = field(default_factory=ContextIds)

    def plus(self, other: "Taken") -> "Taken":
        return Taken(self.nbytes + other.nbytes, self.lost.plus(other.lost))
