"""What a dying writer leaves in the ring, and what its successor and the file make of it."""

from __future__ import annotations

import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from record_rig import FIRST, Feed, config, samples, stream

from spiked.errors import SpikedError
from spiked.integrity import Integrity
from spiked.record.finalize import finalize
from spiked.record.nwbfile import DATA, GAPS
from spiked.record.writer import SessionWriter
from spiked.ring import Ring, RingReader, RingWriter
from spiked.stream import Block


class Killed(Exception):
    """In the place of kill -9."""


def die() -> None:
    raise Killed


def block(start: int, stop: int, ring: Ring) -> Block:
    return Block(start, samples(start, stop, ring.info), time.monotonic_ns())


def gaps(ring: Ring) -> list[tuple[int, int]]:
    return [(int(r["start"]), int(r["stop"])) for r in ring.rows("gaps", 0)[0]]


def test_a_fill_whose_process_died_is_completed_and_told_once(tmp_path: Path) -> None:
    """A gap is listed before its zeros are written. What the next process fills is not listed over it again."""
    ring = Ring.create(tmp_path / "ring", stream(4), 1.0)
    Integrity(RingWriter(ring), wait_s=0.0).accept(block(0, 100, ring))
    with pytest.raises(Killed):
        Integrity(RingWriter(ring), wait_s=0.0, meanwhile=die).accept(block(10_100, 10_200, ring))
    assert 100 < ring.committed < 10_100
    successor = Integrity(RingWriter(ring), wait_s=0.0)
    successor.accept(block(10_400, 10_500, ring))
    assert gaps(ring) == [(100, 10_100), (10_100, 10_400)] and ring.next_sample == 10_500
    reader = RingReader(ring)
    got = np.concatenate([c.data for c in iter(lambda: reader.read(20_000), None)])
    assert np.array_equal(got[-100:], samples(10_400, 10_500, ring.info))
    assert not got[-400:-100].any() and got[-100:].all()


def test_who_fills_a_long_gap_is_heard_meanwhile(tmp_path: Path) -> None:
    """Else it is killed for its silence, and what its socket holds is lost: minutes of zeros wait for a slow disk."""
    ring = Ring.create(tmp_path / "ring", stream(4), 1.0)
    words: list[float] = []
    integrity = Integrity(RingWriter(ring), wait_s=0.1, meanwhile=lambda: words.append(time.monotonic()))
    integrity.accept(block(0, 100, ring))
    integrity.accept(block(50_100, 50_200, ring))  # nobody records: every step waits as long as it may
    # now and then the computer holds up this process itself
    assert len(words) > 20 and np.quantile(np.diff(words), 0.9) < 0.1


def test_a_gap_that_was_not_filled_to_its_end_ends_with_the_file(tmp_path: Path) -> None:
    info = stream()
    ring = Ring.create(tmp_path / "ring", info, 2.0)
    feed = Feed(ring)
    feed.put(3000)
    at = feed.writer.next_sample
    feed.writer.add_gap(at, at + 9000, "lost")
    feed.writer.write(np.zeros((1000, info.n_channels), info.dtype), time.monotonic_ns())
    feed.writer.add_gap(at + 9000, at + 9500, "lost")
    feed.writer.end()
    path = tmp_path / "probe.nwb"
    SessionWriter(path, ring, config()).run()
    finalize(path)
    with h5py.File(path) as f:
        table = {k: v[:].tolist() for k, v in f[GAPS].items() if k != "channels"}
        assert len(f[DATA]) == 4000
    assert (table["start_sample"], table["stop_sample"], table["id"]) == ([at], [at + 1000], [0])
    assert table["stop_time"] == [4000 / info.fs_hz] and len(table["reason"]) == 1


def test_a_device_may_count_from_below_zero(tmp_path: Path) -> None:
    """The recorder attaches before the first sample, when nobody knows its number."""
    ring = Ring.create(tmp_path / "ring", stream(4), 1.0)
    early = RingReader(ring, "record")
    assert early.read(100) is None
    Feed(ring, first=-500).put(1000)
    chunk = early.read(2000)
    assert chunk is not None and chunk.first_sample == -500 and len(chunk.data) == 1000


def test_a_folder_that_cannot_hold_the_ring_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpikedError, match=r"check rig\.runtime"):
        Ring.create(tmp_path / "file" / "below" / "ring", stream(4), 1.0)


def test_a_ring_is_forsaken_when_its_writer_is_gone(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "ring", stream(4), 1.0)
    assert ring.forsaken  # nobody came yet
    feed = Feed(ring)
    assert not ring.forsaken
    feed.writer.end()
    assert ring.forsaken
    assert ring.first_sample == FIRST
