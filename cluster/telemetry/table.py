"""Every metric of ours: name, kind, unit, help, labels. Stages, engines and servers take them from here, and
dashboards, rules and docs may name no others.

Ray puts `ray_` before the names and its own labels beside ours (SessionName, NodeAddress, WorkerId and more); to a
counter's name both Ray and the server's /metrics add `_total`.
"""

from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(str, Enum):
    """Who emits a metric: a stage's process, the driver of an engine, or a server at its /metrics."""

    STAGE = "stage"
    ENGINE = "engine"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. `labels` are ours, without those of `base_labels`; a histogram's `buckets` are upper ends.

    `also_server` says that a server's /metrics has it, too, under this name and without base labels.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    source: Source
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    also_server: bool = False

    @property
    def base_labels(self) -> tuple[str, ...]:
        """`ring` tells the engines of a cluster apart."""
        return {
            Source.STAGE: ("ring", "stage"),
            Source.ENGINE: ("ring",),
            Source.SERVER: (),
        }[self.source]

    @property
    def exposed(self) -> tuple[str, ...]:
        """Its names in Prometheus, without the suffixes of a histogram's series."""
        suffix = "_total" if self.kind is Kind.COUNTER else ""
        from_server = self.also_server or self.source is Source.SERVER
        ray = () if self.source is Source.SERVER else (f"ray_{self.name}{suffix}",)
        return ray + ((f"{self.name}{suffix}",) if from_server else ())


# A pass of a streamed model takes from milliseconds to a minute.
_PASS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_FIRST_TOKEN = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_NEXT_TOKEN = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_WHOLE = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
_RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 4.0, 10.0)

_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_STAGE, _ENGINE, _SERVER = Source.STAGE, Source.ENGINE, Source.SERVER

# Stages.
STAGE_SECONDS = MetricSpec(
    "headrace_stage_seconds", _COUNTER, "seconds",
    "Where a stage's time went while its ring had passes under way, by part: compute, or waiting for"
    " weights, for KV pages (kv), for other stages' hidden states (link), or for a pass (idle).",
    _STAGE, ("part",),
)  # fmt: skip
STAGE_PASS_SECONDS = MetricSpec(
    "headrace_stage_pass_seconds", _HISTOGRAM, "seconds",
    "A stage's part of a pass, with its waits; of 100 passes a second at most.",
    _STAGE, buckets=_PASS,
)  # fmt: skip
TIER_BYTES = MetricSpec(
    "headrace_tier_bytes", _COUNTER, "bytes",
    "What a stage moved between its device and a tier (nvme, host) for passes, by content (weights,"
    " kv, adapters) and direction (in: to the device). KV pages that go from host RAM to NVMe are not in it.",
    _STAGE, ("tier", "content", "direction"),
)  # fmt: skip
EXPERTS = MetricSpec(
    "headrace_experts", _COUNTER, "experts",
    "Experts that tokens reached, each once a layer and micro-batch, by where they were: on the"
    " device, or loaded.",
    _STAGE, ("found",),
)  # fmt: skip
KV_DRIVE_WRITTEN = MetricSpec(
    "headrace_kv_drive_written_bytes", _COUNTER, "bytes",
    "What a stage wrote to its drive for KV pages, headers and padding included.",
    _STAGE,
)  # fmt: skip
KV_DRIVE_BUDGET = MetricSpec(
    "headrace_kv_drive_budget_bytes", _GAUGE, "bytes",
    "What a stage may still write of --kv-daily-writes, in the running 24 hours.",
    _STAGE,
)  # fmt: skip
KV_DRIVE_WEAR = MetricSpec(
    "headrace_kv_drive_wear_ratio", _GAUGE, "1",
    "How much of its life the drive of a stage's KV pages has used, by the drive's own estimate; only"
    " where smartctl or nvme-cli may ask it.",
    _STAGE,
)  # fmt: skip
STAGE_PID = MetricSpec(
    "headrace_stage_pid", _GAUGE, "1", "The process id of a stage, on its node.", _STAGE
)

