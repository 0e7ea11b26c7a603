"""What every benchmark's figures are made of: spreads, and rows of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

import numpy as np

from spiked.offline.truth import score, summary

WINDOW_MS = 0.4  # a true and a sorted spike closer than this are one


def spread(values: np.ndarray) -> dict[str, float | int | None]:
    """n, mean, p50, p95, p99 and max of the values themselves; None while there are none."""
    if len(values) == 0:
        return {"n": 0, "mean": None, "p50": None, "p95": None, "p99": None, "max": None}
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    figures = {"mean": values.mean(), "p50": p50, "p95": p95, "p99": p99, "max": values.max()}
    return {"n": len(values), **{k: round(float(v), 3) for k, v in figures.items()}}


def agreement(
    true_samples: np.ndarray, true_units: np.ndarray, samples: np.ndarray, units: np.ndarray, fs_hz: float
) -> dict[str, Any]:
    """The scores that the tables show, and every true unit's own; window 0.4 ms, unfound units count 0."""
    per_unit = score(true_samples, true_units, samples, units, fs_hz, WINDOW_MS)
    figures = summary(per_unit)
    return {
        "match_window_ms": WINDOW_MS, "true_units": figures["true_units"], "mean_accuracy": round(figures["accuracy"], 4),
        "mean_recall": round(figures["recall"], 4), "mean_precision": round(figures["precision"], 4),
        "units_at_0.8": figures["well"], "units_at_0.5": figures["half"], "per_unit": {str(k): v for k, v in per_unit.items()},
    }  # fmt: skip


def row(*cells: Any) -> str:
    """One row of a markdown table; numbers are shortened, None is a dash."""
    return "| " + " | ".join(_cell(c) for c in cells) + " |"


def head(*names: str) -> list[str]:
    """The first two lines of a markdown table."""
    return [row(*names), "|" + "---|" * len(names)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
