"""`spiked bench clocks`: offset errors of two simulated streams over hours, and how soon a jump is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from spiked.bench.clock_scene import Device, Played, Pulses, play, table_error_ms
from spiked.bench.machine import conditions

METHODS: dict[str, Pulses | None] = {
    "arrival": None,
    "pulses, 1 Hz": Pulses(missing=0.05, extra=0.03),
    "pulses, random, 1 Hz": Pulses(random=True, missing=0.05, extra=0.03),
}
JUMP_AT_S = 120.0
JUMPS_S = (0.0012, 0.003, 0.02, 0.2)  # by arrival only those from 4 ms on can be seen


def devices(lost: tuple[tuple[float, int], ...] = (), jitter_s: float = 0.003) -> tuple[Device, Device]:
    """A Maxwell array and an Open Ephys probe, 20 ppm apart on average, both drifting with the room."""
    a = Device(20_000.0, 20, 3.0, 1.5, 1100.0, first=5_000_000, least_delay_s=0.0003, jitter_s=jitter_s)
    b = Device(30_000.0, 696, -17.0, 2.5, 1500.0, 0.123, 777, 0.0006, jitter_s, lost)
    return a, b


def bench(hours: float, seeds: int, say: Callable[[str], None] = lambda _s: None) -> dict[str, Any]:
    """Errors in ms of the newest sample, told once a second, over all seeds; seconds until each jump was told."""
    offsets, jumps = {}, {}
    for name, pulses in METHODS.items():
        played = [_hour(pulses, round(3600 * hours), seed) for seed in range(seeds)]
        error = np.abs(np.concatenate([p.error_ms for p, _ in played]))
        offsets[name] = {
            "median_ms": float(np.median(error)), "p99_ms": float(np.quantile(error, 0.99)), "max_ms": float(error.max()),
            "told_ms": float(np.median(np.concatenate([p.told_ms for p, _ in played]))), "table_max_ms": max(t for _, t in played),
            "known_after_s": max(float(p.seconds[0]) for p, _ in played), "false_jumps": sum(len(p.steps) for p, _ in played),
        }  # fmt: skip
        say(f"{name}: {offsets[name]}")
        jumps[name] = [_jump(pulses, size, seeds) for size in JUMPS_S]
        say(f"{name}: jumps {jumps[name]}")
    return {
        "bench": "clocks",
        "machine": conditions(),
        "hours": hours,
        "seeds": seeds,
        "offset": offsets,
        "jumps": jumps,
    }


def _hour(pulses: Pulses | None, seconds: int, seed: int) -> tuple[Played, float]:
    a, b = devices()
    p = play(a, b, seconds, pulses, seed)
    return p, float(np.abs(table_error_ms(p, a, b)).max())


def _jump(pulses: Pulses | None, size_s: float, seeds: int) -> dict[str, Any]:
    """The device loses this much without a word; None where it was not noticed within 30 s."""
    waits: list[float] = []
    for seed in range(seeds):
        at = JUMP_AT_S + seed / seeds
        a, b = devices(((at, round(size_s * 30_000)),))
        steps = play(a, b, round(JUMP_AT_S) + 30, pulses, seed, busy=False).steps
        waits += [when - at for when, _, _ in steps[:1]]
    told = {"n": len(waits), "longest_s": round(max(waits), 2)} if waits else {"n": 0, "longest_s": None}
    return {"jump_ms": 1000 * size_s, "of": seeds, **told}
