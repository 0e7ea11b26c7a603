"""Trigger rules: what fires, the same whatever the cut of the stream, and what blocks it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiked.act.python_rule import STRIKES, PythonRule
from spiked.act.rules import Firing, Rules, UnitFacts, dice
from spiked.config import Trigger
from spiked.errors import ConfigError
from spiked_client.protocol import BLIND, SPIKE

FS, CHANNELS = 20_000.0, 16
UNITS = UnitFacts(
    np.array([3, 5, 8, 13]),
    tuple(np.array([c, c + 1]) for c in (0, 2, 4, 6)),
    np.array([0.9, 0.2, 0.0, 1.0]),
    np.array([0.95, 0.9, 0.4, 0.8]),
)
NO_BLIND = np.zeros(0, BLIND)


def spikes(*pairs: tuple[int, int]) -> np.ndarray:
    """SPIKE records of (sample, unit)."""
    out = np.zeros(len(pairs), SPIKE)
    out["sample"], out["unit"] = [p[0] for p in pairs], [p[1] for p in pairs]
    return out


def rules(*triggers: dict[str, Any], seed: int = 0) -> Rules:
    made = Rules([Trigger(**{"name": "r", **t}) for t in triggers], FS, CHANNELS, seed)
    made.use(UNITS)
    return made


def fired(made: Rules, records: np.ndarray, blind: np.ndarray = NO_BLIND) -> list[Firing]:
    return made.process(records, blind, 1 << 60)


def at(made: Rules, *pairs: tuple[int, int]) -> list[int]:
    return [f.sample for f in fired(made, spikes(*pairs))]


def test_a_unit_fires() -> None:
    made = rules({"when": "unit", "units": [5, 8]})
    found = fired(made, spikes((10, 3), (20, 5), (21, 99), (30, 8), (30, 13)))
    assert [(f.sample, f.units, f.samples, f.blocked) for f in found] == [
        (20, (5,), (20,), ""),
        (30, (8,), (30,), ""),
    ]


def test_refractory_time_is_counted_from_the_last_decision() -> None:
    made = rules({"when": "unit", "units": [5], "refractory_ms": 1.0})
    assert at(made, (100, 5), (119, 5), (120, 5), (139, 5), (141, 5)) == [100, 120, 141]


def test_a_count_within_a_window_which_begins_anew_after_firing() -> None:
    made = rules({"when": "count", "units": [3, 5], "count": 3, "window_ms": 5.0})  # 100 samples
    assert at(made, (0, 3), (50, 5), (100, 3)) == []  # 0 has just left
    assert at(made, (140, 8), (149, 5)) == [149]
    assert at(made, (150, 3), (151, 3), (152, 3)) == [152]


def test_a_rate_is_a_count() -> None:
    made = rules({"when": "rate", "units": [3], "rate_hz": 200, "window_ms": 10.0})
    assert at(made, (0, 3), (150, 3)) == [150]
    assert at(made, (400, 3), (600, 3)) == []


def test_a_sequence_with_bounds_finds_the_run_that_fits() -> None:
    made = rules({"when": "sequence", "units": [3, 5, 3], "intervals_ms": [[0.5, 2.0], [1.0, 3.0]]})
    # of the two starts only the first is long enough before 5
    found = fired(made, spikes((100, 3), (118, 3), (122, 5), (141, 3), (150, 3)))
    assert [(f.sample, f.samples, f.units) for f in found] == [(150, (100, 122, 150), (3, 5, 3))]
    assert at(made, (170, 5), (200, 3)) == []  # what fired is used up; 150 itself was not a start since
    assert at(made, (220, 5), (245, 3)) == [245]


def test_a_sequence_that_comes_too_soon_still_begins_the_next_one() -> None:
    """Of 3, 5, 3 the last spike is the first of another, unless the rule fired with it."""
    made = rules(
        {"when": "sequence", "units": [3, 5, 3], "intervals_ms": [[1, 5], [1, 5]], "refractory_ms": 10.0}
    )
    ms = (0, 3), (2, 5), (4, 3), (6, 3), (8, 5), (10, 3), (12, 5), (14, 3), (16, 5), (18, 3)
    assert [f.sample for f in fired(made, spikes(*((20 * t, u) for t, u in ms)))] == [80, 280]


def test_a_burst_by_spikes_and_by_share_of_units() -> None:
    made = rules(
        {"name": "n", "when": "burst", "count": 4, "window_ms": 1.0},
        {"name": "share", "when": "burst", "share": 0.75, "window_ms": 1.0},
    )
    found = fired(made, spikes((0, 3), (1, 3), (2, 3), (3, 3), (10, 5), (15, 13), (60, 5)))
    assert [(f.rule.name, f.sample) for f in found] == [("n", 3), ("share", 15)]
    assert found[1].units == (3, 3, 3, 3, 5, 13)


EVERY_KIND = (
    {"name": "unit", "when": "unit", "units": [5, 13], "refractory_ms": 2.0, "probability": 0.7, "sham_fraction": 0.3},
    {"name": "count", "when": "count", "units": [3, 8], "count": 3, "window_ms": 8.0},
    {"name": "share", "when": "burst", "share": 0.6, "window_ms": 4.0, "refractory_ms": 5.0},
    {"name": "many", "when": "burst", "count": 5, "window_ms": 6.0, "least_accuracy": 0.5},
    {"name": "run", "when": "sequence", "units": [3, 5, 8], "intervals_ms": [[0, 5], [0.2, 6]]},
    {"name": "array", "when": "burst", "count": 2, "window_ms": 1.0, "blind": "array"},
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 3999), max_size=60), ones=st.integers(0, 3900)
)
def test_any_cut_gives_the_same_decisions(seed: int, cuts: list[int], ones: int) -> None:
    """Spikes are told up to 20 samples out of order, as template matching does, blindness as soon as it is seen."""
    rng = np.random.default_rng(seed)
    n = rng.integers(50, 500)
    true = np.unique(np.stack([rng.integers(0, 4000, n), rng.choice(UNITS.ids, n)], 1), axis=0)
    told_at = true[:, 0] + rng.integers(28, 48, len(true))  # how many samples it took to decide on each
    blind = np.zeros(6, BLIND)
    blind["start"] = np.sort(rng.integers(0, 4000, 6))
    blind["stop"] = blind["start"] + rng.integers(1, 200, 6)
    blind["channel"] = rng.choice([-1, 0, 3, 5, 7], 6)

    def run(edges: list[int]) -> list[tuple[Any, ...]]:
        made, out = rules(*EVERY_KIND, seed=seed), []
        for a, b in itertools.pairwise([-1, *edges, 5000]):
            k = (told_at > a) & (told_at <= b)
            seen = blind[(blind["start"] < b) & (blind["stop"] > a)].copy()
            seen["start"], seen["stop"] = np.maximum(seen["start"], a), np.minimum(seen["stop"], b)
            found = made.process(spikes(*map(tuple, true[k].tolist())), seen, b - 47)
            out += [(f.rule.name, f.sample, f.units, f.samples, f.blocked, made.is_sham(f)) for f in found]
        return out

    whole = run([])
    pieces = run(sorted({*cuts, *range(ones, ones + 60)}))
    assert sorted(whole) == sorted(pieces)
    assert whole == pieces


def test_an_early_rule_does_not_wait_until_the_order_is_final() -> None:
    made = rules(
        {"name": "e", "when": "unit", "units": [5], "early": True},
        {"name": "o", "when": "unit", "units": [5]},
    )
    assert [f.rule.name for f in made.process(spikes((100, 5)), NO_BLIND, 90)] == ["e"]
    assert made.process(spikes(), NO_BLIND, 100) == []
    assert [f.rule.name for f in made.process(spikes(), NO_BLIND, 101)] == ["o"]


def test_probability_and_sham_are_dice_of_seed_rule_and_sample() -> None:
    triggers = {"when": "unit", "units": [5], "probability": 0.3, "sham_fraction": 0.25}
    every = spikes(*((s, 5) for s in range(0, 40_000, 10)))
    made = rules(triggers, seed=7)
    found = fired(made, every)
    assert len(found) == 4000
    assert np.mean([f.blocked == "" for f in found]) == pytest.approx(0.3, abs=0.03)
    assert np.mean([made.is_sham(f) for f in found]) == pytest.approx(0.25, abs=0.03)
    assert found == fired(rules(triggers, seed=7), every)
    assert found != fired(rules(triggers, seed=8), every)
    assert dice(1, "a", 2, 3, "sham") != dice(1, "a", 2, 3, "chance")


def blind_rows(*rows: tuple[int, int, int]) -> np.ndarray:
    return np.array([(*row, 2) for row in rows], BLIND)


@pytest.mark.parametrize(
    ("row", "mode", "blocked"),
    [
        ((90, 110, 2), "units", "blind"),  # an electrode of unit 5
        ((90, 110, 6), "units", ""),  # of another unit
        ((90, 110, -1), "units", "blind"),
        ((90, 110, 2), "array", ""),
        ((90, 110, -1), "array", "blind"),
        ((90, 110, -1), "ignore", ""),
        ((101, 110, -1), "units", ""),
        ((90, 100, -1), "units", ""),
    ],
)
def test_blind_electrodes_block(row: tuple[int, int, int], mode: str, blocked: str) -> None:
    made = rules({"when": "unit", "units": [5], "blind": mode})
    assert [f.blocked for f in fired(made, spikes((100, 5)), blind_rows(row))] == [blocked]


def test_a_window_that_was_partly_blind_blocks() -> None:
    made = rules({"when": "count", "units": [5], "count": 2, "window_ms": 5.0})
    assert [f.blocked for f in fired(made, spikes((100, 5), (150, 5)), blind_rows((60, 70, 3)))] == ["blind"]
    assert [f.blocked for f in fired(made, spikes((300, 5), (350, 5)))] == [""]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ({"least_confidence": 0.5, "block_doubtful": False}, ["", "confidence", "confidence", ""]),
        ({"least_accuracy": 0.85, "block_doubtful": False}, ["", "", "accuracy", "accuracy"]),
        ({}, ["", "doubtful", "", ""]),
        ({"block_doubtful": False}, ["", "", "", ""]),
    ],
)
def test_units_that_cannot_be_relied_on_block(limit: dict[str, Any], expected: list[str]) -> None:
    made = rules({"when": "unit", "units": [3, 5, 8, 13], **limit})
    made.doubt([5])
    assert [f.blocked for f in fired(made, spikes((1, 3), (2, 5), (3, 8), (4, 13)))] == expected


def test_other_units_begin_windows_anew_but_not_refractory_times() -> None:
    made = rules(
        {"name": "c", "when": "count", "units": [3], "count": 2, "window_ms": 50.0},
        {"name": "u", "when": "unit", "units": [5], "refractory_ms": 5.0},
    )
    assert at(made, (1, 3), (2, 5)) == [2]
    made.use(UNITS)
    assert at(made, (10, 3), (11, 5), (110, 5)) == [110]
    made.use(UnitFacts(np.array([3])))
    assert made.missing() == {"u": [5]}


def test_a_full_window_forgets_the_oldest() -> None:
    made = rules({"when": "count", "units": [3], "count": 4096, "window_ms": 1000.0})
    records = spikes(*((s, 3) for s in range(10_000)))
    assert [f.sample for f in fired(made, records)] == [4095, 8191]


# ---- rules in Python -------------------------------------------------------------------------------------------


AMPLE_MS = 60_000.0  # a budget that a busy computer keeps too


def python(tmp_path: Path, body: str, **options: Any) -> tuple[PythonRule, list[str]]:
    path, told = tmp_path / "mine.py", []
    path.write_text("import time\nimport numpy as np\n" + body)
    trigger = Trigger(name="mine", when="python", call=f"{path}:decide", **options)
    return PythonRule(trigger, FS, told.append), told


def test_a_python_rule_decides_on_batches(tmp_path: Path) -> None:
    rule, told = python(
        tmp_path,
        "def decide(s):\n    return s['sample'][s['unit'] == 5]\n",
        refractory_ms=1.0,
        budget_ms=AMPLE_MS,
    )
    found = rule.process(spikes((5, 3), (10, 5), (15, 5), (31, 5)))
    assert [(f.sample, f.units) for f in found] == [(10, (3, 5, 5, 5)), (31, (3, 5, 5, 5))]
    assert rule.process(spikes((40, 3))) == [] and told == []
    true, _ = python(tmp_path, "def decide(s):\n    return len(s) > 1\n", budget_ms=AMPLE_MS)
    assert [f.sample for f in true.process(spikes((5, 3), (9, 3)))] == [9]
    assert true.process(spikes((12, 3))) == []


@pytest.mark.parametrize(
    ("body", "counter", "said"),
    [
        ("def decide(s):\n    time.sleep(0.004)\n", "overruns", "1 ms are allowed"),
        ("def decide(s):\n    while True: pass\n", "overruns", "did not return within 20 ms"),
        ("def decide(s):\n    s['unit'] = 1\n", "errors", "read-only"),
        ("def decide(s):\n    raise KeyError('x')\n", "errors", "KeyError"),
    ],
)
def test_a_python_rule_that_misbehaves_is_suspended_and_told(
    tmp_path: Path, body: str, counter: str, said: str
) -> None:
    budget_ms = 1.0 if counter == "overruns" else AMPLE_MS
    rule, told = python(tmp_path, body, budget_ms=budget_ms)
    if "sleep" in body:
        rule._patience_s = 60.0  # a busy computer may keep a call for long
    begun = time.thread_time()
    for _ in range(STRIKES + 3):
        assert rule.process(spikes((5, 3))) == []
    assert time.thread_time() - begun < 1.0
    assert rule.counters["calls"] == STRIKES == rule.counters[counter]
    assert rule.counters["suspended"] == 1
    assert len(told) == 1 and "suspended" in told[0] and said in told[0]


def test_a_python_rule_may_answer_as_numpy_does(tmp_path: Path) -> None:
    """(spikes["unit"] == 5).any() is not Python's True."""
    rule, _ = python(tmp_path, "def decide(s):\n    return (s['unit'] == 5).any()\n", budget_ms=AMPLE_MS)
    assert [f.sample for f in rule.process(spikes((5, 3), (9, 5)))] == [9]
    assert rule.process(spikes((12, 3))) == []
    none, told = python(
        tmp_path, "def decide(s):\n    return [[], (), np.zeros(0)][len(s) - 1]\n", budget_ms=AMPLE_MS
    )
    assert none.process(spikes((1, 1))) == none.process(spikes((1, 1), (2, 1))) == []
    assert not none.counters["errors"] and not told


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("'yes'", "TypeError: returned str"), ("{'sample': 5}", "TypeError: returned dict"), ("[float('nan')]", "ValueError"),
        ("[float('inf')]", "OverflowError"), ("s['unit'] == 3", "TypeError: a list of truth values"), ("1 << 62", "after the newest spike"),
        ("1 << 80", "TypeError"), ("[[1], [2, 3]]", "ValueError"), ("-1", "below 0"), ("object()", "TypeError: returned object"),
    ],
)  # fmt: skip
def test_an_answer_that_makes_no_sense_is_the_rule_s_error_and_not_the_live_path_s(
    tmp_path: Path, answer: str, said: str
) -> None:
    rule, told = python(tmp_path, f"def decide(s):\n    return {answer}\n", budget_ms=AMPLE_MS)
    for _ in range(STRIKES):
        assert rule.process(spikes((5, 3), (9, 3))) == []
    assert rule.counters["errors"] == STRIKES and len(told) == 1 and said in told[0]


