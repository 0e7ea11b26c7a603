"""Every sorter for real on small recordings: Kilosort4 as when it is called directly, the others through the same chain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from offline_rig import FS, ZERO, codes, neurons, session, stream

from spiked.cli import main
from spiked.offline import reading, sort, sorters
from spiked.offline.export import write_binary
from spiked.offline.nwb_units import read_units
from spiked.offline.session import StreamFiles, open_session
from spiked.offline.sorters import dartsort, kilosort2
from spiked.offline.truth import score

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
UNITS, DEAD = 6, ("e5", "e10")
SECONDS = 16.0  # with fewer than a thousand spikes Kilosort leaves them in one cluster
SETTINGS = {
    "nblocks": 0,
    "nt": 41,
    "dmin": 35.0,
    "dminx": 35.0,
    "nearest_templates": 25,
    "batch_size": 40_000,
}

# Kilosort4 without us: a plain binary and run_kilosort, in a process of its own.
DIRECT = """
import json, sys
import numpy as np, torch
from kilosort import run_kilosort
job = json.loads(sys.argv[1])
at = np.array(job["positions_um"], np.float32)
probe = {"chanMap": np.arange(len(at)), "xc": at[:, 0].copy(), "yc": at[:, 1].copy(), "kcoords": np.zeros(len(at), np.float32), "n_chan": len(at)}
run_kilosort({**job["settings"], "n_chan_bin": len(at), "fs": job["fs_hz"]}, probe=probe, filename=job["binary"], results_dir=job["out"],
             device=torch.device("cpu"), bad_channels=job["rows"], torch_thread_lim=1)
"""


def quiet(_fraction: float, _text: str) -> None:
    pass


def recorded(folder: Path, seconds: float, sign: int = 1) -> tuple[StreamFiles, np.ndarray, np.ndarray]:
    """(the stream, true samples, true units); `sign` -1: recorded upside down."""
    info = stream()
    data, samples, units = neurons(info, seconds, UNITS)
    folder = session(folder, info, codes(info, sign * data))
    np.savez(folder / "mea.truth.npz", samples=samples, units=units)
    return open_session(folder).stream(None), samples, units


def sorted_by(
    s: StreamFiles, name: str, params: dict[str, Any], folder: Path, left_out: list[int] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """(what was found, what was said meanwhile), by the sorter's own process and from the recording itself."""
    said: list[str] = []
    gain = reading.gain_uv(s).tolist()
    job = sort.sorter_job(
        s, None, gain, name, sorters.check_params(name, params), folder, 1, left_out=left_out
    )
    sort.run(job, "cpu", 600.0, lambda _f, text: said.append(text))
    return sort.read(folder), said


def accuracy(found: dict[str, Any], samples: np.ndarray, units: np.ndarray) -> list[float]:
    scores = score(samples, units, found["samples"], found["units"], FS)
    return sorted((r["accuracy"] for r in scores.values()), reverse=True)


def in_process(code: str, *arguments: str) -> str:
    """What a program of its own prints: other packages' warnings are not this test's errors."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


READ_BACK = """
import json, sys
from pathlib import Path
import numpy as np
out = Path(sys.argv[1])
from spikeinterface.extractors import read_kilosort, read_phy
phy = read_phy(out)
told = {"read_phy": {str(u): len(phy.get_unit_spike_train(u)) for u in phy.unit_ids}}
if (out / "ops.npy").is_file():
    from kilosort.run_kilosort import load_sorting
    ops, st, clu, similar, is_ref, contamination, kept = load_sorting(out)
    told["load_sorting"] = [np.asarray(st).ravel().tolist(), np.asarray(clu).ravel().tolist()]
    told["ops"] = [int(ops["n_chan_bin"]), int(ops["Nchan"]), float(ops["fs"])]
    told["read_kilosort"] = len(read_kilosort(out).unit_ids)
try:
    from phylib.io.model import load_model
except ImportError:
    pass
