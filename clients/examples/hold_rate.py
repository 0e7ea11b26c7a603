"""Hold the population's firing rate: stimulate while it is below a bound, and only while everything is seen.

    python hold_rate.py --output pulser --electrodes 12 --low-hz 80 --high-hz 200 --seconds 60

The decision is made here, with every tick, which costs a few milliseconds more than a rule inside the daemon and can be any
Python. The daemon still holds the limits of the rig's [act] section, and disarms when this program stops taking ticks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter, deque
from typing import Any

from spiked_client import Client, ClientError, Tick


class Rate:
    """Spikes per second over the last `window_ms` in which the array was seen."""

    def __init__(self, window_ms: float, fs_hz: float) -> None:
        self._fs, self._window = fs_hz, round(window_ms * fs_hz / 1000)
        self._parts: deque[tuple[int, int]] = deque()  # samples, spikes
        self._samples = self._spikes = 0

    def add(self, tick: Tick) -> None:
        if not tick.sees():  # what was blind counts neither as silence nor as activity
            return
        self._parts.append((max(tick.stop - tick.first, 0), len(tick.spikes)))
        self._samples += self._parts[-1][0]
        self._spikes += self._parts[-1][1]
        while self._samples - self._parts[0][0] >= self._window:
            n, spikes = self._parts.popleft()
            self._samples, self._spikes = self._samples - n, self._spikes - spikes

    @property
    def hz(self) -> float | None:
        """None until the window is full."""
        return self._spikes / self._samples * self._fs if self._samples >= self._window else None


async def run(args: argparse.Namespace) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    in_bounds = ticks = 0
    async with Client(control_port=args.control_port) as client:
        status = await client.control.status()
        rate = Rate(args.window_ms, float(next(iter(status["streams"].values()))["fs_hz"]))
        async with client.loop(deadline_ms=args.deadline_ms, lease_s=args.lease_s, timeout=5) as loop:
            await loop.arm()
            end, next_at = time.monotonic() + args.seconds, 0.0
            async for tick in loop:
                now = time.monotonic()
                if now > end:
                    break
                rate.add(tick)
                if rate.hz is None:
                    continue
                ticks += 1
                in_bounds += args.low_hz <= rate.hz <= args.high_hz
                if rate.hz < args.low_hz and now >= next_at and not tick.missed:
                    next_at = now + args.every_ms / 1000
                    reply = await loop.stimulate(args.output, args.pattern, electrodes=args.electrodes)
                    outcomes[" ".join(filter(None, (reply["outcome"], reply["reason"])))] += 1
            counters = dict(loop.counters)
    return {
        "stimuli": dict(outcomes),
        "share_of_ticks_in_bounds": round(in_bounds / max(ticks, 1), 3),
        **counters,
    }


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--output", required=True, help="name of an [[output]] in the rig's file")
    p.add_argument("--pattern", default="single")
    p.add_argument("--electrodes", type=int, nargs="+", default=[], help="channel indices")
    p.add_argument("--low-hz", type=float, required=True)
    p.add_argument("--high-hz", type=float, default=float("inf"))
    p.add_argument("--window-ms", type=float, default=500.0)
    p.add_argument("--every-ms", type=float, default=200.0, help="least time between two stimuli")
    p.add_argument("--seconds", type=float, default=60.0)
    p.add_argument("--deadline-ms", type=float, default=20.0)
    p.add_argument(
        "--lease-s", type=float, default=2.0, help="without a tick taken for so long it is disarmed"
    )
    p.add_argument("--control-port", type=int, default=5572)
    return p.parse_args()


if __name__ == "__main__":
    try:
        print(json.dumps(asyncio.run(run(arguments())), indent=2))  # noqa: T201
    except ClientError as e:
        raise SystemExit(f"{e}") from None
