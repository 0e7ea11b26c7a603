"""record: ring -> NWB file. No torch."""

from __future__ import annotations

import argparse
import time

from spiked import config as configuration
from spiked.priority import raise_priority
from spiked.processes.link import Link, wait_for_ring
from spiked.record.writer import SessionWriter
from spiked.stream import Gap
from spiked.timing import told as told_stages

TELL_S = 0.25


def main(args: argparse.Namespace, link: Link) -> None:
    config = configuration.load(args.session / "session.toml")
    link.tell("up")
    ring = wait_for_ring(args.ring, link)
    if ring is None:
        return
    link.tell(
        "log", level="info", text=f"record runs at {raise_priority('record', config.rig.priority)} priority"
    )
    path = args.session / f"{args.stream}.nwb"
    told = 0.0
    lost: list[list[int]] = []

    def progress(samples: int, flushed: int, size: int, force: bool = False) -> None:
        nonlocal told
        now = time.monotonic()
        if force or now - told > TELL_S:
            told = now
            link.tell(
                "progress",
                samples=samples,
                flushed=flushed,
                bytes=size,
                free_bytes=writer.free_bytes,
                lost=lost,
                stages=told_stages(record=writer.step_ms),
            )

    def on_lost(gap: Gap) -> None:
        lost.append([gap.start, gap.stop])
        link.tell("lost", start=gap.start, stop=gap.stop)
        link.tell(
            "log",
            level="error",
            text=f"the recorder fell behind: samples {gap.start} to {gap.stop} are zero in the file",
        )

    writer = SessionWriter(
        path, ring, config, session_id=args.session.name, on_progress=progress, on_lost=on_lost
    )
    if writer.continued:
        link.tell("log", level="warning", text=f"recording goes on at sample {writer.flushed_sample}")

    def over() -> bool:
        """Looked at before every flush; also tells that this process is alive while nothing comes."""
        if writer.samples:
            progress(writer.samples, writer.flushed_sample, writer.samples * writer.row_bytes)
        return link.orphaned and ring.forsaken

    # a record process ends with its ring, not with a signal: the supervisor ends the ring when acquisition has
    writer.run(over)
    progress(writer.samples or (ring.committed if path.exists() else 0), ring.next_sample, 0, force=True)
    link.tell("done")
