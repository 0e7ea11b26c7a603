"""Bad input at the command line: one line that says what is wrong and what to do, and a non-zero exit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zmq

from spiked import config
from spiked.cli import main
from spiked.rehearsal import free_ports
from spiked_models import synthesis


def spiked(*args: str, timeout: float = 280.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spiked.cli", *args], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def refused(*args: str) -> str:
    """The one line on stderr; anything else fails."""
    done = spiked(*args)
    assert done.returncode not in (0, 70)
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("spiked: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    return lines[0]


def rig(folder: Path, **sections: object) -> str:
    ports = free_ports(4)
    data = {
        "rig": {"sessions": str(folder / "sessions")},
        "stream": [{"name": "a", "source": "maxwell", "address": "tcp://127.0.0.1:1", "wait_s": 0.3}],
        "publish": dict(zip(("live_port", "replay_port", "control_port", "health_port"), ports, strict=True)),
        "live": {"enabled": False},
        "offline": {"enabled": False},
        **sections,
    }
    path = folder / "rig.toml"
    path.write_text(config.dump(config.parse(data)))
    return str(path)


def test_configuration_errors(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[[stream]]\nname = "a"\nsource = "maxwell"\nadress = "x"\n')
    assert "unknown key stream.0.adress" in refused("run", str(tmp_path / "a.toml"))
    assert "cannot read" in refused("run", str(tmp_path / "none.toml"))


def test_unwritable_sessions_folder(tmp_path: Path) -> None:
    (tmp_path / "sessions").write_text("a file where the folder should be")
    assert "cannot create a session folder" in refused("run", rig(tmp_path))


def failed_run(folder: Path, path: str) -> tuple[int, str]:
    """Exit code and the session's error of a daemon that starts and then cannot go on."""
    done = spiked("run", path, "--json", str(folder / "run.json"))
    assert "Traceback" not in done.stderr
    summary = json.loads((folder / "run.json").read_text())
    assert "\n" not in summary["error"]
    return done.returncode, summary["error"]


def test_stream_that_never_comes(tmp_path: Path) -> None:
    code, error = failed_run(tmp_path, rig(tmp_path))
    assert code == 3 and "127.0.0.1:1" in error and "within 0.3 s" in error


def test_missing_probe_and_map(tmp_path: Path) -> None:
    stream = {
        "name": "a",
        "source": "maxwell",
        "address": "tcp://127.0.0.1:1",
        "electrode_map": str(tmp_path / "no.cfg"),
    }
    code, error = failed_run(tmp_path, rig(tmp_path, stream=[stream]))
    assert code == 2 and "no electrode map" in error


def test_truncated_replay(tmp_path: Path) -> None:
    np.save(tmp_path / "traces.npy", np.zeros((1000, 4), np.int16))
    whole = (tmp_path / "traces.npy").read_bytes()
    (tmp_path / "traces.npy").write_bytes(whole[:-3000])
    (tmp_path / "params.json").write_text(
        json.dumps({"sampling_frequency": 20000, "lsb_uv": 1.0, "zero_code": 0})
    )
    stream = {"name": "a", "source": "replay", "path": str(tmp_path)}
    code, error = failed_run(tmp_path, rig(tmp_path, stream=[stream]))
    assert code in (2, 4) and "traces.npy" in error


def test_unknown_network_leaves_the_recording(tmp_path: Path) -> None:
    folder = tmp_path / "rec"
    write_recording(folder, seconds=24.0)  # longer than the ring: nobody may wait for the live path
    stream = {"name": "a", "source": "replay", "path": str(folder), "speed": 0}
    code, error = failed_run(tmp_path, rig(tmp_path, stream=[stream], live={"network": "no-such-network"}))
    assert code != 0 and "no-such-network" in error
    session = next((tmp_path / "sessions").iterdir())
    import h5py

    with h5py.File(session / "a.nwb", "r") as f:
        assert np.array_equal(f["acquisition/ElectricalSeries/data"][:], np.load(folder / "traces.npy"))


def write_recording(folder: Path, seconds: float, units: int = 4) -> None:
    """A recording folder of the form the benchmarks read."""
    folder.mkdir()
    adc = synthesis.Adc(lsb_uv=6.29, zero_code=512, dtype="uint16", code_min=0, code_max=1023)
    positions = synthesis.hdmea_grid(4, 4)
    made = synthesis.synthesize(
        positions, 20_000, seconds, units, seed=5, adc=adc, snr=(10, 25), rate_hz=(5, 12)
    )
    np.save(folder / "traces.npy", made.codes)
    spikes = made.spikes
    np.savez(
        folder / "ground_truth.npz", spike_samples=spikes["sample"], spike_units=spikes["unit"], unit_ids=np.arange(units),
        unit_background=np.zeros(units, bool),
    )  # fmt: skip
    params = {"sampling_frequency": 20000.0, "n_channels": 16, "n_samples": len(made.codes), "dtype": "uint16", "lsb_uv": 6.29,
              "zero_code": 512, "code_min": 0, "code_max": 1023}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    contacts = {
        "ndim": 2, "si_units": "um", "annotations": {}, "contact_annotations": {}, "contact_positions": positions.tolist(),
        "contact_plane_axes": [[[1.0, 0.0], [0.0, 1.0]]] * 16, "contact_shapes": ["square"] * 16,
        "contact_shape_params": [{"width": 9.0}] * 16, "contact_ids": [str(i) for i in range(16)], "shank_ids": [""] * 16,
        "device_channel_indices": list(range(16)),
    }  # fmt: skip
    probe = {"specification": "probeinterface", "version": "0.2.21", "probes": [contacts]}
    (folder / "probe.json").write_text(json.dumps(probe))


