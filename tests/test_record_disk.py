"""Full disks, damaged files, and edits that die half way."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_rig import FIRST, Feed, config, samples, stream

from spiked.errors import RecordingError
from spiked.record import edit, superblock
from spiked.record.finalize import finalize
from spiked.record.nwbfile import DATA, LIBVER, POSITION, create
from spiked.record.recover import recover
from spiked.record.writer import SessionWriter
from spiked.ring import Ring


def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system to fill: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from tmpfs(tmp_path / "small", "8m")


def recorded(folder: Path, n: int = 20000) -> tuple[SessionWriter, Ring]:
    """A writer that has flushed n samples and is still open."""
    ring = Ring.create(folder / "ring", stream(), 4.0)
    feed = Feed(ring)
    feed.put(n)
    feed.event(1)
    writer = SessionWriter(folder / "probe.nwb", ring, config())
    while writer.step():
        pass
    return writer, ring


def die(writer: SessionWriter) -> bytes:
    """The file as a kill -9 leaves it now."""
    from spiked.record.disk import abandon

    abandon(writer._file)
    writer._file = None
    writer._leave()
    return writer.path.read_bytes()


def test_a_full_disk_leaves_what_was_flushed(tmp_path: Path, small_disk: Path) -> None:
    info = stream(128)
    ring = Ring.create(tmp_path / "ring", info, 4.0)
    feed = Feed(ring)
    path = small_disk / "probe.nwb"
    writer = SessionWriter(path, ring, config())
    flushed = 0
    with pytest.raises(RecordingError, match=r"cannot write .* samples are safe") as failure:  # noqa: PT012
        while True:
            feed.put(2000)
            writer.step()
            flushed = writer.samples
    assert "\n" not in str(failure.value)
    assert flushed > 10000
    with h5py.File(path, "r", swmr=True) as f:
        assert np.array_equal(f[DATA][:flushed], samples(FIRST, FIRST + flushed, info))
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    report = recover(path)
    assert report.repaired and report.samples == flushed
    with h5py.File(path) as f:
        assert np.array_equal(f[DATA][:], samples(FIRST, FIRST + flushed, info))


def test_recovery_on_a_full_disk_changes_nothing(tmp_path: Path, small_disk: Path) -> None:
    writer, _ = recorded(tmp_path)
    dead = die(writer)
    path = small_disk / "probe.nwb"
    path.write_bytes(dead)
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):  # noqa: PT012
        while True:
            filler.write(bytes(4096))
    with pytest.raises(RecordingError, match="left as it was"):
        recover(path)
    assert path.read_bytes() == dead
    (small_disk / "filler").unlink()
    assert recover(path).samples == 20000


def test_too_little_free_space_ends_the_recording_cleanly(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="min_free_gb"):
        SessionWriter(
            tmp_path / "probe.nwb", Ring.create(tmp_path / "ring", stream(), 1.0), config(min_free_gb=1e6)
        )
    writer, ring = recorded(tmp_path)
    writer.config = config(min_free_gb=1e6)
    Feed.put(feed_on(ring), 1000)
    with pytest.raises(RecordingError, match=r"only .* GB free"):
        writer.step()
    assert not superblock.read(writer.path).open_for_write
    with h5py.File(writer.path) as f:
        assert np.array_equal(f[DATA][:], samples(FIRST, FIRST + 20000, ring.info))


def feed_on(ring: Ring) -> Feed:
    """A feed that carries on in a ring that has begun."""
    from spiked.ring import RingWriter

    feed = Feed.__new__(Feed)
    feed.ring, feed.writer = ring, RingWriter(ring)
    return feed


def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "ring", stream(), 1.0)
    with pytest.raises(RecordingError, match="cannot record into"):
        SessionWriter(tmp_path / "absent" / "probe.nwb", ring, config())


@pytest.mark.parametrize("what", ["text", "empty", "foreign", "oldhdf5"])
def test_what_is_no_session_file_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "probe.nwb"
    if what == "foreign":
        with h5py.File(path, "w", libver=LIBVER) as f:
            f["x"] = np.arange(10)
    elif what == "oldhdf5":
        with h5py.File(path, "w") as f:
            f["x"] = np.arange(10)
    else:
        path.write_bytes(b"nothing" * 20 if what == "text" else b"")
    before = path.read_bytes()
    for attempt in (recover, finalize):
        with pytest.raises(RecordingError) as failure:
            attempt(path)
        assert "\n" not in str(failure.value)
    assert path.read_bytes() == before
    with pytest.raises(RecordingError, match="does not exist"):
        recover(tmp_path / "absent.nwb")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(RecordingError, match="not a session folder"):
        recover(elsewhere)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5])
def test_a_file_cut_short_is_refused_and_left_alone(tmp_path: Path, share: float) -> None:
    writer, _ = recorded(tmp_path)
    whole = die(writer)
    cut = whole[: int(share * len(whole))]
    writer.path.write_bytes(cut)
    with pytest.raises(RecordingError) as failure:
        recover(writer.path)
    assert "\n" not in str(failure.value)
    assert writer.path.read_bytes() == cut


def test_recovery_killed_at_any_write_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop after every prefix of the redo log's pages: the next recovery completes it."""
    writer, ring = recorded(tmp_path)
    dead = die(writer)
    expected = samples(FIRST, FIRST + 20000, ring.info)
    apply, pages = edit._apply, 0

    class Killed(BaseException):
        pass

    def count(changes: list[tuple[int, bytes]], size: int, fd: int) -> None:
        nonlocal pages
        pages = len(changes)
        apply(changes, size, fd)

    monkeypatch.setattr(edit, "_apply", count)
    recover(writer.path)
    assert pages > 3
    for n in range(pages):
        writer.path.write_bytes(dead)

        def partly(changes: list[tuple[int, bytes]], _size: int, fd: int, n: int = n) -> None:
            for offset, data in changes[:n]:
                os.pwrite(fd, data, offset)
            raise Killed

        monkeypatch.setattr(edit, "_apply", partly)
        with pytest.raises(Killed):
            recover(writer.path)
        monkeypatch.setattr(edit, "_apply", apply)
        assert recover(writer.path).samples == 20000
        assert not edit.redo_path(writer.path).exists()
        with h5py.File(writer.path) as f:
            assert np.array_equal(f[DATA][:], expected)


