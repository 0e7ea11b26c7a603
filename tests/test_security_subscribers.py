"""A crowd of clients of which one is stalled and others are killed: nobody else loses a batch, and the stalled one is told."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from client_rig import Ports

from spiked.bench.nursery import Seen
from spiked.bench.subscribers import Crowd
from spiked.errors import SpikedError
from spiked.keys import add, init
from spiked_client.order import Batch, Missed
from spiked_client.protocol import SPIKE, Message

HEALTHY = [f"healthy-{k}" for k in range(6)]


class Heavy(threading.Thread):
    """A publisher of 16 kB messages, 300 a second: a stalled client's buffers are full within a second."""

    def __init__(self, rig: Ports) -> None:
        super().__init__(name="heavy")
        self.publisher, self.slowest_ms, self.sent = rig.streams["A"], 0.0, 0
        self.quit = threading.Event()

    def run(self) -> None:
        some = np.zeros(500, SPIKE)
        while not self.quit.wait(0.0033):
            start = time.perf_counter()
            header = {"first": self.sent, "stop": self.sent + 1, "stamps": {"arrival": time.monotonic_ns()}}
            self.publisher.send("spikes.A", header, spikes=some)
            self.slowest_ms = max(self.slowest_ms, 1000 * (time.perf_counter() - start))
            self.sent += 1


def caught_up(counters: Counter[str], within_s: float = 100.0) -> None:
    """Until the one that was stalled has asked for what it missed, and asks for no more."""
    until, before = time.monotonic() + within_s, -1
    time.sleep(2.0)
    while time.monotonic() < until and not before == counters["replayed"] > 100:
        before = counters["replayed"]
        time.sleep(1.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("encrypted", [False, True])
def test_one_stalled_and_others_killed_cost_the_rest_nothing(tmp_path: Path, encrypted: bool) -> None:
    keys = key = None
    if encrypted:
        keys, key = tmp_path / "keys", tmp_path / "crowd.key"
        init(keys, lambda _t: None)
        add(keys, "crowd", "watch", lambda _t: None, out=key)
    me = psutil.Process()
    with (
        Ports("A", keys=keys, hwm=64, replay_messages=1800) as rig,  # of 6 s: a busy computer loses none
        Crowd(rig.port, tmp_path / "crowd", key) as crowd,
    ):
        heavy = Heavy(rig)
        heavy.start()
        try:
            for name in (*HEALTHY, "stalled", "victim"):
                crowd.start(name)
            crowd.wait([*HEALTHY, "stalled"], 150)
            since = heavy.sent
            time.sleep(0.5)
            before = me.memory_info().rss
            crowd.signal("stalled", signal.SIGSTOP)
            until = time.monotonic() + 100
            for k in range(1, 8):
                while heavy.sent < since + 500 * k and time.monotonic() < until:
                    time.sleep(0.05)
                crowd.signal("victim", signal.SIGKILL)
                crowd.start("victim")
            grown = me.memory_info().rss - before
            crowd.signal("stalled", signal.SIGCONT)
            caught_up(rig.streams["A"].counters)
            sent = heavy.sent
            stalled = crowd.end(["stalled"], 120)["stalled"]
            seen = crowd.end(HEALTHY, 120)
        finally:
            heavy.quit.set()
            heavy.join(10)
    for name, one in seen.items():
        assert not one["missed"] and not one["untold"] and not one["out_of_order"], name
        assert one["received"] > (sent - since) / 2
    # What the stalled one did not get it was told of, and what was still stored it got back, all in order.
    assert stalled["missed"].get("gone", 0) > 0 and set(stalled["missed"]) == {"gone"}
    assert stalled["replayed"] > 100
    assert stalled["untold"] == stalled["out_of_order"] == 0
    assert stalled["received"] + stalled["missed"]["gone"] == stalled["last"] - stalled["first"] + 1
    assert grown < 100e6  # 16 kB x (64 waiting + 1800 stored), and what the kernel keeps is not ours


def test_a_subscriber_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    with Ports("A") as rig, Crowd(rig.port, tmp_path / "crowd", None) as crowd:
        crowd.start("one")
        crowd.signal("one", signal.SIGKILL)
        with pytest.raises(SpikedError, match=r"did not say what they saw: \['one'\]"):
            crowd.end(["one"], patience_s=0.3)


def batch(seq: int, missed: int = 0, replayed: bool = False) -> Batch:
    lost = Missed("spikes.A", seq - missed, seq - 1, "gone") if missed else None
    return Batch(
        Message("spikes.A", {"seq": seq, "stamps": {"arrival": 10}}), 2_000_010, lost, replayed=replayed
    )


def test_what_a_subscriber_saw_is_counted_to_the_last_batch() -> None:
    seen = Seen()
    for b in (
        batch(5),
        batch(6),
        batch(9, missed=2),
        batch(10, replayed=True),
        batch(10),
        batch(14, missed=1),
    ):
        seen.take(b)
    told = json.loads(json.dumps(seen.told()))
    assert (told["first"], told["last"], told["received"], told["replayed"]) == (5, 14, 6, 1)
    assert told["missed"] == {"gone": 3} and told["out_of_order"] == 1
    assert told["untold"] == 2  # 11 and 12: only 13 was told
    assert told["p50_ms"] == 2.0
