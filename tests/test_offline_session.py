"""Reading a session folder, the checks before sorting, and the binary that is sorted."""

from __future__ import annotations

import fcntl
from pathlib import Path

import h5py
import numpy as np
import pytest
from offline_rig import FIRST, FS, ZERO, codes, live, neurons, session, stream

from spiked.errors import OfflineError
from spiked.offline import export, preflight, reading
from spiked.offline.job import main, run_offline
from spiked.offline.session import joined, open_session
from spiked.offline.sort import run as run_sorter
from spiked.offline.sort import sorter_job


def quiet(fraction: float, text: str) -> None:
    """Progress that nobody reads."""


def noise(info, seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return codes(info, rng.normal(0, 5.0, (round(seconds * FS), info.n_channels)))


def test_a_session_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    info = stream()
    folder = session(
        tmp_path / "s", info, noise(info, 2.0), ((1000, 1400, ()), (1400, 1500, ()), (3000, 3100, (2, 5)))
    )
    live(folder, info, np.array([10, 20]), np.array([-1, 4]))
    with (folder / "mea.spikes.bin").open("ab") as f:
        f.write(b"half a record")
    s = open_session(folder).stream(None)
    assert (s.name, s.fs_hz, s.n_samples, s.n_channels, s.first_sample) == ("mea", FS, 40_000, 16, FIRST)
    assert s.zero_code == ZERO and s.gain_uv.tolist() == [2.0] * 16
    np.testing.assert_allclose(s.positions_um, info.positions)
    assert s.gaps.tolist() == [[1000, 1500]] and s.blind_s == pytest.approx(0.025)
    assert [(a, b, np.flatnonzero(m).tolist()) for a, b, m in s.partial] == [(3000, 3100, [2, 5])]
    assert (s.live_spikes()["sample"] - s.first_sample).tolist() == [10, 20]
    assert s.true_spikes() is None


def test_what_was_not_written_whole_is_not_sorted(tmp_path: Path) -> None:
    info = stream()
    folder = session(tmp_path / "s", info, noise(info, 1.0))
    with h5py.File(folder / "mea.nwb", "r+") as f:
        f["scratch/position"][1] = 15_000
    assert open_session(folder).stream("mea").n_samples == 15_000


def test_a_file_that_somebody_keeps_beside_the_recording_is_left_alone(tmp_path: Path) -> None:
    info = stream()
    folder = session(tmp_path / "s", info, noise(info, 1.0))
    (folder / "export.nwb").write_bytes(b"not hdf5")
    assert list(open_session(folder).streams) == ["mea"]
    (folder / "session.toml").unlink()  # now nothing says whose it is
    with pytest.raises(OfflineError, match=r"cannot read export\.nwb"):
        open_session(folder)


def test_a_folder_that_is_no_session_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match=r"no \.nwb file"):
        open_session(tmp_path)
    (tmp_path / "x.nwb").write_bytes(b"not hdf5")
    with pytest.raises(OfflineError, match=r"cannot read x\.nwb"):
        open_session(tmp_path)


def test_gaps_are_silent_and_codes_are_centred_in_the_binary(tmp_path: Path) -> None:
    info = stream()
    data = noise(info, 2.0)
    gaps = ((5000, 9000, ()), (20_000, 20_010, (3,)), (39_990, 40_000, ()))
    s = open_session(session(tmp_path / "s", info, data, gaps)).stream(None)
    result = export.write_binary(s, tmp_path / "x.dat", quiet)
    got = np.fromfile(tmp_path / "x.dat", "<i2").reshape(-1, 16)
    want = data.astype(np.int16) - 512
    want[5000:9000] = want[39_990:] = 0
    want[20_000:20_010, 3] = 0
    np.testing.assert_array_equal(got, want)
    assert result["silenced_samples"] == 4010 and result["clipped"] == 0


def test_chunk_borders_leave_no_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = stream()
    data = noise(info, 1.0)
    s = open_session(session(tmp_path / "s", info, data, ((900, 2100, ()), (4000, 4001, (1,))))).stream(None)
    export.write_binary(s, tmp_path / "whole.dat", quiet)
    monkeypatch.setattr(reading, "PIECE_BYTES", 4 * 16 * 333)
    export.write_binary(s, tmp_path / "parts.dat", quiet)
    assert (tmp_path / "whole.dat").read_bytes() == (tmp_path / "parts.dat").read_bytes()


