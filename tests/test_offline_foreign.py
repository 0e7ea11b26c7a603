"""Recordings of other programs in the offline room: every format, wells, joined recordings, units per recording."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from offline_rig import FS, codes, neurons, session, stream
from test_recordings_maxwell import MAPPING, write_new, write_old
from test_recordings_openephys import write as write_openephys
from test_recordings_spikeglx import write as write_spikeglx

from spiked.cli import main
from spiked.errors import ConfigError, OfflineError, SpikedError
from spiked.offline.epochs import split
from spiked.offline.export import write_binary
from spiked.offline.foreign import Epoch, open_any
from spiked.offline.queue import Queue
from spiked.offline.runner import Runner
from spiked.offline.session import Session
from spiked.offline.task import Task, tasks
from spiked.offline.truth import score


def maxwell(path: Path, wells: dict[int, np.ndarray]) -> Path:
    """A file of the newer layout with these codes (samples, 16 channels) per well, on a grid of 20 um."""
    with h5py.File(path, "w") as h:
        for k, (well, data) in enumerate(wells.items()):
            d = h.create_group(f"data_store/data{k:04d}")
            for key, value in (("lsb", 2e-6), ("gain", 512.0), ("hpf", 300.0), ("sampling", FS)):
                d[f"settings/{key}"] = np.array([value])
            place = [(c, 100 + c, 20.0 * (c % 4), 20.0 * (c // 4)) for c in range(16)]
            d["settings/mapping"] = np.array(place, MAPPING)
            d["groups/routed/raw"] = data.T
            d["groups/routed/channels"] = np.arange(16, dtype="<u4")
            d["groups/routed/frame_nos"] = 5000 + np.arange(len(data), dtype="<u8")
            h[f"wells/well{well:03d}/rec0000"] = d
    return path


def grid(path: Path, n: int) -> Path:
    """A probe file with n contacts on a grid."""
    import probeinterface

    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(
        [[20.0 * (i % 4), 20.0 * (i // 4)] for i in range(n)], shapes="circle", shape_params={"radius": 5}
    )
    probe.set_device_channel_indices(np.arange(n))
    probeinterface.write_probeinterface(path, probe)
    return path


def plain(folder: Path) -> tuple[Path, dict[str, object]]:
    file = folder / "r.dat"
    np.random.default_rng(0).integers(-900, 900, (4000, 16)).astype("<i2").tofile(file)
    return file, {
        "fs_hz": FS,
        "n_channels": 16,
        "dtype": "int16",
        "gain_uv": 0.2,
        "probe": str(grid(folder / "p.json", 16)),
    }


def mda(folder: Path) -> tuple[Path, dict[str, object]]:
    """What SpikeInterface reads and we do not."""
    pytest.importorskip("spikeinterface")
    at = folder / "mda"
    at.mkdir()
    data = np.random.default_rng(1).integers(-900, 900, (4000, 4)).astype("<i2")
    head = np.array([-4, 2, 2, 4, 4000], "<i4")  # int16, 2 bytes, 2 dimensions
    (at / "raw.mda").write_bytes(head.tobytes() + data.tobytes())
    (at / "geom.csv").write_text("0,0\n20,0\n0,20\n20,20\n")
    (at / "params.json").write_text(json.dumps({"samplerate": FS, "spike_sign": -1}))
    return at, {"gain_uv": 0.5}


def nwb(folder: Path) -> tuple[Path, dict[str, object]]:
    info = stream()
    data = np.random.default_rng(4).integers(400, 600, (4000, info.n_channels))
    return session(folder / "of-ours", info, data.astype(info.dtype)) / "mea.nwb", {}


FORMATS: dict[str, Callable[[Path], tuple[Path, dict[str, object]]]] = {
    "maxwell 2016": lambda d: (write_old(d / "old.raw.h5"), {}),
    "maxwell": lambda d: (write_new(d / "new.raw.h5"), {}),
    "spikeglx": lambda d: (write_spikeglx(d / "run"), {}),
    "openephys": lambda d: (write_openephys(d / "oe"), {"probe": str(grid(d / "p.json", 8))}),
    "plain": plain,
    "mda": mda,
    "nwb": nwb,
}


def opened(path: Path, choice: dict[str, object], **more: object) -> Session:
    (task,) = tasks([path], choice=choice, **more)  # type: ignore[arg-type]
    return task.open()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_binary_holds_what_the_file_does(tmp_path: Path, kind: str) -> None:
    path, choice = FORMATS[kind](tmp_path)
    recorded = opened(path, choice).stream(None)
    target = tmp_path / "b.dat"
    told = write_binary(recorded, target, lambda fraction, text: None)
    with open_any(path, recorded.choice) as r:  # type: ignore[attr-defined]
        whole = r.read(0, r.n_samples)
        uv = (whole.astype(float) - r.info.zero_code) * r.info.gains
        assert (recorded.n_samples, recorded.n_channels, recorded.fs_hz) == (
            r.n_samples,
            r.info.n_channels,
            r.info.fs_hz,
        )
        assert np.array_equal(recorded.positions_um, r.info.positions)
    written = np.fromfile(target, "<i2").reshape(-1, recorded.n_channels) * np.array(told["gain_uv"])
    assert np.allclose(written, uv, atol=0.11 if recorded.dtype == "float32" else 1e-9)
    assert len(recorded.live_spikes()) == 0 and recorded.fingerprint()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_gain_that_is_told_counts(tmp_path: Path, kind: str) -> None:
    """Preflight asks for it where a file's own cannot be right, in whatever format."""
    path, choice = FORMATS[kind](tmp_path)
    recorded = opened(path, {**choice, "gain_uv": 0.25}).stream(None)
    assert recorded.gain_uv == pytest.approx(np.full(recorded.n_channels, 0.25))


