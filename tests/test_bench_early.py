"""What the benchmark says of decisions in two steps: times of both, and how many early ones came to nothing."""

from __future__ import annotations

import numpy as np

from spiked.bench.early import NUMBERED, BothSteps, figures
from spiked.bench.latency import RECEIPT, Played
from spiked.bench.loop import nearest
from spiked.bench.tables import _steps
from spiked_client.protocol import FATES, RESOLVED

FS, MS = 20_000.0, 1_000_000
TROUGHS = np.array([100, 500, 700])


def near(at: np.ndarray) -> np.ndarray:
    return nearest(TROUGHS, at, FS)


def receiver(
    early: list[tuple[int, int, int]], final: list[tuple[int, int]], fates: list[tuple[int, int, str]]
) -> BothSteps:
    """early: number, sample, ms after the trough at which it came; final: sample, ms; fates: number, final sample, fate."""
    r = BothSteps(1, "normal")
    e, f = np.zeros(len(early), NUMBERED), np.zeros(len(final), RECEIPT)
    for i, (number, sample, ms) in enumerate(early):
        e[i]["number"], e[i]["sample"], e[i]["received"] = number, sample, sample * 50_000 + ms * MS
    for i, (sample, ms) in enumerate(final):
        f[i]["sample"], f[i]["received"] = sample, sample * 50_000 + ms * MS
    r._early, r._parts = [e], [f]
    r._resolved = [np.array([(n, 0, sample, 0, FATES.index(fate)) for n, sample, fate in fates], RESOLVED)]
    return r


def test_both_steps_are_timed_from_the_trough() -> None:
    played = Played(FS, 0, 0, np.zeros((1, 2)))
    r = receiver(
        [(1, 100, 2), (2, 500, 3), (3, 900, 2), (4, 5000, 2)], [(100, 4), (500, 4), (700, 5)],
        [(1, 100, "confirmed"), (2, 500, "confirmed"), (3, -1, "withdrawn")],
    )  # fmt: skip
    told = figures(played, r, 0, 2000, near)
    assert (
        told["trough_to_client_ms"]["early"]["mean"] == 2.5 and told["trough_to_client_ms"]["early"]["n"] == 2
    )
    assert told["trough_to_client_ms"]["final"]["mean"] == round((4 + 4 + 5) / 3, 3)
    assert told["lead_ms"]["mean"] == 1.5 and told["lead_ms"]["n"] == 2
    assert (told["confirmed"], told["withdrawn"], told["open"]) == (2, 1, 0)
    assert (told["told_early_share"], told["withdrawn_share"]) == (round(2 / 3, 4), round(1 / 3, 4))
    assert told["withdrawn_near_a_true_spike"] == 0
    lines = _steps({"steps": told})
    assert (
        "early mean 2.5" in lines[0]
        and "3 told early (66.7 % of the final spikes), 1 withdrawn (33.33 %)" in lines[1]
    )


def test_without_early_decisions_there_is_nothing_to_say() -> None:
    told = figures(Played(FS, 0, 0, np.zeros((1, 2))), receiver([], [(100, 4)], []), 0, 2000, near)
    assert told["early_spikes"] == 0 and told["lead_ms"]["n"] == 0 and _steps({"steps": told}) == []
