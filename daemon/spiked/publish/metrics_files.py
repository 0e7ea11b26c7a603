"""docs/metrics.md, monitoring/alerts.yml and monitoring/grafana-dashboard.json, written from the table of figures.

python -m spiked.publish.metrics_files [FOLDER]      writes them anew; a test fails when they differ from the table
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from spiked_client.figures import FIGURES, Figure
from spiked_client.judge import CLEAR_S, LEAST, RAISE_S

ROOMS = {
    "session": "The session", "acquire": "Receiving", "record": "Recording", "live": "Sorting live", "act": "Stimulation", "offline": "Offline jobs",
    "out": "Sockets, MQTT, browsers", "gpu": "GPUs",
}  # fmt: skip
HOW = {"value": "", "increase": " per minute", "p99": " (p99)"}
DOCS, ALERTS, DASHBOARD = "docs/metrics.md", "monitoring/alerts.yml", "monitoring/grafana-dashboard.json"

INTRODUCTION = f"""# Metrics

What each figure means, when it is good and when it is bad, and what to do. This page is written from the table in
`spiked_client/figures.py` (`python -m spiked.publish.metrics_files`); the Prometheus endpoint, MQTT alarms, `spiked monitor`, the alert
rules and the dashboard use the same table.

```toml
[metrics]
enabled = true            # http://127.0.0.1:9464/metrics
```

Beyond this computer it answers only with TLS and a token: `host`, `cert_file`, `key_file` and `token_file` (at least 16 characters;
`openssl rand -hex 32`), and in Prometheus

```yaml
scrape_configs:
  - job_name: spiked
    scrape_interval: 5s
    scheme: https
    authorization: {{credentials_file: /etc/prometheus/spiked.token}}
    static_configs: [{{targets: ["rigA:9464"]}}]
rule_files: [alerts.yml]
```

`monitoring/alerts.yml` are the alert rules and `monitoring/grafana-dashboard.json` a Grafana dashboard (Dashboards, New, Import).

A figure is judged by its value; a counter by how much it grew within a minute; a histogram by the 99th percentile of the last minute,
once there were {LEAST}. Up to *good* it is good, from *bad* on it is bad, between them it is a warning; where *good* is the larger number it is
low values that are bad. Where only *good* is given it never gets worse than a warning. Those marked * are coloured in the monitors and call nobody.

Alarms over MQTT (`<prefix>/<rig>/alarm`), in the `session` topic and in `log.jsonl` follow the same limits: a value must stay bad for {RAISE_S:g} s
before it counts and good for {CLEAR_S:g} s before the alarm ends; counters and percentiles count at once.

