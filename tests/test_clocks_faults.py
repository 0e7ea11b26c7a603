"""Clocks that cannot be compared: told, and no reason to end a recording."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spiked.clocks.pulses import PulseClock
from spiked.journal import Journal
from spiked.ring import Ring, RingWriter
from spiked.stream import StreamInfo
from spiked.timekeeping import Timekeeper


@pytest.mark.parametrize("seed", [22, 49, 111, 132])
def test_pulses_of_which_no_two_are_off_by_the_same_are_no_match(seed: int) -> None:
    """Sync pulses timed by software, off by a millisecond now and then. Later ones that are right are used."""
    rng = np.random.default_rng(seed)
    reference = np.cumsum(rng.uniform(0.7, 1.3, 5))
    clock = PulseClock()
    clock.add_reference(reference)
    clock.add(reference + rng.normal(0, 0.001, 5))
    end = float(reference[-1])
    for second in range(3):
        assert clock.update(lambda x: x, end + second, end + second) is None
    assert clock.line is None and clock.matched == 0
    later = end + 70 + np.cumsum(rng.uniform(0.7, 1.3, 60))
    clock.add_reference(later)
    clock.add(later)
    clock.update(lambda x: x, float(later[-1]) + 1, float(later[-1]) + 1)
    assert clock.line is not None and abs(clock.line(float(later[-1]))) < 1e-4


def test_a_clock_that_fails_is_told_and_the_session_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = StreamInfo("a", 1000.0, ("0",), ((0.0, 0.0),), "int16", (1.0,))
    ring = Ring.create(tmp_path / "ring", info, 10.0)
    writer = RingWriter(ring)
    writer.write(np.zeros((100, 1), np.int16), 1_000_000_000)
    track: Any = SimpleNamespace(name="a", ring=ring, cfg=SimpleNamespace(source="maxwell", sync_line=None))
    news: list[dict[str, Any]] = []
    journal = Journal(tmp_path / "log.jsonl")
    keeper = Timekeeper(tmp_path, journal, news.append)
    keeper.begin([track])
    assert keeper.look([track]) and keeper.told()
    assert keeper.clocks is not None

    def broken() -> None:
        raise ZeroDivisionError("a figure nobody thought of")

    monkeypatch.setattr(keeper.clocks, "update", broken)
    keeper._looked_s = 0.0
    keeper.look([track])
    keeper.look([track])
    keeper.finish([track])
    journal.close()
    assert keeper.told() == {} and keeper.news() == {"reference": None, "streams": {}}
    assert len(news) == 1 and "the recording goes on" in news[0]["text"]
    (note,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert note["level"] == "error" and "ZeroDivisionError" in note["text"]
    assert json.loads((tmp_path / "clocks.json").read_text())["streams"]["a"]  # what was known before
