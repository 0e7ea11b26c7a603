"""The LSL bridge: sample numbers as LSL time, and real outlets read through real inlets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from client_rig import Ports, blind, spikes
from status_rig import status, stream

from spiked import config as configuration
from spiked.journal import Journal
from spiked.lookout import Lookout
from spiked.timing import ClockFit
from spiked_client.errors import ClientError
from spiked_client.lsl import Clock, run
from spiked_client.protocol import GAP, LEDGER, OUTCOMES, STIM

FS = 20_000


def test_samples_become_seconds_of_the_clock_and_jitter_goes() -> None:
    rng, fit, clock = np.random.default_rng(2), ClockFit(FS), Clock()
    start, true = 1000.0, FS * (1 + 30e-6)
    for k in range(2000):  # twenty seconds in blocks of 10 ms
        arrival = start + 200 * (k + 1) / true + rng.exponential(0.002)
        fit.add(5_000_000 + 200 * (k + 1), int(arrival * 1e9))
    clock.arrived(5_000_000 + 400_000, int((start + 400_000 / true + 0.004) * 1e9))
    at = np.array([5_000_000, 5_200_000, 5_400_000])
    assert (
        abs(clock.seconds(at) - (start + (at - 5_000_000) / true)).max() < 0.006
    )  # by the last arrival alone
    clock.told({"fs_hz": FS, "processes": {"acquire": {"clock": fit.told()}}})
    found = clock.seconds(at) - (start + (at - 5_000_000) / true)
    assert abs(found).max() < 0.0005 and np.ptp(found) < 0.0002
    clock.arrived(1000, int((start + 500) * 1e9))  # another session: that line is not its line
    assert clock.seconds(np.array([1000]))[0] == pytest.approx(start + 500)


def test_odd_messages_break_nothing() -> None:
    clock = Clock()
    for told in (
        {},
        {"fs_hz": "x"},
        {"processes": 5},
        {"processes": {"acquire": {"clock": {"sample": None}}}},
    ):
        clock.told(told)
    assert len(clock.seconds(np.zeros(0, np.int64))) == 0


def test_it_runs_on_the_rigs_computer_only() -> None:
    with pytest.raises(ClientError, match="needs the clock of the rig's computer"):
        run("192.0.2.7", 5572, None, threading.Event())


@pytest.mark.parametrize(
    ("command", "hidden", "line"),
    [
        ("lsl", "pylsl", "spiked lsl needs pylsl (import of pylsl halted; None in sys.modules); pip install 'spiked[lsl]'\n"),
        ("monitor", "textual", "spiked: spiked monitor needs textual: pip install 'spiked[monitor]'; `spiked watch` works without\n"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_one_line(command: str, hidden: str, line: str) -> None:
    code = f"import sys; sys.modules[{hidden!r}] = None; from spiked.cli import main; sys.exit(main([{command!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False
    )
    assert (done.returncode, done.stderr) == (1, line)


CHILD = """
import json, sys, time
import pylsl

def inlet(name):
    found = pylsl.resolve_byprop("name", name, timeout=120)
    assert found, name
    i = pylsl.StreamInlet(found[0])
    i.open_stream(120)
    return i

spikes, markers, rates = (inlet(f"rigA-A-{what}") for what in ("spikes", "markers", "rates"))
info = spikes.info(120)
labels, c = [], info.desc().child("channels").child("channel")
while not c.empty():
    labels.append(c.child_value("label"))
    c = c.next_sibling()
print(json.dumps({"type": info.type(), "labels": labels, "nominal": info.nominal_srate()}), flush=True)
got, marked, rated = [], [], []
while not got:  # from now on it hears all that the stream says
    x, t = spikes.pull_sample(timeout=1.0)
    if x is not None:
        got.append([t, *x])
print("heard", flush=True)
end = time.monotonic() + float(sys.argv[1])
def all_came():
    return len(got) > 60 and rated and {"sent", "stim", "gap", "calibrated"} <= {text.split()[0] for _, text in marked}

while (now := time.monotonic()) < end or (now < end + 120 and not all_came()):
    x, t = spikes.pull_sample(timeout=0.05)
    if x is not None:
        got.append([t, *x])
    x, t = markers.pull_sample(timeout=0.0)
    if x is not None:
        marked.append([t, x[0]])
    x, t = rates.pull_sample(timeout=0.0)
    if x is not None:
        rated.append([t, *x])
