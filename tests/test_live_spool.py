"""Spikes on a disk that fills up: whole records, now and after there is room again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_record_disk import tmpfs

from spiked.live.spool import Spool
from spiked_client.protocol import SPIKE


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from tmpfs(tmp_path / "small", "1m")


def test_a_disk_that_takes_a_part_garbles_no_later_spike(small_disk: Path) -> None:
    spool = Spool(small_disk, "s")
    kept = np.zeros(0, SPIKE)
    refused = 0
    with open(small_disk / "filler", "wb", buffering=0) as filler:
        while (n := filler.write(bytes(4096))) == 4096:
            if filler.tell() > (1 << 20) - 3 * 4096:
                break
        assert n == 4096
        for k in range(2000):
            some = np.zeros(7, SPIKE)
            some["sample"], some["unit"] = 7 * k + np.arange(7), 1
            try:
                spool.spikes(some)
            except OSError:
                refused += 1
                if refused == 3:
                    filler.truncate(1000)  # somebody makes room
            else:
                kept = np.concatenate([kept, some])
    spool.close()
    assert refused >= 3
    assert np.array_equal(np.fromfile(small_disk / "s.spikes.bin", SPIKE)["sample"], kept["sample"])
