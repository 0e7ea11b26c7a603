"""Calibration beside the live path: fed by it, never in its way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_rig import Rec, recording, run

from spiked.detect.detector import Detected
from spiked.errors import SpikedError
from spiked.live.calibration import LEAST_MEMORY, UNSEEN, Calibration, Collector
from spiked.sort.features import as_float32, seen_in
from spiked.sort.sequences import Sequences
from spiked.stream import Chunk


def test_every_float16_becomes_the_float32_that_numpy_makes_of_it() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    got = as_float32(halves[:, 3:200])
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, halves[:, 3:200].astype(np.float32))


def test_only_what_was_not_seen_makes_a_mask() -> None:
    logits = np.full((2, 5), -3.0, np.float32)
    assert seen_in(logits, None) is None and seen_in(logits, np.ones(5, bool)) is None
    logits[1, 2] = -60_000
    mask = seen_in(logits, np.array([True, True, True, True, False]))
    assert mask is not None
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 0, 1, 0]])


@pytest.fixture(scope="module")
def rec() -> Rec:
    return recording()


@given(
    at=st.lists(st.integers(0, 9_999), min_size=1, max_size=3, unique=True),
    step=st.sampled_from([20, 200, 1000]),
)
@settings(max_examples=15, deadline=None)
def test_a_swap_to_the_same_units_changes_no_spike(rec: Rec, at: list[int], step: int) -> None:
    codes, first = rec.codes[700_000:720_000], 700_000
    whole = run(rec.pipeline(units=rec.sequences), codes, [], first=first)
    expected = np.concatenate([r.spikes for r in whole])
    pipeline, results = rec.pipeline(units=rec.sequences), []
    for a in range(0, len(codes), step):
        if any(a <= 2 * s < a + step for s in at):
            pipeline.swap(rec.sequences)
        results.append(pipeline.process(Chunk(first + a, codes[a : a + step], 0)))
    until = [r.decided_until for r in results]
    assert until == sorted(until)
    got = np.concatenate([*(r.spikes for r in results), pipeline.flush()])
    got = got[got["sample"] < first + len(codes) - 200]
    expected = expected[expected["sample"] < first + len(codes) - 200]
    assert len(got) > 10
    np.testing.assert_array_equal(
        np.sort(got, order=["sample", "unit"]), np.sort(expected, order=["sample", "unit"])
    )


def meta(rec: Rec) -> dict[str, Any]:
    p = rec.pipeline()
    return {
        "stringent": p.stringent, "loose": p.loose, "scaling": rec.scaling, "input_scale": None,
        "network": {"name": rec.network.name, "sha256": rec.network.sha256}, "previous": None,
    }  # fmt: skip


def detected(first: int, n: int, value: float, channels: int = 16) -> Detected:
    x = np.full((channels, n), value, np.float32)
    valid = np.ones((channels, n), bool)
    valid[0, 0] = False
    return Detected(first, x, valid, x - 1, False)


def test_what_is_collected_keeps_its_place_and_holes_are_unseen(rec: Rec, tmp_path: Path) -> None:
    collector = Collector(tmp_path / "c", rec.info, 100, meta(rec))
    for first, n in ((50, 10), (60, 20), (90, 30), (120, 500)):
        collector.add(detected(first, n, first))
    assert collector.full
    collector.close()
    x, logits = (np.load(tmp_path / "c" / f"{k}.npy") for k in ("x", "logits"))
    assert json.loads((tmp_path / "c" / "calibration.json").read_text())["first_sample"] == 50
    np.testing.assert_array_equal(x[3], np.repeat([50, 60, 0, 90, 120], [10, 20, 10, 30, 30]))
    np.testing.assert_array_equal(logits[3], np.repeat([49, 59, UNSEEN, 89, 119], [10, 20, 10, 30, 30]))
    assert logits[0, [0, 10, 40, 70]].tolist() == [UNSEEN] * 4 and logits[0, 1] == 49


def calibrated(rec: Rec, folder: Path, n: int, give: int) -> Calibration:
    """Fed with `give` samples of the recording's pipeline."""
    c = Calibration(folder / "work", rec.info, n, meta(rec), folder / "found.sequences.h5")
    until = time.monotonic() + 120
    while (
        c.outcome is None and c.progress() == ("collecting", 0.0, "collecting") and time.monotonic() < until
    ):
        c.add(detected(0, 1, 0.0))  # until there is room
        time.sleep(0.01)
    pipeline = rec.pipeline(scaling=rec.scaling, tap=c.add)
    run(pipeline, rec.codes[1 : give + 1], range(1000, give, 1000), first=1)
    return c


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_units_come_from_another_process_and_nothing_stays_behind(rec: Rec, tmp_path: Path) -> None:
    c = calibrated(rec, tmp_path, 200_000, 210_000)
    c.join(250)
    assert isinstance(c.outcome, Sequences) and len(c.outcome) >= 3
    assert c.outcome.first_sample == 0 and c.outcome.stop_sample == 200_000
    assert [p.name for p in tmp_path.iterdir()] == ["found.sequences.h5"]


def test_cancelling_while_collecting_ends_it_at_once(rec: Rec, tmp_path: Path) -> None:
    c = calibrated(rec, tmp_path, 200_000, 20_000)
    state, fraction, _ = c.progress()
    assert state == "collecting" and 0.05 < fraction < 0.2
    c.cancel()
    c.add(detected(0, 1, 0.0))
    c.join(120)
    assert isinstance(c.outcome, SpikedError) and "cancelled" in str(c.outcome)
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_samples_is_one_line(rec: Rec, tmp_path: Path) -> None:
    c = Calibration(tmp_path / "work", rec.info, 1 << 45, meta(rec), tmp_path / "found")
    c.join(120)
    assert isinstance(c.outcome, SpikedError)
    assert str(c.outcome).startswith("calibration needs ") and "lower calibrate_s" in str(c.outcome)
    (tmp_path / "file").write_text("in the way")
    c = Calibration(tmp_path / "file" / "work", rec.info, 100, meta(rec), tmp_path / "found")
    c.join(120)
    assert isinstance(c.outcome, SpikedError) and "calibration failed" in str(c.outcome)


def test_the_calibrating_process_cannot_take_all_memory() -> None:
    code = """if True:
        import pathlib, psutil, resource
        import numpy as np
        from spiked.live.calibration import _bounded
        _bounded()
        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        try:
            np.ones(limit // 8 + 1)
        except MemoryError:
            print(limit, psutil.virtual_memory().total, pathlib.Path("/proc/self/oom_score_adj").read_text())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit, total, first_to_go = map(int, done.stdout.split())
    assert limit <= max(LEAST_MEMORY, total // 2) and first_to_go == 800
