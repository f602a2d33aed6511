"""What clients get: latency, queue, refusals, KV pages, adapters, and how good answers are."""

from headrace.cluster.telemetry import table
from headrace.cluster.telemetry.panels import Dashboard, Panel, Query, Row
from headrace.cluster.telemetry.queries import (
    COUNT,
    PER_SECOND,
    SECONDS,
    SHARE,
    TIME,
    now,
    over,
    quantile,
    quantiles,
    rate,
    stat,
)
from headrace.cluster.telemetry.table import MetricSpec

_TURNED_AWAY = rate(table.TURNED_AWAY, "ring, code")
_FOUND, _MISSED = rate(table.KV_HITS), rate(table.KV_MISSES)


def _of_server(spec: MetricSpec, by: str) -> str:
    return f"sum by ({by}) (rate({spec.exposed[-1]}[$window]))"


def _forecast(share: float) -> str:
    name = f"{table.FORECAST_RATIO.exposed[0]}_bucket"
    return f"histogram_quantile({share}, sum by (le) (rate({name}[$window])))"


SERVED = Row(
    "Headline",
    (
        stat("First token, p95", SECONDS, quantile(table.FIRST_TOKEN, 0.95, "ring")),
        stat("Between tokens, p95", SECONDS, quantile(table.INTER_TOKEN, 0.95, "ring")),
        stat("Tokens generated", "tokens/s", rate(table.OUTPUT_TOKENS)),
        stat("Running", COUNT, now(table.RUNNING)),
        stat("Waiting", COUNT, now(table.WAITING)),
        stat("Turned away", PER_SECOND, rate(table.TURNED_AWAY), red_above=0.1),
    ),
)

LATENCY = Row(
    "Latency",
    (
        Panel("First token", SECONDS, quantiles(table.FIRST_TOKEN), table.FIRST_TOKEN.help),
        Panel("Between tokens", SECONDS, quantiles(table.INTER_TOKEN), table.INTER_TOKEN.help),
        Panel("From admission to the end", SECONDS, quantiles(table.END_TO_END)),
        Panel(
            "First token over its forecast", COUNT,
            tuple(Query(_forecast(q), f"p{100 * q:.0f}") for q in (0.5, 0.95)),
            "Of requests with a time: above 1, they came later than was promised. From `headrace serve`.",
        ),
        Panel(
            "What recent passes took", SECONDS,
            (Query(table.RECENT_PASS_SECONDS.exposed[0], "{{instance}}"),), "From `headrace serve`.",
        ),
        Panel(
            "Tokens", "tokens/s",
            (
                Query(rate(table.OUTPUT_TOKENS), "{{ring}} generated"),
                Query(rate(table.PROMPT_TOKENS), "{{ring}} of prompts"),
            ),
        ),
    ),
)  # fmt: skip

QUEUE = Row(
    "Queue and refusals",
    (
        Panel(
            "Sequences", COUNT,
            (
                Query(now(table.RUNNING), "{{ring}} running"),
                Query(now(table.WAITING), "{{ring}} waiting"),
                Query(now(table.MAX_RUNNING), "{{ring}} room in passes"),
            ),
            "Some wait though passes have room: KV pages are short.",
        ),
        Panel(
            "Taken in and ended", PER_SECOND,
            (
                Query(rate(table.ADMITTED, "ring, priority"), "{{ring}} taken in, {{priority}}"),
                Query(rate(table.ENDED, "ring, reason"), "{{ring}} ended, {{reason}}"),
            ),
        ),
        Panel(
            "Turned away", PER_SECOND, (Query(_TURNED_AWAY, "{{ring}} {{code}}"),),
            "queue_full: more wait than --max-waiting. deadline_*: a time could not be kept."
            " rate_limit_exceeded: a key's own limit.",
        ),
        Panel(
            "Requests by status", PER_SECOND,
            (Query(_of_server(table.REQUESTS, "status"), "{{status}}"),), "From `headrace serve`.",
        ),
        Panel(
            "Requests by path", PER_SECOND,
            (Query(_of_server(table.REQUESTS, "path"), "{{path}}"),), "From `headrace serve`.",
        ),
        Panel(
            "Passes held for others to join", PER_SECOND,
            (
                Query(_of_server(table.WINDOWS, "instance"), "{{instance}} held"),
                Query(_of_server(table.JOINED, "instance"), "{{instance}} joined"),
            ),
            "Many held and few joined: a smaller --batch-window. From `headrace serve`.",
        ),
    ),
)  # fmt: skip

_PAGES = "{{ring}} {{state}}"
KV = Row(
    "KV pages",
    (
        Panel(
            "On the devices", COUNT,
            (Query(now(table.KV_PAGES, "ring, state", 'tier="device"'), _PAGES),),
            "Pages of 64 tokens. Nothing free or cached: sequences wait, or give way.",
            stacked=True,
        ),
        Panel(
            "In host RAM", COUNT,
            (Query(now(table.KV_PAGES, "ring, state", 'tier="host"'), _PAGES),), stacked=True,
        ),
        Panel(
            "On NVMe", COUNT,
            (Query(now(table.KV_PAGES, "ring, state", 'tier="nvme"'), _PAGES),), stacked=True,
        ),
        Panel(
            "Found instead of computed", SHARE,
            (
                Query(
                    f"{rate(table.KV_HITS, 'ring, tier')} / on (ring) group_left ()"
                    f" ({_FOUND} + {_MISSED})",
                    "{{ring}} {{tier}}",
                ),
            ),
            "Of the full pages that were looked for.", stacked=True, most=1.0,
        ),
        Panel(
            "Moves between tiers", PER_SECOND,
            (Query(rate(table.KV_MOVES, "ring, move, result"), "{{ring}} {{move}} {{result}}"),),
            "lost: the page could not be written or read, and is computed again.",
        ),
        Panel(
            "For want of room", PER_SECOND,
            (
                Query(rate(table.KV_PREEMPTIONS, "ring, by"), "{{ring}} gave way, by {{by}}"),
                Query(rate(table.KV_EVICTIONS, "ring, tier"), "{{ring}} evicted from {{tier}}"),
                Query(rate(table.KV_SPOILED), "{{ring}} began again"),
            ),
            "Much of recompute: more --kv-host-memory, or fewer sequences.",
        ),
    ),
)  # fmt: skip