# Engines.
BUSY_SECONDS = MetricSpec(
    "headrace_busy_seconds", _COUNTER, "seconds",
    "How long the ring had passes under way.", _ENGINE,
)  # fmt: skip
BOUND_SECONDS = MetricSpec(
    "headrace_bound_seconds", _COUNTER, "seconds",
    "What the binding resource needed at least for the passes that were made: over the busy seconds it"
    " is the share of the bound.", _ENGINE,
)  # fmt: skip
PASSES = MetricSpec(
    "headrace_passes", _COUNTER, "passes", "Passes that computed something.", _ENGINE
)
PLANNED_PASS_SECONDS = MetricSpec(
    "headrace_planned_pass_seconds", _GAUGE, "seconds",
    "What each resource needs for a full pass by the plan, by term; the largest one binds.",
    _ENGINE, ("term",),
)  # fmt: skip
COMPUTED_TOKENS = MetricSpec(
    "headrace_computed_tokens", _COUNTER, "tokens",
    "Tokens that passes computed: of prompts, decoded, and guessed.", _ENGINE,
)  # fmt: skip
PROMPT_TOKENS = MetricSpec(
    "headrace_prompt_tokens", _COUNTER, "tokens", "Tokens of prompts taken in.", _ENGINE,
    also_server=True,
)  # fmt: skip
OUTPUT_TOKENS = MetricSpec(
    "headrace_output_tokens", _COUNTER, "tokens", "Tokens generated.", _ENGINE, also_server=True
)
DECODES = MetricSpec(
    "headrace_decodes", _COUNTER, "decodes", "Times that a pass drew for a sequence.", _ENGINE,
    also_server=True,
)  # fmt: skip
DRAFT_TOKENS = MetricSpec(
    "headrace_draft_tokens", _COUNTER, "tokens", "Guessed tokens that passes verified.", _ENGINE,
    also_server=True,
)  # fmt: skip
ACCEPTED_DRAFT_TOKENS = MetricSpec(
    "headrace_accepted_draft_tokens", _COUNTER, "tokens", "Guessed tokens that were right.", _ENGINE,
    also_server=True,
)  # fmt: skip
RUNNING = MetricSpec(
    "headrace_running_sequences", _GAUGE, "sequences", "Sequences that have pages.", _ENGINE,
    also_server=True,
)  # fmt: skip
WAITING = MetricSpec(
    "headrace_waiting_sequences", _GAUGE, "sequences", "Sequences that wait for pages.", _ENGINE,
    also_server=True,
)  # fmt: skip
MAX_RUNNING = MetricSpec(
    "headrace_max_running_sequences", _GAUGE, "sequences",
    "Sequences that the passes under way have room for.", _ENGINE,
)  # fmt: skip
ADMITTED = MetricSpec(
    "headrace_admitted_sequences", _COUNTER, "sequences", "Sequences taken in.", _ENGINE,
    ("priority",),
)  # fmt: skip
ENDED = MetricSpec(
    "headrace_ended_sequences", _COUNTER, "sequences",
    "Sequences that have ended, by reason: stop, length, or abort (given up, or failed).",
    _ENGINE, ("reason",),
)  # fmt: skip
TURNED_AWAY = MetricSpec(
    "headrace_turned_away", _COUNTER, "requests",
    "Requests that were refused or ended early for want of time or room, or for a limit of their key's,"
    " by code.",
    _ENGINE, ("code",), also_server=True,
)  # fmt: skip
TURNED_AWAY_CODES = (
    "queue_full",
    "deadline_unreachable",
    "deadline_passed",
    "rate_limit_exceeded",
    "too_many_requests",
    "not_ready",
)
"""Shown from the start, so that the first one counts as an increase."""
FIRST_TOKEN = MetricSpec(
    "headrace_time_to_first_token_seconds", _HISTOGRAM, "seconds",
    "From a request's admission to its first token.", _ENGINE, buckets=_FIRST_TOKEN,
    also_server=True,
)  # fmt: skip
INTER_TOKEN = MetricSpec(
    "headrace_inter_token_seconds", _HISTOGRAM, "seconds", "Between two tokens of a sequence.",
    _ENGINE, buckets=_NEXT_TOKEN, also_server=True,
)  # fmt: skip
END_TO_END = MetricSpec(
    "headrace_end_to_end_seconds", _HISTOGRAM, "seconds",
    "From a sequence's admission to its end, of those that ended by themselves.",
    _ENGINE, buckets=_WHOLE,
)  # fmt: skip
KV_PAGES = MetricSpec(
    "headrace_kv_pages", _GAUGE, "pages", "KV pages by tier and state.", _ENGINE, ("tier", "state"),
    also_server=True,
)  # fmt: skip
KV_HITS = MetricSpec(
    "headrace_kv_hits", _COUNTER, "pages",
    "KV pages that requests found instead of computing them, by the tier they were in.",
    _ENGINE, ("tier",),
)  # fmt: skip
KV_MISSES = MetricSpec(
    "headrace_kv_misses", _COUNTER, "pages", "Full KV pages that were looked for and computed.",
    _ENGINE,
)  # fmt: skip
KV_MOVES = MetricSpec(
    "headrace_kv_moves", _COUNTER, "pages",
    "Moves of KV pages between tiers, by kind (out, in, spill, fetch, sink) and result (moved, lost).",
    _ENGINE, ("move", "result"),
)  # fmt: skip
KV_PREEMPTIONS = MetricSpec(
    "headrace_kv_preemptions", _COUNTER, "sequences",
    "Sequences that gave their pages back and waited, by how they go on: swap finds all pages again,"
    " recompute does not.",
    _ENGINE, ("by",),
)  # fmt: skip
KV_EVICTIONS = MetricSpec(
    "headrace_kv_evictions", _COUNTER, "pages", "Cached KV pages that went for room, by tier.",
    _ENGINE, ("tier",),
)  # fmt: skip
KV_SPOILED = MetricSpec(
    "headrace_kv_spoiled", _COUNTER, "sequences",
    "Sequences that began again because one of their KV pages on NVMe was damaged.", _ENGINE,
)  # fmt: skip
ADAPTER_SLOTS = MetricSpec(
    "headrace_adapter_slots", _GAUGE, "slots",
    "Slots for adapters by state: free, used by sequences that run, coming (being loaded), or cached (an"
    " adapter that nobody uses now).", _ENGINE, ("state",), also_server=True,
)  # fmt: skip
ADAPTERS_WAITING = MetricSpec(
    "headrace_adapters_waiting", _GAUGE, "adapters",
    "Adapters that sequences wait with, for a slot.", _ENGINE, also_server=True,
)  # fmt: skip
ADAPTER_WAIT_SECONDS = MetricSpec(
    "headrace_adapter_wait_seconds", _COUNTER, "seconds",
    "How long adapters waited for a slot, summed up.", _ENGINE, also_server=True,
)  # fmt: skip
ADAPTER_HITS = MetricSpec(
    "headrace_adapter_hits", _COUNTER, "sequences",
    "Times that a sequence began to run and its adapter was on the device.", _ENGINE, also_server=True,
)  # fmt: skip
ADAPTER_MISSES = MetricSpec(
    "headrace_adapter_misses", _COUNTER, "sequences",
    "Times that a sequence had to wait until its adapter was loaded.", _ENGINE, also_server=True,
)  # fmt: skip
ADAPTER_LOADS = MetricSpec(
    "headrace_adapter_loads", _COUNTER, "loads",
    "Loads of adapters into slots of all stages, by result: loaded, or failed on some stage.",
    _ENGINE, ("result",), also_server=True,
)  # fmt: skip
ADAPTER_EVICTIONS = MetricSpec(
    "headrace_adapter_evictions", _COUNTER, "adapters",
    "Adapters that left a slot to make room for another one.", _ENGINE, also_server=True,
)  # fmt: skip
ADAPTER_SEQUENCES = MetricSpec(
    "headrace_adapter_sequences", _COUNTER, "sequences",
    "Sequences taken in that run with an adapter, by its name.", _ENGINE, ("adapter",),
    also_server=True,
)  # fmt: skip
ADAPTER_TOKENS = MetricSpec(
    "headrace_adapter_tokens", _COUNTER, "tokens",
    "Tokens of sequences with an adapter, by its name and kind: prompt (taken in) or output (generated).",
    _ENGINE, ("adapter", "kind"), also_server=True,
)  # fmt: skip
RECOVERIES = MetricSpec(
    "headrace_recoveries", _COUNTER, "recoveries",
    "Times that a ring went on after a failure, by kind: replaced (stages have new processes), reconnected (edges"
    " alone are new), or replanned (another ring, of other stages).",
    _ENGINE, ("kind",),
)  # fmt: skip
REPLACED_STAGES = MetricSpec(
    "headrace_replaced_stages", _COUNTER, "stages", "Times that a stage's process was replaced after"
    " it had failed.", _ENGINE, ("stage",),
)  # fmt: skip
RECOVERY_SECONDS = MetricSpec(
    "headrace_recovery_seconds", _COUNTER, "seconds", "How long recoveries took, by phase.",
    _ENGINE, ("phase",),
)  # fmt: skip
STAGE_STATE = MetricSpec(
    "headrace_stage_state", _GAUGE, "1",
    "1 for the state that a stage is in (serving, breaking off, resting, gone, starting), 0 for the others.",
    _ENGINE, ("stage", "state"),
)  # fmt: skip

