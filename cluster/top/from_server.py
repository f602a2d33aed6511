"""The ring of a server, from its GET /ring."""

from collections.abc import Mapping
from typing import Any

from headrace.cluster.top.door import Door
from headrace.cluster.top.view import RecoveryView, RingView, StageView
from headrace.scheduler.errors import HeadraceError

_TIMES = {
    "computing": "compute",
    "waiting_for_weights": "weights",
    "waiting_for_kv": "kv",
    "waiting_for_link": "link",
    "between_passes": "idle",
}
_RATES = {
    "nvme_bytes_per_second": "NVMe",
    "host_bytes_per_second": "host",
    "kv_nvme_bytes_per_second": "KV NVMe",
    "kv_host_bytes_per_second": "KV host",
}


_SERVES = {"state": "serving"}
"""A stage that is no process of its own."""


class ServerSource:
    """One server, which says what its ring did in the last five seconds."""

    warm_up = 0.0

    def __init__(self, door: Door) -> None:
        self.door = door

    @property
    def place(self) -> str:
        return self.door.url

    def look(self) -> list[RingView]:
        state = self.door.get("/ring")
        try:
            return [ring_view(state)]
        except (KeyError, TypeError, AttributeError) as error:
            told = f"{self.place}/ring is not as this version knows it: {error!r} is missing"
            raise HeadraceError(told) from error


def ring_view(state: Mapping[str, Any]) -> RingView:
    """What GET /ring says."""
    serves = all((each["process"] or _SERVES)["state"] == "serving" for each in state["stages"])
    # While a stage is replaced there are no passes, and what they did before is past.
    passes = (state["passes"] or {}) if serves else {}
    kinds = [state["sequences"][kind] for kind in ("interactive", "batch")]
    running, waiting = (sum(kind[what] for kind in kinds) for what in ("running", "waiting"))
    return RingView(
        name=state["name"] or state["model"],
        stages=tuple(_stage(each, serves=serves) for each in state["stages"]),
        running=running,
        waiting=waiting,
        max_running=state["sequences"]["max_running"],
        share_of_bound=passes.get("share_of_bound"),
        bound_by=state["plan"]["bound_by"],
        tokens_per_second=passes.get("tokens_per_second"),
        pass_seconds=passes.get("pass_seconds"),
        since_pass=state["seconds_since_pass"],
        rejected=state["rejected"],
        pages={
            tier: {name: count for name, count in state["kv"][tier].items() if name != "total"}
            for tier in ("device", "host", "nvme")
        },
        adapter_slots=state["adapters"]["slots"],
        adapters_waiting=state["adapters"]["waiting"],
        recoveries=state["recoveries"]["count"],
        last=_recovery(state["recoveries"]["last"]),
    )


def _stage(state: Mapping[str, Any], *, serves: bool) -> StageView:
    times, process = state["times"] if serves else None, state["process"] or {}
    return StageView(
        stage=state["stage"],
        node=process.get("node", ""),
        pid=process.get("pid", 0),
        state=process.get("state", ""),
        seconds=process.get("seconds"),
        parts=None if times is None else {_TIMES[name]: times[name] for name in _TIMES},
        rates={} if times is None else {_RATES[name]: times[name] for name in _RATES},
    )


def _recovery(last: Mapping[str, Any] | None) -> RecoveryView | None:
    if last is None:
        return None
    return RecoveryView(
        tuple(last["stages"]),
        last["phases"],
        last["seconds_ago"],
        last["requests"],
        last.get("cause", ""),
        (last["kind"],),
    )
