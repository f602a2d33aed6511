"""What a batch job is made of: its input, its journal, and what its rows may name."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from headrace.cluster.adapters import Adapters
from headrace.cluster.inputs import Input, open_input
from headrace.cluster.journal import JobIdentity, Journal
from headrace.cluster.progress import Progress, progress_path
from headrace.scheduler.errors import JobError
from headrace.scheduler.request import SamplingParams


@dataclass(frozen=True, slots=True)
class JobAdapters:
    """Adapters that a job's rows may name, and the one of rows that name none, if there is one."""

    named: Adapters = field(default_factory=Adapters)
    default: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What must not change between the runs of a job; nothing without adapters."""
        if not len(self.named):
            return {}
        return {"adapters": self.named.digests(), "default_adapter": self.default}

    @classmethod
    def of(cls, named: Adapters, default: str | None) -> Self:
        """JobError for a default that there is not."""
        if default is not None and default not in named:
            raise JobError(f"--default-adapter {default}: there is no --adapter {default}=DIR")
        return cls(named, default)


class JobFiles:
    """A job's input and journal, open and checked before anything expensive starts.

    Raises JobError as open_input and Journal do: the input cannot be read, the output cannot be
    written, another job writes it or it belongs to another job.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        model_digest: str,
        defaults: SamplingParams,
        adapters: JobAdapters | None = None,
    ) -> None:
        self.adapters = adapters or JobAdapters()
        self.path, self.model_digest, self.defaults = source, model_digest, defaults
        self.source: Input = open_input(source)
        if output.exists() and output.samefile(source):
            raise JobError(f"--output {output} is the --input: choose another --output")
        parameters = asdict(defaults) | self.adapters.parameters
        identity = JobIdentity(model_digest, self.source.digest, parameters)
        self.journal = journal = Journal(output, identity)
        try:
            self.progress = Progress(
                progress_path(output),
                {"created": journal.created, **asdict(identity)},
                lambda number: journal.key_of(number) is not None,
            )
        except BaseException:
            journal.close()
            raise

    def close(self) -> None:
        """Unlock and close. Safe to call twice."""
        journal = self.journal
        done = journal.num_answered + journal.num_quarantined
        self.progress.close(complete=done == self.source.total)
        journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