else:
    model = load_model(out / "params.py")
    told["phylib"] = [model.n_spikes, model.n_templates, model.channel_mapping.tolist()]
    assert len(model.get_template(int(model.template_ids[0])).channel_ids)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str], tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Kilosort4 through us on a recording that is upside down, two channels left out by name; its folder and the truth."""
    pytest.importorskip("kilosort")
    root = tmp_path_factory.mktemp("ks")
    s, samples, units = recorded(root / "s", SECONDS, -1)
    rows = sorters.rows_of(list(DEAD), s)
    params = {**SETTINGS, "invert_sign": True, "bad_channels": list(DEAD), "save_extra_vars": True}
    found, said = sorted_by(s, "kilosort4", params, root / "sorter", rows)
    return root, found, said, (samples, units)


def test_kilosort4_finds_what_it_finds_when_called_directly(inverted: Any) -> None:
    """The same spikes to the sample, though it reads the session's file, upside down, and channels are left out by name."""
    root, found, _, truth = inverted
    s, _, _ = recorded(root / "upright", SECONDS)
    write_binary(s, root / "x.dat", quiet)
    job = {"positions_um": s.positions_um.tolist(), "settings": SETTINGS, "fs_hz": FS, "binary": str(root / "x.dat"), "out": str(root / "direct"), "rows": [5, 10]}  # fmt: skip
    env = sort.environment(1, "cpu")
    done = subprocess.run([sys.executable, "-c", DIRECT, json.dumps(job)], env=env, capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    direct = (
        np.load(root / "direct/spike_times.npy").ravel(),
        np.load(root / "direct/spike_clusters.npy").ravel(),
    )
    order = np.argsort(direct[0], kind="stable")
    np.testing.assert_array_equal(found["samples"], direct[0][order])
    np.testing.assert_array_equal(found["units"], direct[1][order])
    assert len(np.unique(found["units"])) >= UNITS - 1 and accuracy(found, *truth)[UNITS - 2] > 0.8
    ours, theirs = (np.load(f / "templates.npy") for f in (root / "sorter/sorter_output", root / "direct"))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # rounding: one is the other upside down


def test_no_copy_of_the_recording_is_left_or_made(inverted: Any) -> None:
    root, _, said, _ = inverted
    raw = (root / "s/mea.nwb").stat().st_size
    left = [p for p in (root / "sorter").rglob("*") if p.is_file()]
    assert all(p.stat().st_size < 0.5 * raw for p in left) and not [
        p for p in left if p.suffix in (".dat", ".bin")
    ]
    stages = [t.split(",")[0] for t in said]
    assert (
        stages[0] == "starting the sorter"
        and "Kilosort detection" in stages
        and "Kilosort extraction" in stages
    )
    assert any("batches" in t for t in said)


def test_the_results_are_read_by_kilosort_spikeinterface_and_phy(inverted: Any) -> None:
    root, found, _, _ = inverted
    out = root / "sorter/sorter_output"
    told = json.loads(in_process(READ_BACK, str(out)))
    times, clusters = told["load_sorting"]
    assert sorted(zip(times, clusters, strict=True)) == sorted(
        zip(found["samples"].tolist(), found["units"].tolist(), strict=True)
    )
    units, counts = np.unique(found["units"], return_counts=True)
    assert told["read_phy"] == {str(u): n for u, n in zip(units.tolist(), counts.tolist(), strict=True)}
    assert told["read_kilosort"] == len(units) and told["ops"] == [16, 14, FS]
    assert {"tF.npy", "Wall.npy", "full_st.npy"} <= {p.name for p in out.iterdir()}
    if "phylib" in told:
        assert told["phylib"] == [len(found["samples"]), len(np.load(out / "templates.npy")), [k for k in range(16) if k not in (5, 10)]]  # fmt: skip


def test_shanks_are_sorted_one_by_one_and_joined(tmp_path: Path) -> None:
    pytest.importorskip("kilosort")
    s, samples, _ = recorded(tmp_path / "s", 6.0)
    with h5py.File(s.nwb, "r+") as f:  # the right half becomes a second shank
        x = f["general/extracellular_ephys/electrodes/rel_x"]
        x[...] = x[...] + 300.0 * (x[...] > 30)
    s = open_session(tmp_path / "s").stream(None)
    found, said = sorted_by(s, "kilosort4", {**SETTINGS, "shank_idx": [0, 1]}, tmp_path / "sorter")
    near = np.abs(found["samples"][:, None] - samples[None, :]).min(1) <= 20
    assert near.mean() > 0.95 and len(near) > 0.8 * len(samples)
    out = tmp_path / "sorter/sorter_output"
    told = json.loads(in_process(READ_BACK, str(out)))
    per_shank = [np.unique(np.load(out / f"shank_{k}/spike_clusters.npy")).size for k in (0, 1)]
    assert min(per_shank) >= 1 and len(told["read_phy"]) == sum(per_shank) == np.unique(found["units"]).size
    assert all((out / f"shank_{k}/ops.npy").is_file() for k in (0, 1))
    rows = (out / "cluster_shank.tsv").read_text().splitlines()[1:]
    assert [int(r.split("\t")[1]) for r in rows] == [0] * per_shank[0] + [1] * per_shank[1]
    assert found["ks_label"].keys() == set(range(sum(per_shank)))
    assert any("shank 2 of 2" in t for t in said)


def test_rt_sort_goes_all_the_way_to_units_in_the_session_file(tmp_path: Path) -> None:
    s, samples, units = recorded(tmp_path / "s", 40.0)
    folder = s.nwb.parent
    code = main(["sort", str(folder), "--sorter", "rt_sort", "--set", "device=cpu", "--set", "threads=1", "--set", "calibrate_s=30", "--json", str(tmp_path / "r.json")])  # fmt: skip
    assert code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["sorter"] == "rt_sort" and report["offline_units"] >= 3
    assert report["recording"]["copied_bytes"] == 0
    found = sort.read(folder / "offline/rt_sort/sorter")
    assert accuracy(found, samples, units)[2] > 0.7
    assert found["samples"].max() > 0.95 * s.n_samples  # all of it, not only what it was calibrated on
    assert (folder / "offline/rt_sort/sorter/units.sequences.h5").is_file()
    assert not list((folder / "offline/rt_sort").rglob("calibration.*"))
    assert len(read_units(s.nwb)) == report["merged_units"] >= 1
    told = json.loads(in_process(READ_BACK, str(folder / "offline/rt_sort/sorter/sorter_output")))
    assert len(told["read_phy"]) == report["offline_units"]
    if "phylib" in told:
        assert told["phylib"][:2] == [len(found["samples"]), report["offline_units"]]
    # the units that were found are sorted again, nothing is calibrated
    saved = folder / "offline/rt_sort/sorter/units.sequences.h5"
    again, said = sorted_by(s, "rt_sort", {"sequences": str(saved)}, tmp_path / "again")
    assert not any("calibrating" in t for t in said)
    assert len(again["samples"]) == pytest.approx(len(found["samples"]), rel=0.02)


def test_templates_are_learned_and_matched_over_all_of_it(tmp_path: Path) -> None:
    s, samples, units = recorded(tmp_path / "s", 40.0)
    params = {"calibrate_s": 30.0, "templates_from": "rt_sort", "bad_channels": ["e15"]}
    found, said = sorted_by(s, "templates", params, tmp_path / "sorter", [15])
    assert accuracy(found, samples, units)[2] > 0.8
    assert [t for t in said if "calibrating" in t] and [t for t in said if "sorting" in t]
    assert (tmp_path / "sorter/units.templates.h5").is_file()


@pytest.mark.skipif(find_spec("dartsort") is None, reason="dartsort is not installed")
@pytest.mark.skipif(not os.environ.get("SPIKED_TEST_DARTSORT"), reason="minutes on a CPU; set SPIKED_TEST_DARTSORT=1")  # fmt: skip
def test_dartsort_sorts(tmp_path: Path) -> None:
    s, samples, units = recorded(tmp_path / "s", 20.0)
    found, _ = sorted_by(
        s, "dartsort", {"do_motion_estimation": False, "matching_iterations": 1}, tmp_path / "sorter"
    )
    assert accuracy(found, samples, units)[2] > 0.5
    assert (tmp_path / "sorter/sorting").is_dir()
    assert len(json.loads(in_process(READ_BACK, str(tmp_path / "sorter/sorter_output")))["read_phy"]) == np.unique(found["units"]).size  # fmt: skip


@pytest.mark.skipif(find_spec("dartsort") is None, reason="dartsort is not installed")
def test_dartsorts_fields_are_those_of_its_configuration() -> None:
    table = {p.name: p for p in dartsort.parameters()}
    code = "import dataclasses, json, dartsort as d; print(json.dumps({f.name: getattr(d.DARTsortUserConfig(), f.name) for f in dataclasses.fields(d.DARTsortUserConfig)}, default=str))"
    real = json.loads(in_process(code).splitlines()[-1])
    assert set(table) - {"bad_channels", "probe"} == set(real) - set(dartsort.OURS)
    assert all(table[k].default == v for k, v in real.items() if k in table)
    assert all(p.check(p.default) == p.default for p in table.values())


@pytest.mark.skipif(not kilosort2.missing("cpu"), reason="Kilosort2 can run here")
def test_a_sorter_that_cannot_run_here_says_why_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s, _, _ = recorded(tmp_path / "s", 4.0)
    assert main(["sort", str(s.nwb.parent), "--sorter", "kilosort2", "--set", "device=cpu"]) == 6
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "kilosort2 cannot run here: matlab: there is no matlab in PATH" in told and "docker" in told
    assert not list((s.nwb.parent / "offline/kilosort2").glob("*.dat"))
    assert main(["sort", str(s.nwb.parent), "--sorter", "kilosort2", "--set", "runner=matlab"]) == 6
    if find_spec("dartsort") is None:
        assert main(["sort", str(s.nwb.parent), "--sorter", "dartsort"]) == 6
        assert "pip install 'spiked[dartsort]'" in capsys.readouterr().err


SORTS = """
import json, signal, sys
from spiked.offline import sort
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sort.run(json.loads(sys.argv[1]), "cpu", 600.0, lambda fraction, text: None)
"""


@pytest.mark.skipif(not kilosort2.missing("cpu"), reason="Kilosort2 can run here")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_what_a_sorter_starts_ends_with_the_job(tmp_path: Path, how: signal.Signals) -> None:
    """MATLAB is a child of the sorter's process: it would keep the GPU and the memory of a job that is over."""
    s, _, _ = recorded(tmp_path / "s", 2.0)
    write_binary(s, tmp_path / "x.dat", quiet)
    program, at_work = tmp_path / "bin/ks2_compiled", tmp_path / "at work"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\necho $$ > '{at_work}.new'; mv '{at_work}.new' '{at_work}'; exec sleep 600\n"
    )
    program.chmod(0o755)
    job = sort.sorter_job(s, tmp_path / "x.dat", s.gain_uv.tolist(), "kilosort2", {}, tmp_path / "sorter", 1)
    code = SORTS.replace(
        "json.loads(sys.argv[1])", "json.loads(sys.argv[1]) | {'parent': __import__('os').getpid()}"
    )
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(job)], env=env, stderr=subprocess.DEVNULL
    ) as runs:
        until = time.monotonic() + 500
        while not at_work.exists() and runs.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        matlab = psutil.Process(int(at_work.read_text()))
        runs.send_signal(how)
    matlab.wait(200)


def test_stimulation_or_a_sorter_that_reads_binaries_are_the_reasons_for_a_copy(tmp_path: Path) -> None:
    from spiked.offline.export import prepare

    s, _, _ = recorded(tmp_path / "s", 4.0)
    told = prepare(s, tmp_path / "x.dat", quiet, needs_binary=True)
    assert (
        told["file"] == "x.dat"
        and told["bytes"] == s.n_samples * 16 * 2
        and "only reads binaries" in told["why"]
    )
    job = {"binary": str(tmp_path / "x.dat"), "fs_hz": FS, "gain_uv": told["gain_uv"], "positions_um": s.positions_um.tolist()}  # fmt: skip
    with reading.opened(s) as there, reading.opened(reading.binary_stream(job)) as copy:
        np.testing.assert_array_equal(there[:], copy[:])
        assert abs(float(copy[:].mean())) < 1 and ZERO == 512
