"""The receiving end of a trigger socket: replace `fire` by what drives your hardware.

    python stimulator.py --address tcp://127.0.0.1:5580

It belongs to an [[output]] of kind "zmq". Every command is answered, so that the ledger knows what became of it.
"""

from __future__ import annotations

import argparse
import time

from spiked_client import ClientError, Stimulator, Wanted


def fire(wanted: Wanted) -> None:
    """Give the stimulus. Raise OSError when the hardware does not."""


def run(address: str, seconds: float) -> int:
    """Carry out commands for so long; how many."""
    done, end = 0, time.monotonic() + seconds
    with Stimulator(address, "example") as stimulator:
        while time.monotonic() < end:
            wanted = stimulator.receive(0.5)
            if wanted is None:
                continue
            try:
                fire(wanted)
            except OSError as e:
                stimulator.answer(wanted, False, str(e))
            else:
                stimulator.answer(wanted)
                done += 1
    return done


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--address", default="tcp://127.0.0.1:5580")
    p.add_argument("--seconds", type=float, default=float("inf"))
    given = p.parse_args()
    try:
        print(f"{run(given.address, given.seconds)} stimuli")  # noqa: T201
    except ClientError as e:
        raise SystemExit(f"{e}") from None
