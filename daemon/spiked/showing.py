"""What a display asks the control port for: how a stream is laid out, what a unit looks like, its last spikes as they were received.

All of it is read beside the sample path: descriptions and snippets from the ring, templates from the session's file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import Overrun, SpikedError
from spiked.ring import Ring, RingReader
from spiked.session import Session
from spiked_client.protocol import is_count

MAX_SNIPPETS, MAX_CHANNELS, MAX_SAMPLES = 32, 32, 512  # of one request
Op = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]


class Showing:
    """`session` gives the one that runs, or None."""

    def __init__(self, session: Callable[[], Session | None]) -> None:
        self._session = session

    def operations(self) -> dict[str, Op]:
        return {"describe": self.describe, "template": self.template, "snippets": self.snippets}

    def _ring(self, request: dict[str, Any]) -> tuple[Session, str, Ring]:
        session, name = self._session(), request.get("stream")
        track = session.tracks.get(name) if session is not None and isinstance(name, str) else None
        if session is None or track is None or track.ring is None:
            raise SpikedError(f"no stream {str(name)[:40]} is being received; see `spiked status`")
        return session, track.name, track.ring

    async def describe(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Every stream that is received: rate, channels, where its electrodes are."""
        session = self._session()
        rings = {} if session is None else {t.name: t.ring for t in session.tracks.values() if t.ring}
        streams = {
            name: {
                "fs_hz": r.info.fs_hz, "channel_ids": list(r.info.channel_ids), "positions_um": [list(p) for p in r.info.positions_um],
                "geometry_known": r.info.geometry_known, "source": r.info.source, "first_sample": r.first_sample,
            }
            for name, r in rings.items()
        }  # fmt: skip
        return {"session": None if session is None else session.folder.name, "streams": streams}

    async def template(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the sorter looks for in one unit, per electrode."""
        session, stream, ring = self._ring(request)
        unit = request.get("unit")
        if not is_count(unit, 0):
            raise SpikedError("template needs unit, a whole number")
        found = await asyncio.to_thread(_template, session.folder, stream, int(unit or 0))
        return {**found, "fs_hz": ring.info.fs_hz}

    async def snippets(self, request: dict[str, Any]) -> dict[str, Any]:
        """Microvolts around samples that the ring still holds, on a few channels."""
        _, _, ring = self._ring(request)
        n = ring.info.n_channels
        samples, channels = (
            _numbers(request, "samples", MAX_SNIPPETS),
            _numbers(request, "channels", MAX_CHANNELS),
        )
        before, after = request.get("before"), request.get("after")
        if not is_count(before, 0) or not is_count(after) or before + after > MAX_SAMPLES:  # type: ignore[operator]
            raise SpikedError(f"snippets needs before and after, at most {MAX_SAMPLES} samples together")
        if max(channels) >= n:
            raise SpikedError(f"the stream has channels 0 to {n - 1}")
        kept, uv = _cut(ring, samples, channels, int(before or 0), int(after or 0))
        return {"samples": kept, "channels": channels, "uv": uv.astype("<f4").tobytes()}


def _numbers(request: dict[str, Any], key: str, most: int) -> list[int]:
    given = request.get(key)
    if not isinstance(given, list) or not 1 <= len(given) <= most or not all(is_count(x, 0) for x in given):
        raise SpikedError(f"{key} is a list of 1 to {most} whole numbers")
    return given


def _cut(
    ring: Ring, samples: list[int], channels: list[int], before: int, after: int
) -> tuple[list[int], np.ndarray]:
    """Which of the samples the ring held, and (these, channels, before + after) microvolts, raw."""
    info, reader = ring.info, RingReader(ring)
    kept, cuts = [], []
    for sample in samples:
        first, stop = sample - before, sample + after
        if first < ring.oldest_sample or stop > ring.next_sample:
            continue
        reader.skip_to(first)
        pieces: list[np.ndarray] = []
        try:
            while (left := stop - reader.position) > 0 and (chunk := reader.read(left)) is not None:
                pieces.append(chunk.data[:, channels])
        except Overrun:
            continue
        codes = np.concatenate(pieces).astype(np.float32)
        kept.append(sample)
        cuts.append(((codes - info.zero_code) * info.gains[channels]).T)
    return kept, np.array(cuts, np.float32).reshape(len(kept), len(channels), before + after)


def _template(session: Path, stream: str, unit: int) -> dict[str, Any]:
    """From the file that the live process keeps in the session folder."""
    import h5py

    for kind in ("templates", "sequences"):
        path = session / f"{stream}.{kind}.h5"
        if path.exists():
            break
    else:
        raise SpikedError(f"{stream} has no units yet")
    try:
        with h5py.File(path, "r") as f:
            at = np.flatnonzero(f["unit_ids"][()] == unit)
            if not len(at):
                raise SpikedError(f"{stream} has no unit {unit}")
            return (_of_templates if kind == "templates" else _of_sequences)(f, int(at[0]))
    except (OSError, KeyError) as e:
        raise SpikedError(f"{path.name} cannot be read just now ({type(e).__name__})") from e


def _of_templates(f: Any, at: int) -> dict[str, Any]:
    a, b = f["wave_ptr"][at : at + 2].tolist()
    return {
        "kind": "templates", "channels": f["wave_channel"][a:b].tolist(), "before": int(f.attrs["before"]),
        "uv": f["waveform"][a:b].astype("<f4").tobytes(),
    }  # fmt: skip


def _of_sequences(f: Any, at: int) -> dict[str, Any]:
    a, b = f["ptr"][at : at + 2].tolist()
    ms = 1000 / float(f.attrs["fs_hz"])
    return {
        "kind": "sequences", "channels": f["electrode"][a:b].tolist(),
        "latency_ms": [round(float(x) * ms, 4) for x in f["latency"][a:b]], "sd": [round(float(x), 3) for x in f["amp"][a:b]],
    }  # fmt: skip
