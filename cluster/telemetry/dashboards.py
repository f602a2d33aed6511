"""The two dashboards: `python -m headrace.cluster.telemetry.dashboards` writes cluster/grafana/*.json."""

import json
from pathlib import Path

from headrace.cluster.telemetry.panels import Dashboard, dashboard_json
from headrace.cluster.telemetry.ring_dashboard import RING
from headrace.cluster.telemetry.serving_dashboard import SERVING

GRAFANA = Path(__file__).resolve().parents[1] / "grafana"

DASHBOARDS = {"ring.json": RING, "serving.json": SERVING}


def text_of(dashboard: Dashboard) -> str:
    return json.dumps(dashboard_json(dashboard), indent=1) + "\n"


if __name__ == "__main__":
    for name, each in DASHBOARDS.items():
        (GRAFANA / name).write_text(text_of(each))
