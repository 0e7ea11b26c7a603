"""The limits of stimulation hold for all streams of a session together."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from spiked.act.shared import SharedSafety, account
from spiked.config import Act
from spiked.track import clear_leftovers

S = 1_000_000_000


def spend(path: Path, limits: Act, tries: int, out: str) -> None:
    """As many stimuli as are allowed, as fast as it goes."""
    safety = SharedSafety(path, limits)
    sent = []
    for _ in range(tries):
        now = time.monotonic_ns()
        if not safety.refusal(now, 1.0) and not safety.take(now, 1.0):
            sent.append(safety._last_ns)  # the other one may have been held up between clock and lock
    np.save(out, np.array(sent, np.int64))


@pytest.mark.parametrize(
    "limits", [{"max_count": 61}, {"max_per_s": 37}, {"lockout_ms": 10.0}, {"max_nc_per_s": 23.0}]
)
def test_two_processes_never_go_beyond_what_is_allowed_to_both(
    tmp_path: Path, limits: dict[str, float]
) -> None:
    free = {"max_per_s": 100_000, "max_count": 1_000_000, "lockout_ms": 0.0, "max_nc_per_s": None, **limits}
    path = account(tmp_path, os.getpid(), "session")
    spawn = multiprocessing.get_context("fork")
    begun = time.monotonic_ns()
    workers = [
        spawn.Process(target=spend, args=(path, Act(**free), 1500, str(tmp_path / f"{k}.npy")))
        for k in range(2)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join(200)
        assert w.exitcode == 0
    each = [np.load(tmp_path / f"{k}.npy") for k in range(2)]
    sent = np.sort(np.concatenate(each))
    assert len(sent)
    if "max_count" in limits:
        assert len(sent) == 61
    if "max_per_s" in limits:
        assert all(np.count_nonzero((sent > t - S) & (sent <= t)) <= 37 for t in sent)
    if "max_nc_per_s" in limits:
        assert all(np.count_nonzero((sent > t - S) & (sent <= t)) <= 23 for t in sent)
    if "lockout_ms" in limits:
        assert np.diff(sent).min(initial=S) >= 10_000_000
        assert len(sent) <= 1 + (time.monotonic_ns() - begun) // 10_000_000


def test_a_stimulus_seen_on_one_stream_locks_the_others_out_and_a_restart_forgets_nothing(
    tmp_path: Path,
) -> None:
    path, limits = account(tmp_path, os.getpid(), "session"), Act(lockout_ms=100, max_count=3)
    a, b = SharedSafety(path, limits), SharedSafety(path, limits)
    a.seen(10 * S)
    assert b.refusal(10 * S + 1_000_000, None) == "lockout" and b.refusal(11 * S, None) == ""
    assert b.take(11 * S, None) == "" and a.take(12 * S, None) == ""
    restarted = SharedSafety(path, limits, count=1)
    assert (
        restarted.told()["count"] == 2 and restarted.take(13 * S, None) == ""
    )  # the account says two were sent
    assert restarted.count == 3 and a.refusal(20 * S, None) == "count"


def test_who_was_held_up_between_the_clock_and_the_lock_comes_after_the_others(tmp_path: Path) -> None:
    limits = Act(max_per_s=1, max_count=100, lockout_ms=0.0)
    path = account(tmp_path, os.getpid(), "session")
    a, b = SharedSafety(path, limits), SharedSafety(path, limits)
    assert b.take(1 * S, None) == "" and b.take(int(2.2 * S), None) == ""
    assert a.take(int(0.9 * S), None) == "rate"  # looked at the clock before both
    limits = Act(max_per_s=2, max_count=100, lockout_ms=0.0)
    a.limits = b.limits = limits
    assert a.take(int(0.9 * S), None) == "" and b.take(int(2.3 * S), None) == "rate"
    assert b.take(int(3.1 * S), None) == "rate" and b.take(int(3.3 * S), None) == ""
    b.limits = Act(max_per_s=100, max_count=100, lockout_ms=500.0)
    assert a.take(1 * S, None) == "" and b.take(int(3.7 * S), None) == "lockout"


def test_the_account_of_a_daemon_that_died_is_removed(tmp_path: Path) -> None:
    path = account(tmp_path, 2**22 + 1, "session")  # no such process
    path.touch()
    assert clear_leftovers(tmp_path) == [path] and not path.exists()
