"""Plain arrays, simulated recordings, SpikeInterface folders, and what is said of everything unknown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import probeinterface
import pytest

from spiked.errors import ConfigError, RecordingError, SpikedError
from spiked.sources.recordings import open_recording
from spiked.stream import EventKind

N, C = 3000, 6
SHARED = Path(os.environ.get("SPIKED_SHARED", Path(__file__).parents[1] / "../shared")).resolve()


def codes(dtype: str = "int16") -> np.ndarray:
    return ((np.arange(N)[:, None] * 3 + np.arange(C) * 101) % 1001 - 12).astype(dtype)


def probe(path: Path, n: int = C) -> Path:
    p = probeinterface.Probe(ndim=2, si_units="um")
    p.set_contacts(
        positions=np.stack([np.zeros(n), 17.5 * np.arange(n)], 1), shapes="circle", shape_params={"radius": 5}
    )
    p.set_device_channel_indices(np.arange(n))
    probeinterface.write_probeinterface(path, p)
    return path


def folder(path: Path, **params: Any) -> Path:
    """A simulated recording: two true units (0, 2), one background unit (1), two pulses."""
    path.mkdir()
    np.save(path / "traces.npy", codes("uint16"))
    probe(path / "probe.json")
    told = {"sampling_frequency": 20000.0, "lsb_uv": 6.29, "zero_code": 512}
    told |= {"code_min": 0, "code_max": 1023}
    told |= {"n_channels": C, "n_samples": N, "dtype": "uint16"} | params
    (path / "params.json").write_text(json.dumps(told))
    np.savez_compressed(
        path / "ground_truth.npz",
        spike_samples=np.array([50, 20, 30, 2000]), spike_units=np.array([2, 0, 1, 0]), unit_ids=np.arange(3),
        unit_background=np.array([False, True, False]), unit_snr=np.array([9.0, 1.0, 4.0]),
        unit_peak_channel=np.array([3, 1, 5]), stim_samples=np.array([100, 900]),
        stim_channels=np.array([4, 5]),
        stim_amp=np.array([30000.0, 29000.0]), stim_type=np.array(["single", "paired"]),
    )  # fmt: skip
    return path


@pytest.mark.parametrize("below", ["", "traces.npy"])
def test_simulated_folder(tmp_path: Path, below: str) -> None:
    with open_recording(folder(tmp_path / "r") / below) as rec:
        assert np.array_equal(rec.read(5, 2500), codes("uint16")[5:2500])
        assert (rec.info.name, rec.info.fs_hz, rec.info.zero_code, rec.info.code_max) == (
            "r",
            20000,
            512,
            1023,
        )
        assert rec.info.positions_um[2] == (0.0, 35.0) and rec.info.gain_uv == (6.29,) * C
        truth = rec.ground_truth
        assert truth is not None
        assert truth.samples.tolist() == [20, 50, 2000] and truth.units.tolist() == [0, 2, 0]
        assert (
            truth.unit_ids.tolist() == [0, 2]
            and truth.snr.tolist() == [9, 4]
            and truth.peak_channel.tolist() == [3, 5]
        )
        assert [(e.sample, e.kind, e.line, e.value, e.text) for e in rec.events] == [
            (100, EventKind.STIM, 4, 30000, "single"), (900, EventKind.STIM, 5, 29000, "paired"),
        ]  # fmt: skip


def test_published_tool_writes_what_is_read(tmp_path: Path) -> None:
    tool, templates = SHARED / "tools/make_recording.py", SHARED / "data/gt/templates_hdmea20kwide_train.npz"
    if not tool.exists() or not templates.exists():
        pytest.skip(f"no recording tool in {SHARED} (set SPIKED_SHARED)")
    out = tmp_path / "made"
    options = "--array 6x6 --n-units 3 --n-background 2 --duration 3 --seed 3 --stim-rate 1 --stim-start 0.2"
    command = [sys.executable, str(tool), "--templates", str(templates), "--out", str(out), *options.split()]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    raw, truth = np.load(out / "traces.npy"), np.load(out / "ground_truth.npz")
    with open_recording(out) as rec:
        assert np.array_equal(rec.read(0, rec.n_samples), raw)
        assert rec.ground_truth is not None and rec.ground_truth.unit_ids.tolist() == [0, 1, 2]
        assert len(rec.ground_truth.samples) == int(truth["unit_n_spikes"][:3].sum())
        assert [e.sample for e in rec.events] == truth["stim_samples"].tolist() and rec.events


@pytest.mark.parametrize(("suffix", "dtype"), [(".dat", "int16"), (".raw", "uint16"), (".bin", "float32")])
def test_binary_told_by_the_caller(tmp_path: Path, suffix: str, dtype: str) -> None:
    path = tmp_path / f"a{suffix}"
    codes(dtype).tofile(path)
    how: dict[str, Any] = {"fs_hz": 30000, "n_channels": C, "dtype": dtype, "gain_uv": 0.195, "zero_code": 3}
    with open_recording(path, probe=probe(tmp_path / "p.json"), **how) as rec:
        assert rec.info.dtype == dtype and rec.info.gain_uv[0] == 0.195 and rec.info.zero_code == 3
        assert np.array_equal(rec.read(0, N), codes(dtype))


def test_a_gain_that_is_no_number(tmp_path: Path) -> None:
    codes().tofile(tmp_path / "a.dat")
    how: dict[str, Any] = {"fs_hz": 30000, "n_channels": C, "dtype": "uint16", "gain_uv": float("nan")}
    with pytest.raises(ConfigError, match="a gain is not a finite number"):
        open_recording(tmp_path / "a.dat", probe=probe(tmp_path / "p.json"), **how)


def test_binary_told_by_the_json_beside_it(tmp_path: Path) -> None:
    codes().tofile(tmp_path / "a.dat")
    probe(tmp_path / "p.json")
    told = {
        "sampling_frequency": 30000,
        "dtype": "int16",
        "lsb_uv": 0.195,
        "probe": "p.json",
        "n_channels": C,
    }
    (tmp_path / "a.json").write_text(json.dumps(told))
    with open_recording(tmp_path / "a.dat") as rec:
        assert rec.info.fs_hz == 30000 and np.array_equal(rec.read(1, 9), codes()[1:9])


def test_npy_and_big_endian(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", codes(">i2"))
    with open_recording(
        tmp_path / "a.npy", probe=probe(tmp_path / "p.json"), fs_hz=30000, gain_uv=1.0
    ) as rec:
        assert rec.info.dtype == "int16" and rec.read(0, 5).dtype == np.dtype("int16")
        assert np.array_equal(rec.read(0, N), codes())


def complain(path: Path, match: str, kind: type[SpikedError] = ConfigError, **how: Any) -> None:
    with pytest.raises(kind, match=match) as e:
        open_recording(path, **how)
    assert "\n" not in str(e.value)


def test_incomplete_descriptions_are_named(tmp_path: Path) -> None:
    codes().tofile(tmp_path / "a.dat")
    p = probe(tmp_path / "p.json")
    complain(tmp_path / "a.dat", "give a probe file", fs_hz=30000, n_channels=C, dtype="int16", gain_uv=1.0)
    complain(tmp_path / "a.dat", "does not say its sampling_frequency, lsb_uv, dtype", probe=p)
    complain(
        tmp_path / "a.dat", "use int16, uint16, float32", probe=p, fs_hz=1.0, gain_uv=1.0, dtype="float64"
    )
    complain(tmp_path / "a.dat", "makes no sense", probe=p, fs_hz=1.0, gain_uv=1.0, dtype="int17")
    complain(
        tmp_path / "a.dat",
        "6 contacts but the stream has 8",
        probe=p,
        fs_hz=1.0,
        gain_uv=1.0,
        dtype="int16",
        n_channels=8,
    )


def test_cut_off_arrays_are_named(tmp_path: Path) -> None:
    p = probe(tmp_path / "p.json")
    how: dict[str, Any] = {"probe": p, "fs_hz": 30000, "gain_uv": 1.0}
    (tmp_path / "a.dat").write_bytes(codes().tobytes()[:-5])
    complain(tmp_path / "a.dat", "cut off or has another layout", RecordingError, dtype="int16", **how)
    np.save(tmp_path / "a.npy", codes())
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-100])
    complain(tmp_path / "a.npy", "is cut off", RecordingError, **how)
    (tmp_path / "a.npy").write_bytes(whole[:20])
    complain(tmp_path / "a.npy", "is cut off", RecordingError, **how)
    np.save(tmp_path / "a.npy", codes()[:, 0])
    complain(tmp_path / "a.npy", "1-dimensional", RecordingError, **how)


def test_folders_that_lack_something(tmp_path: Path) -> None:
    complain(folder(tmp_path / "a", n_samples=N + 1), "copy the folder again", RecordingError)
    complain(folder(tmp_path / "b", n_channels=C + 1), "check n_channels", RecordingError)
    (folder(tmp_path / "c") / "probe.json").unlink()
    complain(tmp_path / "c", "no probe.json", RecordingError)
    (folder(tmp_path / "d") / "params.json").write_text("{")
    complain(tmp_path / "d", "cannot be read as JSON")
    complain(folder(tmp_path / "e", lsb_uv="six"), "not a number")
    path = folder(tmp_path / "f") / "ground_truth.npz"
    path.write_bytes(path.read_bytes()[:200])
    complain(tmp_path / "f", "ground_truth", RecordingError)


def test_unknown_things_are_named(tmp_path: Path) -> None:
    complain(tmp_path / "no", "there is no recording")
    complain(tmp_path, "holds no recording that is known", RecordingError)
    (tmp_path / "a.xyz").write_text("hello")
    complain(tmp_path / "a.xyz", "no known format; give one of: Maxwell", RecordingError)


def test_reading_outside_or_after_closing_is_refused(tmp_path: Path) -> None:
    rec = open_recording(folder(tmp_path / "r"))
    kept = rec.read(0, 3)
    for start, stop in ((-1, 3), (N - 1, N + 1), (5, 4)):
        with pytest.raises(RecordingError, match="asked for"):
            rec.read(start, stop)
    rec.close()
    rec.close()
    with pytest.raises(RecordingError, match="was closed"):
        rec.read(0, 3)
    assert np.array_equal(kept, codes("uint16")[:3])


@pytest.mark.parametrize("form", ["binary", "zarr"])
@pytest.mark.filterwarnings("ignore")  # of the libraries that write the folder
def test_spikeinterface_folder(tmp_path: Path, form: str) -> None:
    si = pytest.importorskip("spikeinterface")
    made = si.NumpyRecording([codes()], 30000.0)
    made.set_channel_gains(0.195)
    made.set_channel_offsets(-1.95)
    p = probeinterface.Probe(ndim=2, si_units="um")
    p.set_contacts(
        positions=np.stack([np.zeros(C), 17.5 * np.arange(C)], 1), shapes="circle", shape_params={"radius": 5}
    )
    p.set_device_channel_indices(np.arange(C))
    made.set_probe(p, in_place=True)
    path = tmp_path / ("saved.zarr" if form == "zarr" else "saved")
    made.save(folder=path, format=form, verbose=False, progress_bar=False, n_jobs=1)
    with open_recording(path) as rec:
        assert np.array_equal(rec.read(3, 2900), codes()[3:2900])
        assert rec.info.gain_uv == pytest.approx((0.195,) * C) and rec.info.zero_code == pytest.approx(10)
        assert rec.info.fs_hz == 30000 and rec.info.positions_um[5] == (0.0, 87.5) and rec.info.geometry_known


def test_without_spikeinterface_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "si_folder.json").write_text("{}")
    code = (
        "import sys; sys.modules['spikeinterface'] = None\n"
        "from spiked.sources.recordings import open_recording\n"
        "try: open_recording(sys.argv[1])\n"
        "except Exception as e: sys.stdout.write(f'{type(e).__name__}: {e}')\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert out.stdout.startswith("ConfigError") and "spiked[offline]" in out.stdout and "\n" not in out.stdout


def test_a_damaged_spikeinterface_folder_says_so(tmp_path: Path) -> None:
    pytest.importorskip("spikeinterface")
    (tmp_path / "si_folder.json").write_text("{}")
    complain(tmp_path, "SpikeInterface cannot load", RecordingError)


def test_opening_an_array_loads_neither_torch_nor_h5py(tmp_path: Path) -> None:
    folder(tmp_path / "r")
    code = (
        "import sys\nfrom spiked.sources.recordings import open_recording\nimport spiked.sources.replay\n"
        "heavy = {'torch', 'h5py', 'pynwb', 'spikeinterface', 'probeinterface', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "open_recording(sys.argv[1])\n"
        "assert not {'torch', 'h5py', 'pynwb', 'spikeinterface'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], check=True)


@pytest.mark.parametrize("name", ["traces.npy", "params.json", "probe.json", "ground_truth.npz"])
def test_damaged_bytes_never_give_more_than_one_line(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "r") / name
    whole, rng, said = path.read_bytes(), np.random.default_rng(1), []
    for _ in range(60):
        bad = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.4 else whole)
        bad[int(rng.integers(min(len(bad), 400)))] = int(rng.integers(256))
        path.write_bytes(bad)
        try:
            open_recording(tmp_path / "r").close()
        except SpikedError as e:
            said.append(str(e))
    assert len(said) > 10 and not any("\n" in text for text in said)
