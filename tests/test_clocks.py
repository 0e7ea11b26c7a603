"""Clocks of several streams: offset errors over a simulated hour, and how soon a jump is told."""

from __future__ import annotations

import numpy as np
import pytest

from spiked.bench.clock_scene import Device, Pulses, play, table_error_ms
from spiked.clocks.aligned import COLUMNS, Clocks
from spiked.clocks.fit import straight


def maxwell(**more: object) -> Device:
    return Device(
        20_000.0, 100, ppm=3.0, swing_ppm=1.5, swing_s=1100.0, first=5_000_000, least_delay_s=0.0003, **more
    )  # type: ignore[arg-type]


def open_ephys(**more: object) -> Device:
    options = {
        "ppm": -17.0,
        "swing_ppm": 2.5,
        "begun_s": 0.123,
        "first": 777,
        "least_delay_s": 0.0006,
        **more,
    }
    return Device(30_000.0, 696, **options)  # type: ignore[arg-type]


pytestmark = pytest.mark.timeout(1200)  # hours of clocks, on a computer that has other things to do

HOUR = {
    "arrival": (None, 0.003),
    "pulses of a constant period": (Pulses(missing=0.05, extra=0.03), 0.003),
    "random pulses": (Pulses(random=True, missing=0.05, extra=0.03), 0.003),
}


@pytest.mark.parametrize("how", HOUR)
def test_the_offset_stays_within_a_millisecond_over_an_hour(how: str) -> None:
    """20 ppm apart and drifting, chunks 3 ms late on average, the computer busy for 0.4 s once a minute."""
    pulses, jitter = HOUR[how]
    a, b = maxwell(jitter_s=jitter), open_ephys(jitter_s=jitter)
    p = play(a, b, 3600, pulses, seed=3)
    error = np.abs(p.error_ms)
    print(f"{how}: median {np.median(error):.3f} ms, p99 {np.quantile(error, 0.99):.3f}, max {error.max():.3f}, "
          f"told {np.median(p.told_ms):.3f}, table max {np.abs(table_error_ms(p, a, b)).max():.3f}")  # fmt: skip
    assert p.seconds[0] <= 10 and len(error) > 3_580  # known within seconds, and from then on
    assert error.max() < 1.0 and np.abs(table_error_ms(p, a, b)).max() < 1.0
    assert not p.steps
    assert set(p.methods[30:]) == {
        "pulses" if pulses else "arrival"
    }  # random pulses are known for certain a little later
    if pulses:
        assert error[30:].max() < 0.2 and np.median(error) < 0.05
    assert np.mean(error[60:] <= 4 * p.told_ms[60:]) > 0.97  # the error that is told is honest
    told = p.clocks.told()["b"]
    assert abs(told["ppm"] + 20) < 6 and told["steps"] == 0 and told["n"] > 1000


@pytest.mark.parametrize("lost", [3, -2, 1])
@pytest.mark.parametrize("samples", [600, 6_000])
def test_samples_lost_without_a_word_are_told_within_five_seconds(samples: int, lost: int) -> None:
    """By arrival: 20 and 200 ms on the second stream (-2: the first loses 2/3 of it)."""
    at = 120.37 + lost / 7
    spans = ((at, samples),)
    a = maxwell(lost=spans if lost < 0 else ())
    b = open_ephys(lost=spans if lost > 0 else ())
    p = play(a, b, 170, seed=abs(lost), busy=False)
    name, fs = ("a", 20_000) if lost < 0 else ("b", 30_000)
    ((when, stream, step),) = p.steps
    assert stream == name and at < when <= at + 5
    assert step.seconds == pytest.approx(samples / fs, abs=0.0015) and step.method == "arrival"
    device = a if lost < 0 else b
    assert abs(float(device.time(step.sample)) - at) < 1.5
    after = p.seconds > when + 1
    assert np.abs(p.error_ms[after]).max() < 1.0  # and the clock is right again
    assert p.clocks.told()[name]["steps"] == 1


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("samples", [36, 90, 3_000])
def test_pulses_tell_a_jump_of_a_millisecond(samples: int, random: bool) -> None:
    """1.2 ms, 3 ms and 100 ms: the smaller ones no arrival time can show."""
    at = 100.61
    a, b = maxwell(jitter_s=0.002), open_ephys(jitter_s=0.002, lost=((at, samples),))
    p = play(a, b, 130, Pulses(random=random), seed=5, busy=False)
    assert len(p.steps) == 1
    when, stream, step = p.steps[0]
    assert stream == "b" and at < when <= at + 5
    assert step.seconds == pytest.approx(samples / 30_000, abs=0.0015)
    assert np.abs(p.error_ms[p.seconds > when + 6]).max() < 0.3


