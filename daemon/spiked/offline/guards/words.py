"""What the guards saw of a job that went well, in sentences for its report."""

from __future__ import annotations

from typing import Any

UNITS = {
    "memory_percent": "{:.0f} % of the computer's memory in use",
    "sorter_gb": "{:.1f} GB by the sorter",
    "gpu_memory_percent": "{:.0f} % of the GPU's memory",
    "gpu_celsius": "the GPU at {:.0f} degrees",
}


def sentences(d: dict[str, Any]) -> list[str]:
    """From the mapping of report.json; [] for a report from before there were guards."""
    told, canary = d.get("guards"), d.get("canary")
    if not told or canary is None:
        return []
    peaks = told["guards"]["peaks"]
    worst = [text.format(peaks[name]) for name, text in UNITS.items() if name in peaks]
    out = [f"While it sorted, at most {', '.join(worst)}; at least {peaks['disk_free_gb']:.1f} GB of disk free."] if worst else []  # fmt: skip
    if canary.get("ran"):
        result = {"sorted": "could be sorted"}.get(canary["outcome"], canary["text"])
        out.append(f"The first {canary['seconds']:.0f} s, tried beforehand: {result}.")
    tries = [*canary.get("out_of_memory", []), *told["out_of_memory"]]
    if tries:
        out.append(
            f"Sorted in batches of {told['batch_size']} samples after running out of memory {len(tries)} "
            f"time{'s' * (len(tries) > 1)} ({' '.join(tries)})."
        )
    return out + [f"Warning: {w}." for w in told["guards"]["warnings"]]
