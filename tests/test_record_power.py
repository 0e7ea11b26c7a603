"""The power goes: what a disk holds then is any mixture of the last sync and what was written since."""

from __future__ import annotations

import os
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from record_rig import FIRST, Feed, config, samples, stream
from test_record_disk import die

from spiked.errors import RecordingError
from spiked.record.nwbfile import DATA, EVENTS, GAPS, P_SAMPLES, POSITION, SYNCED
from spiked.record.recover import recover
from spiked.record.writer import SessionWriter
from spiked.ring import Ring

PAGE = 4096


def written(folder: Path) -> tuple[Path, bytes, bytes, int]:
    """A file's bytes as of its last sync, as they were when the power went, and the samples synced."""
    ring = Ring.create(folder / "ring", stream(64), 20.0)
    feed = Feed(ring)
    writer = SessionWriter(folder / "probe.nwb", ring, config(fsync_ms=1e6))

    def put(seconds: float) -> None:
        for _ in range(int(seconds * 10)):
            feed.gap(5)
            feed.event(1)
            feed.put(1995)
            while writer.step():
                pass

    put(1.5)
    os.fdatasync(writer._lock.fd)
    synced = writer.samples
    writer._syncer.synced = FIRST + synced
    put(0.2)  # with the next steps the file says what was synced
    before = writer.path.read_bytes()
    put(3.0)
    after = die(writer)
    with h5py.File(writer.path, "r", swmr=True) as f:
        life = f[SYNCED].id.get_offset() + 8
    before, after = (
        b[:life] + b"\1" + bytes(7) + b[life + 8 :] for b in (before, after)
    )  # it was another boot
    return writer.path, before, after, synced


def right(path: Path, least: int) -> int:
    """Every sample that is left is what was sent; how many there are."""
    with h5py.File(path) as f:
        data = f[DATA][:]
        expected = samples(FIRST, FIRST + len(data), stream(64))
        for start, stop in zip(f[GAPS]["start_sample"][:], f[GAPS]["stop_sample"][:], strict=True):
            expected[start - FIRST : stop - FIRST] = 0
        assert np.array_equal(data, expected) and len(data) >= least
        assert f[POSITION][P_SAMPLES] == len(data)
        assert len({len(c) for c in f[GAPS].values()} | {len(c) for c in f[EVENTS].values()}) <= 2
    return len(data)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_power_cut_costs_what_was_not_synced(tmp_path: Path, share: float) -> None:
    """Low pages are written first, and a file's new length last: the index is ahead of the samples."""
    path, before, after, synced = written(tmp_path)
    path.write_bytes(after[: len(before) + int(share * (len(after) - len(before)))])
    (told,) = recover(path).files
    assert told.repaired and told.cut > 0 and f"without {told.cut} samples" in str(told)
    assert right(path, synced) == told.samples
    again = path.read_bytes()
    assert not recover(path).repaired and path.read_bytes() == again


def test_the_page_of_the_position_may_be_the_only_one_that_came(tmp_path: Path) -> None:
    path, before, after, synced = written(tmp_path)
    whole = tmp_path / "whole.nwb"
    whole.write_bytes(after)
    with h5py.File(whole, "r", swmr=True) as f:
        at = f[POSITION].id.get_offset() // PAGE * PAGE
    path.write_bytes(before[:at] + after[at : at + PAGE] + before[at + PAGE :])
    (told,) = recover(path).files
    assert told.cut > 0
    right(path, synced)


@pytest.mark.parametrize("seed", range(4))
def test_samples_that_were_not_written_back_do_not_read_as_zeros(tmp_path: Path, seed: int) -> None:
    """The index and the position were, and of the chunk that they tell of some pages."""
    path, before, after, synced = written(tmp_path)
    rng = np.random.default_rng(seed)
    image = bytearray(before)
    pages = [p for p in range(0, len(before), PAGE) if before[p : p + PAGE] != after[p : p + PAGE]]
    empty = [p for p in pages if not any(before[p : p + PAGE])]
    keep = set(rng.permutation(empty)[: len(empty) // 2].tolist())
    for p in pages:
        if p not in keep:
            image[p : p + PAGE] = after[p : min(p + PAGE, len(before))]
    path.write_bytes(bytes(image))
    (told,) = recover(path).files
    assert told.cut > 0 and right(path, synced) == told.samples


def test_in_the_same_life_of_the_computer_nothing_is_doubted(tmp_path: Path) -> None:
    """After a kill all that was flushed is there: zeros are what a dead stream sent."""
    ring = Ring.create(tmp_path / "ring", stream(64), 20.0)
    feed = Feed(ring)
    writer = SessionWriter(tmp_path / "probe.nwb", ring, config(fsync_ms=50))
    for k in range(30):
        if k < 15:
            feed.put(1000)
        else:
            feed.writer.write(np.zeros((1000, 64), "uint16"), 0)
        if k == 28:  # the last step notes what a disk, however slow, has by then
            until = time.monotonic() + 120
            while writer.synced_sample <= FIRST and time.monotonic() < until:
                time.sleep(0.01)
        while writer.step():
            pass
        time.sleep(0.01)
    path = writer.path
    path.write_bytes(die(writer))
    with h5py.File(path, "r", swmr=True) as f:
        assert f[SYNCED][0] > 0
    assert recover(path).files[0].cut == 0 and recover(path).samples == 30_000


def test_a_copy_that_lacks_synced_samples_is_left_alone(tmp_path: Path) -> None:
    path, before, after, _ = written(tmp_path)
    cut = after[: len(before) * 3 // 4]
    path.write_bytes(cut)
    with pytest.raises(RecordingError, match=r"cut short|left as it was"):
        recover(path)
    assert path.read_bytes() == cut
    path.write_bytes(after)
    assert recover(path).files[0].cut == 0
    with h5py.File(path) as f:
        assert f[SYNCED][0] > 0
