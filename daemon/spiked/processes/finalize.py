"""finalize: what the session learned besides samples goes into the closed file."""

from __future__ import annotations

import argparse

from spiked.errors import RecordingError
from spiked.processes.link import Link
from spiked.record.recover import recover


def main(args: argparse.Namespace, link: Link) -> None:
    path = args.session / f"{args.stream}.nwb"
    if not path.exists():
        raise RecordingError(f"{path} was never begun: no sample was recorded")
    # not `finalize`: after a disk failure the file is still marked as being written, and this handles both
    recover(path)
    link.tell("done")
