"""Who fired when: a sorter of SpikeInterface's in a process of its own; its failures are one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from offline_rig import FS, neurons, stream

from spiked.errors import SpikedError
from spiked.offline.truth import score
from spiked.templates import find
from spiked.templates.find import find_spikes, said, write_int16


def scene(seconds: float = 20.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, sample, unit = neurons(stream(), seconds, 5)
    return np.ascontiguousarray(x.T).astype(np.float16), sample, unit


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sorter", ["lupin", "tridesclous2", "kilosort4"])
def test_the_neurons_are_found_and_nothing_is_left_behind(tmp_path: Path, sorter: str) -> None:
    pytest.importorskip("kilosort" if sorter == "kilosort4" else "spikeinterface")
    x, sample, unit = scene()
    info, told = stream(), []
    found, units, source = find_spikes(
        x, FS, info.positions, info.channel_ids, tmp_path, sorter, lambda f, t: told.append((f, t))
    )
    per_unit = score(sample, unit, found, units, FS, 0.4)
    assert sum(v["accuracy"] > 0.9 for v in per_unit.values()) >= 4, per_unit
    assert source["sorter"] == sorter and source["version"].startswith(("spikeinterface ", "kilosort "))
    assert list(tmp_path.iterdir()) == []
    fractions = [f for f, _ in told]
    assert fractions == sorted(fractions) and len({t for _, t in told}) > 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_silence_is_told_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("spikeinterface")
    rng = np.random.default_rng(0)
    x = rng.normal(0, 5, (16, 60_000)).astype(np.float16)
    with pytest.raises(SpikedError) as e:
        find_spikes(x, FS, stream().positions, stream().channel_ids, tmp_path)
    assert (
        "\n" not in str(e.value)
        and "lupin" in str(e.value)
        and 'live.templates_from = "rt_sort"' in str(e.value)
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, info = np.ones((16, 100), np.float16), stream()
    real = find.importlib.util.find_spec
    monkeypatch.setattr(
        find.importlib.util, "find_spec", lambda name: None if name == "kilosort" else real(name)
    )
    if real("spikeinterface") is not None:
        with pytest.raises(SpikedError, match=r"needs the package kilosort.*pip install 'spiked\[offline\]'"):
            find_spikes(x, FS, info.positions, info.channel_ids, tmp_path, "kilosort4")
    monkeypatch.setattr(find.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SpikedError, match="lupin needs SpikeInterface"):
        find_spikes(x, FS, info.positions, info.channel_ids, tmp_path)
    with pytest.raises(SpikedError, match="'magic' is not one of lupin"):
        find_spikes(x, FS, info.positions, info.channel_ids, tmp_path, "magic")


def test_no_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spikeinterface")
    monkeypatch.setattr(find, "ROOM", 1e15)
    with pytest.raises(SpikedError, match=r"GB are free; free space, lower live\.calibrate_s"):
        find_spikes(np.ones((16, 100), np.float16), FS, stream().positions, stream().channel_ids, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samples_are_kept_to_a_sixteenth_of_the_noise_and_large_ones_unclipped(tmp_path: Path) -> None:
    x, _, _ = scene(2.0)
    lsb = write_int16(x, FS, tmp_path / "a.bin")
    codes = np.fromfile(tmp_path / "a.bin", "<i2").reshape(-1, 16)
    np.testing.assert_allclose(codes.T * lsb, x.astype(np.float32), atol=lsb / 2 + 1e-4)
    assert 0.8 * 5 / 16 < lsb < 1.2 * 5 / 16
    x[3, 1000] = 60_000.0
    x[4, 1000] = np.nan
    lsb = write_int16(x, FS, tmp_path / "b.bin")
    codes = np.fromfile(tmp_path / "b.bin", "<i2").reshape(-1, 16)
    assert codes[1000, 3] * lsb == pytest.approx(60_000, rel=0.01) and codes[1000, 4] == 0
    with pytest.raises(SpikedError, match="all zero"):
        write_int16(np.zeros((4, 100), np.float16), FS, tmp_path / "c.bin")


def test_progress_is_read_from_the_process_and_from_bars() -> None:
    assert said("progress 0.250 clustering") == (0.25, "clustering")
    bar = "find spikes (no parallelization):  50%|#####     | 6/12 [00:01<00:01,  5.00it/s]"
    fraction, text = said(bar) or (0.0, "")
    assert text == "matching" and 0.5 < fraction < 0.9
    assert said("Traceback (most recent call last):") is None
    assert said("something else:  50%|##  | 1/2 [") is None
