"""Recordings that no sorter can use, or that one would sort into garbage without a word: found before it is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from offline_rig import codes, neurons, session, stream

from spiked.cli import main
from spiked.errors import SpikedError
from spiked.offline import failures, preflight
from spiked.offline.job import run_offline
from spiked.offline.session import StreamFiles, open_session
from spiked.record import nwbfile

SECONDS = 5.0


def quiet(fraction: float, text: str) -> None:
    pass


@pytest.fixture(scope="module")
def microvolt() -> np.ndarray:
    """(samples, 16) with three neurons; do not write into it."""
    return neurons(stream(), SECONDS, 3)[0]


def recorded(folder: Path, data: np.ndarray, dtype: str = "uint16", **info: Any) -> StreamFiles:
    """A session's stream holding `data` in microvolt, or in the device's codes when it has their type."""
    side = round(data.shape[1] ** 0.5)
    about = replace(stream(side, dtype), **info)
    stored = data if data.dtype == np.dtype(dtype) else codes(about, data)
    return open_session(session(folder / "s", about, stored)).stream(None)


def refused(s: StreamFiles, folder: Path) -> dict[str, Any]:
    """How the preflight refuses it."""
    with pytest.raises(SpikedError) as e:
        preflight.check(s, folder, preflight.Plan(20_000), quiet)
    told = failures.told(e.value)
    assert told["remedy"] and "\n" not in str(e.value) and told["stage"] == "preflight"
    return {**told, "text": str(e.value)}


def warned(s: StreamFiles, folder: Path) -> str:
    """What it says of one that can be sorted."""
    return "\n".join(preflight.check(s, folder, preflight.Plan(20_000), quiet)["warnings"])


# ---- what Kilosort has one message for, or none ------------------------------------------------------------------


def nan(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[30_000, 3] = np.nan  # costs Kilosort a batch, silently
    return x


ROWS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, str, str, str]] = {
    "not finite": (nan, "float32", "environment", "non_finite", "write the recording again"),
    "white noise": (lambda x: np.random.default_rng(1).normal(0, 5, x.shape), "uint16", "biology", "too_few_spikes", "raw traces"),
    "zeros": (lambda x: 0 * x, "uint16", "biology", "flat", "amplifier"),
    "constant": (lambda x: 0 * x + 100.0, "uint16", "biology", "flat", "amplifier"),
    "saturated": (lambda x: np.where(np.sin(np.arange(len(x)) / 50)[:, None] > 0, 900.0, -900.0) + 0 * x, "uint16", "biology", "flat", "amplifier"),
    "all channels alike": (lambda x: np.repeat(x[:, :1], x.shape[1], 1), "uint16", "environment", "same_signal", "reference"),
    "volts": (lambda x: (x * 1e-6).astype(np.float32), "float32", "environment", "gain", "1e6"),
    "gain too large": (lambda x: x * 1000, "float32", "environment", "gain", "--gain-uv"),
    "one channel": (lambda x: x[:, :1], "uint16", "environment", "too_few_channels", "at least 4"),
    "one batch": (lambda x: x[:20_000], "uint16", "biology", "too_short", "more than 1.0 s"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_what_cannot_be_sorted_is_refused_for_what_it_is(
    row: str, microvolt: np.ndarray, tmp_path: Path
) -> None:
    change, dtype, kind, name, remedy = ROWS[row]
    told = refused(recorded(tmp_path, change(microvolt), dtype), tmp_path)
    assert (told["class"], told["name"]) == (kind, name), told["text"]
    assert remedy in told["remedy"]


def test_rates_and_probes_that_cannot_be(microvolt: np.ndarray, tmp_path: Path) -> None:
    s = recorded(tmp_path, microvolt)
    assert refused(replace(s, fs_hz=2_500.0), tmp_path)["name"] == "rate"
    twice = s.positions_um.copy()
    twice[9] = twice[4]
    told = refused(replace(s, positions_um=twice), tmp_path)
    assert told["name"] == "probe" and "channels 4 and 9 at 0, 20 um" in told["text"]
    nowhere = s.positions_um.copy()
    nowhere[2] = np.nan
    assert refused(replace(s, positions_um=nowhere), tmp_path)["name"] == "probe"


def late(x: np.ndarray) -> np.ndarray:
    y = np.random.default_rng(2).normal(0, 5, x.shape)
    y[60_000:] = x[60_000:]
    return y


def slow(x: np.ndarray) -> np.ndarray:
    """As an amplifier of limited bandwidth leaves it, read with 25 channels in place of 16."""
    noise = np.random.default_rng(4).normal(0, 20, (len(x) + 4, x.shape[1]))
    smooth = sum(noise[k : k + len(x)] for k in range(5)) / 5 + x
    return smooth[: len(x) // 25 * 25].reshape(-1, 25)


SILENT: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "short": (lambda x: x, "5 s are short"),
    "four channels": (lambda x: x[:, :4], "4 channels are few"),
    "some channels dead": (lambda x: np.where(np.arange(16) < 4, 0.0, x), "4 of 16 channels are flat"),
    "silent at first": (late, "spikes begin at about"),
    "wrong number of channels": (slow, "repeat after 16 values, not after 25"),
    "twins": (lambda x: np.where(np.arange(16) == 7, x[:, 3:4], x), "channels 3 and 7 hold the same samples"),
    "gain odd": (lambda x: x * 25, "is the gain right?"),
}


@pytest.mark.parametrize("row", SILENT)
def test_what_would_be_sorted_badly_without_a_word_is_said(
    row: str, microvolt: np.ndarray, tmp_path: Path
) -> None:
    change, said = SILENT[row]
    assert said in warned(recorded(tmp_path, change(microvolt), "float32"), tmp_path)


def test_a_sound_recording_has_no_other_warning(microvolt: np.ndarray, tmp_path: Path) -> None:
    lines = warned(recorded(tmp_path, microvolt + np.repeat(slow(microvolt).ravel()[: len(microvolt)][:, None], 16, 1) * 0.2), tmp_path).splitlines()  # fmt: skip
    assert [line for line in lines if "SLAy" not in line] == ["5 s are short: units with few spikes may stay together (low confidence)"]  # fmt: skip


def test_a_gap_is_no_dead_channel(microvolt: np.ndarray, tmp_path: Path) -> None:
    n = len(microvolt)
    folder = session(tmp_path / "s", stream(), codes(stream(), microvolt), ((n // 4, n - n // 8, ()),))
    told = preflight.check(open_session(folder).stream(None), tmp_path, preflight.Plan(20_000), quiet)
    assert told["bad_channels"] == [] and told["noise_uv"] == pytest.approx(5.0, rel=0.2)
    assert any("never arrived" in w for w in told["warnings"])


# ---- the computer ------------------------------------------------------------------------------------------------


def test_memory_and_device_are_looked_at(microvolt: np.ndarray, tmp_path: Path) -> None:
    s = recorded(tmp_path, microvolt)
    told = preflight.check(s, tmp_path, preflight.Plan(60_000, memory_gb=0.5), quiet)
    assert any("0.5 GB are free" in w and "smaller batches" in w for w in told["warnings"])
    assert 1.2 < told["need_memory_gb"] < 1.5
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        with pytest.raises(SpikedError, match=r"device = 'cuda:1' was asked for .*; set device = 'auto'"):
            preflight.check(s, tmp_path, preflight.Plan(20_000, device="cuda:1"), quiet)


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    """A real file system of its own; skips where this user may not mount one."""
    at.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "spiked-test", str(at)], capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_too_small_a_disk_is_told_with_what_is_needed_and_why(microvolt: np.ndarray, tmp_path: Path) -> None:
    s = recorded(tmp_path, microvolt)
    with small_disk(tmp_path / "disk", "20m") as disk:
        told = refused(s, disk)
    assert (told["class"], told["name"]) == ("resource", "disk_full")
    assert "0.02 GB free" in told["text"] and "for an int16 copy of the recording" in told["text"] and "spikes)" in told["text"]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(
    microvolt: np.ndarray, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "40m") as disk:
        folder = session(disk / "s", stream(), codes(stream(), microvolt))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(SpikedError) as e:
            run_offline(folder, {"device": "cpu"})
    told = failures.told(e.value)
    assert (told["class"], told["name"], told["stage"]) == ("environment", "read_only", "preflight")
    assert "Read-only file system" in str(e.value) and "how the drive is mounted" in told["remedy"]


# ---- files that are not, or not yet, whole -----------------------------------------------------------------------


@contextmanager
def writer(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A process that has done `code` and holds on."""
    held = textwrap.dedent(code) + "\nprint('ready', flush=True)\nsys.stdin.read()\n"
    process = subprocess.Popen([sys.executable, "-c", held, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


OPEN = "import sys, h5py\nf = h5py.File(sys.argv[1], 'r+')"
SWMR = "import sys, h5py\nf = h5py.File(sys.argv[1], 'r+', libver='latest')\nf.swmr_mode = True"
RECORDER = "import sys\nfrom pathlib import Path\nfrom spiked.record.lock import WriterLock\nlock = WriterLock(Path(sys.argv[1]))"
NEW = """
    import sys, h5py, numpy as np
    f = h5py.File(sys.argv[1], 'w', libver='latest')
    f.create_group('acquisition').create_dataset('x', data=np.zeros((2_000_000, 4)), chunks=(1000, 4), maxshape=(None, 4))
"""


def fails(folder: Path) -> dict[str, Any]:
    with pytest.raises(SpikedError) as e:
        run_offline(folder, {"device": "cpu"})
    return {**failures.told(e.value), "text": str(e.value)}


@pytest.mark.parametrize("how", [OPEN, RECORDER])
def test_a_file_that_is_still_written_is_not_sorted(how: str, microvolt: np.ndarray, tmp_path: Path) -> None:
    folder = session(tmp_path / "s", stream(), codes(stream(), microvolt))
    with writer(how, folder / "mea.nwb"):
        told = fails(folder)
        assert (told["class"], told["name"]) == (
            "environment",
            "still_written",
        ) and "end that session" in told["remedy"]
        assert not preflight.is_written(folder / "session.toml")
    assert not preflight.is_written(folder / "mea.nwb")


def test_a_file_whose_writer_was_killed_is_damaged_and_says_recover(
    microvolt: np.ndarray, tmp_path: Path
) -> None:
    folder = session(tmp_path / "s", stream(), codes(stream(), microvolt))
    file = folder / "mea.nwb"
    with writer(SWMR, file) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    told = fails(folder)
    assert (told["class"], told["name"]) == ("environment", "file_damaged") and "spiked recover" in told[
        "text"
    ]
    with writer(NEW, file) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert fails(folder)["name"] == "file_damaged"


@pytest.mark.parametrize("bytes_left", [0, 3_000, 400_000])
def test_a_truncated_or_empty_file_is_damaged(bytes_left: int, microvolt: np.ndarray, tmp_path: Path) -> None:
    folder = session(tmp_path / "s", stream(), codes(stream(), microvolt))
    os.truncate(folder / "mea.nwb", bytes_left)
    told = fails(folder)
    assert (told["class"], told["name"]) == ("environment", "file_damaged"), told["text"]
    assert main(["sort", str(folder / "mea.nwb"), "--out", str(tmp_path / "out")]) != 0


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = session(tmp_path / "s", stream(), np.zeros((100, 16), np.uint16))
    (folder / "mea.nwb").unlink()
    assert "no .nwb file" in fails(folder)["text"]
    assert main(["sort", str(tmp_path / "nothing.raw.h5")]) == 2
    assert "there is no recording" in capsys.readouterr().err


def test_samples_behind_a_filter_that_is_not_installed(microvolt: np.ndarray, tmp_path: Path) -> None:
    folder = session(tmp_path / "s", stream(), codes(stream(), microvolt))
    with h5py.File(folder / "mea.nwb", "r+") as f:
        old = f[nwbfile.DATA]
        shape, attrs = old.shape, dict(old.attrs)
        del f[nwbfile.DATA]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((1000, 16))
        plist.set_filter(32_099, h5py.h5z.FLAG_OPTIONAL, ())  # a number that no plugin has
        space = h5py.h5s.create_simple(shape)
        made = h5py.h5d.create(f.id, nwbfile.DATA.encode(), h5py.h5t.NATIVE_UINT16, space, plist)
        for start in range(0, shape[0], 1000):
            made.write_direct_chunk((start, 0), b"\0" * 100, 0)
        for key, value in attrs.items():
            f[nwbfile.DATA].attrs[key] = value
    told = fails(folder)
    assert (told["class"], told["name"], told["stage"]) == ("environment", "hdf5_plugin", "preflight"), told[
        "text"
    ]
    assert "HDF5_PLUGIN_PATH" in told["remedy"]
