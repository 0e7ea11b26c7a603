"""A stimulated session is sorted offline without its artifacts."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from offline_rig import FIRST, FS, codes, neurons, session, stream

from spiked.config import Stim
from spiked.offline.export import write_binary
from spiked.offline.session import open_session
from spiked.offline.stimulated import marks
from spiked.offline.task import tasks
from spiked.record import nwbfile

TIMES = np.arange(20_000, 190_000, 11_000)


def stimulated(folder: Path, at: np.ndarray) -> tuple[Path, np.ndarray]:
    """(session folder, microvolt without artifacts): 10 s with artifacts of 3 mV that decay within 2 ms on most channels."""
    info = stream()
    x, _, _ = neurons(info, 10.0, 4, seed=5)
    t = np.arange(2000) / FS * 1000
    size = 3000.0 / (1 + np.arange(info.n_channels) / 4.0)
    size[-3:] = 0
    with_artifacts = x.copy()
    for k in at:
        with_artifacts[k : k + 2000] += np.exp(-t / 2.0)[:, None] * size
    data = (
        np.clip(codes(info, x), 0, None),
        np.clip(np.rint(with_artifacts / 2.0 + 512), 0, 65535).astype(np.uint16),
    )
    path = session(folder, info, data[1])
    with h5py.File(path / "mea.nwb", "r+") as f:
        table = f[nwbfile.EVENTS]
        for column in table.values():
            column.resize(len(at), 0)
        table["sample"][:], table["state"][:] = at + FIRST, 1
        table["kind"][:], table["text"][:], table["line"][:] = b"stim", b"pulse", 3
    return path, x


def read_back(path: Path, channels: int) -> np.ndarray:
    return np.fromfile(path, "<i2").reshape(-1, channels) * 2.0


def test_artifacts_are_gone_and_everything_else_is_as_it_was(tmp_path: Path) -> None:
    folder, clean = stimulated(tmp_path / "s", TIMES)
    files = open_session(folder).stream(None)
    assert marks(files) == [(int(t), 0) for t in TIMES]
    raw = write_binary(files, tmp_path / "raw.dat", lambda _f, _t: None)
    told = write_binary(files, tmp_path / "clean.dat", lambda _f, _t: None, Stim())
    assert raw["stimuli"] == 0 and told["stimuli"] == len(TIMES)
    before, after = (read_back(tmp_path / name, 16) for name in ("raw.dat", "clean.dat"))
    assert before.shape == after.shape == clean.shape
    near = np.zeros(len(clean), bool)
    for k in TIMES:
        near[k + 20 : k + 400] = True

    def error(y: np.ndarray) -> float:
        return float(np.sqrt(np.mean((y[near] - clean[near]) ** 2)))

    assert error(before) > 150 and error(after) < 12, (error(before), error(after))
    untouched = np.ones(len(clean), bool)
    for k in TIMES:
        untouched[k - 100 : k + 6000] = False
    assert untouched.sum() > 50_000
    np.testing.assert_array_equal(after[untouched], before[untouched])
    np.testing.assert_array_equal(after[:, -3:], before[:, -3:])  # they carried none


def test_without_stimuli_or_switched_off_the_binary_is_the_recording(tmp_path: Path) -> None:
    folder, _ = stimulated(tmp_path / "s", TIMES)
    files = open_session(folder).stream(None)
    off = write_binary(files, tmp_path / "off.dat", lambda _f, _t: None, Stim(enabled=False))
    write_binary(files, tmp_path / "raw.dat", lambda _f, _t: None)
    assert off["stimuli"] == 0
    assert (tmp_path / "off.dat").read_bytes() == (tmp_path / "raw.dat").read_bytes()


def test_sessions_that_are_sorted_as_one_know_their_stimuli(tmp_path: Path) -> None:
    """Each file counts from its own device's first sample; what is sorted counts from 0, through all of them."""
    for name in ("a", "b"):
        stimulated(tmp_path / name, TIMES)
    n = round(10.0 * FS)
    (joined,) = tasks([tmp_path / "a", tmp_path / "b"], joined=True)
    (alone,) = tasks([tmp_path / "a/mea.nwb"])
    assert marks(alone.open().stream(None)) == [(int(t), 0) for t in TIMES]
    assert marks(joined.open().stream(None)) == [(int(t), 0) for t in [*TIMES, *(TIMES + n)]]
