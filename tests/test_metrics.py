"""The table of figures: what it reads, how it judges, and that the docs, alert rules, dashboard and endpoint agree with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from status_rig import histogram, stages, status, stream

from spiked.live.latency import BlindTally, Latency
from spiked.publish.gpu import parse
from spiked.publish.metrics import Exposition
from spiked.publish.metrics_files import ALERTS, DASHBOARD, DOCS, alerts, dashboard, table
from spiked.timing import EDGES_MS, ClockFit, Histogram
from spiked_client.figures import BY_NAME, FIGURES
from spiked_client.judge import CLEAR_S, WINDOW_S, Judge, percentile
from spiked_client.protocol import BLIND

ROOT = Path(__file__).parent.parent
PROMTOOL = shutil.which("promtool", path=f"{os.environ.get('PATH', '')}:/usr/local/bin")
NAME = re.compile(r"\bspiked_[a-z_]+\b")


def exposed(told: dict[str, Any]) -> str:
    exposition, registry = Exposition(), CollectorRegistry()
    exposition.status = told
    registry.register(exposition)
    return generate_latest(registry).decode()


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            found.setdefault(s.name, []).append((s.labels, s.value))
    return found


def test_every_figure_is_read_from_a_full_status_and_scraped_with_its_labels() -> None:
    told = status()
    found = samples(exposed(told))
    for figure in FIGURES:
        values = list(figure.read(told))
        assert values, f"{figure.name} reads nothing"
        assert all(len(labels) == len(figure.labels) for labels, _ in values), figure.name
        name = f"{figure.exposed}_bucket" if figure.kind == "histogram" else figure.exposed
        assert set(found[name][0][0]) - {"le"} == set(figure.labels), figure.name
    assert found["spiked_samples_total"] == [({"stream": "A"}, 600_000.0), ({"stream": "B"}, 600_000.0)]
    assert ({"stream": "A", "unit": "2"}, 3.0) in found["spiked_unit_rate_hz"]
    assert found["spiked_ring_fill_ratio"][0] == ({"stream": "A", "reader": "record"}, 0.001)
    assert found["spiked_disk_hours_left"][0][1] == pytest.approx(500e9 / (2 * 768 * 20_000) / 3600)
    assert {labels["state"]: v for labels, v in found["spiked_session_state"]}["recording"] == 1
    assert ({"stream": "A", "reason": "rate"}, 2.0) in found["spiked_stim_refused_total"]
    assert ({"socket": "control"}, 3.0) in found["spiked_unwanted_messages_total"]
    buckets = {
        labels["le"]: v for labels, v in found["spiked_live_chunk_ms_bucket"] if labels["stream"] == "A"
    }
    assert (buckets["0.3"], buckets["0.5"], buckets["+Inf"]) == (0, 1000, 1000) and len(buckets) == len(
        EDGES_MS
    ) + 1
    assert (
        found["spiked_live_chunk_ms_sum"][0][1] == pytest.approx(400)
        and found["spiked_live_chunk_ms_count"][0][1] == 1000
    )


def test_what_runs_no_longer_is_not_told() -> None:
    found = samples(exposed(status(state="done")))
    for gone in (
        "ring_fill_ratio",
        "live_behind_ms",
        "unit_rate_hz",
        "disk_hours_left",
        "process_running",
        "blind_ratio",
    ):
        assert f"spiked_{gone}" not in found
    assert "spiked_samples_total" in found


junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5), c, max_size=3))  # fmt: skip


def odd(told: Any, at: list[int], value: Any) -> Any:
    """The same with one part, found by walking down `at`, replaced."""
    if not at or not isinstance(told, dict | list) or not told:
        return value
    key = sorted(told)[at[0] % len(told)] if isinstance(told, dict) else at[0] % len(told)
    items = dict(told) if isinstance(told, dict) else list(told)
    items[key] = odd(items[key], at[1:], value)
    return items


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), junk)
def test_a_field_that_is_odd_breaks_nothing(at: list[int], value: Any) -> None:
    told = odd(status(), at, value)
    judge = Judge()
    judge.update(told, 0.0)
    exposed(told)


# ---- judging


def judged(judge: Judge, told: dict[str, Any], now: float) -> list[tuple[str, str, tuple[str, ...]]]:
    found = [(j.figure.name, j.level, j.labels) for j in judge.update(told, now)]
    return [j for j in found if j[0] != "doubtful_units_ratio"]  # not what is asked here


def test_a_value_must_stay_bad_before_it_counts_and_good_before_it_is_forgotten() -> None:
    judge = Judge()
    good, bad = status(), status(disk_free_gb=1.0)
    assert judged(judge, good, 0.0) == []
    assert judged(judge, bad, 1.0) == [] and judged(judge, good, 2.0) == []  # a flicker
    assert judged(judge, bad, 3.0) == [] and judged(judge, bad, 5.0) == []
    assert ("disk_free_gb", "bad", ()) in judged(judge, bad, 6.5)
    assert judge.alarms[0].level == "bad" and "Delete or move old sessions" in judge.alarms[0].line()
    assert judged(judge, good, 7.0) == [] and judged(judge, good, 20.0) == []
    now = judged(judge, good, 7.0 + CLEAR_S)
    assert ("disk_free_gb", "good", ()) in now and "disk_free_gb" not in [a.figure.name for a in judge.alarms]


def test_a_counter_is_judged_by_its_growth_within_a_minute_also_over_a_restart() -> None:
    judge, told = Judge(), status()

    def at(now: float, skipped: int) -> list[tuple[str, str, tuple[str, ...]]]:
        live = told["streams"]["A"]["processes"]["live"]
        live["counters"] = {**live["counters"], "skipped_samples": skipped}
        return [j for j in judged(judge, told, now) if j[0] == "live_skipped_samples"]

    assert at(0, 500) == [] and at(1, 500) == []  # what was before we came
    assert at(2, 520) == [("live_skipped_samples", "bad", ("A",))]
    assert judge.standing["live_skipped_samples", ("A",)].value == 20
    assert at(3, 5) == []  # the process was restarted
    assert judge.standing["live_skipped_samples", ("A",)].value == 25
    assert [at(t, 5) for t in range(4, int(WINDOW_S))] == [[]] * (int(WINDOW_S) - 4)
    assert [j for t in range(30) for j in at(WINDOW_S + t, 5)] == [("live_skipped_samples", "good", ("A",))]


def test_a_histogram_is_judged_by_the_99th_percentile_of_the_last_minute() -> None:
    judge, told = Judge(), status()

    def at(now: float, fast: int, slow: int) -> None:
        a, b = histogram(fast, 0.4), histogram(slow, 40)
        spike = {"n": [x + y for x, y in zip(a["n"], b["n"], strict=True)], "sum": a["sum"] + b["sum"]}
        told["streams"]["A"]["processes"]["live"]["stages"]["spike"] = spike
        judge.update(told, now)

    def level() -> str:
        return judge.standing["spike_latency_ms", ("A",)].level

    at(0, 100_000, 5000)
    assert level() == "good"  # long ago
    at(1, 101_000, 5005)
    assert level() == "good"
    at(2, 101_000, 5030)
    assert level() == "warning" and 30 < judge.standing["spike_latency_ms", ("A",)].value <= 50


def test_alarms_of_what_is_told_no_longer_end_and_memory_is_bounded() -> None:
    judge = Judge()
    for now in (0.0, 5.0):
        judge.update(status(disk_free_gb=1.0), now)
    idle = {"rig": "rigA", "state": "idle", "streams": {}}
    ended = judge.update(idle, 20.0)
    assert [(j.figure.name, j.level) for j in ended if j.figure.name == "disk_free_gb"] == [
        ("disk_free_gb", "good")
    ]
    assert judge.alarms == [] and len(judge._series) < 5
    many = Judge()
    many.update(status(streams={f"s{i}": stream(0) for i in range(3000)}), 0.0)
    assert len(many._series) <= 20_000


@settings(deadline=None)
@given(st.lists(st.floats(0, 900), min_size=1, max_size=300), st.floats(0.01, 0.99))
def test_percentiles_lie_in_the_bin_that_holds_them(values: list[float], q: float) -> None:
    h = Histogram()
    for v in values:
        h.add(v)
    got = percentile(list(EDGES_MS), h.counts, q)
    true = sorted(values)[min(int(np.ceil(q * len(values))), len(values)) - 1]
    k = int(np.searchsorted(EDGES_MS, true))
    assert (0, *EDGES_MS)[k] - 1e-9 <= got <= EDGES_MS[k] + 1e-9


# ---- what is measured


@settings(deadline=None)
@given(st.lists(st.floats(0, 1200), max_size=50))
def test_the_live_latency_tells_the_same_bins_as_a_histogram(values: list[float]) -> None:
    fine, coarse = Latency(), Histogram()
    rounded = [
        round(v / 0.05) * 0.05 + 0.01 for v in values
    ]  # not on an edge: they belong to different sides there
    fine.add(np.array(rounded))
    for v in rounded:
        coarse.add(v)
    assert fine.told()["n"] == coarse.told()["n"]


def test_blind_time_is_counted_by_reason_and_share_of_channels() -> None:
    tally = BlindTally(4)
    tally.add(np.array([(0, 100, -1, 0), (100, 200, 2, 2), (0, 1000, -1, 4)], BLIND))
    told = tally.told(1000)
    assert (
        told["samples"]["gap"] == 100
        and told["samples"]["artifact"] == 25
        and told["samples"]["uncalibrated"] == 1000
    )
    assert told["ratio"] == 0.125
    for n in range(30):
        told = tally.told(1000 + 100 * (n + 1))
    assert told["ratio"] == 0


@pytest.mark.parametrize("ppm", [-40.0, 0.0, 20.0])
def test_a_device_clock_is_known_to_a_part_in_a_million_within_a_minute(ppm: float) -> None:
    rng, fit, first = np.random.default_rng(1), ClockFit(30_000.0), 10**12
    true = 30_000.0 * (1 + ppm / 1e6)
    for k in range(60 * 100):
        taken_ns = k * 300 / true * 1e9
        fit.add(
            first + k * 300, int(5e12 + taken_ns + rng.exponential(1e6))
        )  # queues: a millisecond, now and then ten
    told = fit.told()
    assert told is not None and abs(told["ppm"] - ppm) < 1 and told["ppm_error"] < 1
    at_ns = told["t_ns"] + (first + 900_000 - told["sample"]) / told["fs_hz"] * 1e9
    assert abs(at_ns - 5e12 - 900_000 / true * 1e9) < 1e6
    fit.restart()
    assert fit.told() is None


def test_nvidia_smi_is_read_also_where_it_does_not_know() -> None:
    text = "0, NVIDIA H100, 1024, 81559, 45, 12\n1, NVIDIA T4, 5, 15360, [N/A], [Not Supported]\nnonsense\n"
    assert parse(text) == [
        {"index": 0, "name": "NVIDIA H100", "memory_used_mb": 1024.0, "memory_mb": 81559.0, "celsius": 45.0, "busy_ratio": 0.12},
        {"index": 1, "name": "NVIDIA T4", "memory_used_mb": 5.0, "memory_mb": 15360.0},
    ]  # fmt: skip


# ---- the files


@pytest.mark.parametrize(("name", "made"), [(DOCS, table), (ALERTS, alerts), (DASHBOARD, dashboard)])
def test_the_files_are_those_of_the_table(name: str, made: Any) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == made(), "run python -m spiked.publish.metrics_files"


def test_every_metric_that_a_rule_or_panel_names_exists_with_the_labels_it_uses() -> None:
    found = samples(exposed(status()))
    rules = [r for g in yaml.safe_load((ROOT / ALERTS).read_text())["groups"] for r in g["rules"]]
    board = json.loads((ROOT / DASHBOARD).read_text())
    texts = [r["expr"] for r in rules] + [t["expr"] for p in board["panels"] for t in p.get("targets", ())]
    texts += [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    used = {name for text in texts for name in NAME.findall(text)}
    assert used <= set(found), used - set(found)
    for rule in rules:
        names = NAME.findall(rule["expr"])
        labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert not names or labels <= set(found[names[0]][0][0]), rule["alert"]
    shown = {name for p in board["panels"] for t in p.get("targets", ()) for name in NAME.findall(t["expr"])}
    assert {f"{f.exposed}_bucket" if f.kind == "histogram" else f.exposed for f in FIGURES} == shown
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])
    limited = {f.name for f in FIGURES if f.good is not None and f.alarm}
    assert len(rules) == 1 + sum(1 if BY_NAME[n].bad is None else 2 for n in limited)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_takes_the_rules_and_the_exposition() -> None:
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(ROOT / ALERTS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"],
        input=exposed(status()),
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [
        line for line in done.stderr.splitlines() if "use base unit" not in line and "abbreviated" not in line
    ]
    assert not complaints, complaints  # milliseconds are meant


def test_limits_are_on_the_endpoint_too() -> None:
    found = {
        labels["figure"]: v for labels, v in samples(exposed({}))["spiked_limit"] if labels["limit"] == "bad"
    }
    assert found["spiked_disk_hours_left"] == 1 and found["spiked_live_skipped_samples_total"] == 1
    assert stages("x")["x"] == histogram()