def test_float_recordings_are_scaled_with_a_stated_gain(tmp_path: Path) -> None:
    info = stream(dtype="float32")
    data = noise(info, 1.0)
    data[100, 4] = 50_000.0  # beyond what int16 can hold
    s = open_session(session(tmp_path / "s", info, data)).stream(None)
    result = export.write_binary(s, tmp_path / "x.dat", quiet)
    got = np.fromfile(tmp_path / "x.dat", "<i2").reshape(-1, 16) * np.array(result["gain_uv"])
    assert result["clipped"] == 1
    data[100, 4] = got[100, 4]
    np.testing.assert_allclose(got, data, atol=export.FLOAT_UV / 2 + 1e-3)


def test_a_sample_that_is_not_finite_is_named(tmp_path: Path) -> None:
    info = stream(dtype="float32")
    data = noise(info, 1.0)
    data[12_345, 2] = np.nan
    s = open_session(session(tmp_path / "s", info, data)).stream(None)
    with pytest.raises(OfflineError, match="12345") as e:
        export.write_binary(s, tmp_path / "x.dat", quiet)
    assert e.value.kind == "environment"


def refusal(tmp_path: Path, data: np.ndarray, **more) -> OfflineError:
    info = more.pop("info", stream())
    with pytest.raises(OfflineError) as e:
        run_offline(session(tmp_path / "s", info, data), {"device": "cpu"})
    return e.value


def test_white_noise_is_biology_before_kilosort_is_started(tmp_path: Path) -> None:
    error = refusal(tmp_path, noise(stream(), 8.0))
    assert (error.kind, error.stage) == ("biology", "preflight") and "nothing to sort" in str(error)


def test_flat_channels_are_biology_and_a_few_of_them_a_warning(tmp_path: Path) -> None:
    info = stream()
    assert "flat" in str(refusal(tmp_path, np.full((80_000, 16), 512, np.uint16)))
    data, _, _ = neurons(info, 4.0, 3)
    data[:, [2, 7]] = 0
    s = open_session(session(tmp_path / "some", info, codes(info, data))).stream(None)
    got = preflight.check(s, tmp_path, preflight.Plan(60_000), quiet)
    assert got["bad_channels"] == [2, 7] and "2 of 16" in " ".join(got["warnings"])
    assert got["noise_uv"] == pytest.approx(5.0, rel=0.2) and got["events_hz"] > 10


def test_too_short_a_recording_is_told_with_its_length(tmp_path: Path) -> None:
    error = refusal(tmp_path, noise(stream(), 2.5))
    assert error.kind == "biology" and "2.5 s" in str(error)


def test_a_full_disk_is_a_resource(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "BYTES_PER_SPIKE", 1e15)
    error = refusal(tmp_path, codes(stream(), neurons(stream(), 4.0, 3)[0]))
    assert error.kind == "resource" and "GB needed" in str(error) and "for about" in str(error)


def test_the_command_tells_a_failure_as_one_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = session(tmp_path / "s", stream(), noise(stream(), 8.0))
    assert main([str(folder), "--json-progress", "--params", '{"device": "cpu"}']) == 6
    last = capsys.readouterr().out.splitlines()[-1]
    assert '"event": "failed"' in last and '"kind": "biology"' in last and '"stage": "preflight"' in last
    assert main([str(folder), "--params", '{"nonsense": 1}']) == 2


def test_two_jobs_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = session(tmp_path / "s", stream(), noise(stream(), 1.0))
    (folder / "offline/kilosort4").mkdir(parents=True)
    with (folder / "offline/kilosort4/job.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OfflineError, match="another job"):
            run_offline(folder, {"device": "cpu"})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kilosorts_own_refusal_is_classified_and_a_timeout_ends_it(tmp_path: Path) -> None:
    info = stream()
    s = open_session(session(tmp_path / "s", info, noise(info, 4.0))).stream(None)
    gain = export.write_binary(s, tmp_path / "x.dat", quiet)["gain_uv"]
    binary = tmp_path / "x.dat"
    job = sorter_job(s, binary, gain, "kilosort4", {"Th_univ": 9}, tmp_path / "a", 1)
    with pytest.raises(OfflineError, match="does not accept a parameter") as e:
        run_sorter(job, "cpu", 600.0, quiet)
    assert e.value.kind == "environment"
    with pytest.raises(OfflineError, match="timeout_s") as e:
        run_sorter(sorter_job(s, binary, gain, "kilosort4", {}, tmp_path / "b", 1), "cpu", 0.5, quiet)
    assert e.value.kind == "resource"


def test_intervals_are_joined() -> None:
    assert joined(np.array([[5, 7], [1, 3], [3, 4], [6, 9]])).tolist() == [[1, 4], [5, 9]]