# Servers, at their own /metrics alone.
REQUESTS = MetricSpec(
    "headrace_requests", _COUNTER, "requests",
    "Requests that have ended, by path or method and status (499: the client went away).",
    _SERVER, ("path", "status"),
)  # fmt: skip
FORECAST_RATIO = MetricSpec(
    "headrace_first_token_forecast_ratio", _HISTOGRAM, "1",
    "Time to the first token over its forecast, of requests with a time.",
    _SERVER, buckets=_RATIOS,
)  # fmt: skip
RECENT_PASS_SECONDS = MetricSpec(
    "headrace_pass_seconds", _GAUGE, "seconds", "What recent passes took.", _SERVER
)
WINDOWS = MetricSpec(
    "headrace_batch_windows", _COUNTER, "passes",
    "Passes that an idle ring held back for a moment, so that others could join.", _SERVER,
)  # fmt: skip
JOINED = MetricSpec(
    "headrace_batch_window_joined", _COUNTER, "sequences",
    "Sequences that came while such a pass was held, and share it.", _SERVER,
)  # fmt: skip

# Servers with --shadow.
SHADOW_SEQUENCES = MetricSpec(
    "headrace_shadow_sequences", _COUNTER, "sequences",
    "Sampled answers that were compared with the reference.", _SERVER,
)  # fmt: skip
SHADOW_TOKENS = MetricSpec(
    "headrace_shadow_tokens", _COUNTER, "tokens", "Tokens of answers that were compared.", _SERVER
)
SHADOW_KLD_NATS = MetricSpec(
    "headrace_shadow_kld_nats", _COUNTER, "nats",
    "KL(reference || served store), summed over the compared tokens: over their number it is the mean.",
    _SERVER,
)  # fmt: skip
SHADOW_GREEDY_TOKENS = MetricSpec(
    "headrace_shadow_greedy_tokens", _COUNTER, "tokens",
    "Compared tokens that were to be the likeliest: of answers at temperature 0, without biases, penalties"
    " and grammars.",
    _SERVER,
)  # fmt: skip
SHADOW_STRAYED_TOKENS = MetricSpec(
    "headrace_shadow_strayed_tokens", _COUNTER, "tokens",
    "Greedy tokens that a model finds less likely than another one, ties aside, by model (source): the served"
    " store itself (own), which says that the ring computed wrongly, or the reference.",
    _SERVER, ("source",),
)  # fmt: skip
SHADOW_DROPPED = MetricSpec(
    "headrace_shadow_dropped", _COUNTER, "sequences",
    "Sampled answers that were not compared, by reason: too many wait (full), longer than there is memory"
    " for (long), or the shadow's process failed twice (failed).",
    _SERVER, ("reason",),
)  # fmt: skip
SHADOW_RESTARTS = MetricSpec(
    "headrace_shadow_restarts",
    _COUNTER,
    "restarts",
    "Times that the shadow's process died.",
    _SERVER,
)
SHADOW_WAITING_TOKENS = MetricSpec(
    "headrace_shadow_waiting_tokens", _GAUGE, "tokens",
    "Tokens of samples that wait or are being compared, prompts included.", _SERVER,
)  # fmt: skip
SHADOW_KLD = MetricSpec(
    "headrace_shadow_kld", _GAUGE, "nats",
    "KL(reference || served store) over the tokens of the newest batch, by figure: mean or p99.",
    _SERVER, ("figure",),
)  # fmt: skip
SHADOW_AGREEMENT = MetricSpec(
    "headrace_shadow_agreement", _GAUGE, "1",
    "Of the newest batch, the share of tokens for which both models have the same likeliest one (models), and"
    " of the greedy ones that are the likeliest, ties aside, of the served store (own) or of the reference.",
    _SERVER, ("source",),
)  # fmt: skip
SHADOW_PERPLEXITY_RATIO = MetricSpec(
    "headrace_shadow_perplexity_ratio", _GAUGE, "1",
    "Perplexity of the newest batch's answers by the served store over that by the reference.",
    _SERVER,
)  # fmt: skip
SHADOW_MAX_KLD = MetricSpec(
    "headrace_shadow_max_kld", _GAUGE, "nats", "--shadow-max-kld, for the alert.", _SERVER
)

ALL = tuple(value for value in globals().values() if isinstance(value, MetricSpec))
