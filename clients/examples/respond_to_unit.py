"""Stimulate a fixed time after a unit's spikes; a share of the decisions is sham, as the control.

    python respond_to_unit.py --output pulser --electrodes 12 --delay-ms 5 --sham 0.3 --seconds 60

The rule runs inside the daemon, within milliseconds of the spike. This program chooses the unit, arms the rule, holds the
lease, and compares what the array did after real and after sham stimuli. End it with Ctrl-C: the rule is disarmed at
once; should it crash or hang, two seconds later.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from typing import Any

import numpy as np

from spiked_client import Client, ClientError
from spiked_client.protocol import LEDGER, OUTCOMES, newest

RULE, AFTER_MS = (
    f"respond-{os.getpid()}",  # of this run: the ledger knows those of earlier ones too
    (2.0, 30.0),
)  # spikes are counted this long after where the stimulus was, or would have been


async def first_stream(client: Client, patience_s: float = 20.0) -> dict[str, Any]:
    """Status of the first stream, once its units have fired."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        streams: dict[str, Any] = (await client.control.status())["streams"]
        stream: dict[str, Any] = next(iter(streams.values()), {})
        if stream.get("processes", {}).get("live", {}).get("rates_hz"):
            return dict(stream)
        await asyncio.sleep(0.5)
    raise ClientError("there are no units that fire; wait for the calibration")


async def follow(client: Client, records: list[np.ndarray]) -> None:
    """Every record of the stimulus ledger, as it comes."""
    async for batch in client.messages("ledger", from_start=True):  # also what comes before it is connected
        records.append(batch.message.arrays["ledger"])  # noqa: PERF401 - as they come


async def settled(client: Client, records: list[np.ndarray], at_most_s: float = 30.0) -> None:
    """Until the ledger has said nothing for a second, though those who write it answer, and no decision waits for its moment any more."""
    end, said = time.monotonic() + at_most_s, -1
    while time.monotonic() < end:
        try:
            await client.control.triggers()
        except ClientError:  # they are busy: the ledger may be behind
            said = -1
        waits = newest(np.concatenate([np.zeros(0, LEDGER), *records]))["outcome"] == OUTCOMES.index("held")
        if len(records) == said and not waits.any():
            return
        said = len(records)
        await asyncio.sleep(1.0)


def responses(records: np.ndarray, spikes: np.ndarray, delay: int, fs_hz: float) -> dict[str, Any]:
    """Spikes per stimulus in the window after it, for real and sham ones; and how long the way out took."""
    first, last = (round(ms * fs_hz / 1000) for ms in AFTER_MS)
    out: dict[str, Any] = {"outcomes": {}}
    spikes = np.sort(spikes)
    for i, name in enumerate(OUTCOMES):
        at = records["sample"][records["outcome"] == i] + delay
        if len(at):
            out["outcomes"][name] = len(at)
        if len(at) and name in ("sent", "sham"):
            n = np.searchsorted(spikes, at + last) - np.searchsorted(spikes, at + first)
            out[f"spikes_after_{name}"] = round(float(n.mean()), 3)
    answered = records[records["ack_ns"] > 0]
    if len(answered):
        out["sent_to_acknowledged_ms"] = round(
            float(np.mean(answered["ack_ns"] - answered["sent_ns"])) / 1e6, 3
        )
    return out


async def run(args: argparse.Namespace) -> dict[str, Any]:
    records: list[np.ndarray] = []
    spikes: list[np.ndarray] = []
    async with Client(control_port=args.control_port) as client:
        stream = await first_stream(client)
        fs_hz, rates = float(stream["fs_hz"]), stream["processes"]["live"]["rates_hz"]
        unit = int(max(rates, key=rates.__getitem__)) if args.unit is None else args.unit
        trigger = {
            "name": RULE, "when": "unit", "units": [unit], "delay_ms": args.delay_ms, "sham_fraction": args.sham,
            "refractory_ms": args.refractory_ms, "output": args.output, "electrodes": args.electrodes, "pattern": args.pattern,
        }  # fmt: skip
        await client.control.set_trigger(trigger)
        following = asyncio.create_task(follow(client, records))
        try:
            async with client.loop(deadline_ms=args.deadline_ms, lease_s=args.lease_s, timeout=5) as loop:
                await loop.arm([RULE])
                end = time.monotonic() + args.seconds
                async for tick in loop:
                    spikes.append(tick.spikes["sample"])
                    if time.monotonic() > end:
                        break
                counters = dict(loop.counters)
            await settled(client, records)
        finally:
            following.cancel()
        await client.control.remove_trigger(RULE)
    ledger = newest(np.concatenate([np.zeros(0, LEDGER), *records]))
    ledger = ledger[ledger["rule"] == RULE.encode()]
    found = responses(
        ledger, np.concatenate([np.zeros(0, np.int64), *spikes]), round(args.delay_ms * fs_hz / 1000), fs_hz
    )
    return {"unit": unit, "decisions": len(ledger), **found, **counters}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--unit", type=int, help="default: the one that fires most")
    p.add_argument("--output", required=True, help="name of an [[output]] in the rig's file")
    p.add_argument("--pattern", default="single")
    p.add_argument("--electrodes", type=int, nargs="+", default=[], help="channel indices")
    p.add_argument("--delay-ms", type=float, default=5.0, help="from the spike's trough")
    p.add_argument("--sham", type=float, default=0.3)
    p.add_argument("--refractory-ms", type=float, default=200.0)
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