def test_a_good_call_in_between_forgives(tmp_path: Path) -> None:
    body = "n = 0\ndef decide(s):\n    global n\n    n += 1\n    if n % 3: raise ValueError\n"
    rule, told = python(tmp_path, body, budget_ms=AMPLE_MS)
    for _ in range(20):
        rule.process(spikes((5, 3)))
    assert rule.counters["errors"] == 14 and not rule.counters["suspended"] and not told


@pytest.mark.parametrize("call", ["no_such_module:f", "math:no_such_function", "math:pi", "/no/such.py:f"])
def test_a_python_rule_that_cannot_be_loaded_is_refused_in_one_line(call: str) -> None:
    with pytest.raises(ConfigError, match=r"^trigger call [^\n]*$"):
        PythonRule(Trigger(name="x", when="python", call=call), FS, print)


@pytest.mark.parametrize(
    ("trigger", "said"),
    [
        ({"when": "unit"}, "needs units"),
        ({"when": "count", "units": [1]}, "count"),
        ({"when": "burst", "window_ms": 5}, "either count"),
        ({"when": "sequence", "units": [1, 2], "intervals_ms": [[5, 1]]}, "least, most"),
        ({"when": "sequence", "units": [1, 2], "intervals_ms": [[1, 5], [1, 5]]}, "one interval less"),
        ({"when": "python", "call": "f"}, "module:function"),
    ],
)
def test_rules_that_make_no_sense_are_refused(trigger: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Trigger(**{"name": "x", **trigger})
