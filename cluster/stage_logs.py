"""The stages' logs of KV pages on NVMe, as one."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import ray

from headrace.cluster.pipeline import gather
from headrace.cluster.wire import decode
from headrace.runtime.kv_log.stats import LogReport

if TYPE_CHECKING:
    from headrace.runtime.kv_log.stage_log import StageLog
    from headrace.runtime.stage import Stage

log = logging.getLogger(__name__)

SECONDS = 60.0
"""How long stages may take to answer, and to let what is being written end and delete their files."""


class StageLogs(Protocol):
    def keys(self) -> list[bytes]:
        """Of the pages that every stage has, oldest first."""

    def reports(self) -> list[LogReport | None]:
        """One a stage; None of one that does not answer."""

    def close(self) -> None:
        """Keep or delete the pages, as it was said. Safe to call twice."""


def held_by_all(keys: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Keys that all of `keys` have, in the order of the first: a page is of use on all stages only."""
    others = [set(some) for some in keys[1:]]
    return [key for key in keys[0] if all(key in some for some in others)]


class ActorLogs:
    """Of stages that are Ray actors."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self._before: dict[
            int, LogReport
        ] = {}  # of logs that were closed when stages were replaced

    def leave(self, stage: int) -> None:
        """Note what the stage's log has done, before another process goes on with it."""
        report = _report(self._actors[stage].log_report.remote(), SECONDS)
        if report is not None:
            self._before[stage] = self._whole(stage, report)

    def replace(self, stage: int, actor: Any) -> None:
        """Another actor has the stage's log from now on."""
        self._actors[stage] = actor

    def keys(self) -> list[bytes]:
        refs = [actor.log_keys.remote() for actor in self._actors]
        return held_by_all(gather(refs, SECONDS, doing="looking for KV pages on NVMe"))

    def reports(self) -> list[LogReport | None]:
        refs = [actor.log_report.remote() for actor in self._actors]
        ray.wait(refs, num_returns=len(refs), timeout=SECONDS)
        found = [_report(ref) for ref in refs]
        return [report and self._whole(stage, report) for stage, report in enumerate(found)]

    def _whole(self, stage: int, report: LogReport) -> LogReport:
        before = self._before.get(stage)
        return report if before is None else report.after(before)

    def close(self) -> None:
        actors, self._actors = self._actors, []
        refs = [actor.close_log.remote() for actor in actors]
        ray.wait(refs, num_returns=len(refs), timeout=SECONDS) if refs else None
        for stage, ref in enumerate(refs):
            try:
                ray.get(ref, timeout=0.1)
            except ray.exceptions.RayError as error:
                log.warning(
                    "stage %d did not close its KV pages on NVMe, which the next run there does: %s",
                    stage,
                    str(error).splitlines()[0],
                )


def _report(ref: Any, seconds: float = 0.1) -> LogReport | None:
    try:
        return decode(ray.get(ref, timeout=seconds), LogReport)
    except ray.exceptions.RayError:
        return None


class LocalLogs:
    """Of stages of this process; closes the logs, which are its own from now on."""

    def __init__(self, stages: "Sequence[Stage]", logs: "Sequence[StageLog]") -> None:
        self._stages, self._logs = list(stages), list(logs)

    def keys(self) -> list[bytes]:
        return held_by_all([log.keys() for log in self._logs])

    def reports(self) -> list[LogReport | None]:
        return [log.report() for log in self._logs]

    def close(self) -> None:
        for stage, each in zip(self._stages, self._logs, strict=True):
            stage.end_moves()
            each.close()