def test_each_well_is_a_stream(tmp_path: Path) -> None:
    write_new(tmp_path / "w.raw.h5", wells=(2, 5))
    both = opened(tmp_path / "w.raw.h5", {})
    assert list(both.streams) == ["well002", "well005"]
    with both.streams["well005"].codes() as a, both.streams["well002"].codes() as b:
        assert np.array_equal(a[10:20], b[10:20] + 3)
    folders = {both.folder(s, "kilosort4") for s in both.streams.values()}
    assert folders == {tmp_path / f"w.spiked/offline/kilosort4/well00{w}" for w in (2, 5)}
    one = opened(tmp_path / "w.raw.h5", {"well": 5})
    assert list(one.streams) == ["recording"]
    (whole,), (five,) = tasks([tmp_path / "w.raw.h5"]), tasks([tmp_path / "w.raw.h5"], choice={"well": 5})
    assert whole.key != five.key


def test_what_is_said_of_a_recording_is_part_of_it(tmp_path: Path) -> None:
    """A job goes on after its last finished stage only while gain, rate, probe and well are the same."""
    path, said = plain(tmp_path)
    wider = tmp_path / "wider.json"
    wider.write_text((tmp_path / "p.json").read_text().replace("20.0", "30.0"))
    told = [
        said,
        {**said, "gain_uv": 0.4},
        {**said, "fs_hz": 25_000.0},
        {**said, "probe": str(wider)},
        {**said, "zero_code": 7.0},
    ]
    assert len({json.dumps(opened(path, choice).stream(None).fingerprint()) for choice in told}) == len(told)
    assert opened(path, said).stream(None).fingerprint() == opened(path, said).stream(None).fingerprint()
    wells = write_new(tmp_path / "w.raw.h5", wells=(2, 5))
    two, five = (opened(wells, {"well": w}) for w in (2, 5))
    assert two.stream(None).fingerprint() != five.stream(None).fingerprint()
    assert two.path == tmp_path / "w-well002.spiked" and five.path == tmp_path / "w-well005.spiked"


def test_two_recordings_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for day in ("monday", "tuesday", "wednesday"):
        (tmp_path / day).mkdir()
        plain(tmp_path / day)
    monday, tuesday, wednesday = (tmp_path / day / "r.dat" for day in ("monday", "tuesday", "wednesday"))
    with pytest.raises(ConfigError, match="would both leave their results"):
        tasks([monday, tuesday], out=tmp_path / "out")
    assert len(tasks([monday, monday], out=tmp_path / "out")) == 1
    later = ["--later", "--out", str(tmp_path / "out")]
    assert main(["sort", str(monday), *later]) == 0 and main(["sort", str(monday), *later]) == 0
    assert main(["sort", str(tuesday), *later]) == 2
    assert f"out/r is for the results of {monday}" in capsys.readouterr().err
    joined = ["--concatenate", str(monday)]
    assert main(["sort", *joined, str(tuesday), *later]) == 0
    assert main(["sort", *joined, str(tuesday), str(wednesday), *later]) == 0  # one more
    assert main(["sort", *joined, str(wednesday), *later]) == 0
    assert main(["sort", *joined, str(tuesday), *later]) == 2
    monday.rename(tmp_path / "moved.dat")  # the same recording, elsewhere
    assert main(["sort", str(tuesday), *later]) == 0


