"""What a display asks the control port for: snippets are the samples that were written, jobs are those of the queue."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_sort_sequences import some

from spiked import config as configuration
from spiked.afterwards import Afterwards
from spiked.errors import SpikedError
from spiked.journal import Journal
from spiked.offline.queue import Queue
from spiked.offline.task import Task
from spiked.ring import Ring, RingWriter
from spiked.showing import Showing
from spiked.stream import StreamInfo

FIRST, CHANNELS, FS = 10**12, 6, 1000.0
GAINS = (0.5, 1.0, 2.0, 0.25, 3.0, 1.5)


@pytest.fixture
def stage(tmp_path: Path) -> tuple[Showing, RingWriter]:
    """A stream of 1000 samples a second whose ring holds two seconds, and what it shows."""
    info = StreamInfo(
        "s", FS, tuple(f"e{c}" for c in range(CHANNELS)), tuple((0.0, 20.0 * c) for c in range(CHANNELS)), "uint16", GAINS, zero_code=512.0
    )  # fmt: skip
    ring = Ring.create(tmp_path / "r", info, 2.0)
    session: Any = SimpleNamespace(folder=tmp_path, tracks={"s": SimpleNamespace(name="s", ring=ring)})
    writer = RingWriter(ring)
    writer.start_at(FIRST)
    return Showing(lambda: session), writer


def codes(first: int, n: int) -> np.ndarray:
    t = np.arange(first, first + n)[:, None]
    return ((t * 7 + np.arange(CHANNELS) * 131) % 1024).astype(np.uint16)


async def test_snippets_are_what_was_received_and_leave_out_what_is_gone(
    stage: tuple[Showing, RingWriter],
) -> None:
    showing, writer = stage
    asked = {"stream": "s", "channels": [4, 0], "before": 5, "after": 9}
    for k in range(0, 900, 100):
        writer.write(codes(k, 100), k + 1)
    wanted = [
        FIRST + 3,
        FIRST + 50,
        FIRST + 197,
        FIRST + 895,
        7,
    ]  # too early, whole, across two writes, not there yet, nonsense
    told = await showing.snippets({**asked, "samples": wanted})
    assert told["samples"] == [FIRST + 50, FIRST + 197]
    uv = np.frombuffer(told["uv"], "<f4").reshape(2, 2, 14)
    for sample, got in zip((50, 197), uv, strict=True):
        expected = (codes(sample - 5, 14)[:, [4, 0]].astype(float) - 512) * (3.0, 0.5)
        assert np.allclose(got, expected.T)
    for k in range(900, 6000, 100):
        writer.write(codes(k, 100), k + 1)
    told = await showing.snippets({**asked, "samples": [FIRST + 50, FIRST + 5950]})
    assert told["samples"] == [FIRST + 5950]  # the ring has gone round
    about = (await showing.describe({}))["streams"]["s"]
    assert (about["fs_hz"], about["first_sample"], about["positions_um"][2]) == (FS, FIRST, [0.0, 40.0])


@pytest.mark.parametrize(
    ("change", "why"),
    [({"stream": "t"}, "no stream t"), ({"stream": 3}, "no stream 3"), ({"samples": []}, "1 to 32"), ({"samples": ["a"]}, "whole numbers"),
     ({"samples": [1] * 33}, "1 to 32"), ({"channels": [6]}, "channels 0 to 5"), ({"channels": [-1]}, "whole numbers"),
     ({"before": 500, "after": 500}, "at most 512"), ({"before": None}, "at most 512"), ({"after": 0}, "at most 512")],
)  # fmt: skip
async def test_snippets_refuse_nonsense(
    stage: tuple[Showing, RingWriter], change: dict[str, Any], why: str
) -> None:
    asked = {"stream": "s", "samples": [FIRST], "channels": [0], "before": 5, "after": 9}
    with pytest.raises(SpikedError, match=why):
        await stage[0].snippets({**asked, **change})


async def test_a_unit_as_the_sorter_has_it(stage: tuple[Showing, RingWriter], tmp_path: Path) -> None:
    showing, _ = stage
    with pytest.raises(SpikedError, match="no units yet"):
        await showing.template({"stream": "s", "unit": 5})
    sequences = some(3)
    sequences.save(tmp_path / "s.sequences.h5")
    told = await showing.template({"stream": "s", "unit": 5})
    a, b = sequences.ptr[1:3]
    assert told["kind"] == "sequences" and told["channels"] == sequences.electrode[a:b].tolist()
    assert told["latency_ms"] == pytest.approx((sequences.latency[a:b] / 20).tolist(), abs=1e-3)
    for unit, why in ((6, "no unit 6"), ("x", "whole number"), (None, "whole number"), (-1, "whole number")):
        with pytest.raises(SpikedError, match=why):
            await showing.template({"stream": "s", "unit": unit})
    (tmp_path / "s.sequences.h5").write_bytes(b"not HDF5")
    with pytest.raises(SpikedError, match="cannot be read"):
        await showing.template({"stream": "s", "unit": 5})


async def test_jobs_are_listed_given_up_and_tried_again(tmp_path: Path) -> None:
    config = configuration.parse(
        {"rig": {"sessions": str(tmp_path / "s")}, "stream": [{"name": "a", "source": "maxwell"}]}
    )
    after = Afterwards(config, Journal(None), lambda _event: None)
    ops = after.operations()
    assert await ops["jobs"]({}) == {"jobs": []}
    with pytest.raises(SpikedError, match="no offline jobs yet"):
        await ops["cancel_job"]({"job": 1})
    with Queue(tmp_path / "s") as queue:
        job, _ = queue.enqueue(Task((str(tmp_path / "one"),)))
    assert [(j["id"], j["state"], "paths" in j) for j in (await ops["jobs"]({}))["jobs"]] == [
        (job, "queued", False)
    ]  # type: ignore[index]
    assert await ops["cancel_job"]({"job": job}) == {"job": job, "state": "cancelled"}
    with pytest.raises(SpikedError, match="nothing to cancel"):
        await ops["cancel_job"]({"job": job})
    for wrong in (None, "1", True, 99):
        with pytest.raises(SpikedError):
            await ops["retry_job"]({"job": wrong})
    after.stop()  # no runner here
    assert await ops["retry_job"]({"job": job}) == {"job": job, "state": "queued"}
    assert (await ops["jobs"]({}))["jobs"][0]["state"] == "queued"  # type: ignore[index]
