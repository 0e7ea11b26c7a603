"""Decisions in two steps in a whole session: an array with known cells, the daemon, a stimulator, and clients that count."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import probeinterface
import pytest
from live_rig import FS, recording, templates
from output_rig import PATIENT_MS, OwnStimulator
from session_rig import rehearsal

from spiked.act.ledger import read
from spiked.cli import main
from spiked.rehearsal import Rehearsal, free_ports
from spiked_client import Client, ClientError, DaemonAbsent, Refused, Tick
from spiked_client.protocol import FATES, OUTCOMES, REASONS, SPIKE, TOLD_EARLY
from spiked_client.subscribe import SyncClient

SECONDS = 50.0  # all there is; the session ends once enough was seen, however late the live process and its clients are


def array(folder: Path) -> Path:
    """The recording whose units are known, as a folder that the simulator plays."""
    rec = recording()
    folder.mkdir()
    np.save(folder / "traces.npy", rec.codes)
    np.savez(
        folder / "ground_truth.npz",
        spike_samples=rec.truth["sample"],
        spike_units=rec.truth["unit"],
        unit_ids=np.arange(5),
    )
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(rec.info.positions, shapes="square", shape_params={"width": 9.0})
    probe.set_device_channel_indices(np.arange(16))
    probeinterface.write_probeinterface(folder / "probe.json", probe)
    params = {
        "sampling_frequency": FS, "n_channels": 16, "n_samples": len(rec.codes), "dtype": "uint16", "lsb_uv": 6.29, "zero_code": 512,
        "code_min": 0, "code_max": 1023,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    return folder


class Counting(threading.Thread):
    """An early loop that arms the rule and keeps every tick, and beside it a client of final spikes only."""

    def __init__(self, port: int) -> None:
        super().__init__(name="counting")
        self.port, self.ticks, self.final, self.error = port, list[Tick](), list[np.ndarray](), ""
        self.counters: dict[str, int] = {}
        self.missed = 0
        self.done = threading.Event()
        self.finals = threading.Thread(target=self._finals, name="finals", daemon=True)

    def run(self) -> None:
        self.finals.start()
        asyncio.run(self._loop())

    def _finals(self) -> None:
        with SyncClient(control_port=self.port, wait_s=150) as client:
            subscription = client.spikes(from_start=True)
            while (batch := subscription.get(0.3)) is not None or not self.done.is_set():
                if batch is not None:
                    self.final.append(batch.spikes)
                    self.missed += batch.missed.count if batch.missed else 0

    async def _loop(self) -> None:
        try:
            async with Client(control_port=self.port, wait_s=150) as client:
                while not (await client.control.endpoints())["streams"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                async with client.loop(deadline_ms=1e9, timeout=15, early=True, lease_s=60) as loop:
                    self.counters = loop.counters
                    while True:
                        try:
                            await loop.arm()
                            break
                        except (Refused, DaemonAbsent):  # the live process is not there yet, or busy
                            await asyncio.sleep(0.2)
                    while True:
                        try:
                            async for tick in loop:
                                self.ticks.append(tick)
                            break
                        except Refused:  # to renew the lease of a session that ends, and has more to tell
                            continue
        except ClientError as e:
            self.error = type(e).__name__


def session(tmp_path: Path) -> tuple[Rehearsal, str]:
    address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    templates().save(tmp_path / "known.templates.h5")
    rule = {"name": "rule", "when": "burst", "count": 1, "window_ms": 1.0, "refractory_ms": 40, "output": "pulser", "electrodes": [5],
            "amplitude_ua": 5, "width_us": 200, "early": True}  # fmt: skip
    r = rehearsal(
        tmp_path, seconds=SECONDS, simulate=("--recording", str(array(tmp_path / "array"))),
        live={"enabled": True, "sorter": "templates", "templates": str(tmp_path / "known.templates.h5"), "early": True, "max_chunk_ms": 1.0},
        output=[{"name": "pulser", "kind": "zmq", "address": address, "timeout_ms": PATIENT_MS}], trigger=[rule], act={"late_ms": 12_000.0}, ring={"seconds": 60.0},
        publish={"replay_messages": 200_000},  # all of them: a client of final spikes may come late
    )  # fmt: skip
    return r, address


def under_way(session: Path) -> int:
    """Commands that the stimulator has not answered."""
    ledger = read(session / "sim.ledger.bin")
    return int((ledger["ack_ns"][ledger["sent_ns"] > 0] == 0).sum())


@pytest.mark.timeout(600)
def test_every_early_spike_is_resolved_once_and_none_counted_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    r, address = session(tmp_path)
    with r, OwnStimulator(address) as rig:
        clients = Counting(r.config.publish.control_port)
        clients.start()
        folder = Path(r.wait_state(("recording",), 150)["folder"])
        until = time.monotonic() + 200
        while (
            sum(len(t.early) for t in list(clients.ticks)) < 150 or len(rig.wanted) < 30 or not clients.final
        ):
            assert time.monotonic() < until and not clients.error, clients.error
            time.sleep(0.1)
        sent = r.stop_simulator(150)
        assert r.wait_received(sent["samples"])
        received_ns = time.monotonic_ns()
        until = time.monotonic() + 100
        told: dict[str, Any] = {"t_ns": 0}
        while told["t_ns"] < received_ns or told["behind"] >= FS // 1000 or under_way(folder):
            assert time.monotonic() < until, told
            time.sleep(0.1)
            told = r.status()["streams"]["sim"]["processes"]["live"]
        summary = r.stop()
        clients.join(120)
        clients.done.set()
        clients.finals.join(60)
    assert summary["exit_code"] == 0 and clients.error in ("Silence", "DaemonAbsent") and not clients.missed
    recorded = np.fromfile(folder / "sim.spikes.bin", SPIKE)
    recorded = recorded[recorded["unit"] >= 0]
    early, resolved, final = (
        np.concatenate([getattr(t, k) for t in clients.ticks]) for k in ("early", "resolved", "spikes")
    )

    # Final spikes are the ones on file, whoever listens: nothing that was withdrawn, nothing twice.
    both = recorded, np.concatenate(clients.final)
    for one in both:
        keys = Counter(zip(one["sample"].tolist(), one["unit"].tolist(), strict=True))
        assert max(keys.values()) == 1 and len(keys) > 100
    told_to_all, on_file = (np.sort(a, order=["sample", "unit"]) for a in both)
    np.testing.assert_array_equal(told_to_all, on_file)
    seen = {(int(s["sample"]), int(s["unit"])) for s in final}
    assert seen <= {(int(s["sample"]), int(s["unit"])) for s in recorded}

    # Every early spike has one fate, and the confirmed ones are the final spikes that say so.
    assert len(early) > 30 and early["number"].tolist() == list(
        range(int(early["number"][0]), int(early["number"][-1]) + 1)
    )
    assert sorted(resolved["number"].tolist()) == early["number"].tolist()
    counts = Counter(FATES[f] for f in resolved["fate"].tolist())
    assert counts["confirmed"] > 0.8 * len(early) and counts["lost"] == 0
    flagged = {(int(s["sample"]), int(s["unit"])) for s in recorded if s["flags"] & TOLD_EARLY}
    assert {(int(x["sample"]), int(x["unit"])) for x in resolved if x["sample"] >= 0} <= flagged
    assert clients.counters["early"] == len(early) and clients.counters["unresolved"] == 0
    news = sum(len(t.news) for t in clients.ticks)
    assert news == len(early) + int((final["flags"] & TOLD_EARLY == 0).sum())

    # The daemon's own figures: of the whole stream, these clients may have come a little later.
    assert told["early"]["told"] >= told["early"]["confirmed"] + told["early"]["withdrawn"] - 1
    ended = json.loads((folder / "sim.latency.json").read_text())["early"]
    assert ended["told"] == ended["confirmed"] + ended["withdrawn"] >= len(early)
    assert ended["confirmed"] == len(flagged) and ended["latency_ms"]["n"] > 0

    # What was sent on early spikes says so, and what became of them.
    ledger = read(folder / "sim.ledger.bin")
    words = Counter((OUTCOMES[x["outcome"]], REASONS[x["reason"]]) for x in ledger)
    assert words["sent", "confirmed"] > 10 and not words["sent", "early"] and not words["dry", "early"], words
    assert len(rig.wanted) == (ledger["sent_ns"] > 0).sum()
    assert main(["report", str(folder)]) == 0
    assert "on early spikes:" in capsys.readouterr().out
