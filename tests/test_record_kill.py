"""kill -9 of the recorder: what was flushed is there, and a restarted recorder leaves neither hole
nor repetition.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from record_rig import FIRST, Feed, config, recorder, samples, stream

from spiked.errors import RecordingError
from spiked.record import superblock
from spiked.record.nwbfile import DATA, EVENTS, P_SAMPLES, POSITION
from spiked.record.recover import recover
from spiked.record.writer import SessionWriter
from spiked.ring import Ring

RING_S = 20.0


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    path = Path("/dev/shm") / f"spiked-test-{os.getpid()}-{time.monotonic_ns()}.ring"
    yield Ring.create(path, stream(128), RING_S)
    path.unlink()


def until(condition, timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def kill(process) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_killed_again_and_again_the_file_is_what_was_sent(tmp_path: Path, ring: Ring) -> None:
    """Five lives, killed at random moments; the last one ends properly."""
    feed, path, rng = Feed(ring), tmp_path / "probe.nwb", np.random.default_rng(3)
    feed.start(speed=0.25)  # a busy computer starts a recorder late; the ring holds that long
    for _ in range(4):
        process = recorder(ring.path, path)
        assert process.stdout.readline() == "ready\n"
        before = ring.reader_position("record")
        until(lambda before=before: ring.reader_position("record") > before)
        time.sleep(rng.uniform(0, 0.4))
        kill(process)
        assert superblock.read(path).open_for_write
        time.sleep(rng.uniform(0, 0.2))
    process = recorder(ring.path, path)
    until(lambda: ring.reader_position("record") > ring.next_sample - 20000)
    feed.stop()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "lost" not in out
    sent = ring.committed
    with h5py.File(path) as f:
        assert f[DATA].shape == (sent, ring.info.n_channels)
        for a in range(0, sent, 20000):
            b = min(sent, a + 20000)
            assert np.array_equal(f[DATA][a:b], samples(FIRST + a, FIRST + b, ring.info)), a
        told = [t.decode() for t in f[EVENTS]["text"][:]]
    rows, _, missed = ring.rows("events", 0)
    assert missed == 0 and told == [t.decode() for t in rows["text"]]


@pytest.mark.slow
def test_after_a_kill_everything_flushed_is_there(tmp_path: Path) -> None:
    """All die, the ring too: a SWMR reader opens the file, and recovery closes it at the last flush."""
    rng, lost_ms, life = np.random.default_rng(5), [], -1
    # three lives; more where the computer was too busy for the recorder to flush on time
    while len(lost_ms) < 3 or (np.median(lost_ms) >= 200 and len(lost_ms) < 9):
        life += 1
        path, ring = tmp_path / f"{life}.nwb", Ring.create(tmp_path / f"{life}.ring", stream(128), RING_S)
        process = recorder(ring.path, path)
        assert process.stdout.readline() == "ready\n"
        feed = Feed(ring)
        feed.start()
        until(lambda ring=ring: ring.reader_position("record") > FIRST)
        time.sleep(rng.uniform(0.3, 0.8))
        sent = ring.next_sample
        kill(process)
        done = ring.reader_position("record")
        feed.stop()
        lost_ms.append((sent - done) / ring.info.fs_hz * 1000)
        with pytest.raises(OSError, match="already open for write"):
            h5py.File(path)
        with h5py.File(path, "r", swmr=True) as f:
            whole = int(f[POSITION][P_SAMPLES])
            assert FIRST + whole >= done
            assert np.array_equal(f[DATA][:whole], samples(FIRST, FIRST + whole, ring.info))
        report = recover(path)
        assert report.repaired and report.samples == whole
        with h5py.File(path) as f:
            assert np.array_equal(f[DATA][:], samples(FIRST, FIRST + whole, ring.info))
            assert np.all(np.diff(f[EVENTS]["sample"][:]) > 0)
        assert not recover(path).repaired
    assert np.median(lost_ms) < 200, lost_ms  # flush period, plus what a busy machine adds


def test_reading_while_recording(tmp_path: Path, ring: Ring) -> None:
    feed, path = Feed(ring), tmp_path / "probe.nwb"
    feed.start(speed=0.25)
    process = recorder(ring.path, path)
    until(lambda: ring.reader_position("record") > FIRST)
    lengths = [0]
    with h5py.File(path, "r", swmr=True) as f:
        data, position = f[DATA], f[POSITION]

        def longer() -> bool:
            position.refresh()
            return int(position[P_SAMPLES]) > lengths[-1]

        for _ in range(4):
            until(longer)
            data.refresh()
            n = int(position[P_SAMPLES])
            assert np.array_equal(
                data[max(0, n - 2000) : n], samples(FIRST + max(0, n - 2000), FIRST + n, ring.info)
            )
            lengths.append(n)
            time.sleep(0.3)
    with pytest.raises(RecordingError, match="running process"):
        recover(path)
    feed.stop()
    process.communicate(timeout=240)
    assert np.all(np.diff(lengths) > 0) and len(lengths) == 5


def test_dead_for_longer_than_the_ring_holds(tmp_path: Path) -> None:
    """What the ring lost is zero in the file, listed there, and told."""
    ring = Ring.create(tmp_path / "ring", stream(), 2.0)
    feed, path, told = Feed(ring), tmp_path / "probe.nwb", []
    feed.put(8000)
    first = SessionWriter(path, ring, config())
    while first.step():
        pass
    first._leave()  # it ends here without a word; the file stays open for continuing
    for _ in range(10):
        feed.put(10000)
    ring.end()
    second = SessionWriter(path, ring, config(), on_lost=told.append)
    second.run()
    assert len(told) == 1
    gap = told[0]
    assert gap.start == FIRST + 8000 and gap.stop > gap.start
    with h5py.File(path) as f:
        data = f[DATA][:]
        table = f["intervals/invalid_times"]
        assert (table["start_sample"][0], table["stop_sample"][0]) == (gap.start, gap.stop)
        assert table["reason"][0] == b"lost"
    assert len(data) == ring.committed
    expected = samples(FIRST, FIRST + len(data), ring.info)
    expected[gap.start - FIRST : gap.stop - FIRST] = 0
    assert np.array_equal(data, expected)


def test_a_finalized_file_is_not_continued(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "ring", stream(), 2.0)
    feed = Feed(ring)
    feed.put(1000)
    writer = SessionWriter(tmp_path / "probe.nwb", ring, config())
    writer.step()
    writer.finish()
    recover(tmp_path / "probe.nwb")
    before = (tmp_path / "probe.nwb").read_bytes()
    with pytest.raises(RecordingError, match="is complete"):
        SessionWriter(tmp_path / "probe.nwb", ring, config())
    assert (tmp_path / "probe.nwb").read_bytes() == before


def test_a_file_of_another_acquisition_is_refused(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "ring", stream(), 2.0)
    feed = Feed(ring)
    feed.put(1000)
    writer = SessionWriter(tmp_path / "probe.nwb", ring, config())
    writer.step()
    writer.finish()
    other = Ring.create(tmp_path / "other", stream(), 2.0)
    Feed(other, FIRST + 1).put(1000)
    with pytest.raises(RecordingError, match="another acquisition"):
        SessionWriter(tmp_path / "probe.nwb", other, config())


def test_a_session_without_samples_leaves_no_file(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "ring", stream(), 2.0)
    ring.end()
    SessionWriter(tmp_path / "probe.nwb", ring, config()).run()
    assert not (tmp_path / "probe.nwb").exists()
    (tmp_path / "session.toml").touch()
    assert "nothing was recorded" in str(recover(tmp_path))
