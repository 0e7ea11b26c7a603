"""report.html: one file that needs nothing else, drawn by the browser that opens it.

`sections` writes what can be read without a script; report.js sorts the tables and draws what comes into view.
"""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from spiked.offline.html import escape
from spiked.offline.labels import LabelRules
from spiked.offline.page.sections import SECTIONS

MOST_STIMULI = 5000  # drawn over the raster


def write_page(d: dict[str, Any], arrays: dict[str, Any], path: Path) -> None:
    """`d` is the mapping of report.json, `arrays` what `figures` made. Whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(page(d, arrays), encoding="utf-8")
    beside.replace(path)


def page(d: dict[str, Any], arrays: dict[str, Any]) -> str:
    """The whole document."""
    parts = [(key, title, make(d)) for key, title, make in SECTIONS]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in parts)
    body = "\n".join(
        f'<section id="{key}">\n<h2>{escape(title)}</h2>\n{html}\n</section>' for key, title, html in parts
    )
    title = escape(f"{d['session']}, stream {d['stream']}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}: offline report</title>\n<style>\n{_asset("report.css")}</style>\n</head>\n<body>\n'
        f"<nav>{links}</nav>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n"
        f'<script type="application/json" id="data">{_json(_drawn(d, arrays))}</script>\n'
        f"<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n"
    )


def _drawn(d: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    found = d["compare"]["agreement"]
    both: dict[str, Any] = {"offline": [], "live": [], "matrix": []}
    if found:
        both = {"offline": found["offline_ids"], "live": found["live_ids"], "matrix": found["matrix"]}
    return {
        "duration_s": d["recording"]["duration_s"],
        "refractory_ms": LabelRules().refractory_ms,
        "gaps": d["gap_spans"],
        "blind": d["blind"]["spans"],
        "stim_s": sorted({*(d["stimuli"] or {}).get("times_s", []), *d["stim_marks_s"]})[:MOST_STIMULI],
        "drift": d["drift"],
        "agreement": _paired_first(both, found["pairs"] if found else []),
        **arrays,
    }


def _paired_first(both: dict[str, Any], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The agreement matrix with pairs along its diagonal, what has no partner after them."""
    rows = _order(both["offline"], [p["offline"] for p in pairs])
    columns = _order(both["live"], [p["live"] for p in pairs])
    return {
        "offline": [both["offline"][r] for r in rows],
        "live": [both["live"][c] for c in columns],
        "matrix": [[round(both["matrix"][r][c], 2) for c in columns] for r in rows],
    }


def _order(ids: list[int], first: list[int]) -> list[int]:
    at = {u: k for k, u in enumerate(ids)}
    paired = [at[u] for u in first]
    return paired + [k for k in range(len(ids)) if k not in set(paired)]


def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(_finite(data), separators=(",", ":"), default=float).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
