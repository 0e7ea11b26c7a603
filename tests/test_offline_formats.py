"""The same neurons in every format, sorted by `spiked sort` for real: each file gives the same units."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from offline_rig import FS, codes, neurons, session, stream
from test_offline_foreign import grid
from test_recordings_maxwell import MAPPING
from test_recordings_openephys import channel

from spiked.cli import main
from spiked.offline.truth import score

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
UNITS = 5
INFO = stream(dtype="int16")  # 16 channels, 4 x 4, 20 um, 2 uV per code
PLACES = [(20 * (k % 4), 20 * (k // 4)) for k in range(16)]


def nwb(folder: Path, data: np.ndarray) -> list[str]:
    (session(folder / "s", INFO, data) / "mea.nwb").rename(folder / "r.nwb")
    return [str(folder / "r.nwb")]


def spikeglx(folder: Path, data: np.ndarray) -> list[str]:
    run = folder / "r"
    run.mkdir()
    binary = run / "r_g0_t0.imec0.ap.bin"
    np.hstack([data, np.zeros((len(data), 1), "<i2")]).astype("<i2").tofile(binary)
    meta = {
        "typeThis": "imec", "fileName": binary.name, "fileSizeBytes": binary.stat().st_size, "firstSample": 0,
        "imDatPrb_pn": "NP1010", "imDatPrb_type": 0, "imAiRangeMax": 0.6, "imMaxInt": 512, "imSampRate": FS,
        "nSavedChans": 17, "snsApLfSy": "16,0,1", "acqApLfSy": "384,384,1",
        "snsSaveChanSubset": ",".join(map(str, range(16))) + ",768",
        "~snsChanMap": "(384,0,1)" + "".join(f"(AP{k};{k}:{k})" for k in range(16)) + "(SY0;768:768)",
        "~imroTbl": "(0,384)" + "".join(f"({k} 0 0 500 250 1)" for k in range(384)),
        "~snsGeomMap": "(NP1010,2,250,70)" + "".join(f"(0:{x}:{y}:1)" for x, y in PLACES),
    }  # fmt: skip
    binary.with_suffix(".meta").write_text("\n".join(f"{k}={v}" for k, v in meta.items()))
    return [str(run)]


def openephys(folder: Path, data: np.ndarray) -> list[str]:
    where = folder / "r/Record Node 101/experiment1/recording1"
    own = where / "continuous/Probe-100.AP"
    own.mkdir(parents=True)
    data.astype("<i2").tofile(own / "continuous.dat")
    np.save(own / "sample_numbers.npy", 777 + np.arange(len(data), dtype="<i8"))
    np.save(own / "timestamps.npy", np.arange(len(data)) / FS)
    told = {
        "folder_name": "Probe-100.AP/", "sample_rate": FS, "stream_name": "AP", "num_channels": 16,
        "channels": [channel(f"CH{k + 1}", bit=2.0) for k in range(16)], "source_processor_name": "Probe",
        "source_processor_id": 100, "recorded_processor": "Record Node", "recorded_processor_id": 101,
    }  # fmt: skip
    structure = {"GUI version": "1.0.1", "continuous": [told], "events": [], "spikes": []}
    (where / "structure.oebin").write_text(json.dumps(structure))
    return [str(folder / "r"), "--probe", str(grid(folder / "p.json", 16))]


def maxwell_2016(folder: Path, data: np.ndarray) -> list[str]:
    with h5py.File(folder / "r.raw.h5", "w") as h:
        sig = h.create_dataset("sig", (1028, len(data)), "<u2", chunks=(64, 20_000), compression="gzip")
        sig[:16] = (data.T.astype(int) + 512).clip(0, 1023)
        h["mapping"] = np.array([(k, k, *place) for k, place in enumerate(PLACES)], MAPPING)
        for key, value in (("lsb", 2e-6), ("gain", 512.0), ("hpf", 300.0)):
            h[f"settings/{key}"] = np.array([value])
    return [str(folder / "r.raw.h5")]


@pytest.mark.parametrize("write", [nwb, spikeglx, openephys, maxwell_2016], ids=lambda f: f.__name__)
def test_a_recording_is_sorted(tmp_path: Path, write: Callable[[Path, np.ndarray], list[str]]) -> None:
    pytest.importorskip("kilosort")
    data, samples, units = neurons(INFO, 18.0, UNITS)
    arguments = write(tmp_path, codes(INFO, data))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert main(["sort", *arguments, "--out", str(tmp_path / "out"), "--set", "device=cpu"]) == 0
    with np.load(tmp_path / "out/r/offline/kilosort4/units.npz") as z:
        found = score(samples, units, z["samples"], z["units"], FS)
    assert sum(u["accuracy"] > 0.9 for u in found.values()) >= UNITS - 1
    assert (tmp_path / "out/r/report.md").is_file()
    assert {p: p.stat().st_mtime_ns for p in before} == before  # a recording is only read
