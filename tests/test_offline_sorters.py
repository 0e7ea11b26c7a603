"""Sorters behind one interface: what they can be told, what is refused before anything runs, and how they read the recording."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import probeinterface
import pytest
from offline_rig import FS, session, stream

from spiked.cli import main
from spiked.errors import ConfigError, OfflineError
from spiked.offline import reading, sorters
from spiked.offline.export import prepare, write_binary
from spiked.offline.presets import JobSettings
from spiked.offline.session import StreamFiles, open_session
from spiked.offline.sorters import kilosort4

N = 30_000
GAPS = ((900, 2100, ()), (4000, 4010, (1, 3)))


def quiet(_fraction: float, _text: str) -> None:
    pass


def recorded(
    folder: Path, dtype: str = "uint16", side: int = 4, data: np.ndarray | None = None
) -> StreamFiles:
    info = stream(side, dtype)
    if data is None:
        x = np.random.default_rng(0).normal(info.zero_code, 40, (N, side * side))
        data = x.astype(np.float32) if dtype == "float32" else np.rint(x).astype(dtype)
    return open_session(session(folder, info, data, GAPS)).stream(None)


# ---- parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"th_univ": 9}, "has no parameter 'th_univ'; did you mean Th_universal?"),
        ({"bad_chanels": ["e1"]}, "did you mean bad_channels?"),
        ({"entirely_else": 1}, "`spiked sorters kilosort4` lists them"),
        ({"Th_universal": "high"}, "Th_universal = 'high': it must be a number above 0"),
        ({"nblocks": -1}, "a whole number of at least 0"),
        ({"nt": 61.5}, "nt = 61.5: it must be a whole number"),
        ({"do_CAR": 1}, "true or false"),
        ({"drift_smoothing": [0.5]}, "a list of 3 numbers"),
        ({"max_peels": 10_001}, "at most 10000"),
        ({"data_dtype": "int8"}, "one of int16, int32, float32"),
        ({"fs": 30_000}, "has no parameter 'fs'"),
    ],
)
def test_a_wrong_parameter_is_refused_in_one_line(params: dict, said: str) -> None:
    pytest.importorskip("kilosort")
    with pytest.raises(ConfigError) as e:
        JobSettings.of({"sorter_params": params})
    assert said in str(e.value) and "\n" not in str(e.value)


def test_right_parameters_come_in_their_own_types() -> None:
    pytest.importorskip("kilosort")
    given = {"nblocks": 5.0, "Th_learned": 7, "tmax": float("inf"), "shank_idx": 1, "max_cluster_subset": None, "bad_channels": [4, "e7"]}  # fmt: skip
    got = JobSettings.of({"sorter_params": given}).sorter_params
    assert got == {**given, "nblocks": 5, "Th_learned": 7.0, "shank_idx": [1], "bad_channels": ["4", "e7"]}
    assert isinstance(got["nblocks"], int) and isinstance(got["Th_learned"], float)


def test_every_setting_of_the_installed_kilosort_can_be_set_and_its_default_is_allowed() -> None:
    run = pytest.importorskip("kilosort.run_kilosort")
    table = {p.name: p for p in kilosort4.parameters()}
    settings = set(run.DEFAULT_SETTINGS) - set(kilosort4.FROM_THE_RECORDING)
    assert settings < set(table)
    assert all(table[k].default == run.DEFAULT_SETTINGS[k] for k in settings)
    for p in table.values():
        assert p.check(p.default) == p.default and p.help
    arguments = set(run.run_kilosort.__code__.co_varnames[: run.run_kilosort.__code__.co_argcount])
    ours = {"settings", "probe_name", "filename", "data_dir", "file_object", "results_dir", "device", "progress_bar", "verbose_console"}  # fmt: skip
    assert arguments - ours <= set(table)


def test_asking_for_parameters_imports_nothing_heavy(tmp_path: Path) -> None:
    import subprocess

    code = "import sys; from spiked.offline.presets import JobSettings as J; J.of({'sorter_params': {'nblocks': 0}}); print(*{'torch', 'spikeinterface', 'kilosort'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""


# ---- what only the recording shows ------------------------------------------------------------------------------


def test_channels_are_left_out_by_name_not_by_row(tmp_path: Path) -> None:
    s = recorded(tmp_path / "s")
    assert s.channel_ids[:2] == ("e0", "e1")
    assert sorters.rows_of(["e3", "e11", "e3"], s) == [3, 11]
    with pytest.raises(ConfigError, match=r"no channel 3; its channels are e0, e1, e2 \.\.\. e15"):
        sorters.rows_of([3], s)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"bad_channels": [f"e{k}" for k in range(13)]}, "3 channels are left"),
        ({"shank_idx": [1]}, r"the electrodes lie on shanks \[0\]"),
        ({"nt": 60}, "it must be odd"),
        ({"nt": 41, "templates_from_data": False}, "set nt = 61"),
        ({"tmin": 2.0}, r"before 1\.5 s"),
        ({"highpass_cutoff": 10_000.0}, "below half the rate"),
        ({"batch_size": 29_990}, "less than a batch"),
        ({"nt0min": 61}, "below nt = 61"),
    ],
)
def test_what_does_not_fit_the_recording_is_refused_before_anything_runs(
    tmp_path: Path, params: dict, said: str
) -> None:
    pytest.importorskip("kilosort")
    s = recorded(tmp_path / "s")
    kilosort4.check({"batch_size": 10_000}, s)
    with pytest.raises(ConfigError, match=said) as e:
        kilosort4.check({"batch_size": 10_000, **params}, s)
    assert "\n" not in str(e.value)


def test_the_command_refuses_a_wrong_parameter_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("kilosort")
    s = recorded(tmp_path / "s")
    assert main(["sort", str(s.nwb.parent), "--set", "nblock=0"]) == 2
    assert "did you mean nblocks?" in capsys.readouterr().err
    assert not list(tmp_path.glob("jobs.sqlite")) and not (s.nwb.parent / "offline").exists()


def test_presets_fit_the_electrodes_and_the_computer() -> None:
    pytest.importorskip("kilosort")
    grid = np.stack(np.meshgrid(np.arange(32) * 17.5, np.arange(32) * 17.5), -1).reshape(-1, 2)
    probe = np.stack([np.tile([0.0, 32.0], 192), np.repeat(np.arange(192) * 15.0, 2)], 1)
    coarse = grid / 17.5 * 60

    def choose(at: np.ndarray, device: str, preset: str = "auto", seconds: float = 7200.0) -> sorters.Preset:
        return kilosort4.of_array(preset, device, FS, at, seconds)

    assert choose(probe, "cuda").params == choose(probe, "cuda", "neuropixels").params == {}
    assert choose(grid, "cuda").params == {"nblocks": 0, "nt": 41, "x_centers": 3}
    assert (
        choose(coarse, "cuda").params["max_channel_distance"] == choose(coarse, "cuda").params["dminx"] == 60
    )
    assert choose(grid[:64], "cpu", seconds=90.0).name == "cpu_small"
    assert choose(grid, "cpu").name == "mea" and choose(probe, "cpu").name == "default"
    assert choose(probe, "cuda", "mea").params["nblocks"] == 0
    with pytest.raises(ConfigError, match="known are auto, default, neuropixels, mea, cpu_small"):
        choose(grid, "cpu", "fast")
    for preset in kilosort4.PRESETS:
        sorters.check_params("kilosort4", choose(grid, "cpu", preset).params)


def test_shanks_are_told_apart_and_arrays_are_none() -> None:
    four = np.concatenate([np.stack([250.0 * k + np.tile([0, 32.0], 48), np.repeat(np.arange(48) * 15.0, 2)], 1) for k in range(4)])  # fmt: skip
    assert sorters.shanks(four).tolist() == np.repeat(range(4), 96).tolist()
    assert sorters.layout(four) == "probe"
    sparse = np.stack(np.meshgrid(np.arange(8) * 200.0, np.arange(8) * 200.0), -1).reshape(-1, 2)
    assert sorters.shanks(sparse).max() == 0 and sorters.layout(sparse) == "array"


def test_a_probe_file_takes_the_place_of_what_the_recording_says(tmp_path: Path) -> None:
    s = recorded(tmp_path / "s")
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(s.positions_um[:, ::-1] * 2, shapes="circle", shape_params={"radius": 5.0})
    probe.set_device_channel_indices(np.arange(16))
    probeinterface.write_probeinterface(tmp_path / "p.json", probe)
    moved = sorters.placed(s, {"probe": str(tmp_path / "p.json")})
    np.testing.assert_allclose(moved.positions_um, s.positions_um[:, ::-1] * 2)
    np.testing.assert_array_equal(
        reading.stream_of(reading.source_of(moved)).positions_um, moved.positions_um
    )
    (tmp_path / "p.prb").write_text("import os; os.abort()")
    with pytest.raises(ConfigError, match="not probeinterface JSON"):
        sorters.placed(s, {"probe": str(tmp_path / "p.prb")})


# ---- reading where it lies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_read_in_place_is_what_the_binary_would_hold(tmp_path: Path, dtype: str) -> None:
    s = recorded(tmp_path / "s", dtype)
    write_binary(s, tmp_path / "x.dat", quiet)
    want = np.fromfile(tmp_path / "x.dat", "<i2").reshape(-1, 16)
    told = prepare(s, tmp_path / "y.dat", quiet)
    assert told["file"] == "" and told["bytes"] == 0 and not (tmp_path / "y.dat").exists()
    again = reading.stream_of(json.loads(json.dumps(reading.source_of(s))))
    with reading.opened(again) as codes:
        assert codes.shape == want.shape and codes.dtype == np.int16
        np.testing.assert_array_equal(codes[:], want)
        rng = np.random.default_rng(1)
        for start, stop in np.sort(rng.integers(0, N, (40, 2)), 1):
            np.testing.assert_array_equal(codes[start:stop], want[start:stop])
            np.testing.assert_array_equal(codes[start:stop, 2:5], want[start:stop, 2:5])
    with reading.opened(s, sign=-1) as turned:
        np.testing.assert_array_equal(turned[:], np.where(want == -32768, 32767, -want))
    with reading.opened(s, "float32") as plain:
        np.testing.assert_allclose(plain[:], want, atol=0.5)


def test_a_sample_that_is_not_finite_is_found_before_the_sorter_runs(tmp_path: Path) -> None:
    data = np.zeros((N, 16), np.float32)
    data[12_345, 2] = np.inf
    s = recorded(tmp_path / "s", "float32", data=data)
    with pytest.raises(OfflineError, match="sample 12345 is not finite"):
        prepare(s, tmp_path / "x.dat", quiet)


def test_spikeinterface_reads_it_in_place_and_finds_it_again(tmp_path: Path) -> None:
    si = pytest.importorskip("spikeinterface.core")
    from spiked.offline.si_recording import recording_of

    s = recorded(tmp_path / "s")
    job = {"source": reading.source_of(s), "fs_hz": s.fs_hz, "gain_uv": reading.gain_uv(s).tolist(), "positions_um": s.positions_um.tolist()}  # fmt: skip
    recording = recording_of(job)
    write_binary(s, tmp_path / "x.dat", quiet)
    want = np.fromfile(tmp_path / "x.dat", "<i2").reshape(-1, 16)
    np.testing.assert_array_equal(recording.get_traces(start_frame=800, end_frame=5000), want[800:5000])
    np.testing.assert_allclose(recording.get_traces(end_frame=50, return_in_uV=True), want[:50] * 2.0)
    np.testing.assert_allclose(recording.get_channel_locations(), s.positions_um)
    recording.dump(tmp_path / "r.json")
    again = si.load(tmp_path / "r.json")
    np.testing.assert_array_equal(again.get_traces(channel_ids=[3, 5]), want[:, [3, 5]])


# ---- the commands -----------------------------------------------------------------------------------------------


def test_spiked_sorters_lists_them_and_one_ones_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sorters"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n{name}: " in "\n" + told for name in sorters.NAMES)
    assert told.count("can run here") + told.count("cannot run here: ") == len(sorters.NAMES)
    if kilosort4.missing("cpu"):
        return
    assert main(["sorters", "kilosort4"]) == 0
    told = capsys.readouterr().out
    assert "Th_universal = 9   (a number above 0)" in told and "presets:" in told and "cpu_small:" in told
    assert main(["sorters", "kilosort5"]) == 2
    assert "known are kilosort4" in capsys.readouterr().err


def test_phy_is_pointed_to_a_recording_that_is_a_plain_file(tmp_path: Path) -> None:
    from spiked.offline.foreign import open_foreign
    from spiked.offline.sorters import phy
    from spiked.sources.formats.recording import Choice

    s = recorded(tmp_path / "s")
    assert reading.plain_file(s) is None  # HDF5
    x = np.random.default_rng(3).integers(-500, 500, (N, 16)).astype("<i2")
    x.tofile(tmp_path / "x.bin")
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(s.positions_um, shapes="circle", shape_params={"radius": 5.0})
    probe.set_device_channel_indices(np.arange(16))
    probeinterface.write_probeinterface(tmp_path / "p.json", probe)
    choice = Choice(probe=tmp_path / "p.json", fs_hz=FS, n_channels=16, dtype="int16", gain_uv=2.0)
    stream_ = open_foreign([tmp_path / "x.bin"], tmp_path / "out", choice).stream(None)
    plain = reading.plain_file(reading.stream_of(reading.source_of(stream_)))
    assert plain is not None
    spikes, units = np.arange(100, N - 100, 500), np.arange(100, N - 100, 500) % 3
    with reading.opened(stream_) as codes:
        phy.write(tmp_path / "phy", spikes, units, codes, s.positions_um, FS)
        np.testing.assert_array_equal(codes[:], x)
    np.save(tmp_path / "phy/channel_map.npy", np.delete(np.arange(16), 5))  # as where a channel was left out
    phy.show_traces(tmp_path / "phy", plain, FS)
    told: dict = {}
    exec((tmp_path / "phy/params.py").read_text(), told)
    mapped = np.memmap(told["dat_path"], told["dtype"], "r", told["offset"]).reshape(
        -1, told["n_channels_dat"]
    )
    np.testing.assert_array_equal(mapped[:, np.load(tmp_path / "phy/channel_map.npy")], np.delete(x, 5, 1))
