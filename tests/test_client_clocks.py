"""The client's conversion of sample numbers between streams."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from spiked_client.clocks import Clocks
from spiked_client.errors import UnknownStream
from spiked_client.protocol import Message

COLUMNS = ["sample", "reference_sample", "ratio", "error_ms", "method", "segment"]


def told() -> dict[str, object]:
    """b counts 30 kHz, a 20 kHz; b's clock jumps by 300 samples at its sample 600 000; c is not known yet."""
    ratio = 2 / 3
    first = [[k * 100_000, 50 + k * 100_000 * ratio, ratio, 0.02, "pulses", 0] for k in range(1, 6)]
    second = [[k * 100_000, 250 + k * 100_000 * ratio, ratio, 0.03, "pulses", 1] for k in range(7, 10)]
    streams = {
        "a": {"table": [], "starts": [[0, 0]], "method": "same"},
        "b": {"table": [*first, *second], "starts": [[0, 0], [1, 600_000]], "error_ms": 0.03},
        "c": {"table": [], "starts": [[0, 77]]},
    }
    return {"reference": "a", "columns": COLUMNS, "streams": streams}


def test_there_and_back_in_every_segment(tmp_path: Path) -> None:
    (tmp_path / "clocks.json").write_text(json.dumps(told()))
    clocks = Clocks.load(tmp_path / "clocks.json")
    b = np.array([0, 150_000, 599_999, 600_000, 712_345, 2_000_000])
    a = clocks.convert(b, "b", "a")
    expected = np.where(b < 600_000, 50, 250) + b * 2 / 3
    assert np.allclose(a, expected, atol=1e-6)
    assert np.allclose(clocks.convert(a, "a", "b"), b, atol=1e-5)
    assert np.array_equal(clocks.convert(b, "b", "b"), b)
    assert clocks.error_ms("b") == 0.03 and clocks.error_ms("a") == 0.0 and clocks.error_ms("c") is None


@pytest.mark.parametrize(
    ("segment", "from_sample", "sample"),
    [(0, 0, 60_000), (1, 700_000, 800_000), (0, 5_000_000, 5_060_000), (2, 900_000, 960_000)],
)
def test_another_session_does_not_use_the_clock_of_the_last_one(
    segment: int, from_sample: int, sample: int
) -> None:
    """Its numbers may begin anew, or anywhere; what it tells is what counts."""
    clocks = Clocks(told())
    figures = {
        "sample": sample,
        "reference_sample": 40.0,
        "ratio": 2 / 3,
        "error_ms": 0.1,
        "segment": segment,
        "from_sample": from_sample,
    }
    before = clocks.convert([150_000], "b", "a")[0]
    for k in range(3):
        news = {
            **figures,
            "fs_hz": 30_000.0,
            "sample": sample + 30_000 * k,
            "reference_sample": 40.0 + 20_000 * k,
        }
        clocks.take(Message("clock", {"reference": "a", "streams": {"a": {}, "b": news}}))
    assert clocks.convert([sample + 1500], "b", "a")[0] == pytest.approx(1040.0)
    same = segment == 2  # a jump within the session
    assert (clocks.convert([150_000], "b", "a")[0] == before) == same


def test_news_that_was_under_way_is_no_other_session() -> None:
    clocks = Clocks(told())
    late = {
        "sample": 880_000,
        "reference_sample": 1.0,
        "ratio": 1.0,
        "error_ms": 0.1,
        "segment": 1,
        "from_sample": 600_000,
    }
    before = clocks.convert([150_000, 890_000], "b", "a").tolist()
    clocks.take(Message("clock", {"reference": "a", "streams": {"b": late}}))
    assert clocks.convert([150_000, 890_000], "b", "a").tolist() == before


def test_an_unknown_clock_is_said_and_learned_from_messages() -> None:
    clocks = Clocks(told())
    assert clocks.known("a") and clocks.known("b") and not clocks.known("c")
    with pytest.raises(UnknownStream, match="'c' is not known"):
        clocks.convert([1], "c", "a")
    figures = {
        "sample": 1000,
        "reference_sample": 3000.5,
        "ratio": 1.0,
        "error_ms": 0.4,
        "segment": 0,
        "from_sample": 77,
    }
    assert clocks.take(Message("clock", {"reference": "a", "streams": {"c": figures, "d": {"steps": 0}}}))
    assert not clocks.take(Message("spikes.c", {}))
    assert clocks.convert([1100], "c", "a")[0] == 3100.5 and clocks.error_ms("c") == 0.4
    assert clocks.convert([3100.5 / 1], "a", "c")[0] == 1100.0
    through = clocks.convert([1100], "c", "b")  # by way of the reference
    assert through[0] == pytest.approx((3100.5 - 50) * 1.5)
    assert Clocks({}).reference is None
