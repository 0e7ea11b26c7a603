"""Figures as rows: every row has the head's columns and the figures stand in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spiked.bench.figures import row, spread
from spiked.bench.tables import summary, table

MS = {"n": 10, "mean": 3.5, "p50": 3.25, "p95": 5.0, "p99": 7.75, "max": 9.5}
BASE: dict[str, Any] = {
    "channels": 64,
    "fs_hz": 20_000.0,
    "machine": {"load_1min": 0.7},
    "network": "lite",
    "chunk_ms": 1.0,
    "threads": 2,
}
SCORES = {
    "true_units": 14,
    "mean_accuracy": 0.7512,
    "mean_recall": 0.8,
    "mean_precision": 0.9,
    "units_at_0.8": 9,
    "units": 17,
}
SPEED = {"compute_ms": MS, "cpu_ms": 3.1, "real_time_factor": 1.62, "chunk_ms": 5.0}
SORTER = {**SCORES, "calibration_wall_s": 20.5, "calibration_cpu_s": 18.25}
RESULTS: dict[str, dict[str, Any]] = {
    "sort": {**SCORES, "calibration_s": 4.75, "chunk_compute_ms": MS, "real_time_factor": 1.17},
    "ingest": {"wire": "maxwell", "samples_sent": 1_200_000, "samples_recorded": 1_199_999, "missing": 1,
               "cpu_share_of_a_core": {"acquire": 0.35, "record": 0.09, "simulate": 0.22}},
    "live": {"wire": "maxwell", "latency_ms": {"trough_to_receipt": MS, "trough_to_arrival": MS}, "cpu_share_of_a_core": {"live": 0.51, "acquire": 0.2},
             "skipped_samples": 0, "deadline_missed": 3, "true_spikes": 12, "lookahead_ms": 3.1, "sender": {"burst_late_ms": MS}},
    "calibrate": {**SCORES, "seconds": 60.0, "pass_s": 5.25, "calibration_s": 4.75, "total_s": 10.0, "seconds_per_second": 0.1667, "peak_rss_gb": 0.93,
                  "pass_real_time_factor": 11.4, "pass_cpu_s": 5.0, "calibration_cpu_s": 4.5},
    "clocks": {"offset": {"arrival": {"median_ms": 0.25, "p99_ms": 0.5, "max_ms": 0.75, "table_max_ms": 0.125, "told_ms": 3.25, "false_jumps": 0}},
               "jumps": {"arrival": [{"jump_ms": 1.2, "of": 5, "n": 0, "longest_s": None}, {"jump_ms": 20.0, "of": 5, "n": 5, "longest_s": 3.25}]}},
    "network": {"mac_per_sample_and_channel": 107_100, "device": "cpu", "lookahead_ms": 2.0, "input": "noise",
                "rows": [{**SPEED, "channels": n, "precision": "float32", "gmac_per_s": 33.0} for n in (16, 64)]},
    "offline": {"seconds": 60.0, "preset": "cpu_small", "device": "cpu", "raw_bytes": 2e8, "same_spikes": True, "overhead": 0.021,
                "overhead_each": [0.01, 0.021, 0.04], "wall_s": {"direct": 50.25, "spiked": 51.5}, "cpu_s": {"direct": 48.25, "spiked": 49.5}, "overhead_cpu": 0.03, "disk_bytes": {"direct": 7e6, "spiked": 8e6},
                "turns": [{"load_before": 0.7, **{w: {"units": 17, "spikes": 900, "wall_s": 51.0} for w in ("direct", "spiked")}}]},
    "peer": {"peer": {"default": SORTER, "tight": SORTER}, "ours": SORTER, "peer_network_pass": "its own",
             "speed": [{"threads": 1, "ratio_same_chunk": 9.5, "ratio_same_chunk_p50": 9.0, "ratio_same_chunk_cpu": 8.5,
                        "peer, as packaged": SPEED, "ours, the same chunk": SPEED, "ours, 1 ms": SPEED}]},
}  # fmt: skip
EXPECTED = {
    "sort": ["0.751", "9 of 14", "3.25 / 7.75 ms", "1.17"],
    "ingest": ["64 x 20 kHz", "1199999", "1", "0.35 core"],
    "live": ["3.5 ms", "7.75 ms", "0.51 core", "3"],
    "calibrate": ["60 s", "10.0 s", "0.167 s", "0.93 GB"],
    "clocks": ["0.125", "0 of 5 told", "3.25 s", "a jump told after at most"],
    "network": ["107100", "2 cores", "float32", "7.75 ms"],
    "offline": ["51.5 s", "49.5 s", "17", "8 MB"],
    "peer": ["SpikeLab, tight limits", "spiked", "18.25 s", "ours, 1 ms: 5 ms"],
}


@pytest.mark.parametrize("bench", RESULTS)
def test_rows_fit_their_head_and_hold_the_figures(bench: str) -> None:
    lines = table({**BASE, "bench": bench, **RESULTS[bench]})
    for part in "\n".join(lines).split("\n\n"):
        columns = {len(line.split("|")) for line in part.splitlines()}
        assert len(columns) == 1 and len(part.splitlines()) > 2
    cells = {cell.strip() for line in lines for cell in line.split("|")}
    assert cells >= set(EXPECTED[bench])


def test_summaries_name_the_load_bearing_figures() -> None:
    told = {name: "\n".join(summary({**BASE, "bench": name, **RESULTS[name]})) for name in RESULTS}
    assert "mean 3.5 ms" in told["live"] and "3 deadlines missed" in told["live"]
    assert "calibrated in 10.0 s" in told["calibrate"] and "9.5 times" in told["peer"]
    assert not told["sort"]  # it tells its own while it runs


def test_cells_are_short() -> None:
    assert row(0.12345, 123.456, None, 7, "a") == "| 0.123 | 123 | - | 7 | a |"


def test_spread_of_nothing_is_empty() -> None:
    assert spread(np.zeros(0))["mean"] is None
    assert spread(np.arange(101.0)) == {
        "n": 101,
        "mean": 50.0,
        "p50": 50.0,
        "p95": 95.0,
        "p99": 99.0,
        "max": 100.0,
    }