def test_joined_recordings_are_read_end_to_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    parts = [rng.integers(400, 600, (n, 16)).astype("<u2") for n in (3000, 1700, 2500)]
    (tmp_path / "day").mkdir()
    for k, p in enumerate(parts):
        maxwell(tmp_path / f"day/r{k + 9}.raw.h5", {0: p})
    recorded = opened(tmp_path / "day", {}).stream(None)
    assert [e.start for e in recorded.epochs] == [0, 3000, 4700] and recorded.n_samples == 7200  # type: ignore[attr-defined]
    assert [e.name for e in recorded.epochs] == ["r9.raw.h5", "r10.raw.h5", "r11.raw.h5"]  # type: ignore[attr-defined]
    whole = np.concatenate(parts)
    with recorded.codes() as data:
        for a, b in ((0, 7200), (2990, 3010), (2999, 4701), (4700, 4800), (100, 200)):
            assert np.array_equal(data[a:b], whole[a:b])
    before = recorded.fingerprint()
    maxwell(tmp_path / "day/r10.raw.h5", {0: parts[1][:, ::-1]})
    assert recorded.fingerprint() != before


def test_what_does_not_fit_is_not_joined(tmp_path: Path) -> None:
    data = np.full((2000, 16), 512, "<u2")
    a, b = maxwell(tmp_path / "a.raw.h5", {0: data}), maxwell(tmp_path / "b.raw.h5", {0: data})
    for path, value, what in (
        ("settings/sampling", 10_000.0, "sampling rate"),
        ("settings/lsb", 3e-6, "gain"),
    ):
        with h5py.File(b, "r+") as f:
            dataset = f[f"data_store/data0000/{path}"]
            old = dataset[0]
            dataset[0] = value
        (task,) = tasks([a, b], joined=True)
        with pytest.raises(ConfigError, match=f"b.raw.h5 differs from .*a.raw.h5 in its {what}"):
            task.open()
        with h5py.File(b, "r+") as f:
            f[f"data_store/data0000/{path}"][0] = old
    with h5py.File(b, "r+") as f:
        mapping = f["data_store/data0000/settings/mapping"]
        rows = mapping[...]
        rows["x"] += 1
        mapping[...] = rows
    (task,) = tasks([a, b], joined=True)
    with pytest.raises(ConfigError, match="electrode positions"):
        task.open()


def test_what_cannot_be_sorted_says_so(tmp_path: Path) -> None:
    path, choice = plain(tmp_path)
    with pytest.raises(ConfigError, match="give a probe file"):
        opened(path, {k: v for k, v in choice.items() if k != "probe"})
    with pytest.raises(OfflineError, match="no electrode positions; give them with --probe"):
        opened(write_openephys(tmp_path / "oe"), {})
    (tmp_path / "x.rhd").write_bytes(b"not intan" * 50)
    with pytest.raises(SpikedError, match=r"SpikeInterface cannot open .*x.rhd"):
        opened(tmp_path / "x.rhd", {})
    (tmp_path / "folder").mkdir()
    for n in (0, 1):
        (tmp_path / f"folder/g0_imec{n}.ap.bin").touch()
    with pytest.raises(ConfigError, match="several probes"):
        tasks([tmp_path / "folder"])


def test_units_are_split_back_per_recording(tmp_path: Path) -> None:
    samples = np.array([0, 5, 999, 1000, 1500, 2999])
    np.savez(tmp_path / "units.npz", samples=samples, units=np.array([3, 7, 3, 3, 3, 3]))
    epochs = (Epoch("a.nwb", Path("a"), 0, 1000), Epoch("b.nwb", Path("b"), 1000, 3000))
    rows = split(tmp_path, epochs, 1000.0)
    with np.load(tmp_path / rows[1]["file"]) as z:
        assert z["samples"].tolist() == [0, 500, 1999] and z["times_s"].tolist() == [0.0, 0.5, 1.999]
        assert z["units"].tolist() == [3, 3, 3] and z["unit_ids"].tolist() == [3, 7]
    assert rows[0]["rate_hz"] == {"3": 2.0, "7": 1.0} and rows[1]["rate_hz"]["7"] == 0.0
    assert json.loads((tmp_path / "epochs.json").read_text()) == rows


