"""The closed loop in whole sessions: simulator, daemon, a stimulator, and whatever goes wrong in between."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from output_rig import OwnStimulator
from session_rig import rehearsal

from spiked import config as configuration
from spiked.act.ledger import read
from spiked.act.report import intervals
from spiked.cli import main
from spiked.rehearsal import Rehearsal, free_ports
from spiked_client.control import SyncControl
from spiked_client.errors import Refused
from spiked_client.protocol import LEDGER, OUTCOMES, REASONS
from spiked_client.subscribe import SyncClient


class Asking(SyncControl):
    """Asks again where the daemon gave up on a live process that a busy computer held up."""

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        for _ in range(10):
            try:
                return super().request(op, **fields)
            except Refused as e:
                if "the live process did not answer" not in str(e):
                    raise
        return super().request(op, **fields)


def asking(r: Rehearsal) -> Asking:
    return Asking(control_port=r.config.publish.control_port, timeout=30.0)


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulated array's units, found once."""
    r = rehearsal(
        tmp_path_factory.mktemp("units"),
        seconds=900.0,
        live={"enabled": True, "sorter": "rt_sort", "calibrate_s": 5.0},
    )
    with r, asking(r) as c:
        r.wait_state(("recording",), 120)
        until(lambda: live(c).get("units"), 600)
        return Path(r.stop()["folder"]) / "sim.sequences.h5"


def session(folder: Path, units: Path, seconds: float, *simulate: str) -> tuple[Rehearsal, str]:
    """One rule on any unit, at most 17 times a second. And the trigger socket's address."""
    address = simulate[1] if simulate else f"tcp://127.0.0.1:{free_ports(1)[0]}"
    settings = {"enabled": True, "sequences": str(units)}
    r = rehearsal(folder, seconds=seconds, simulate=simulate, live=settings)
    data = json.loads(r.config.model_dump_json())
    data["output"] = [{"name": "pulser", "kind": "zmq", "address": address}]
    data["trigger"] = [
        {"name": "any", "when": "burst", "count": 1, "window_ms": 1.0, "refractory_ms": 60, "output": "pulser",
         "pattern": "p", "electrodes": [5], "amplitude_ua": 5, "width_us": 200}
    ]  # fmt: skip
    data["act"] = {"late_ms": 500.0}  # this machine has other things to do as well
    r.config = configuration.parse(data)
    return r, address


def until(what: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if got := what():
            return got
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s:g} s")


def live(c: SyncControl) -> dict[str, Any]:
    return dict(c.status()["streams"]["sim"]["processes"].get("live", {}))


def pulses(rig: OwnStimulator, c: SyncControl, lease: str, n: int) -> None:
    """Until n more commands arrived; the lease is renewed meanwhile."""
    enough = len(rig.wanted) + n

    def there() -> bool:
        c.renew(lease)
        return len(rig.wanted) >= enough

    until(there)


def quiet(rig: OwnStimulator, seconds: float = 1.0) -> int:
    """Since when nothing was decided on of what arrives for so long, monotonic; 0: something was. What is under way may take its time."""
    now = time.monotonic_ns() + 200_000_000
    time.sleep(0.2 + seconds)
    return now if all(w.decided_ns <= now for w in rig.wanted) else 0


