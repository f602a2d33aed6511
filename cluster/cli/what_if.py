"""`headrace plan --what-if`: the plan, speed and price of a model on hardware that is only written down."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace.cluster.adapters import adapter_room
from headrace.cluster.bench.hollow import hollow_store
from headrace.cluster.bench.shapes import SHAPES, config_of
from headrace.cluster.cli.plan import describe, plan_json
from headrace.cluster.cli.terms import TERMS
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.run_plan import choices_of, resolve_dtype, shape_in
from headrace.cluster.whatif.hardware import Pool, read_pools
from headrace.cluster.whatif.inputs import plan_inputs
from headrace.cluster.whatif.outcome import MILLION, Outcome, outcomes
from headrace.runtime.manifest import MANIFEST
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.inputs import Workload
from headrace.scheduler.placement import Plan


def find_store(name: Path, fmt: str) -> Store:
    """The store at that path, or one of a shape of that name as it would be in a format."""
    if not (name / MANIFEST).exists() and str(name) in SHAPES:
        return hollow_store(config_of(str(name)), fmt)
    if not name.exists():
        raise HeadraceError(
            f"{name} is neither a store nor a model shape; shapes are {', '.join(SHAPES)}"
        )
    return Store.open(name)


def ask(store: Store, options: EngineOptions, nodes: Path, prices: Path | None) -> list[Outcome]:
    """What each pool of the file would do. HeadraceError for files and options that are wrong."""
    pools = read_pools(nodes, prices)
    shape = shape_in(store, resolve_dtype(options.dtype, "cuda", store), options.kv_format)
    shape = shape.with_adapters(*adapter_room(options))
    workload = Workload(context=options.context, min_sequences=options.min_sequences)

    def question(pool: Pool) -> Any:
        return pool, plan_inputs(
            pool,
            shape,
            workload,
            choices_of(options),
            device_memory=options.device_memory,
            host_memory=options.host_memory,
            kv_host_memory=options.kv_host_memory,
        )

    return outcomes([question(pool) for pool in pools])


def render(title: str, found: Sequence[Outcome], tokens: int) -> RenderableType:
    table = Table(title=Text(title), title_justify="left", show_lines=True)
    table.add_column("pool")
    for name in ("tokens/s", "bound", "h / 1M", "cost / 1M"):
        table.add_column(name, justify="right", no_wrap=True)
    if tokens != MILLION:
        table.add_column(f"{tokens:,}", justify="right", no_wrap=True)
    refused = []
    for outcome in found:
        if outcome.plan is None:
            table.add_row(outcome.pool.name, Text("does not fit", style="red"))
            refused.append(Text(f"{outcome.pool.name}: {outcome.refusal}"))
            continue
        prediction = outcome.plan.prediction
        row: list[str | Text] = [
            Text.assemble(outcome.pool.name, ("\n" + _layout(outcome.plan), "dim")),
            f"{prediction.expected_rate:,.1f}",
            f"{prediction.share:.0%}",
            f"{outcome.hours(MILLION):,.2f}",
            _cost(outcome, MILLION),
        ]
        if tokens != MILLION:
            row.append(f"{outcome.hours(tokens):,.1f} h\n{_cost(outcome, tokens)}")
        table.add_row(*row)
    return Group(table, *refused)


def _layout(plan: Plan) -> str:
    """What was chosen and what binds it."""
    placement = plan.placement
    layers = [len(placement.layers_of(stage)) for stage in range(placement.num_stages)]
    shared = f", layers {'/'.join(map(str, layers))}" if max(layers) - min(layers) > 1 else ""
    text = f"{describe(plan)}{shared}; {plan.prediction.sequences} sequences"
    return f"{text}; bound by {TERMS[plan.prediction.bound_by]}"


def _cost(outcome: Outcome, tokens: int) -> str:
    return f"{outcome.cost(tokens):,.2f}" if outcome.price_per_hour else "-"


def what_if_json(found: Sequence[Outcome], tokens: int) -> list[dict[str, Any]]:
    return [_one(outcome, tokens) for outcome in found]


def _one(outcome: Outcome, tokens: int) -> dict[str, Any]:
    about = {"pool": outcome.pool.name, "price_per_hour": outcome.price_per_hour}
    if outcome.plan is None:
        return {**about, "fits": False, "refusal": outcome.refusal}
    prediction, plan = outcome.plan.prediction, outcome.plan
    stages = range(plan.placement.num_stages)
    return {
        **about,
        "fits": True,
        "tokens_per_second": prediction.expected_rate,
        "share_of_bound": prediction.share,
        "bound_by": prediction.bound_by,
        "layers_of_stages": [len(plan.placement.layers_of(stage)) for stage in stages],
        "hours_per_million": outcome.hours(MILLION),
        "cost_per_million": outcome.cost(MILLION),
        "job": {
            "tokens": tokens,
            "hours": outcome.hours(tokens),
            "cost": outcome.cost(tokens),
        },
        "plan": plan_json(plan),
    }