ADAPTERS = Row(
    "Adapters",
    (
        Panel(
            "Tokens by adapter", "tokens/s",
            (Query(rate(table.ADAPTER_TOKENS, "ring, adapter, kind"), "{{ring}} {{adapter}} {{kind}}"),),
            "Those without one are the rest of all tokens.",
        ),
        Panel(
            "Sequences by adapter", PER_SECOND,
            (Query(rate(table.ADAPTER_SEQUENCES, "ring, adapter"), "{{ring}} {{adapter}}"),),
        ),
        Panel(
            "Slots", COUNT, (Query(now(table.ADAPTER_SLOTS, "ring, state"), "{{ring}} {{state}}"),),
            table.ADAPTER_SLOTS.help, stacked=True,
        ),
        Panel(
            "Adapters that wait for a slot", COUNT,
            (
                Query(now(table.ADAPTERS_WAITING), "{{ring}} now"),
                Query(rate(table.ADAPTER_WAIT_SECONDS), "{{ring}} on average"),
            ),
            "Above 0 for long: more --adapter-slots.",
        ),
        Panel(
            "Adapters found on the device", SHARE,
            (
                Query(
                    over(
                        rate(table.ADAPTER_HITS),
                        f"({rate(table.ADAPTER_HITS)} + {rate(table.ADAPTER_MISSES)})",
                    ),
                    "{{ring}}",
                ),
            ),
            "Of the sequences that began with one; the others waited for a load.", most=1.0,
        ),
        Panel(
            "Loads and evictions", PER_SECOND,
            (
                Query(rate(table.ADAPTER_LOADS, "ring, result"), "{{ring}} {{result}}"),
                Query(rate(table.ADAPTER_EVICTIONS), "{{ring}} evicted"),
            ),
            "Their bytes are among those from host RAM in the dashboard of the ring.",
        ),
    ),
)  # fmt: skip


def _of_last(spec: MetricSpec, label: str) -> Query:
    return Query(spec.exposed[0], f"{{{{instance}}}} {{{{{label}}}}}" if label else "{{instance}}")


def _in_an_hour(spec: MetricSpec, by: str) -> str:
    return f"sum by ({by}) (increase({spec.exposed[0]}[1h]))"


SHADOW = Row(
    "Shadow (headrace serve --shadow)",
    (
        Panel(
            "Divergence from the reference", "nats",
            (
                Query(
                    over(
                        _in_an_hour(table.SHADOW_KLD_NATS, "instance"),
                        _in_an_hour(table.SHADOW_TOKENS, "instance"),
                    ),
                    "{{instance}} mean, 1 h",
                ),
                _of_last(table.SHADOW_KLD, "figure"),
                Query(table.SHADOW_MAX_KLD.exposed[0], "{{instance}} --shadow-max-kld"),
            ),
            table.SHADOW_KLD.help,
        ),
        Panel(
            "Agreement", SHARE, (_of_last(table.SHADOW_AGREEMENT, "source"),),
            "own: below 1, the ring computes other tokens than its store says.", most=1.0,
        ),
        Panel(
            "Perplexity over the reference's", COUNT,
            (_of_last(table.SHADOW_PERPLEXITY_RATIO, ""),), table.SHADOW_PERPLEXITY_RATIO.help,
        ),
        Panel(
            "Greedy tokens that strayed, in an hour", COUNT,
            (
                Query(_in_an_hour(table.SHADOW_STRAYED_TOKENS, "instance, source"), "{{instance}} {{source}}"),
                Query(_in_an_hour(table.SHADOW_GREEDY_TOKENS, "instance"), "{{instance}} of"),
            ),
            table.SHADOW_STRAYED_TOKENS.help,
        ),
        Panel(
            "Samples in an hour", COUNT,
            (
                Query(_in_an_hour(table.SHADOW_SEQUENCES, "instance"), "{{instance}} compared"),
                Query(_in_an_hour(table.SHADOW_DROPPED, "instance, reason"), "{{instance}} dropped, {{reason}}"),
                Query(_in_an_hour(table.SHADOW_RESTARTS, "instance"), "{{instance}} restarts"),
            ),
            table.SHADOW_DROPPED.help,
        ),
        Panel(
            "Tokens that wait", COUNT, (_of_last(table.SHADOW_WAITING_TOKENS, ""),),
            table.SHADOW_WAITING_TOKENS.help,
        ),
    ),
)  # fmt: skip

SERVING = Dashboard(
    "headrace-serving",
    "Headrace: serving",
    "Latency, queue, refusals, KV pages, adapters, and how far answers are from a reference.",
    TIME,
    (SERVED, LATENCY, QUEUE, KV, ADAPTERS, SHADOW),
)
