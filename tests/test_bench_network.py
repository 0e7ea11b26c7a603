"""`spiked bench network`: what is counted, what is fed, and one small run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli import refused, spiked

from spiked.bench.network import bench, macs, noise_input
from spiked_models import networks

NAME = "rtsort-20k-lite"


def test_multiply_adds_of_a_streaming_network() -> None:
    net = networks.load(NAME)
    k, w = net.kernel, net.width
    assert macs(net) == k * w + 2 * k * w * w + k * w


@pytest.mark.parametrize("spikes", [False, True])
def test_input_has_the_noise_that_the_network_knows(spikes: bool) -> None:
    net = networks.load(NAME)
    x = noise_input(net, 70, 20_000, spikes)
    assert x.shape == (70, 20_000) and x.dtype == np.float32
    iqr = np.subtract(*np.percentile(x, (75, 25), axis=1)) / net.input_scale
    assert np.median(iqr) == pytest.approx(net.inference_scaling_numerator, rel=0.1)
    deepest = -x.min(1) / x.std(1)
    assert (deepest > 7).any() == spikes


def test_every_pair_is_measured(tmp_path: Path) -> None:
    r = bench(NAME, channels=(4, 16), chunks_ms=(1.0, 5.0), seconds=0.05)
    assert [(x["channels"], x["chunk_samples"]) for x in r["rows"]] == [
        (4, 20),
        (4, 100),
        (16, 20),
        (16, 100),
    ]
    for x in r["rows"]:
        assert x["compute_ms"]["n"] >= 30 and x["compute_ms"]["p50"] <= x["compute_ms"]["p99"]
        assert x["real_time_factor"] == pytest.approx(
            x["chunk_ms"] / x["compute_ms"]["mean"], rel=0.05, abs=0.001
        )


def test_command_writes_and_prints(tmp_path: Path) -> None:
    out = tmp_path / "network.json"
    arguments = (
        "--network",
        NAME,
        "--channels",
        "8",
        "--chunk-ms",
        "2",
        "--seconds",
        "0.05",
        "--spikes",
        "--precision",
        "float32",
    )
    done = spiked("bench", "network", *arguments, "--json", str(out), "--table")
    assert done.returncode == 0, done.stderr
    r = json.loads(out.read_text())
    assert r["network"] == NAME and r["input"] == "noise and cells" and r["machine"]["versions"]["torch"]
    assert f"| {NAME} | {r['mac_per_sample_and_channel']} | 1 core | float32 | 8 | 2 ms |" in done.stdout
    assert "no-such" in refused("bench", "network", "--network", "no-such")
    assert "above 0" in refused("bench", "network", "--channels", "0")
