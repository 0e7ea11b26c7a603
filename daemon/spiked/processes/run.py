"""`python -m spiked.processes.run ROLE ...`: the one way a child starts; errors become one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import traceback
from pathlib import Path

from spiked.act.arming import Arming
from spiked.errors import SpikedError
from spiked.processes.link import Link

ROLES = {
    "acquire": "spiked.processes.acquire",
    "record": "spiked.processes.record",
    "live": "spiked.live.process",
    "finalize": "spiked.processes.finalize",
}

GOODBYE_S = 10.0  # for last words, at most: a supervisor that is held up for seconds still hears them


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spiked process")
    parser.add_argument("role", choices=sorted(ROLES))
    parser.add_argument("--session", type=Path, required=True)
    parser.add_argument("--stream", required=True)
    parser.add_argument("--ring", type=Path, required=True)
    parser.add_argument("--life", type=int, default=0, help="how often this process was restarted")
    args = parser.parse_args(argv)
    link = Link(args.role)
    if (
        args.role == "live"
    ):  # which takes seconds to start: an emergency stop must not end it instead, unheeded
        signal.signal(signal.SIGUSR2, lambda *_: Arming(args.session).stop("signal SIGUSR2"))
    try:
        importlib.import_module(ROLES[args.role]).main(args, link)
    except SpikedError as e:
        link.tell("fatal", error=str(e), kind=type(e).__name__, code=e.exit_code)
        return e.exit_code
    except Exception as e:  # noqa: BLE001 - the last line of defence of a process: say it and exit
        link.tell("crash", error=f"{type(e).__name__}: {e}", trace=traceback.format_exc(limit=20))
        traceback.print_exc()
        return 70
    finally:
        link.flush(GOODBYE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
