"""What a ring does: share of the bound, where the time of each stage goes, what the tiers give."""

from headrace.cluster.telemetry import table
from headrace.cluster.telemetry.panels import Dashboard, Panel, Query, Row
from headrace.cluster.telemetry.queries import (
    BUBBLE,
    BYTES,
    COUNT,
    PASS_SECONDS,
    RATE,
    SECONDS,
    SHARE,
    SHARE_OF_BOUND,
    STAGES,
    TIME,
    by_stage,
    now,
    over,
    quantile,
    rate,
    series,
    share_of_time,
    stat,
    tier,
)

HEADLINE = Row(
    "Headline",
    (
        stat(
            "Share of the bound", SHARE, SHARE_OF_BOUND,
            "What the binding resource needed at least, over what passes took. 100%: nothing is left to"
            " gain but by another plan or other hardware.",
            red_below=0.5,
        ),
        stat("Tokens generated", "tokens/s", rate(table.OUTPUT_TOKENS)),
        stat("A pass", SECONDS, PASS_SECONDS, "While the ring had passes under way."),
        stat(
            "Bubble", SHARE, BUBBLE,
            "Share of the stages' time in which they waited for another stage or for a pass.",
            red_above=0.4,
        ),
        stat("Running sequences", COUNT, now(table.RUNNING)),
        stat(
            "Recoveries in an hour", COUNT,
            f"sum by (ring) (increase({series(table.RECOVERIES)}[1h]))", red_above=0.5,
        ),
    ),
)  # fmt: skip

BOUND = Row(
    "The bound",
    (
        Panel(
            "Share of the bound", SHARE, (Query(SHARE_OF_BOUND, "{{ring}}"),),
            "Low while the ring fills or drains; low for long, the rows below say where time goes.",
        ),
        Panel(
            "What a pass takes, and at least", SECONDS,
            (
                Query(PASS_SECONDS, "{{ring}} taken"),
                Query(over(rate(table.BOUND_SECONDS), rate(table.PASSES)), "{{ring}} at least"),
            ),
            "Choose a window of two passes or more.",
        ),
        Panel(
            "Which resource binds a full pass, by the plan", SECONDS,
            (Query(f"max by (ring, term) ({series(table.PLANNED_PASS_SECONDS)})", "{{ring}} {{term}}"),),
            "The longest one binds. nvme: more stages, or drives, or host memory. pcie: more stages, or"
            " device memory. compute: weights no longer matter, and more sequences do not help.",
            "bargauge",
        ),
    ),
)  # fmt: skip

STAGE_TIME = Row(
    "Where the time of each stage goes",
    (
        Panel(
            "Stage $stage", SHARE,
            (Query(share_of_time("ring, stage, part", 'stage=~"$stage"'), "{{ring}} {{part}}"),),
            "Shares of the time that the ring had passes under way. weights: a tier is too slow. kv: pages"
            " come too late. link: the stage before it is later. idle: no pass was there for it.",
            width=8, stacked=True, most=1.0, repeat="stage",
        ),
        by_stage(
            "Waiting for weights", SHARE, share_of_time("ring, stage", 'part="weights"'),
            "One stage above the others has a slow drive or link.",
        ),
        by_stage("Waiting for KV pages", SHARE, share_of_time("ring, stage", 'part="kv"')),
        by_stage(
            "Bubble: waiting for stages and passes", SHARE,
            share_of_time("ring, stage", 'part=~"link|idle"'),
        ),
        by_stage(
            "A stage's part of a pass, p50", SECONDS,
            quantile(table.STAGE_PASS_SECONDS, 0.5, "ring, stage"),
        ),
        by_stage(
            "A stage's part of a pass, p95", SECONDS,
            quantile(table.STAGE_PASS_SECONDS, 0.95, "ring, stage"),
        ),
        by_stage("Computing", SHARE, share_of_time("ring, stage", 'part="compute"')),
    ),
)  # fmt: skip