@pytest.mark.slow
def test_bench_sort(tmp_path: Path) -> None:
    write_recording(tmp_path / "rec", seconds=40.0)
    out, spikes = tmp_path / "out.json", tmp_path / "spikes.npz"
    arguments = ["bench", "sort", "--recording", str(tmp_path / "rec"), "--calibrate-s", "25", "--chunk-ms", "5", "--network", "rtsort-20k-lite"]  # fmt: skip
    done = spiked(*arguments, "--json", str(out), "--spikes", str(spikes), timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["true_units"] == 4 and result["mean_accuracy"] > 0.7
    assert set(result["per_unit"]["0"]) >= {"accuracy", "recall", "precision"}
    assert result["real_time_factor"] > 0 and result["chunk_compute_ms"]["n"] == 3000
    with np.load(spikes) as z:
        assert len(z["samples"]) == result["spikes"] and z["samples"].min() >= 25 * 20_000


def test_bench_without_enough_recording(tmp_path: Path) -> None:
    write_recording(tmp_path / "rec", seconds=1.0)
    line = refused("bench", "sort", "--recording", str(tmp_path / "rec"), "--calibrate-s", "60", "--network", "rtsort-20k-lite")  # fmt: skip
    assert "leaves nothing to sort" in line
    assert "no recording" in refused("bench", "sort", "--recording", str(tmp_path / "nowhere"))


def test_no_daemon(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    for command in ("status", "stop", "calibrate"):
        assert "no spiked daemon answered" in refused(command, "--port", str(port), "--timeout-s", "0.5")


def test_simulator_nobody_listens_to() -> None:
    (port,) = free_ports(1)
    line = refused(
        "simulate", "--address", f"tcp://127.0.0.1:{port}", "--electrodes", "4x4", "--wait-s", "0.2"
    )
    assert "nobody subscribed" in line
    assert "must look like" in refused("simulate", "--electrodes", "many")


def test_demo_arguments(tmp_path: Path) -> None:
    assert "square number" in refused("demo", "--electrodes", "37", "--folder", str(tmp_path))
    assert "leaves no time" in refused("demo", "--duration-s", "30", "--folder", str(tmp_path))


@pytest.mark.parametrize(
    "command",
    [["sort"], ["curate"], ["recover"], ["report"], ["templates", "--out", "x"], ["run"], ["doctor"]],
)
def test_a_home_folder_that_nobody_has(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "~nobody-of-this-name/x"]) != 0
    told = capsys.readouterr()
    assert "~nobody-of-this-name/x" in told.err + told.out and "Traceback" not in told.err


def hear_interrupts() -> None:
    """A shell's background jobs do not, nor does what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupted_while_it_waits() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as silent:
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        command = [sys.executable, "-m", "spiked.cli", "status", "--port", str(port), "--timeout-s", "250"]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
        ) as process:  # fmt: skip
            assert silent.poll(120_000)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None and process.stderr.read() == "spiked: interrupted\n"
        assert process.returncode == 130


def test_a_result_that_could_not_be_written_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.dat").touch()
    assert main(["sort", str(tmp_path / "r.dat"), "--json", str(tmp_path / "none/x.json")]) == 2
    assert "give a path in an existing folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["r.dat"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["web", "--port", "99999999"], "'99999999' is no port"),
        (["status", "--port", "-1"], "'-1' is no port"),
        (["run", "rig.toml", "--duration-s", "nan"], "'nan' is not a number of seconds above 0"),
        (["status", "--timeout-s", "0"], "'0' is not a number of seconds above 0"),
        (["watch", "--seconds", "inf"], "'inf' is not a number of seconds above 0"),
        (["simulate", "--duration-s", "nan"], "check --electrodes, --duration-s"),
        (["simulate", "--electrodes", "0x0", "--duration-s", "1"], "check --electrodes, --duration-s"),
        (["demo", "--electrodes", "-4"], "must be a square number"),
        (["demo", "--duration-s", "nan"], "leaves no time to sort"),
    ],
)
def test_numbers_that_cannot_be(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):  # argparse's own way
        sys.exit(main(arguments))
    assert line in capsys.readouterr().err


def test_a_name_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path / "r") + b"\xff.dat"))
    file.touch()
    assert main(["sort", str(file), "--later"]) == 2
    assert "is not UTF-8; rename it" in capsys.readouterr().err


def test_nobody_reads_what_is_printed() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "spiked.cli", "networks"], stdout=writes, stderr=subprocess.PIPE, check=False
    )
    os.close(writes)
    assert done.returncode == 128 + signal.SIGPIPE and not done.stderr


def test_what_is_printed_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "spiked.cli", "networks"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