Figures of running streams are told while the session records; counters begin at 0 with a session, or with a process that was restarted.
Everything comes from the health message of that second, so a scrape costs the live path nothing ([why so](decisions/0011-metrics.md)).
"""


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:g}"


def table() -> str:
    """docs/metrics.md."""
    out = [INTRODUCTION]
    for room, figures in groupby(FIGURES, lambda f: f.room):
        out += [
            f"\n## {ROOMS[room]}\n",
            "| metric | meaning | good | bad | what to do |",
            "|---|---|---|---|---|",
        ]
        for f in figures:
            labels = f"{{{','.join(f.labels)}}}" if f.labels else ""
            how, star = (
                HOW[f.judged_by] if f.good is not None else "",
                "" if f.alarm or f.good is None else " *",
            )
            good, bad = (f"{_number(x)}{how if x is not None else ''}" for x in (f.good, f.bad))
            out.append(f"| `{f.exposed}{labels}` {f.kind}{star} | {f.about} | {good} | {bad} | {f.todo} |")
    out.append(
        "\nBesides: `spiked_info{rig,version,session}`, always 1, and `spiked_limit{figure,limit}`, the limits above."
    )
    return "\n".join(out) + "\n"


# ---- Prometheus ----------------------------------------------------------------------------------------------------


def expression(f: Figure) -> str:
    """PromQL of the number that is judged."""
    if f.kind == "counter":
        return f"increase({f.exposed}[1m])"
    if f.kind == "histogram":
        by = ", ".join(("le", "instance", *f.labels))
        return f"histogram_quantile(0.99, sum by ({by}) (rate({f.exposed}_bucket[1m])))"
    return f.exposed


def _rules(f: Figure) -> list[tuple[str, str, str]]:
    """(level, expression, limit) of the alerts of one figure."""
    if f.good is None:
        return []
    e, low = expression(f), f.bad is not None and f.bad < f.good
    off, on = ("<", "<=") if low else (">", ">=")
    if f.bad is None:
        return [("warning", f"{e} {off} {f.good:g}", _number(f.good))]
    between = f"({e} {off} {f.good:g}) unless ({e} {on} {f.bad:g})"
    return [("warning", between, _number(f.good)), ("bad", f"{e} {on} {f.bad:g}", _number(f.bad))]


def alerts() -> str:
    """monitoring/alerts.yml; strings are JSON, which YAML is too."""
    out = [
        "# Alert rules for Prometheus, written from the table of figures: python -m spiked.publish.metrics_files",
        "groups:", "  - name: spiked", "    rules:",
        *_rule("SpikedAbsent", 'up{job="spiked"} == 0', "30s", "bad", "spiked on {{ $labels.instance }} does not answer",
               "Look whether the daemon runs (`systemctl status spiked`) and `[metrics]` is enabled."),
    ]  # fmt: skip
    for f in FIGURES:
        for level, expr, limit in _rules(f) if f.alarm else ():
            name = "Spiked" + "".join(w.capitalize() for w in f.name.split("_")) + level.capitalize()
            at = "".join(f" {label}={{{{ $labels.{label} }}}}" for label in f.labels)
            text = f"{f.name}{at}: {{{{ $value | humanize }}}}{HOW[f.judged_by]}, {level} from {limit}"
            out += _rule(
                name, expr, "0s" if f.kind != "gauge" else f"{RAISE_S:g}s", level, text, f"{f.about} {f.todo}"
            )
    return "\n".join(out) + "\n"


def _rule(name: str, expr: str, wait: str, level: str, summary: str, description: str) -> list[str]:
    return [
        f"      - alert: {name}", f"        expr: {json.dumps(expr)}", f"        for: {wait}", f"        labels: {{severity: {level}}}",
        "        annotations:", f"          summary: {json.dumps(summary)}", f"          description: {json.dumps(description)}",
    ]  # fmt: skip


# ---- Grafana -------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, ACROSS = 8, 7, 3


def _panel(f: Figure, number: int, x: int, y: int) -> dict[str, Any]:
    selector = '{instance=~"$instance"}'
    expr = expression(f)
    if f.kind == "counter":
        expr = (
            f"rate({f.exposed}{selector}[1m])" if f.good is None else f"increase({f.exposed}{selector}[1m])"
        )
    elif f.kind == "histogram":
        expr = expr.replace("_bucket[", f"_bucket{selector}[")
    else:
        expr += selector
    legend = " ".join(f"{{{{{label}}}}}" for label in f.labels) or f.name
    how = {"gauge": "", "counter": " per second" if f.good is None else " per minute", "histogram": ", p99"}[
        f.kind
    ]
    defaults: dict[str, Any] = {
        "unit": "ms" if f.name.endswith("_ms") else "percentunit" if f.name.endswith("_ratio") else "short"
    }
    if f.good is not None:
        defaults |= {
            "thresholds": {"mode": "absolute", "steps": _steps(f)},
            "custom": {"thresholdsStyle": {"mode": "line"}},
        }
    return {
        "id": number, "type": "timeseries", "title": f.name + how, "description": f"{f.about} {f.todo}".strip(),
        "datasource": {"type": "prometheus", "uid": "${source}"}, "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []}, "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [{"refId": "A", "expr": expr, "legendFormat": legend}],
    }  # fmt: skip


def _steps(f: Figure) -> list[dict[str, Any]]:
    assert f.good is not None
    if f.bad is None:
        return [{"color": "green", "value": None}, {"color": "orange", "value": f.good}]
    if f.bad < f.good:
        return [
            {"color": "red", "value": None},
            {"color": "orange", "value": f.bad},
            {"color": "green", "value": f.good},
        ]
    return [
        {"color": "green", "value": None},
        {"color": "orange", "value": f.good},
        {"color": "red", "value": f.bad},
    ]


def dashboard() -> str:
    """monitoring/grafana-dashboard.json: a row per room, a panel per figure, its limits as lines."""
    panels: list[dict[str, Any]] = []
    y = 0
    for room, figures in groupby(FIGURES, lambda f: f.room):
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": ROOMS[room],
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
            }
        )
        shown = list(figures)
        for i, f in enumerate(shown):
            panels.append(_panel(f, len(panels) + 1, WIDTH * (i % ACROSS), y + 1 + HEIGHT * (i // ACROSS)))
        y += 1 + HEIGHT * -(-len(shown) // ACROSS)
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    instance = {
        "name": "instance", "type": "query", "label": "rig", "datasource": {"type": "prometheus", "uid": "${source}"}, "includeAll": True, "multi": True,
        "query": {"query": "label_values(spiked_info, instance)", "refId": "instance"}, "refresh": 2, "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip
    board = {
        "title": "spiked", "uid": "spiked", "schemaVersion": 39, "refresh": "5s", "time": {"from": "now-1h", "to": "now"}, "tags": ["spiked"],
        "templating": {"list": [source, instance]}, "panels": panels, "annotations": {"list": []}, "editable": True,
    }  # fmt: skip
    return json.dumps(board, indent=1) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the three files below the folder given, or below the current one."""
    root = Path((argv if argv is not None else sys.argv[1:] or ["."])[0])
    for name, text in ((DOCS, table()), (ALERTS, alerts()), (DASHBOARD, dashboard())):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