TIERS = Row(
    "Tiers",
    (
        Panel(
            "From NVMe", RATE, (Query(tier("nvme"), "{{ring}} {{content}}"),),
            "All stages together: compare with what the drives read (headrace bench io).",
        ),
        Panel(
            "From host RAM", RATE, (Query(tier("host"), "{{ring}} {{content}}"),),
            "Weights of the host tier, KV pages and adapters; what came from NVMe crosses the link beside it.",
        ),
        Panel(
            "To host RAM", RATE, (Query(tier("host", "out"), "{{ring}} {{content}}"),),
            "KV pages that left the devices.",
        ),
        by_stage("From NVMe, by stage", RATE, tier("nvme", by="ring, stage")),
        by_stage("From host RAM, by stage", RATE, tier("host", by="ring, stage")),
        Panel(
            "Bytes moved for each token", BYTES,
            (
                Query(
                    over(rate(table.TIER_BYTES, more='direction="in"'), rate(table.OUTPUT_TOKENS)),
                    "{{ring}}",
                ),
            ),
            "Falls as more sequences share a pass.",
        ),
        by_stage(
            "Experts found on the device", SHARE,
            over(
                rate(table.EXPERTS, "ring, stage", 'found="on the device"'),
                rate(table.EXPERTS, "ring, stage"),
            ),
            "Of mixtures whose experts stream; else nothing.",
        ),
    ),
)  # fmt: skip

WORK = Row(
    "Work",
    (
        Panel(
            "Tokens", "tokens/s",
            (
                Query(rate(table.OUTPUT_TOKENS), "{{ring}} generated"),
                Query(rate(table.PROMPT_TOKENS), "{{ring}} of prompts"),
                Query(rate(table.COMPUTED_TOKENS), "{{ring}} computed"),
            ),
        ),
        Panel(
            "Sequences that a pass draws for", COUNT,
            (Query(over(rate(table.DECODES), rate(table.PASSES)), "{{ring}}"),),
            "Every byte that is read serves so many.",
        ),
        Panel(
            "Guessed tokens that were right", SHARE,
            (
                Query(
                    over(rate(table.ACCEPTED_DRAFT_TOKENS), rate(table.DRAFT_TOKENS)), "{{ring}}"
                ),
            ),
            "With --ngram-speculation; else nothing.",
        ),
    ),
)  # fmt: skip

DRIVES = Row(
    "Drives of KV pages, and recoveries",
    (
        by_stage("Written for KV pages", RATE, rate(table.KV_DRIVE_WRITTEN, "ring, stage")),
        by_stage(
            "May still be written today", BYTES, now(table.KV_DRIVE_BUDGET, "ring, stage"),
            "With --kv-daily-writes; at 0 pages are dropped and computed again.",
        ),
        by_stage(
            "Life of the drive that is used", SHARE, now(table.KV_DRIVE_WEAR, "ring, stage"),
            "Where smartctl or nvme-cli may ask the drive.",
        ),
        Panel(
            "Recoveries", COUNT, (Query(now(table.RECOVERIES, "ring, kind"), "{{ring}} {{kind}}"),),
            "Stages were replaced, edges alone formed anew, or the model was planned anew for other stages.",
        ),
        by_stage("Stages replaced", COUNT, now(table.REPLACED_STAGES, "ring, stage")),
        Panel(
            "Stages that do not serve", COUNT,
            (
                Query(
                    now(table.STAGE_STATE, "ring, stage, state", 'state!="serving"'),
                    "{{ring}} stage {{stage}} {{state}}",
                ),
            ),
            "1 for what a stage does while it or another one is replaced.",
        ),
        by_stage(
            "Process id", COUNT, now(table.STAGE_PID, "ring, stage"),
            "On the stage's node; another one takes its place when it is replaced.",
        ),
        Panel(
            "Seconds of recoveries, by phase", SECONDS,
            (Query(now(table.RECOVERY_SECONDS, "ring, phase"), "{{ring}} {{phase}}"),),
        ),
    ),
)  # fmt: skip

RING = Dashboard(
    "headrace-ring",
    "Headrace: ring",
    "Share of the bound, where the time of each stage goes, and what the tiers give.",
    (*TIME, STAGES),
    (HEADLINE, BOUND, STAGE_TIME, TIERS, WORK, DRIVES),
)