# ---- sorted for real ----------------------------------------------------------------------------------------

SECONDS, UNITS = 18.0, 5  # of less, Kilosort finds one or two units


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_wells_are_sorted_each_and_one_without_cells_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("kilosort")
    info = stream()
    wells = {w: codes(info, neurons(info, SECONDS, UNITS, seed=seed)[0]) for w, seed in ((1, 0), (4, 4))}
    wells[5] = np.full_like(wells[1], 512)
    file = maxwell(tmp_path / "plate.raw.h5", wells)
    told = tmp_path / "told.json"
    assert main(["sort", str(file), "--set", "device=cpu", "--json", str(told)]) == 0
    out = tmp_path / "plate.spiked"
    result = json.loads(told.read_text())["streams"]
    assert set(result) == {"well001", "well004", "well005"}
    assert (
        result["well005"]["failed"]["class"] == "biology"
        and "flat" in (out / "report.well005.md").read_text()
    )
    for well in ("well001", "well004"):
        with np.load(out / f"offline/kilosort4/{well}/units.npz") as z:
            assert len(np.unique(z["units"])) == result[well]["merged_units"] >= UNITS - 2
            assert z["samples"].min() >= 0 and z["samples"].max() < SECONDS * FS
        assert (out / f"report.{well}.md").is_file()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".h5"] == ["plate.raw.h5"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_folder_is_sorted_as_one_and_split_back(tmp_path: Path) -> None:
    pytest.importorskip("kilosort")
    info = stream()
    data, samples, units = neurons(info, SECONDS, UNITS)
    whole, cut = codes(info, data), 140_000
    (tmp_path / "day").mkdir()
    maxwell(tmp_path / "day/r9.raw.h5", {0: whole[:cut]})
    maxwell(tmp_path / "day/r10.raw.h5", {0: whole[cut:]})
    assert main(["sort", str(tmp_path / "day"), "--out", str(tmp_path / "out"), "--set", "device=cpu"]) == 0
    results = tmp_path / "out/day/offline/kilosort4"
    rows = json.loads((results / "epochs.json").read_text())
    assert [r["name"] for r in rows] == ["r9.raw.h5", "r10.raw.h5"] and rows[1]["start"] == cut
    with np.load(results / "units.npz") as z:
        everything = z["samples"]
    for r in rows:
        with np.load(results / r["file"]) as z:
            at, who = z["samples"], z["units"]
        assert ((at >= 0) & (at < r["stop"] - r["start"])).all() and len(at) == r["spikes"]
        here = (samples >= r["start"]) & (samples < r["stop"])
        found = score(
            samples[here] - r["start"], units[here], at, who, FS
        )  # times from the recording's own start
        assert sum(u["accuracy"] > 0.8 for u in found.values()) >= UNITS - 2
    assert sum(r["spikes"] for r in rows) == len(everything)
    assert json.loads((tmp_path / "out/day/report.json").read_text())["epochs"] == rows


def test_more_recordings_than_a_process_may_have_open(tmp_path: Path) -> None:
    """A day in files of a minute each: 1440 of them, where a process may have 1024 open."""
    _, said = plain(tmp_path)
    (tmp_path / "day").mkdir()
    whole = np.random.default_rng(3).integers(-900, 900, (300, 20, 16)).astype("<i2")
    for k, part in enumerate(whole):
        part.tofile(tmp_path / f"day/r{k}.dat")
    recorded = opened(tmp_path / "day", said).stream(None)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, limits[1]))
    try:
        with recorded.codes() as data:
            assert np.array_equal(data[0:6000], whole.reshape(-1, 16))
            assert np.array_equal(data[15:45], whole.reshape(-1, 16)[15:45])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_recordings_than_fit_into_a_command_line(tmp_path: Path) -> None:
    paths = tuple(str(tmp_path / ("long-" * 20) / f"{k}.dat") for k in range(2000))
    with Queue(tmp_path) as q:
        job, _ = q.enqueue(Task(paths, str(tmp_path / "out"), params={"device": "cpu"}))
    Runner(tmp_path, lambda event: None).drain()
    with Queue(tmp_path) as q:
        assert q.job(job).text.startswith(f"there is no recording {paths[0]}")
