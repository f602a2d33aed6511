"""`headrace job`: `headrace generate` as a job of a Ray cluster."""

import asyncio
import json as json_module
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from headrace.cluster.cli.option_groups import takes_options
from headrace.scheduler.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.cluster.ray_jobs import RayJobs

app = typer.Typer(
    help="Run batch jobs on a Ray cluster.", no_args_is_help=True, pretty_exceptions_enable=False
)

JobId = Annotated[str, typer.Argument(help="As `submit` printed it.")]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Print what it writes; end as it does.")
]


@dataclass(frozen=True)
class Cluster:
    """The dashboard that is asked."""

    address: Annotated[
        str,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard."),
    ] = "http://127.0.0.1:8265"
    ca_file: Annotated[
        Path | None, typer.Option(help="Who signed the certificate of an https address, in PEM.")
    ] = None

    def jobs(self) -> "RayJobs":
        from headrace.cluster.ray_jobs import RayJobs

        return RayJobs(self.address, self.ca_file)


@app.command()
@takes_options
def submit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="-- STORE OPTIONS",
            help="As of `headrace generate`. All paths are those of the cluster.",
        ),
    ],
    cluster: Cluster,
    id: Annotated[
        str | None, typer.Option(help="Of the job. \\[default: one that Ray makes]")
    ] = None,
    grace: Annotated[
        int, typer.Option(min=1, help="Seconds for rows that run to finish, once cancelled.")
    ] = 60,
    follow: Follow = False,
) -> None:
    """Start `headrace generate` on the cluster's head, and print the job's id.

    Submit the same again to go on with a job that was cut: rows that are finished are not repeated.
    """
    given = _checked(arguments)
    jobs = cluster.jobs()
    job_id = jobs.submit(given, id, grace)
    typer.echo(job_id, err=follow)
    if follow:
        _follow(jobs, job_id)


@app.command()
@takes_options
def status(
    job_id: JobId,
    cluster: Cluster,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print what has become of a job."""
    told = _told(cluster.jobs().details(job_id))
    if json:
        typer.echo(json_module.dumps(told))
        return
    for name, value in told.items():
        if value is not None:
            typer.echo(f"{name.replace('_', ' ')}: {value}")


@app.command()
@takes_options
def logs(job_id: JobId, cluster: Cluster, follow: Follow = False) -> None:
    """Print what a job has written."""
    jobs = cluster.jobs()
    if follow:
        _follow(jobs, job_id)
    else:
        typer.echo(jobs.logs(job_id), nl=False)


@app.command()
@takes_options
def cancel(job_id: JobId, cluster: Cluster) -> None:
    """Stop a job: no further row is started, and those that run may finish. Returns when it has ended."""
    jobs = cluster.jobs()
    stopped = jobs.stop(job_id)
    details = jobs.wait(job_id)
    if not stopped:
        raise HeadraceError(f"{job_id} had ended already: {details.status.value}")
    typer.echo(
        f"{job_id} has ended: {details.status.value}. Submit the same again to go on with it"
    )


def _checked(arguments: list[str]) -> list[str]:
    """The arguments of `headrace generate`, on the cluster unless they name another; usage errors are click's."""
    from headrace.cluster.adapters import parse_adapters
    from headrace.cluster.cli.generate_command import generate_rows
    from headrace.cluster.cli.main import app as headrace

    root: Any = typer.main.get_command(headrace)
    given = root.commands["generate"].make_context("headrace generate", list(arguments)).params
    paths = [
        given.get(name)
        for name, kind in get_type_hints(generate_rows).items()
        if Path in (kind, *get_args(kind))
    ]
    paths += parse_adapters(given.get("adapter") or []).values()
    for value in paths:
        if value and not Path(value).is_absolute():
            raise HeadraceError(
                f"{value} must be an absolute path: the job does not run in this folder, nor, unless this"
                " is the cluster's head, on this machine"
            )
    on_cluster = [] if given["address"] else ["--address", "auto"]
    return [*arguments, *on_cluster]


def _follow(jobs: "RayJobs", job_id: str) -> None:
    """Print what the job writes, and exit as it does. Ctrl-C leaves it running."""
    from headrace.cluster.ray_jobs import exit_code

    async def print_all() -> None:
        async for text in jobs.follow(job_id):
            typer.echo(text, nl=False)

    try:
        asyncio.run(print_all())
        details = jobs.wait(job_id)
    except KeyboardInterrupt:
        typer.echo(
            f"\n{job_id} goes on: see `headrace job logs {job_id} --follow`, or stop it with"
            f" `headrace job cancel {job_id}`",
            err=True,
        )
        raise
    code = exit_code(details)
    if code == 127:
        typer.echo(
            "The cluster's head has no `headrace` on the PATH that Ray was started with.", err=True
        )
    if code:
        typer.echo(f"{job_id} has ended: {details.status.value}", err=True)
    raise typer.Exit(code)


def _told(details: Any) -> dict[str, Any]:
    """What there is to say of a job, by name."""
    return {
        "id": details.submission_id,
        "status": details.status.value,
        "exit_code": details.driver_exit_code,
        "started": _time(details.start_time),
        "ended": _time(details.end_time),
        "command": details.entrypoint.removeprefix("exec "),
        "message": details.message,
    }


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds // 1000, UTC).isoformat()