def test_a_torn_redo_log_is_dropped(tmp_path: Path) -> None:
    writer, _ = recorded(tmp_path)
    die(writer)
    edit.redo_path(writer.path).write_bytes(edit.HEAD.pack(edit.MAGIC, 0, 0, 0) + b"torn log")
    assert recover(writer.path).samples == 20000


def test_an_edit_that_fails_leaves_the_file(tmp_path: Path) -> None:
    writer, ring = recorded(tmp_path)
    writer.finish()
    before = writer.path.read_bytes()
    with pytest.raises(ZeroDivisionError), edit.editing(writer.path) as f:  # noqa: PT012
        f[DATA][:100] = 7
        f.create_dataset("scratch/more", data=np.arange(100000))
        f.flush()
        1 / 0  # noqa: B018
    assert writer.path.read_bytes() == before
    with edit.editing(writer.path) as f:
        f[DATA][:100] = 7
    with h5py.File(writer.path) as f:
        assert np.all(f[DATA][:100] == 7)
        assert np.array_equal(f[DATA][100:], samples(FIRST + 100, FIRST + 20000, ring.info))


def test_an_empty_file_whose_maker_died_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "session.toml").touch()
    (tmp_path / "probe.nwb.part").write_bytes(b"half")
    create(tmp_path / "probe.nwb", stream(), config(), datetime.now(UTC), "s", FIRST)
    report = recover(tmp_path)
    assert report.samples == 0 and not report.repaired
    assert not (tmp_path / "probe.nwb.part").exists()


def test_the_checksum_is_hdf5s(tmp_path: Path) -> None:
    """lookup3 against files that HDF5 wrote; every bit of the superblock counts."""
    path = tmp_path / "a.h5"
    for version, n in (("v110", 3), ("v112", 120), ("v114", 999)):
        with h5py.File(path, "w", libver=(version, version)) as f:
            f["x"] = np.arange(n)
        head = path.read_bytes()[: superblock.SIZE]
        block = superblock.parse(head, path)
        assert not block.open_for_write and block.eof == path.stat().st_size
        assert block.cleared(0) == head
        for at in range(8, 44):
            with pytest.raises(RecordingError):
                superblock.parse(head[:at] + bytes([head[at] ^ 16]) + head[at + 1 :], path)


@given(
    st.lists(st.tuples(st.integers(0, 30000), st.binary(min_size=1, max_size=9000)), max_size=12),
    st.integers(0, 40000),
)
@settings(max_examples=40, deadline=None)
def test_the_overlay_is_a_file(writes: list[tuple[int, bytes]], cut: int) -> None:
    """Any writes and a truncation through the overlay, then committed, equal the same on a plain file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path, plain = Path(folder) / "a", Path(folder) / "b"
        content = np.random.default_rng(0).bytes(20000)
        for p in (path, plain):
            p.write_bytes(content)
        overlay = edit.Overlay(path)
        with open(plain, "r+b") as f:
            for at, data in writes:
                for target in (overlay, f):
                    target.seek(at)
                    target.write(data)
            for target in (overlay, f):
                if cut > 20000:
                    target.truncate(cut)
                target.seek(0)
            assert path.read_bytes()[:20000] == content
            assert overlay.read() == f.read()
        overlay.commit()
        overlay.release()
        assert path.read_bytes() == plain.read_bytes()


def test_position_tells_what_is_whole(tmp_path: Path) -> None:
    writer, _ = recorded(tmp_path)
    with h5py.File(writer.path, "r", swmr=True) as f:
        assert f[POSITION][:].tolist() == [FIRST, 20000, 0, 1, 0, 1, FIRST, 0]
    writer.finish()
