"""What a unit looks like: its template, and its last spikes as the ring of the daemon still holds them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from spiked_client.control import Control
from spiked_client.errors import ClientError, Refused
from spiked_client.web.stream import Stream

BEFORE_MS, AFTER_MS, AROUND = 1.0, 2.0, 12  # time about the trough; electrodes
KEEP_S = 0.7  # the same picture serves everybody for so long
MAX_PICTURES = 64
PATIENCE_S = 5.0  # of the twelve seconds that a page waits for two answers


class Pictures:
    """`control` is for these questions alone; None while the daemon is not there. `stream` finds one by its name."""

    def __init__(self, stream: Callable[[str], Stream | None]) -> None:
        self.control: Control | None = None
        self._stream = stream
        self._kept: dict[tuple[str, int], tuple[float, asyncio.Task[dict[str, Any]]]] = {}

    def forget(self) -> None:
        """Other units are in use now."""
        self._kept.clear()

    async def of(self, stream: str, unit: int) -> dict[str, Any]:
        """A unit's template, and the typical and the single traces of its last spikes. Raises ClientError."""
        now = time.monotonic()
        self._kept = {key: kept for key, kept in self._kept.items() if kept[0] > now - KEEP_S}
        found = self._kept.get((stream, unit))
        if found is None:
            if len(self._kept) >= MAX_PICTURES:
                raise ClientError("too many units are looked at; ask again")
            task = asyncio.create_task(self._take(stream, unit))
            task.add_done_callback(
                lambda t: t.cancelled() or t.exception()
            )  # somebody may have left meanwhile
            found = self._kept[stream, unit] = (now, task)
        return await asyncio.shield(found[1])

    async def _take(self, name: str, unit: int) -> dict[str, Any]:
        stream, ask = self._stream(name), self.control
        if stream is None or ask is None or not stream.about:
            raise ClientError(f"no stream {name[:40]} is known")
        rows = stream.units[stream.units["unit"] == unit]
        if not len(rows):
            raise ClientError(f"{name[:40]} has no unit {unit}")
        out: dict[str, Any] = {"unit": unit, "fs_hz": stream.fs_hz}
        with contextlib.suppress(Refused):
            out["template"] = _template(
                await ask.request("template", timeout=PATIENCE_S, stream=name, unit=unit)
            )
        channels, samples = stream.around(int(rows["channel"][0]), AROUND), stream.last_spikes(unit)
        before, after = (round(ms * stream.fs_hz / 1000) for ms in (BEFORE_MS, AFTER_MS))
        if samples and channels:
            with contextlib.suppress(Refused):
                where = {"samples": samples, "channels": channels, "before": before, "after": after}
                told = await ask.request("snippets", timeout=PATIENCE_S, stream=name, **where)
                out["spikes"] = _spikes(told, len(channels), before, after)
        return out


def _template(told: dict[str, Any]) -> dict[str, Any]:
    """With the waveforms as lists; the strongest electrodes only."""
    channels = told.get("channels")
    rest = {k: v for k, v in told.items() if k != "uv"}
    if told.get("kind") != "templates" or not isinstance(channels, list) or not channels:
        return rest
    uv = np.frombuffer(told["uv"], "<f4").reshape(len(channels), -1)
    order = np.argsort(-np.abs(uv).max(1), kind="stable")[: 2 * AROUND]
    return {**rest, "channels": [channels[i] for i in order], "uv": np.round(uv[order], 2).tolist()}


def _spikes(told: dict[str, Any], n_channels: int, before: int, after: int) -> dict[str, Any]:
    """The typical spike (the median) per electrode, and every one on the unit's own electrode; straight drift taken out."""
    samples = told.get("samples") or []
    uv = np.frombuffer(told["uv"], "<f4").reshape(len(samples), n_channels, before + after)
    edge = max((before + after) // 8, 1)
    x = np.linspace(-0.5, 0.5, before + after) * (before + after) / max(before + after - edge, 1)
    head, tail = uv[..., :edge].mean(-1, keepdims=True), uv[..., -edge:].mean(-1, keepdims=True)
    uv = uv - (head + tail) / 2 - (tail - head) * x
    typical = np.round(np.median(uv, 0), 1).tolist() if len(samples) else []
    single = np.round(uv[:, 0], 1).tolist()
    return {
        "n": len(samples),
        "before": before,
        "channels": told.get("channels"),
        "typical_uv": typical,
        "single_uv": single,
    }
