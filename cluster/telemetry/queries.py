"""PromQL of the metrics of our table, and panels that several dashboards have."""

from headrace.cluster.telemetry import table
from headrace.cluster.telemetry.panels import OURS, Panel, Query, labels_of, one_of
from headrace.cluster.telemetry.table import MetricSpec

SECONDS, BYTES, SHARE, COUNT = "s", "bytes", "percentunit", "short"
RATE, PER_SECOND = "Bps", "ops"


def series(spec: MetricSpec, more: str = "") -> str:
    return f"{spec.exposed[0]}{{{OURS}{',' if more else ''}{more}}}"


def rate(spec: MetricSpec, by: str = "ring", more: str = "") -> str:
    return f"sum by ({by}) (rate({series(spec, more)}[$window]))"


def now(spec: MetricSpec, by: str = "ring", more: str = "") -> str:
    return f"sum by ({by}) ({series(spec, more)})"


def quantile(spec: MetricSpec, share: float, by: str = "") -> str:
    name, labels = f"{spec.exposed[0]}_bucket", f"le{', ' if by else ''}{by}"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({name}{{{OURS}}}[$window])))"


def quantiles(spec: MetricSpec) -> tuple[Query, ...]:
    return tuple(Query(quantile(spec, q), f"p{100 * q:.0f}") for q in (0.5, 0.95, 0.99))


def over(above: str, below: str) -> str:
    """A quotient, of two series with the same labels."""
    return f"{above} / {below}"


def share_of_time(by: str, more: str) -> str:
    whole = rate(table.STAGE_SECONDS, "ring, stage")
    part = rate(table.STAGE_SECONDS, by, more)
    return f"{part} / on (ring, stage) group_left () {whole}"


TIME = (
    labels_of("SessionName", "ray_headrace_busy_seconds_total", "SessionName"),
    labels_of("ring", 'ray_headrace_busy_seconds_total{SessionName=~"$SessionName"}', "ring"),
    one_of("window", ("1m", "2m", "5m", "15m", "1h"), "2m"),
)
STAGES = labels_of("stage", f"ray_headrace_stage_seconds_total{{{OURS}}}", "stage")

SHARE_OF_BOUND = over(rate(table.BOUND_SECONDS), rate(table.BUSY_SECONDS))
BUBBLE = over(rate(table.STAGE_SECONDS, more='part=~"link|idle"'), rate(table.STAGE_SECONDS))
PASS_SECONDS = over(rate(table.BUSY_SECONDS), rate(table.PASSES))


def stat(title: str, unit: str, expr: str, about: str = "", **more: float) -> Panel:
    return Panel(
        title, unit, (Query(expr, "{{ring}}"),), about, "stat", 4, 5,
        red_below=more.get("red_below"), red_above=more.get("red_above"),
    )  # fmt: skip


def by_stage(title: str, unit: str, expr: str, about: str = "", most: float | None = None) -> Panel:
    return Panel(title, unit, (Query(expr, "{{ring}} stage {{stage}}"),), about, most=most)


def tier(tier: str, direction: str = "in", by: str = "ring, content") -> str:
    return rate(table.TIER_BYTES, by, f'tier="{tier}",direction="{direction}"')
