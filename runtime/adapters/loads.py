"""What has become of loads of adapters."""

from typing import NamedTuple


class EndedLoads(NamedTuple):
    """Numbers of loads that ended well, and of others with the reasons; `nbytes` were copied to the device."""

    done: tuple[int, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    nbytes: int = 0