def test_a_restart_that_is_told_is_no_alarm() -> None:
    a, b = maxwell(), open_ephys()
    clocks, rng = Clocks({"a": a.fs_hz, "b": b.fs_hz}), np.random.default_rng(0)

    def second(s: int) -> list[object]:
        out: list[object] = []
        for name, device in (("a", a), ("b", b)):
            out += clocks.arrived(name, *device.chunks(s, rng, lambda t: t))
        return [*out, *clocks.update()]

    assert not any(second(s) for s in range(1, 60))
    b.begun_s += 2.0  # it was off for two seconds; the session's numbering went on
    clocks.reset("b", b.first + b.done)
    assert clocks.knot("b") is None
    assert not any(second(s) for s in range(60, 120))
    knot = clocks.knot("b")
    assert knot is not None and knot.segment == 1
    assert abs(knot.reference - float(a.sample(b.time(knot.sample)))) < 20  # 1 ms
    rows = [dict(zip(COLUMNS, r, strict=True)) for r in clocks.table("b")]
    assert {r["segment"] for r in rows} == {0, 1} and all(r["method"] == "arrival" for r in rows)


@pytest.mark.parametrize(
    "trouble", ["a busy minute", "a slow start", "a start that falls behind", "a queue worked off", "silence"]
)
def test_a_busy_computer_is_no_jump(trouble: str) -> None:
    rng = np.random.default_rng(8)
    a, b = maxwell(), open_ephys()
    clocks = Clocks({"a": a.fs_hz, "b": b.fs_hz})

    def late(t: np.ndarray) -> np.ndarray:
        if trouble == "a busy minute":  # delays of 5 to 300 ms for a minute
            return np.where((t > 60) & (t < 120), t + rng.uniform(0.005, 0.3, len(t)), t)
        if trouble == "a slow start":
            return np.maximum(t, 3.7)
        if trouble == "a start that falls behind":
            return t + np.interp(t, (0, 2, 18, 22), (0, 5, 4, 0))
        if trouble == "a queue worked off":  # evenly, which looks like a clock that is slow
            return t + np.interp(t, (0, 21), (3, 0))
        return np.where((t > 60) & (t < 68), 68.0, t)

    steps: list[object] = []
    for s in range(1, 180):
        for name, device in (("a", a), ("b", b)):
            steps += clocks.arrived(name, *device.chunks(s, rng, late))
        steps += clocks.update()
    assert not steps
    knot = clocks.knot("b")
    assert knot is not None
    assert abs(knot.reference - float(a.sample(b.time(knot.sample)))) < 20


def test_pulses_that_cannot_be_told_apart_are_refused() -> None:
    """25 pulses a second: arrival cannot say which is which. Random ones of that rate can be matched."""
    a, b = maxwell(), open_ephys()
    p = play(a, b, 40, Pulses(period_s=0.03), busy=False)
    assert set(p.methods) == {"arrival"} and p.clocks.told()["b"]["pulses"]["ambiguous"]
    p = play(maxwell(), open_ephys(), 40, Pulses(period_s=0.03, random=True), busy=False)
    assert p.methods[-1] == "pulses" and abs(p.error_ms[-1]) < 0.1


def test_a_cable_that_is_out_for_a_while_is_no_jump() -> None:
    """Every pulse misses its counterpart then, by a whole period each time."""
    a, b = maxwell(), open_ephys()
    p = play(a, b, 150, _Out(missing=0.05), busy=False)
    assert not p.steps and np.abs(p.error_ms).max() < 0.5 and p.methods[-1] == "pulses"


class _Out(Pulses):
    def seen(
        self, times: np.ndarray, a: float, b: float, device: Device, rng: np.random.Generator
    ) -> np.ndarray:
        out = device.fs_hz == 20_000 and 60 < a < 75
        return np.zeros(0, np.int64) if out else super().seen(times, a, b, device, rng)


def test_arrival_takes_over_when_the_pulses_stop() -> None:
    a, b = maxwell(), open_ephys()
    p = play(a, b, 240, _Ending(), busy=False)
    assert p.methods[50] == "pulses" and p.methods[-1] == "arrival"
    assert np.abs(p.error_ms).max() < 1.0 and not p.steps


class _Ending(Pulses):
    def times(self, seconds: float, rng: np.random.Generator) -> np.ndarray:
        return super().times(100, rng)


def test_a_line_through_points_of_which_a_third_are_wrong() -> None:
    rng = np.random.default_rng(0)
    x = np.linspace(0, 100, 300)
    y = 0.01 + 20e-6 * x + rng.normal(0, 20e-6, 300)
    wrong = rng.random(300) < 0.33
    y[wrong] += rng.exponential(0.05, int(wrong.sum()))
    line = straight(x, y)
    assert line.slope == pytest.approx(20e-6, abs=1e-6) and abs(line(100) - 0.012) < 20e-6
    assert straight(x[:1], y[:1]).slope == 0.0
    assert abs(line(0.0) - 0.01) < 3 * line.error(0.0) + 5e-6
