"""Jobs of a Ray cluster by its dashboard: `headrace generate` there, started, followed and stopped from here.

Ray's own client does the work, and finds the cluster's token as all of Ray does: in RAY_AUTH_TOKEN, in the
file RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token.
"""

import logging
import os
import shlex
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from headrace.scheduler.errors import HeadraceError

POLL_SECONDS = 0.5
REACH_SECONDS = 10.0


class RayJobs:
    """The jobs of the cluster whose dashboard is at `address`, such as "http://head:8265".

    HeadraceError when it is not there, wants a token, or has no such job.
    """

    def __init__(self, address: str, ca_file: Path | None = None) -> None:
        """`ca_file`, in PEM, signed the certificate of an https `address`."""
        _knock(address)
        _use_token()
        # After the environment is as it should be, which Ray reads when it is imported.
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of sockets that close

        self._address = address
        with self._explaining():
            verify = True if ca_file is None else str(ca_file)
            self._client = JobSubmissionClient(address, verify=verify)

    def submit(self, arguments: Sequence[str], job_id: str | None, grace: int) -> str:
        """Start `headrace generate ARGUMENTS` and return the job's id.

        Once it is told to stop, rows that run may finish for `grace` seconds.
        """
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(grace)}
        with self._explaining(job_id):
            # exec: a shell would be told to stop, too, and be gone before the command is.
            return str(
                self._client.submit_job(
                    entrypoint=f"exec {shlex.join(['headrace', 'generate', *arguments])}",
                    submission_id=job_id,
                    runtime_env={"env_vars": environment},
                )
            )

    def details(self, job_id: str) -> Any:
        """Ray's JobDetails."""
        with self._explaining(job_id):
            return self._client.get_job_info(job_id)

    def logs(self, job_id: str) -> str:
        with self._explaining(job_id):
            return str(self._client.get_job_logs(job_id))

    async def follow(self, job_id: str) -> AsyncIterator[str]:
        """What the job writes, from its beginning until it ends."""
        import aiohttp

        try:
            async for text in self._client.tail_job_logs(job_id):
                yield text
        except (RuntimeError, aiohttp.ClientError) as error:
            raise HeadraceError(
                f"{self._address} does not send the logs of {job_id} any more: {error}. The job goes on"
            ) from error

    def stop(self, job_id: str) -> bool:
        """Tell a job to stop. False if it has ended already."""
        with self._explaining(job_id):
            return bool(self._client.stop_job(job_id))

    def wait(self, job_id: str) -> Any:
        """The JobDetails of a job that has ended, when it has."""
        while not (details := self.details(job_id)).status.is_terminal():
            time.sleep(POLL_SECONDS)
        return details

    @contextmanager
    def _explaining(self, job_id: str | None = None) -> Iterator[None]:
        """Errors of Ray's client as ours."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise HeadraceError(
                f"{self._address} did not accept the token of its cluster, or was given none:"
                " put it into a file of mode 0600 and the file's name into RAY_AUTH_TOKEN_PATH"
                " (on the head, `ray get-auth-token` prints it)"
            ) from error
        except (RuntimeError, requests.RequestException, ConnectionError, ValueError) as error:
            raise HeadraceError(self._reason(error, job_id)) from error

    def _reason(self, error: Exception, job_id: str | None) -> str:
        text = str(error)
        if job_id is not None and "does not exist" in text:
            return f"{self._address} has no job {job_id}"
        if job_id is not None and "already exists" in text:
            return (
                f"{self._address} has a job {job_id} already: leave --id out, or choose another. To go on"
                " with a job that was cut, submit it under a new one"
            )
        return (
            f"{self._address} does not answer as a Ray dashboard does: {_first_line(text)}. Give the"
            " --address of the dashboard, which has port 8265 by default, and start Ray's head with"
            " --include-dashboard=true"
        )


def exit_code(details: Any) -> int:
    """What a shell would say of a job that has ended: 130 if it was stopped."""
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return 130
    code = details.driver_exit_code
    if not code:
        return 1  # it did not even start
    return 128 - int(code) if code < 0 else int(code)


def _use_token() -> None:
    """Send the cluster's token, if there is one here, as `ray start` takes it."""
    default = Path.home() / ".ray" / "auth_token"
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or default.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _knock(address: str) -> None:
    """HeadraceError when nothing listens at the URL, for which Ray's client would wait for minutes."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise HeadraceError(
            f"--address {address} is no URL of a Ray dashboard: one is http://head:8265"
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=REACH_SECONDS).close()
    except (OSError, ValueError) as error:
        raise HeadraceError(
            f"cannot reach --address {address}: {error}. Is the cluster up (ray status on its head), and"
            " is this its dashboard (port 8265 by default, of 127.0.0.1 unless --dashboard-host says"
            " otherwise)?"
        ) from error


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0][:300].rstrip(".")
