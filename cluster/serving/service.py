"""An engine and what stands before it, for whoever listens: the command's server, or Ray Serve's replicas."""

from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.cluster.serving.adapters import check_not_model
from headrace.cluster.serving.app import Front, create_app
from headrace.cluster.serving.async_engine import AsyncEngine
from headrace.cluster.serving.batches.file_store import FileStore
from headrace.cluster.serving.batches.lane import BatchLane
from headrace.cluster.serving.batches.manager import Batches
from headrace.cluster.serving.batches.routes import FileRoutes, NoFiles
from headrace.cluster.serving.guard import Gate, Rules
from headrace.cluster.serving.metrics import Metrics
from headrace.cluster.serving.rates import Rates
from headrace.cluster.serving.reader import Model, Reader
from headrace.cluster.serving.reading_room import ReadingRoom
from headrace.cluster.serving.served_engine import ServedEngine
from headrace.cluster.serving.shadow.messages import Setup
from headrace.cluster.serving.shadow.shadow import Shadow
from headrace.cluster.serving.shadow.ties import tie_of
from headrace.scheduler.batch_window import BatchWindow

if TYPE_CHECKING:
    from headrace.cluster.serving.server import ServerOptions

_BODIES = 32
"""How many of the largest bodies there is room for, from when they come in until they are tokens."""


class Service:
    """One engine as clients see it, wherever they come in: `app` for HTTP, and what gRPC shares with it."""

    def __init__(
        self,
        engine: ServedEngine,
        options: "ServerOptions",
        rules: Rules,
        store: FileStore | None = None,
        shadow: Setup | None = None,
    ) -> None:
        """HeadraceError where an adapter is called like the model."""
        check_not_model(engine.adapters, options.model_name)
        rates = Rates(rules.keys or ())
        self.metrics = Metrics(engine.events)
        self.gate = Gate(rules, rates, self.metrics)
        self.model = Model(
            options.model_name, engine.tokenizer, engine.model_digest, engine.max_context
        )
        self.shadow: Shadow | None = None
        if shadow is not None and options.shadow is not None:
            setup = replace(shadow, tie=tie_of(shadow, engine.plan.kv_format))
            self.shadow = Shadow(options.shadow, setup, lambda: self.engine.num_open > 0)
            self.metrics.watch_shadow(self.shadow)
        self.engine = AsyncEngine(
            engine,
            self.metrics,
            options.max_waiting,
            max_ttft=options.max_ttft,
            window=BatchWindow(options.batch_window),
            rates=rates,
            on_end=None if self.shadow is None else self.shadow.offer,
        )
        self.metrics.watch(lambda: self.engine.state)
        self.reader = Reader(self.model, engine, options.max_waiting)
        self.room = ReadingRoom(_BODIES * options.max_body)
        front = Front(
            self.engine,
            self.reader,
            self.room,
            self.model,
            self.metrics,
            max_body=options.max_body,
            shadow=self.shadow,
        )
        files: FileRoutes | NoFiles = NoFiles()
        self.batches: Batches | None = None
        if store is not None:
            weights = {key.name: key.weight for key in rules.keys or ()}
            lane = BatchLane(self.engine, self.model, engine.max_sequences, weights)
            self.batches = Batches(store, lane, self.reader, self.model, options.max_body)
            files = FileRoutes(store, self.batches, options.max_body)
        self.app = create_app(front, files, self.gate, self.metrics)
