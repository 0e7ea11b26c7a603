"""A health message as a daemon with two streams and everything switched on would send it."""

from __future__ import annotations

from typing import Any

from spiked.timing import EDGES_MS


def histogram(n: int = 1000, ms: float = 0.4) -> dict[str, Any]:
    """n durations of `ms` each."""
    counts = [0] * (len(EDGES_MS) + 1)
    counts[next((i for i, e in enumerate(EDGES_MS) if ms <= e), len(EDGES_MS))] = n
    return {"n": counts, "sum": n * ms}


def stages(*names: str, n: int = 1000, ms: float = 0.4) -> dict[str, Any]:
    return {"edges_ms": list(EDGES_MS), **{name: histogram(n, ms) for name in names}}


def stream(units: int = 3, **live: Any) -> dict[str, Any]:
    acquire = {
        "samples": 600_000, "counters": {"messages": 20_000, "malformed": 0, "resets": 0, "gaps": 1}, "ring": {"capacity": 400_000, "behind": {"record": 400, "live": 20}},
        "row_bytes": 768, "clock": {"sample": 1, "t_ns": 1, "fs_hz": 20_000.4, "ppm": 20.0, "ppm_error": 0.1, "rms_ms": 0.05, "seconds": 30}, "stages": stages("acquire"),
    }  # fmt: skip
    record = {
        "samples": 599_600,
        "flushed": 599_600,
        "bytes": 599_600 * 768,
        "free_bytes": 5e11,
        "lost": [[10, 20]],
        "stages": stages("record"),
    }
    lived = {
        "rates_hz": {str(u): 1.5 * u for u in range(units)}, "samples": 599_000, "behind": 20, "units": units, "doubtful": [1], "latency_ms": {"n": 1000, "p50": 2.0},
        "stages": stages("wait", "clean", "detect", "sort", "act", "publish", "chunk", "spike"), "blind": {"samples": {"gap": 10.0, "artifact": 5.5}, "ratio": 0.01},
        "early": {"told": 900, "confirmed": 880, "withdrawn": 19, "latency_ms": {"n": 900, "p50": 1.2}},
        "act": {"armed": ["rule"], "stopped": "", "count": 4, "decisions": {"sent": 4, "refused": 2}, "refusals": {"rate": 2}},
        "counters": {"spikes": 1000, "mua": 50, "deadline_missed": 3, "skipped_samples": 0, "chunks": 30_000, "sent": 5000, "dropped": 0, "malformed": 1, "told_dropped": 0},
    }  # fmt: skip
    return {
        "samples": 600_000, "fs_hz": 20_000.0, "channels": 384, "first_sample": 0, "gaps": 1, "gap_samples": 10, "processes": {"acquire": acquire, "record": record, "live": {**lived, **live}},
        "pids": {"acquire": 2, "record": 3, "live": 4}, "lives": {"acquire": 0, "record": 0, "live": 1}, "clock": {"reference": "A", "steps": 0, "error_ms": 0.2}, "calibration": {"state": "done", "fraction": 1.0, "stage": ""},
    }  # fmt: skip


def status(**more: Any) -> dict[str, Any]:
    return {
        "rig": "rigA", "pid": 1, "state": "recording", "session": "2026-11-21T14-03-22_rigA", "folder": "/data/s1", "error": "", "streams": {"A": stream(), "B": stream(2)},
        "disk_free_gb": 500.0, "cpu": {"A.live": 12.5}, "ports": {"control": {"requests": 10, "refused": 1, "malformed": 2}, "health": {"sent": 100}},
        "jobs": {"queued": 1, "running": 1, "done": 7, "failed": 0, "cancelled": 0, "ended": {"done": 3, "environment": 1, "resource": 0}, "now": [{"job": 9, "session": "s0", "stage": "sort", "overall": 0.4, "text": "batch 3"}]},
        "gpus": [{"index": 0, "name": "X", "memory_used_mb": 1000.0, "memory_mb": 80_000.0, "celsius": 40.0, "busy_ratio": 0.2}], "alarms": [],
        "mqtt": {"connected": True, "waiting": 0, "trouble": "", "dropped": 0, "events": 12}, "web": {"url": "http://127.0.0.1:5575/", "pid": 9, "lives": 1, "problem": ""}, "lsl": {"pid": 10, "lives": 0}, **more,
    }  # fmt: skip