def seen(c: SyncControl, n: int) -> None:
    """n stimuli of somebody else are marked and noticed."""
    for _ in range(n):
        c.mark_stim(pattern="by hand")
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_armed_killed_stopped_and_every_pulse_in_the_ledger(tmp_path: Path, units: Path) -> None:
    r, address = session(tmp_path, units, 900.0)
    told: list[np.ndarray] = []
    with r, OwnStimulator(address) as rig, asking(r) as c:
        r.wait_state(("recording",), 120)
        until(lambda: live(c).get("units"))
        with SyncClient(control_port=r.config.publish.control_port) as client:
            topic = client.messages("ledger", from_start=True)
            until(lambda: live(c)["act"]["decisions"].get("dry", 0) > 2)
            assert not rig.wanted
            # armed: commands arrive, limits hold
            lease = c.arm(["any"], lease_s=60.0)["lease"]
            with pytest.raises(Refused, match="cannot be raised while armed"):
                c.set_limits(max_per_s=1000)
            with pytest.raises(Refused, match="cannot be changed while armed"):
                c.remove_trigger("any")
            with pytest.raises(Refused, match="there is no trigger 'none'"):
                c.arm(["none"])
            pulses(rig, c, lease, 10)
            seen(c, 3)
            c.set_limits(max_count=len(rig.wanted) + 500, lockout_ms=6.0)
            while len(told) < 15 and (batch := topic.get(30.0)) is not None:
                told.append(batch.message.arrays["ledger"])
        # kill -9 in the middle: the successor is not armed, and the old lease is worth nothing
        old = c.status()["streams"]["sim"]["pids"]["live"]
        os.kill(old, signal.SIGKILL)
        killed_ns = time.monotonic_ns()
        until(lambda: c.status()["streams"]["sim"]["pids"].get("live", old) != old and live(c).get("act"))
        n = len(rig.wanted)
        before = until(lambda: live(c)["act"]["decisions"].get("dry", 0) > 2 and live(c)["act"])
        assert before["armed"] == [] and before["count"] >= n == len(rig.wanted)
        with pytest.raises(Refused, match="this lease is over"):
            c.renew(lease)
        # a client that falls silent
        lease = c.arm(lease_s=10.0)["lease"]
        pulses(rig, c, lease, 5)
        until(lambda: c.triggers()["streams"]["sim"]["armed"] == [], 60)
        assert quiet(rig)
        # the emergency stop
        lease = c.arm(lease_s=60.0)["lease"]
        pulses(rig, c, lease, 3)
        assert c.stimulate(lease, "pulser", "q")["outcome"] in ("sent", "refused")
        assert main(["stop", "--stimulation", "--port", str(r.config.publish.control_port)]) == 0
        assert quiet(rig)
        with pytest.raises(Refused, match=r"stopped \(spiked stop --stimulation\); clear_stop first"):
            c.arm()
        c.clear_stop()
        assert c.triggers()["streams"]["sim"]["armed"] == []
        os.kill(c.status()["streams"]["sim"]["pids"]["live"], signal.SIGUSR2)
        assert until(lambda: c.triggers()["streams"]["sim"]["stopped"]) == "signal SIGUSR2"
        folder = Path(r.stop()["folder"])

    ledger = read(folder / "sim.ledger.bin")
    assert ledger["number"].tolist() == list(range(1, len(ledger) + 1))
    sent, received = ledger[ledger["sent_ns"] > 0], {w.number: w for w in rig.wanted}
    assert len(received) == len(rig.wanted) and set(received) <= set(sent["number"])
    whole, cut = sent[sent["ack_ns"] > 0], sent[sent["ack_ns"] == 0]
    before_the_kill = sent["number"][sent["decided_ns"] < killed_ns]
    assert cut["number"].tolist() == before_the_kill[len(before_the_kill) - len(cut) :].tolist()
    # written down, and killed before it was sent, or on its way when the stop came
    assert set(sent["number"]) - set(received) <= {*cut["number"], *rig.refused}
    assert (whole["trigger_ns"] <= whole["decided_ns"])[whole["n_triggers"] > 0].all()
    assert (whole["decided_ns"] <= whole["sent_ns"]).all() and (whole["sent_ns"] < whole["ack_ns"]).all()
    assert all(received[s["number"]].sample == s["sample"] for s in sent if s["number"] in received)
    assert set(ledger["outcome"]) >= {
        OUTCOMES.index("dry"),
        OUTCOMES.index("sent"),
        OUTCOMES.index("refused"),
    }
    assert REASONS.index("stopped") in ledger["reason"]
    live_told = np.concatenate(told)
    written = {r.tobytes() for r in np.fromfile(folder / "sim.ledger.bin", LEDGER)}
    assert {r.tobytes() for r in live_told} <= written  # what is told as sent may turn out not to have left
    assert len(live_told) > 10
    done = whole[whole["outcome"] == OUTCOMES.index("sent")]
    there = np.array([received[n].received_ns if n in received else 0 for n in done["number"]])
    assert ((done["sent_ns"] < there) & (there < done["ack_ns"])).all()  # what is told of the way is true
    took_ms = (whole["ack_ns"] - whole["sent_ns"]) / 1e6
    assert intervals(ledger, 20_000.0)["command sent to acknowledged"]["median"] == pytest.approx(
        np.median(took_ms), abs=0.01
    )
    with h5py.File(folder / "sim.nwb") as f:
        assert f["stimulus/presentation/stimuli/id"][:].tolist() == ledger["number"].tolist()
        kinds = f["acquisition/events/text"][:].tolist()
        assert kinds.count(b"by hand") == 3
    said = [json.loads(line)["text"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any("nothing is armed" in s for s in said)
    assert any("did not renew within 10 s" in s for s in said)
    assert any("stimulation is stopped: spiked stop" in s for s in said)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_its_supervisor_the_live_process_is_disarmed(tmp_path: Path, units: Path) -> None:
    r, address = session(tmp_path, units, 600.0)
    with r, OwnStimulator(address) as rig, asking(r) as c:
        r.wait_state(("recording",), 120)
        until(lambda: live(c).get("units"))
        status = c.status()
        lease = c.arm(lease_s=60.0)["lease"]
        pulses(rig, c, lease, 5)
        assert r.daemon is not None
        r.daemon.kill()
        r.daemon.wait(60)
        since_ns = until(lambda: quiet(rig, 5.0))
        for pid in status["streams"]["sim"]["pids"].values():
            until(lambda pid=pid: not Path(f"/proc/{pid}").exists())
        ledger = read(Path(status["folder"]) / "sim.ledger.bin")
        until(lambda: len(rig.wanted) == (ledger["sent_ns"] > 0).sum())
        assert not ledger["sent_ns"][ledger["number"] > rig.wanted[-1].number].any()
        # what a busy computer has too late, or not at all, is refused before anybody asks whether it is armed
        blocked = np.isin(ledger["reason"], [REASONS.index(why) for why in ("late", "blind")])
        later = ledger["outcome"][(ledger["decided_ns"] > since_ns) & ~blocked]
        assert set(later) <= {OUTCOMES.index("dry")}
    assert ledger["number"][ledger["sent_ns"] > 0].tolist() == [w.number for w in rig.wanted]


def foretold(path: Path, first: int = 20, lately: int = 31) -> dict[int, int]:
    """Number -> sample at which the engine expected the pulse's artifact, from every line of the ledger in its order."""
    at: dict[int, int] = {}
    seen: dict[int, int] = {}
    expected: dict[int, int] = {}
    for row in np.fromfile(path, LEDGER):
        number, artifact = int(row["number"]), int(row["artifact_sample"])
        if row["sent_ns"] > 0 and number not in at:
            at[number] = int(row["sent_sample"])  # as it was known then: an acknowledgement may tell better
            last = list(seen.values())[-lately:]
            expected[number] = at[number] + (int(np.median(last)) if last else first)
        if artifact >= 0 and number not in seen:
            seen[number] = artifact - at[number]
    return expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_artifact_of_every_own_pulse_is_seen_where_it_was(tmp_path: Path, units: Path) -> None:
    """The simulated device is the stimulator: nothing but the samples tells the daemon that it stimulated."""
    log = tmp_path / "stims.npz"
    r, _ = session(
        tmp_path, units, 600.0, "--stim", f"tcp://127.0.0.1:{free_ports(1)[0]}", "--stim-log", str(log)
    )
    with r, asking(r) as c:
        r.wait_state(("recording",), 120)
        until(lambda: live(c).get("units"))
        lease = c.arm(lease_s=60.0)["lease"]

        def enough() -> bool:
            c.renew(lease)
            return live(c)["act"]["count"] > 60

        until(enough)
        c.disarm(lease)
        time.sleep(1.0)
        book = Path(c.status()["folder"]) / "sim.ledger.bin"

        def answered() -> bool:
            told = read(book)
            return bool((told["ack_ns"][told["sent_ns"] > 0] > 0).all())

        until(answered)
        folder = Path(r.stop()["folder"])
        r.stop_simulator(60)
    ledger = read(folder / "sim.ledger.bin")
    sent = ledger[ledger["sent_ns"] > 0]
    with np.load(log) as z:
        stims = z["stims"]
    assert stims["number"].tolist() == sent["number"].tolist()
    expected = foretold(folder / "sim.ledger.bin")
    late = stims["sample"] - [expected[n] for n in stims["number"]]
    punctual = np.abs(late) < 18  # where the daemon looks for them: a busy computer stimulates at odd times
    if punctual.sum() < 20:
        pytest.skip(f"the machine was too busy to stimulate on time: {np.abs(late).mean() / 20:.1f} ms off")
    off = (sent["artifact_sample"] - stims["sample"])[punctual]
    assert (off == 0).mean() > 0.9, off
