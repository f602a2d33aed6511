"""A model as a Ray Serve application: each replica drives a ring of its own, behind the server's routes."""

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.types import ASGIApp

from headrace.cluster.actor_engine import actor_engine, actor_options
from headrace.cluster.cli.sizes import parse_size
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.serving.keys import load_keys
from headrace.cluster.serving.server import ServerOptions
from headrace.cluster.serving.service import Service
from headrace.scheduler.batch_window import LONGEST

ONGOING = 1 << 16
"""Requests that Ray Serve lets into a replica: more than admission leaves there. Those beyond would wait with
Ray Serve, out of sight, where admission tells them at once to come back."""

HEALTH_SECONDS = 2.0
"""How often a replica is asked whether its engine works. Ray Serve replaces it after three times."""

CLOSE_SECONDS = 20.0
"""For a ring to end in, once the replica's requests have."""


class AppArgs(BaseModel):
    """What an application is built of. Names that are not here are keywords of `headrace.LLM`: `stages`,
    `device`, `device_memory`, `context`, ... The others are options of `headrace serve`.

    `store` and `api_keys` are at these paths on every node. `num_replicas` rings share nothing.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    store: Path
    num_replicas: Annotated[int, Field(ge=1)] = 1
    model_name: str | None = None
    api_keys: Path | None = None
    insecure: bool = False
    max_waiting: Annotated[int, Field(ge=1)] = 256
    max_ttft: Annotated[float, Field(gt=0)] | None = None
    batch_window: Annotated[float, Field(ge=0, le=LONGEST)] | None = None
    max_body: str = "4MiB"
    grace: Annotated[float, Field(ge=0)] = 30.0

    @property
    def engine(self) -> EngineOptions:
        """HeadraceError for what no engine knows."""
        return actor_options(self.store, self.model_extra or {})

    @property
    def server(self) -> ServerOptions:
        return ServerOptions(
            model_name=self.store.name if self.model_name is None else self.model_name,
            api_keys=self.api_keys,
            insecure=self.insecure,
            max_waiting=self.max_waiting,
            max_ttft=self.max_ttft,
            batch_window=self.batch_window,
            max_body=parse_size(self.max_body),
            grace=self.grace,
        )


@serve.ingress()
class Ring:
    """A replica: an engine, whose stages are in a placement group of their own, and its routes."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, engine: EngineOptions, server: ServerOptions
    ) -> None:
        keys = None if server.api_keys is None else load_keys(server.api_keys)
        with ExitStack() as stack:
            running = await asyncio.to_thread(stack.enter_context, actor_engine(engine))
            self._service = Service(running, server, server.rules(keys))
            self._stack = stack.pop_all()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve once, on the event loop of requests."""
        self._service.engine.start()
        return self._service.app

    def check_health(self) -> None:
        """Raises what the engine failed with, from which it does not recover."""
        if self._service.engine.error is not None:
            raise self._service.engine.error

    async def __del__(self) -> None:
        """Called by Ray Serve, once, when requests have ended or their grace has."""
        self._service.engine.give_up()
        await self._service.engine.close()
        self._service.room.close()
        await asyncio.to_thread(self._stack.close)


def build_app(args: AppArgs | Mapping[str, Any]) -> serve.Application:
    """The application, for `serve.run(build_app({"store": ..., "stages": 2}))`; or for `serve run` and `import_path`
    in YAML as `headrace.cluster.serving.ray_serve:build_app`.

    HeadraceError, or pydantic's ValidationError, for arguments that mean nothing.
    """
    args = AppArgs.model_validate(args)
    deployment = serve.deployment(
        Ring,
        num_replicas=args.num_replicas,
        max_ongoing_requests=ONGOING,
        graceful_shutdown_timeout_s=args.grace + CLOSE_SECONDS,
        health_check_period_s=HEALTH_SECONDS,
        # As the driver of any engine it is not counted: stages have the processors.
        ray_actor_options={"num_cpus": 0},
    )
    return deployment.bind(args.engine, args.server)
