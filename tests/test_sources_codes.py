"""What Open Ephys sends, at its edges: codes at the rails, names that no file can hold."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from record_rig import config
from source_rig import blocks_of, collect, noise_codes, opened, publishing

from spiked.clean.cleaner import Cleaner
from spiked.record.nwbfile import create
from spiked.sources.codes import Quantizer
from spiked.sources.wire_openephys import DATA, DataHeaders


def test_the_lower_rail_is_a_code_like_any_other() -> None:
    counters = {"clipped": 0, "inexact": 0}
    quantize = Quantizer(0.195, "s", counters)
    codes = np.array([[-32768, -32767, 0, 32767]], np.float32)
    assert quantize(codes * np.float32(0.195)).ravel().tolist() == [-32768, -32767, 0, 32767]
    assert counters == {"clipped": 0, "inexact": 0}
    beyond = np.array([[-32769, 32768, np.nan, 5]], np.float32)
    assert quantize(beyond * np.float32(0.195)).ravel().tolist() == [-32768, 32767, 0, 5]
    assert counters["clipped"] == 3


@pytest.mark.parametrize(
    ("uv", "rail_uv", "clipped"),
    [
        ("auto", 600.0, [3071, 3072]),
        ("float", 600.0, [3071, 3072]),
        (0.195, None, [32767]),
        ("float", None, []),
    ],
)
def test_samples_at_the_rail_are_invalid(uv: str | float, rail_uv: float | None, clipped: list[int]) -> None:
    """3072 codes of 0.195 uV are 599 uV; without a figure for the amplifier only the end of int16 is known."""
    levels = (3000, 3065, 3071, 3072, 32767)
    headers, sent = DataHeaders("s", ["CH1"], 30_000.0), []
    for k in range(60):
        headers.block(300, 300 * k, 0)
        codes = noise_codes(300, 1, k).astype(np.float32)[:, 0]
        if k == 40:
            codes[50:300:50] = levels
        sent.append([DATA, headers(k + 1, 0), (codes * np.float32(0.195)).tobytes()])
    with (
        publishing(sent) as address,
        opened("openephys", address, uv_per_bit=uv, rail_uv=rail_uv) as (source, info),
    ):
        data = np.concatenate([b.data for b in blocks_of(collect(source))])
    at = 12_050 + 50 * np.arange(5)
    _, valid, _ = Cleaner(info).process(0, data)
    wanted = {*clipped, *([32767] if clipped else [])}
    assert {level for level, k in zip(levels, at, strict=True) if not valid[0, k]} == wanted


def test_names_that_no_file_can_hold_are_replaced(tmp_path: Path) -> None:
    """JSON can say half a surrogate pair, and NUL; HDF5 and MessagePack cannot."""
    names = ["\\ud800", "a\\u0000b", "CH3"]
    headers, sent = DataHeaders("s", names, 30_000.0), []
    for k in range(60):
        headers.block(300, 300 * k, 0)
        codes = noise_codes(300, 3, k).astype(np.float32) * np.float32(0.195)
        sent += [[DATA, headers(3 * k + c + 1, c), codes[:, c].tobytes()] for c in range(3)]
    with publishing(sent) as address, opened("openephys", address) as (source, info):
        items = collect(source)
    assert info.channel_ids == ("CH1", "CH2", "CH3")
    assert sum(len(b.data) for b in blocks_of(items)) == 18_000 and source.counters["malformed"] == 0
    create(tmp_path / "probe.nwb", info, config(), datetime.now(UTC), "s", 0)
