"""`spiked bench peer`: what is handed over, and, where the peer is installed, a small run of both.

SPIKED_PEER_ENV names a virtual environment that has spikelab; ../shared/weights the published weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import refused, spiked

from spiked.bench import peer, peer_run, scene
from spiked.bench.peer_side import LIMITS, SCRIPT, SHARED, Peer
from spiked.errors import ConfigError, SpikedError
from spiked.sources.recordings import open_recording

WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "weights" / "mea"
ENV = os.environ.get("SPIKED_PEER_ENV")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scene.write(tmp_path_factory.mktemp("peer") / "rec", scene.grid("4x4"), 22.0, 3, seed=5)


def job(folder: Path, recording: Path, **other: object) -> dict[str, object]:
    base = {"recording": str(recording), "weights": "w", "chunk": 100, "calibrate": [0, 400], "sort": [400, 1000], "threads": 1,
            "neuropixels": False, "limits": {}}  # fmt: skip
    return {**base, **other}


def test_the_peer_gets_the_same_microvolts(recording: Path, tmp_path: Path) -> None:
    with open_recording(recording) as rec:
        peer.export(rec, tmp_path / "recording.npz", 1000)
        codes, gains, positions = rec.read(0, 1000), rec.info.gains, rec.info.positions
    (tmp_path / "job.json").write_text(json.dumps(job(tmp_path, tmp_path / "recording.npz")))
    given = peer_run.Job(tmp_path)
    assert given.fs_hz == 20_000 and np.array_equal(given.positions, positions)
    expected = (codes[400:1000].astype(np.float32) - 512) * gains
    assert np.array_equal(given.microvolts(*given.sort), expected) and given.codes.dtype == np.int16


def test_the_script_needs_nothing_of_ours() -> None:
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print([m for m in sys.modules if m.split('.')[0].startswith('spiked')])"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_second_set_of_limits_starts_from_the_first_ones_work(tmp_path: Path) -> None:
    first = Peer(Path(sys.executable), tmp_path / "default", job(tmp_path, tmp_path), print)
    (first.folder / "inter").mkdir()
    second = Peer(
        Path(sys.executable), tmp_path / "tight", job(tmp_path, tmp_path, limits=LIMITS["tight"]), print
    )
    second.borrow(first.folder)
    assert not (second.folder / "stages.json").exists()  # the first has not come far enough
    for name in SHARED:
        (first.folder / "inter" / name).write_text(name)
    stages = {name: {"wall_s": 2.0, "cpu_s": 1.0} for name in (*peer_run.STEPS, "run_detection_model")}
    (first.folder / "stages.json").write_text(json.dumps(stages))
    second.borrow(first.folder)
    assert {p.name for p in (second.folder / "inter").iterdir()} == set(SHARED)
    taken = json.loads((second.folder / "stages.json").read_text())
    assert set(taken) == set(stages) - {"reassign_spikes_to_clusters", "intra_merge", "inter_merge"}


def test_steps_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def step(n: int) -> list[int]:
        calls.append(n)
        return [n]

    for _ in range(2):
        stages = peer_run.Stages(tmp_path / "stages.json")
        assert stages.timed("form", step, tmp_path / "formed.pickle")(3) == [3]
    assert calls == [3] and set(json.loads((tmp_path / "stages.json").read_text())) == {"form"}


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    Peer(Path(sys.executable), tmp_path, job(tmp_path, tmp_path), print)
    with pytest.raises(ConfigError, match="holds another run"):
        Peer(Path(sys.executable), tmp_path, job(tmp_path, tmp_path, sort=[400, 2000]), print)


def test_a_peer_that_fails_says_why(tmp_path: Path) -> None:
    side = Peer(Path(sys.executable), tmp_path / "p", job(tmp_path, tmp_path / "no.npz"), print)
    with pytest.raises(SpikedError, match=r"calibrate ended with exit 1: .*no\.npz"):
        side.run("calibrate", "calibrate.json")


def test_bad_arguments(recording: Path, tmp_path: Path) -> None:
    folder = ("--folder", str(tmp_path / "out"), "--env", str(tmp_path))
    assert "published weights" in refused(
        "bench",
        "peer",
        str(recording),
        "--weights",
        str(tmp_path),
        "--seconds",
        "1",
        "--calibrate-s",
        "1",
        *folder,
    )
    assert "do not fit" in refused("bench", "peer", str(recording), "--weights", str(tmp_path), *folder)


@pytest.mark.slow
@pytest.mark.skipif(ENV is None, reason="SPIKED_PEER_ENV does not name an environment with spikelab")
@pytest.mark.skipif(not WEIGHTS.exists(), reason="the published weights are not there")
def test_both_sorters_on_the_same_samples(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "peer.json"
    arguments = [
        "bench",
        "peer",
        str(recording),
        "--weights",
        str(WEIGHTS),
        "--calibrate-s",
        "14",
        "--seconds",
        "6",
        "--rounds",
        "1",
    ]
    arguments += [
        "--env",
        str(ENV),
        "--folder",
        str(tmp_path / "out"),
        "--limits",
        "tight",
        "--json",
        str(out),
        "--table",
    ]
    done = spiked(*arguments, timeout=280)
    assert done.returncode == 0, done.stderr
    r = json.loads(out.read_text())
    theirs, ours = r["peer"]["tight"], r["ours"]
    assert r["true_units"] == theirs["true_units"] == ours["true_units"] == 3
    assert theirs["units"] > 0 and theirs["mean_accuracy"] > 0.3 and ours["mean_accuracy"] > 0.3
    assert (
        theirs["calibration_wall_s"] > 0
        and theirs["calibration"]["notes"]
        and theirs["calibration"]["versions"]["spikelab"]
    )
    assert theirs["sort"]["chunks"] == 1200
    for s in r["speed"]:
        assert s["peer, as packaged"]["compute_ms"]["n"] == 20 and s["ours, 1 ms"]["compute_ms"]["n"] == 300
    assert "| SpikeLab, tight limits |" in done.stdout and "| spiked |" in done.stdout
