"""The sequences file: whole, portable, refused when broken or made for another array."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest

from spiked.errors import ConfigError
from spiked.sort.parameters import RTSortParameters
from spiked.sort.sequences import INNER, LOOSE, ROOT, Sequences
from spiked.stream import StreamInfo


def some(n: int = 3, channels: int = 6) -> Sequences:
    size = 4
    electrode = np.concatenate([np.zeros(0, int), *((np.arange(size) + u) % channels for u in range(n))])
    flags = np.tile([ROOT | LOOSE, LOOSE | INNER, LOOSE, 0], n)
    entries = n * size
    rng = np.random.default_rng(0)
    return Sequences(
        fs_hz=20_000.0, channel_ids=tuple(f"e{c}" for c in range(channels)), positions_um=np.arange(2.0 * channels).reshape(-1, 2) * 9,
        stringent_logit=-1.0, loose_logit=-2.0, parameters=RTSortParameters.mea(), first_sample=7, stop_sample=99,
        network={"name": "x", "sha256": "ab"}, inference_scaling=0.4, unit_ids=np.arange(n) * 5, roots=electrode[::size],
        root_amp_mean=np.ones(n), root_amp_sd=np.ones(n), root_amplitude_uv=-np.ones(n), min_loose=np.ones(n), min_inner=np.ones(n),
        n_spikes=np.ones(n), rate_hz=np.ones(n), ptr=np.arange(n + 1) * size, electrode=electrode,
        latency=rng.normal(size=entries), latency_sd=np.ones(entries), amp=np.ones(entries), amp_sd=np.ones(entries),
        prob=np.ones(entries), flags=flags,
    )  # fmt: skip


def info_of(s: Sequences, **change: object) -> StreamInfo:
    fields = {
        "name": "a", "fs_hz": s.fs_hz, "channel_ids": s.channel_ids, "dtype": "int16", "gain_uv": (1.0,) * s.n_channels,
        "positions_um": tuple((float(x), float(y)) for x, y in s.positions_um),
    }  # fmt: skip
    return StreamInfo(**{**fields, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, 3])
def test_what_is_saved_is_loaded(tmp_path: Path, n: int) -> None:
    s = some(n)
    s.save(tmp_path / "s.h5")
    back = Sequences.load(tmp_path / "s.h5")
    for f in dataclasses.fields(Sequences):
        np.testing.assert_equal(getattr(back, f.name), getattr(s, f.name), f.name)
    assert [p.name for p in tmp_path.iterdir()] == ["s.h5"]
    back.check(info_of(s))


def test_ids_are_not_given_twice() -> None:
    s = some(3)
    assert s.next_unit_id == 11
    assert s.with_ids(np.array([0, 1, 2]), 40).next_unit_id == 40


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "s.h5"
    some().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(ConfigError) as e:
        Sequences.load(path)
    assert "\n" not in str(e.value)


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sequences"):
        Sequences.load(tmp_path / "none.h5")
    with h5py.File(tmp_path / "other.h5", "w") as f:
        f["data"] = np.zeros(3)
    with pytest.raises(ConfigError, match="not a sequences file"):
        Sequences.load(tmp_path / "other.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(ConfigError):
        Sequences.load(tmp_path / "text.h5")
    some().save(tmp_path / "new.h5")
    with h5py.File(tmp_path / "new.h5", "r+") as f:
        f.attrs["format_version"] = 99
    with pytest.raises(ConfigError, match="newer version"):
        Sequences.load(tmp_path / "new.h5")


def test_tampered_contents_are_refused(tmp_path: Path) -> None:
    for name, value in (("electrode", 77), ("ptr", 1), ("amp", np.nan), ("unit_ids", 5)):
        some().save(tmp_path / "s.h5")
        with h5py.File(tmp_path / "s.h5", "r+") as f:
            f[name][0] = value
        with pytest.raises(ConfigError, match="not consistent"):
            Sequences.load(tmp_path / "s.h5")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fs_hz": 30_000.0}, "20000 Hz, the stream runs at 30000"),
        ({"channel_ids": ("e0", "e1", "e2", "e3", "x", "e5")}, "channel 4 being e4, in the stream it is x"),
        ({"positions_um": ((0.0, 0.0),) * 6}, "other electrode positions"),
        (
            {"channel_ids": ("e0",), "gain_uv": (1.0,), "positions_um": ((0.0, 0.0),)},
            "6 channels, the stream has 1",
        ),
    ],
)
def test_another_array_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        some().check(info_of(some(), **change))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    some(3).save(tmp_path / "s.h5")
    (tmp_path / "s.h5.new").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        some(2).save(tmp_path / "s.h5")
    assert len(Sequences.load(tmp_path / "s.h5")) == 3


def test_parameters_are_checked_and_travel_as_json() -> None:
    p = RTSortParameters.neuropixels()
    assert RTSortParameters.from_json(p.to_json()) == p
    assert RTSortParameters.default(30_000.0) == p
    with pytest.raises(ConfigError, match="overlap_ms"):
        RTSortParameters(overlap_ms=-1)
    with pytest.raises(ConfigError, match="unknown"):
        RTSortParameters.from_json('{"warp": 9}')
