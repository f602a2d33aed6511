"""Dashboards of Grafana as data: rows of panels, each with its PromQL, and the JSON that Grafana reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
OURS = 'SessionName=~"$SessionName",ring=~"$ring"'
"""What every query of Ray's metrics selects by."""

_COLUMNS = 24
_NOTHING = "-- nothing yet --"


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and what Grafana calls each of its series."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """`kind`, `unit` and `repeat` (a variable, for one panel each of its values) are Grafana's. `stacked` is for
    parts of a whole; `most` is where the axis ends; `about` says how to read it."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    about: str = ""
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    most: float | None = None
    repeat: str | None = None
    red_below: float | None = None
    red_above: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    about: str
    variables: tuple[dict[str, Any], ...]
    rows: tuple[Row, ...]

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]


def labels_of(name: str, metric: str, label: str, *, hidden: bool = False) -> dict[str, Any]:
    """A variable: the values that a label of a metric has, all of them by default."""
    query = f"label_values({metric}, {label})"
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"qryType": 1, "query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,
        "regex": "",
        "sort": 3,
        "hide": 2 if hidden else 0,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "options": [],
    }


def one_of(name: str, values: Sequence[str], chosen: str) -> dict[str, Any]:
    """A variable with values of its own."""
    options = [{"text": each, "value": each, "selected": each == chosen} for each in values]
    return {
        "name": name,
        "label": name,
        "type": "custom",
        "query": ",".join(values),
        "current": {"text": chosen, "value": chosen},
        "options": options,
        "multi": False,
        "includeAll": False,
        "hide": 0,
    }


DATASOURCE_VARIABLE: dict[str, Any] = {
    "name": "datasource",
    "label": "datasource",
    "type": "datasource",
    "query": "prometheus",
    "regex": "",
    "refresh": 1,
    "multi": False,
    "includeAll": False,
    "hide": 0,
    "current": {},
    "options": [],
}


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana imports or is provisioned with; the schema is that of 10.4 and later."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["headrace", "ray"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "annotations": {"list": []},
        "links": [
            {
                "title": "Headrace",
                "type": "dashboards",
                "tags": ["headrace"],
                "includeVars": True,
                "keepTime": True,
                "asDropdown": False,
                "icon": "external link",
                "targetBlank": False,
                "tooltip": "",
                "url": "",
            }
        ],
        "templating": {"list": [DATASOURCE_VARIABLE, *dashboard.variables]},
        "panels": _laid_out(dashboard.rows),
    }


def _laid_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        place = {"x": 0, "y": y, "w": _COLUMNS, "h": 1}
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > _COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            found.append(_panel(panel, len(found) + 1, place))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return found


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "editorMode": "code",
                "range": panel.kind == "timeseries",
                "instant": panel.kind != "timeseries",
            }
            for i, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel.kind),
    }
    if panel.repeat is not None:
        made |= {"repeat": panel.repeat, "repeatDirection": "h", "maxPerRow": 3}
    return made


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "noValue": _NOTHING,
        "thresholds": _thresholds(panel),
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
    }
    if panel.most is not None:
        field["max"] = panel.most
    if panel.kind == "timeseries":
        field["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1 if panel.stacked else 2,
            "fillOpacity": 70 if panel.stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    return field


def _thresholds(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.red_below}]
    if panel.red_above is not None:
        steps.append({"color": "red", "value": panel.red_above})
    return {"mode": "absolute", "steps": steps}


def _options(kind: str) -> dict[str, Any]:
    if kind == "timeseries":
        return {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    reduced = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    if kind == "bargauge":
        return {
            "reduceOptions": reduced,
            "orientation": "horizontal",
            "displayMode": "basic",
            "showUnfilled": True,
        }
    return {
        "reduceOptions": reduced,
        "colorMode": "value",
        "graphMode": "area",
        "textMode": "auto",
        "orientation": "auto",
    }
