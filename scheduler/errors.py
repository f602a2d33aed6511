"""Errors that a user can cause. Each message says what, where, how much and what to do."""


class HeadraceError(Exception):
    """Base of every error that a user can cause; the command line prints it and exits non-zero."""


class StoreError(HeadraceError):
    """A checkpoint or a store is missing, damaged, incomplete or not understood."""


class UnsupportedModelError(HeadraceError):
    """The architecture cannot be run here without changing its results."""


class DoesNotFitError(HeadraceError):
    """The model, the pages or the ring need more memory than the budgets give."""


class RequestError(HeadraceError):
    """One request is malformed or cannot be served (too long, bad parameters).

    `param` names the parameter that is wrong, where it is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """A prompt leaves no room for an answer in the context or in the pages that there are."""


class JobError(HeadraceError):
    """A batch job cannot start or go on: locked, unwritable, or belonging to another model."""


class KVLogError(HeadraceError):
    """A log of KV pages cannot be opened, read or deleted: in use, unreadable, or not one."""


class HandoverError(HeadraceError):
    """KV pages cannot be handed over to a stage: it has other layers or formats, or no room."""


class StageError(HeadraceError):
    """A stage died, hung or disagreed with the plan."""


class ColdTierError(HeadraceError):
    """A cold tier cannot be reached, read or written, or an object in it is missing or damaged."""


class NoPlaceError(StageError):
    """A stage is gone, and the cluster has no place for another process."""


class StageLostError(StageError):
    """A stage died, hung, or lost touch with its neighbours: another process can take its place.

    `silent` are stages that are known not to answer.
    """

    def __init__(self, message: str, silent: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.silent = silent
