"""One session of several streams: Open Ephys and Maxwell framing, and two probes of SpikeGLX, side by side."""

from __future__ import annotations

import json
import time
from pathlib import Path

import h5py
import numpy as np
import offline_rig
import pytest
from session_rig import recorded
from streams_rig import Devices, log_of

from spiked.errors import SpikedError
from spiked.record.sync import lines
from spiked.rehearsal import Rehearsal, free_ports
from spiked_client.clocks import Clocks
from spiked_client.subscribe import SyncClient


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_kinds_of_stream_are_one_session(tmp_path: Path) -> None:
    """Every sample of both in its own file; live paths, ports, status, clients and control for each."""
    wires = {"probe": ("openephys", []), "array": ("maxwell", [])}
    live = {"enabled": True, "calibrate_after_s": 600.0}
    # they end only once everything else was seen, however long that takes
    silence_s = dict.fromkeys(wires, 120.0)  # nor is the one that ends first lost meanwhile
    with Devices(tmp_path, wires, 900.0, silence_s, live=live, ring={"seconds": 60.0}) as d:
        d.rig.wait_state(("recording",), 150)
        d.wait(lambda s: all(x["processes"].get("live") for x in s["streams"].values()), 200)
        with pytest.raises(SpikedError, match="name the stream"):
            d.rig.control("mark_stim", sample=123_456)
        with pytest.raises(SpikedError, match="no stream nowhere"):
            d.rig.control("calibrate", stream="nowhere")
        d.rig.control("mark_stim", stream="array", line=3, text="only here")
        with SyncClient(control_port=d.rig.config.publish.control_port) as client:
            streams = client.control.endpoints()["streams"]
            assert set(streams) == {"probe", "array"}
            assert len({s[port] for s in streams.values() for port in ("pub", "replay")}) == 4
            heard: set[str] = set()
            both = client.messages("mua", from_start=True)
            while heard != {"mua.probe", "mua.array"}:
                batch = both.get(60.0)
                assert batch is not None
                heard.add(batch.message.topic)
        sent = {name: d.end(name) for name in wires}
        d.wait(lambda s: all(s["streams"][n]["samples"] == sent[n]["samples"] for n in wires))
        summary = d.rig.stop()
    assert (summary["exit_code"], summary["state"], summary["error"]) == (0, "done", "")
    session = Path(summary["folder"])
    assert {p.name for p in session.glob("*.nwb")} == {"probe.nwb", "array.nwb"}
    for name, dtype in (("probe", "int16"), ("array", "uint16")):
        data, gaps = recorded(session, name)
        assert gaps == [] and np.array_equal(data, d.codes(name, dtype))
        assert summary["streams"][name]["processes"]["live"]["counters"]["mua"] > 0
    assert [e for e in log_of(session) if e["event"] in ("error", "clock_step", "stream_lost")] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stream_that_fails_leaves_the_other_alone_and_comes_back(tmp_path: Path) -> None:
    wires = {"probe": ("openephys", []), "array": ("maxwell", [])}
    with Devices(tmp_path, wires, 900.0, silence_s={"probe": 10.0}) as d:
        d.rig.wait_state(("recording",), 150)
        d.wait(lambda s: s["streams"]["probe"]["samples"] > 60_000)
        d.kill("probe")
        lost = d.wait(lambda s: s["streams"]["probe"]["state"] == "lost", 120)
        assert lost["state"] == "recording" and "no samples for" in lost["streams"]["probe"]["error"]
        before = lost["streams"]["array"]["samples"]
        d.start("probe")
        d.wait(lambda s: s["streams"]["probe"]["state"] == "recording")
        back = d.wait(lambda s: s["streams"]["array"]["samples"] > before)
        assert back["streams"]["array"]["gaps"] == 0
        d.wait(lambda s: s["streams"]["probe"]["samples"] > lost["streams"]["probe"]["samples"] + 60_000)
        sent = d.end("array")
        d.wait(lambda s: s["streams"]["array"]["samples"] == sent["samples"])
        summary = d.rig.stop()
    assert (summary["exit_code"], summary["state"]) == (0, "done")
    session = Path(summary["folder"])
    data, gaps = recorded(session, "array")
    assert gaps == [] and np.array_equal(data, d.codes("array", "uint16"))
    events = [e["event"] for e in log_of(session) if e.get("stream") == "probe"]
    assert events.count("stream_lost") == 1 and events.count("stream_back") == 1
    data, _ = recorded(session, "probe")
    assert len(data) == summary["streams"]["probe"]["samples"] > 120_000