print(json.dumps({"spikes": got, "markers": marked, "rates": rated}))
"""


@pytest.mark.slow
def test_a_real_inlet_gets_spikes_markers_and_rates_on_the_clock(tmp_path: Path) -> None:
    pytest.importorskip("pylsl", reason="the extra `lsl` is not installed")
    import json

    (tmp_path / "lsl.cfg").write_text("[multicast]\nResolveScope = machine\n")
    env = {**os.environ, "LSLAPICFG": str(tmp_path / "lsl.cfg")}
    with Ports("A") as ports:
        t0, p = time.monotonic_ns(), ports.streams["A"]
        line = {"sample": 0, "t_ns": t0, "fs_hz": float(FS)}
        about = stream()
        about["processes"]["acquire"]["clock"] = line
        told = status(streams={"A": about})
        command = [sys.executable, "-m", "spiked_client.lsl", "--port", str(ports.port), "--parent"]
        bridge = subprocess.Popen(command, env=env, stdin=subprocess.PIPE)
        reader: subprocess.Popen[str] | None = None
        quit_ = threading.Event()
        try:
            sent: list[int] = []

            def talk() -> None:
                n = 0
                while not quit_.wait(0.05):
                    now = time.monotonic_ns()
                    stop = int((now - t0) / 1e9 * FS)
                    header: dict[str, Any] = {
                        "first": stop - 1000,
                        "stop": stop,
                        "stamps": {"arrival": now},
                    }
                    p.send(
                        "spikes.A", header, spikes=spikes(stop - 700, stop - 200, unit=n % 3), blind=blind()
                    )
                    sent.extend((stop - 700, stop - 200))
                    if n % 10 == 0:
                        ports.health.health(**told)
                    n += 1

            talker = threading.Thread(target=talk)
            talker.start()
            reader = subprocess.Popen(
                [sys.executable, "-c", CHILD, "10"], env=env, stdout=subprocess.PIPE, text=True
            )
            assert reader.stdout is not None
            about_spikes = json.loads(reader.stdout.readline())
            assert reader.stdout.readline() == "heard\n"
            entry = np.zeros(1, LEDGER)
            sent_ns = time.monotonic_ns()
            entry["number"], entry["rule"], entry["pattern"], entry["outcome"], entry["sent_ns"] = (
                3,
                b"burst",
                b"pulse",
                OUTCOMES.index("sent"),
                sent_ns,
            )
            time.sleep(0.5)
            for _ in range(2):  # told again when more is known: marked once
                p.send("ledger.A", ledger=entry)
            unsent = np.repeat(entry, 2)  # nobody was there: told as sent, and at once as failed
            unsent["number"], unsent["outcome"][1], unsent["sent_ns"][1] = 4, OUTCOMES.index("failed"), 0
            p.send("ledger.A", ledger=unsent)
            p.send("stim.A", stims=np.array([(FS, 2, 4, 1, 1.5)], STIM))
            p.send("gaps.A", gaps=np.array([(2 * FS, 2 * FS + 30, 4, 0)], GAP))
            ports.health.session("calibrated", units=3, stream="A")
            out, _ = reader.communicate(timeout=200)
            quit_.set()
            talker.join()
        finally:
            quit_.set()  # else a thread that talks on would keep the tests from ending
            for process in (bridge, reader):
                if process is not None and process.poll() is None:
                    process.stdin.close() if process.stdin else process.kill()
                    assert process.wait(120) is not None
    assert bridge.returncode == 0  # it ended with its parent's pipe
    got = json.loads(out)
    assert about_spikes == {
        "type": "Spikes",
        "labels": ["unit", "electrode", "amplitude", "score", "sample"],
        "nominal": 0.0,
    }
    rows = np.array(got["spikes"])
    assert len(rows) > 60 and set(rows[:, 1]) == {0, 1, 2} and (rows[:, 3] == -50).all()
    samples = rows[:, 5].astype(int).tolist()
    assert samples == sent[sent.index(samples[0]) :][: len(samples)]  # each once, in order, none lost
    assert abs(rows[:, 0] - (t0 / 1e9 + rows[:, 5] / FS)).max() < 2e-4
    marks = {text.split()[0]: (t, text) for t, text in got["markers"]}
    assert [text for _, text in got["markers"]].count("sent number=3 rule=burst pattern=pulse") == 1
    assert not any("number=4" in text for _, text in got["markers"])
    assert abs(marks["sent"][0] - sent_ns / 1e9) < 2e-4
    assert (
        marks["stim"][1] == f"stim line=4 state=1 value=1.5 sample={FS}"
        and abs(marks["stim"][0] - t0 / 1e9 - 1) < 2e-4
    )
    assert (
        marks["gap"][1] == f"gap samples=30 sample={2 * FS}"
        and marks["calibrated"][1] == "calibrated units=3"
    )
    assert got["rates"] and got["rates"][0][1:] == [0.0, 1.5, 3.0]


async def test_the_daemon_starts_it_again_and_takes_it_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spiked.lookout.GOODBYE_S", 60.0)  # on a busy computer it takes a while to leave
    pytest.importorskip("pylsl", reason="the extra `lsl` is not installed")
    rig = {"stream": [{"name": "a", "source": "maxwell"}], "lsl": {"enabled": True}}
    lookout = Lookout(configuration.parse(rig), lambda: Journal(None), lambda _topic, _news: None)

    async def no_jobs() -> dict[str, Any]:
        return {}

    with Ports("A") as ports:
        await lookout.start({}, lambda _why: None, no_jobs, ports.port)
        async with asyncio.timeout(120):
            while "lsl" not in lookout.facts():  # noqa: ASYNC110 - waits for another process
                await asyncio.sleep(0.05)
            first = lookout.facts()["lsl"]["pid"]
            os.kill(first, signal.SIGKILL)
            while lookout.facts()["lsl"]["lives"] != 1:  # noqa: ASYNC110 - waits for another process
                await asyncio.sleep(0.05)
        second = lookout.facts()["lsl"]["pid"]
        assert second != first and psutil.pid_exists(second)
        await lookout.close()
    assert not psutil.pid_exists(second)
