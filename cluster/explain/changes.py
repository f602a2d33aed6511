"""What could be changed of a run, each as the inputs of another plan."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from headrace.cluster.explain.load import Load
from headrace.scheduler.inputs import DEFAULT_CONTEXT, DeviceProfile, ModelShape
from headrace.scheduler.links import Hop, Links
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan_inputs import PlanInputs
from headrace.scheduler.sizes import format_size

ROUND = 1 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """`what` would be done, and what it would be planned from; sequences would have `length` times as many
    tokens."""

    what: str
    inputs: PlanInputs
    length: float = 1.0


def changes(
    inputs: PlanInputs, plan: Plan, alternatives: Mapping[str, ModelShape], load: Load
) -> Iterator[Change]:
    """Those that can matter to a plan; what they bring is not known yet."""
    yield from _memory(inputs, plan)
    yield from _drives(inputs, plan)
    for fmt, shape in alternatives.items():
        if fmt != inputs.shape.kv_format:
            yield Change(f"--kv-format {fmt}", replace(inputs, shape=shape))
    yield from _speeds(inputs)
    yield from _stages(inputs)
    yield from _work(inputs, plan, load)


def _memory(inputs: PlanInputs, plan: Plan) -> Iterator[Change]:
    from_nvme = max(plan.nvme_bytes_a_pass)
    if plan.prediction.experts is not None:
        from_nvme += round(plan.prediction.experts.nvme_bytes / plan.placement.num_stages)
    each = " a stage" if len(inputs.budgets) > 1 else ""
    for parts in (1, 2, 4):
        size = -(-from_nvme // parts // ROUND) * ROUND
        if size:
            budgets = tuple(replace(b, host_memory=b.host_memory + size) for b in inputs.budgets)
            what = f"+{format_size(size, up=True)} host memory{each} (--host-memory)"
            yield Change(what, replace(inputs, budgets=budgets))
    streamed = max(
        a + b for a, b in zip(plan.nvme_bytes_a_pass, plan.host_bytes_a_pass, strict=True)
    )
    most = max(b.device_memory for b in inputs.budgets)
    for size in sorted({most, min(most, -(-streamed // ROUND) * ROUND) or most}):
        budgets = tuple(replace(b, device_memory=b.device_memory + size) for b in inputs.budgets)
        what = f"+{format_size(size, up=True)} device memory{each} (--device-memory)"
        yield Change(what, replace(inputs, budgets=budgets))


def _drives(inputs: PlanInputs, plan: Plan) -> Iterator[Change]:
    """Of each node that streams from its drive, and of all of them."""
    streaming = [
        node
        for node in dict.fromkeys(inputs.nodes)
        if any(
            nbytes
            for own, nbytes in zip(inputs.nodes, plan.nvme_bytes_a_pass, strict=True)
            if own == node
        )
    ]

    def twice(nodes: list[str]) -> PlanInputs:
        profiles = tuple(
            replace(p, nvme_gbps=2 * p.nvme_gbps) if node in nodes else p
            for node, p in zip(inputs.nodes, inputs.profiles, strict=True)
        )
        return replace(inputs, profiles=profiles)

    if len(streaming) > 1:
        for node in streaming:
            stages = [str(i) for i, own in enumerate(inputs.nodes) if own == node]
            who = f"stage {stages[0]}" if len(stages) == 1 else f"stages {', '.join(stages)}"
            yield Change(f"a second drive as fast on the node of {who}", twice([node]))
    if streaming or plan.prediction.experts is not None:
        where = " on every node" if len(set(inputs.nodes)) > 1 else ""
        yield Change(f"a second drive as fast{where}", twice(list(inputs.nodes)))


def _speeds(inputs: PlanInputs) -> Iterator[Change]:
    def each(change: Callable[[DeviceProfile], DeviceProfile]) -> PlanInputs:
        return replace(inputs, profiles=tuple(map(change, inputs.profiles)))

    cuda = inputs.profiles[0].kind == "cuda"
    link = "a link from host memory twice as fast (PCIe)" if cuda else "copies twice as fast"
    yield Change(link, each(lambda p: replace(p, host_gbps=2 * p.host_gbps)))
    yield Change(
        "processors that compute twice as fast", each(lambda p: replace(p, tflops=2 * p.tflops))
    )
    yield Change("device memory twice as fast", each(lambda p: replace(p, hbm_gbps=2 * p.hbm_gbps)))
    if len(inputs.profiles) > 1:
        halved = tuple(
            tuple(Hop(hop.seconds / 2, hop.gbps * 2) for hop in row) for row in inputs.links.hops
        )
        yield Change("links between stages twice as fast", replace(inputs, links=Links(halved)))


def _stages(inputs: PlanInputs) -> Iterator[Change]:
    """One more on a node of its own, like the last."""
    if len(inputs.profiles) >= inputs.shape.num_layers:
        return
    last = inputs.profiles[-1]
    hops = inputs.links.hops
    own = Hop(last.hop_seconds, last.link_gbps)
    away = own if len(hops) == 1 else hops[-1][0]
    rows = tuple((*row, away if i < len(hops) - 1 else own) for i, row in enumerate(hops))
    more = replace(
        inputs,
        profiles=(*inputs.profiles, last),
        budgets=(*inputs.budgets, inputs.budgets[-1]),
        links=Links((*rows, (*(row[-1] for row in rows), own))),
        nodes=(*inputs.nodes, "one more"),
        choices=replace(inputs.choices, stage_layers=None),
    )
    yield Change("one more stage like the last, on a node of its own", more)


def _work(inputs: PlanInputs, plan: Plan, load: Load) -> Iterator[Change]:
    choices = inputs.choices
    together = min(load.room(plan, by_number=False), load.requests)
    a_pass = -(-together // plan.passes_in_flight)
    if load.waited and a_pass > plan.max_sequences:  # the plan has pages for fewer, but longer ones
        more = replace(choices, max_sequences=a_pass)
        yield Change(
            f"more sequences at once (--max-sequences {a_pass})", replace(inputs, choices=more)
        )
    if choices.max_sequences is not None:
        free = replace(choices, max_sequences=None, token_budget=None)
        yield Change("no --max-sequences", replace(inputs, choices=free))
    elif choices.token_budget is not None:
        free = replace(choices, token_budget=None)
        yield Change("no --token-budget", replace(inputs, choices=free))
    if choices.placement != "auto":
        free = replace(choices, placement="auto")
        yield Change(f"no --placement {choices.placement}", replace(inputs, choices=free))
    if choices.resident_layers is not None:
        free = replace(choices, resident_layers=None)
        yield Change(
            f"no --resident-layers {choices.resident_layers}", replace(inputs, choices=free)
        )
    half = min(inputs.workload.context or DEFAULT_CONTEXT, inputs.shape.max_context) // 2
    if half > 64:
        shorter = replace(inputs, workload=replace(inputs.workload, context=half))
        if load.longest <= half:
            yield Change(f"--context {half}, which no sequence exceeded", shorter)
        else:
            yield Change(f"sequences half as long (--context {half})", shorter, 0.5)