@pytest.mark.slow
def test_two_probes_of_spikeglx_in_one_session_with_pulses(tmp_path: Path) -> None:
    """Nothing but the address is configured; the clocks are 20 ppm apart and told as such."""
    wires = {"left": ("spikeglx", ["--probes", "2", "--ppm", "0,20", "--sync-hz", "4", "--sync-random"]), "right": ("spikeglx", [])}  # fmt: skip
    with Devices(tmp_path, wires, 900.0) as d:
        d.rig.wait_state(("recording",), 150)
        d.wait(lambda s: (s["streams"]["right"].get("clock") or {}).get("method") == "pulses")
        d.wait(lambda s: all(x["samples"] >= 24 * 30_000 for x in s["streams"].values()))
        summary = d.rig.stop()
        d.end("left")
    assert (summary["exit_code"], summary["state"], summary["error"]) == (0, "done", "")
    session = Path(summary["folder"])
    firsts = {}
    for name, raw in (("left", "left.raw"), ("right", "left.raw.1")):
        data, gaps = recorded(session, name)
        codes = np.fromfile(tmp_path / raw, "int16").reshape(-1, 16)
        firsts[name] = summary["streams"][name]["first_sample"]
        assert gaps == [] and np.array_equal(data, codes[firsts[name] : firsts[name] + len(data)])
    clocks = json.loads((session / "clocks.json").read_text())
    told = clocks["streams"]["right"]
    assert clocks["reference"] == "left" and told["method"] == "pulses" and told["error_ms"] < 0.1
    # the run began at the same instant on both probes: sample k of the right one is k / (1 + 20 ppm) on the left
    for sample, reference, *_ in told["table"]:
        assert abs(reference - sample / (1 + 20e-6)) < 0.2e-3 * 30_000
    assert abs(told["ppm"] - 20) < 15  # of 24 s
    assert not told["steps"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_jump_of_a_clock_is_an_alarm_while_the_session_runs(tmp_path: Path) -> None:
    """Two Open Ephys streams with the same pulses; the second loses 20 ms inside the device and says nothing."""
    jump = 1_500_000  # both streams, and who is to hear of it, are there by then
    sync = ["--sync-hz", "2", "--burst-ms", "5"]
    wires = {
        "one": ("openephys", sync),
        "two": ("openephys", [*sync, "--ppm", "-20", "--untold", f"{jump}:600"]),
    }
    with Devices(tmp_path, wires, 900.0, sync_line=6) as d:
        d.rig.wait_state(("recording",), 150)
        with SyncClient(control_port=d.rig.config.publish.control_port) as client:
            events = client.messages(("session", "clock"))
            clocks, alarm = Clocks(client.control.request("clocks")), None
            until = time.monotonic() + 200
            while alarm is None and time.monotonic() < until:
                batch = events.get(1.0)
                if (
                    batch is not None
                    and not clocks.take(batch.message)
                    and batch.message.header["event"] == "clock_step"
                ):
                    alarm = batch.message.header
            after = d.wait(lambda s: (s["streams"]["two"].get("clock") or {}).get("method") == "pulses")
            sample = after["streams"]["two"]["samples"]
            while not (clocks.known("two") and clocks.streams["two"]["steps"]) and time.monotonic() < until:
                if (batch := events.get(1.0)) is not None:
                    clocks.take(batch.message)
        d.end("one")
        sent = d.end("two")
        summary = d.rig.stop()
    assert alarm is not None and (alarm["stream"], summary["exit_code"]) == ("two", 0)
    assert alarm["ms"] == pytest.approx(20.0, abs=3.0)
    at = sent["first_sample"] + jump
    assert abs(alarm["sample"] - at) < 2 * 30_000
    assert (
        clocks.streams["two"]["steps"] == 1
        and clocks.known("two")
        and clocks.convert(sample, "two", "one") > 0
    )
    (row,) = [e for e in log_of(Path(summary["folder"])) if e["event"] == "clock_step"]
    taken_s = sent["started_ns"] / 1e9 + (jump + 600) / 30_000
    assert row["level"] == "error" and 0 < row["t_ns"] / 1e9 - taken_s < 20.0
    with h5py.File(Path(summary["folder"]) / "two.nwb", "r") as f:
        table = f["processing/sync/clock"]
        assert set(table["segment"][:].tolist()) == {0, 1} and len(table["timestamp"]) >= 2
    assert "JUMPED by +" in "\n".join(lines(Path(summary["folder"])))


@pytest.mark.slow
def test_a_session_ends_when_all_its_streams_have(tmp_path: Path) -> None:
    """Two recordings replayed: the short one ends, the other goes on, and nobody has to stop the session."""
    info, streams, sent = offline_rig.stream(), [], {}
    for name, seconds in (("short", 1.0), ("long", 40.0)):  # one may begin to be played much later
        x, _, _ = offline_rig.neurons(info, seconds, 1)
        sent[name] = offline_rig.codes(info, x)
        folder = offline_rig.session(tmp_path / name, info, sent[name])
        streams.append({"name": name, "source": "replay", "path": str(folder / f"{info.name}.nwb")})
    ports = dict(zip(("control_port", "health_port"), free_ports(2), strict=True))
    config = {
        "rig": {"name": "test", "priority": "normal", "sessions": str(tmp_path / "sessions")},
        "stream": streams,
        "live": {"enabled": False},
        "publish": {**ports, "live_port": 0, "replay_port": 0},
        "offline": {"enabled": False},
    }
    with Rehearsal(tmp_path, None, config) as r:
        summary = r.wait_daemon(200)
    assert (summary["exit_code"], summary["state"], summary["error"]) == (0, "done", "")
    session = Path(summary["folder"])
    events = [e for e in log_of(session) if e["event"] == "stream_ended"]
    assert [e["stream"] for e in events] == ["short"]
    for name, codes in sent.items():
        data, gaps = recorded(session, name)
        assert gaps == [] and np.array_equal(data, codes)
