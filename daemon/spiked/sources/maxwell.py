"""Live samples from MaxLab Live (mxwserver): one message per sampling instant, decoded in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from spiked.config import Stream
from spiked.errors import ConfigError, SourceError
from spiked.sources.base import BATCH_S, LEARN_S, LEARN_WALL_S, EventBudget, Subscriber, check_stopped
from spiked.sources.electrode_map import ElectrodeMap, read_electrode_map
from spiked.sources.probe import placeholder_line
from spiked.sources.wire_maxwell import (
    DEFAULT_ADDRESS,
    DEFAULT_FS_HZ,
    FRAME_MASK,
    frame_head,
    spike_layouts,
    uv_per_bit,
)
from spiked.stream import Block, EventKind, StreamEvent, StreamInfo

log = logging.getLogger(__name__)

FAR_S = 1.0  # a frame number this far off is believed only if the next frame agrees
MAX_COLUMNS = 4096
LIMITS = {"uint16": (0.0, 65535.0), "int16": (-32768.0, 32767.0)}


@dataclass(frozen=True)
class Batch:
    """Well-formed messages: frame numbers (48 bits), wells, amplitudes (frames, columns), spike parts."""

    frames: np.ndarray
    wells: np.ndarray
    values: np.ndarray
    spikes: list[bytes]

    def take(self, keep: np.ndarray) -> Batch:
        """The messages of these indices."""
        return Batch(self.frames[keep], self.wells[keep], self.values[keep], [self.spikes[i] for i in keep])


class MaxwellSource:
    """A Source. Loss shows as jumps of the frame number, which integrity fills.

    Channels: those of the electrode map, in its order, named by amplifier channel; without one, every column
    of the stream, on placeholder positions. Amplitudes are kept as the ADC's own codes (uint16) where they
    are whole numbers, else (the filtered port) as float32.
    """

    def __init__(self, cfg: Stream) -> None:
        self.cfg = cfg
        self.address = cfg.address or DEFAULT_ADDRESS
        self.fs_hz = cfg.fs_hz or DEFAULT_FS_HZ
        self.exhausted = False
        self.counters = dict.fromkeys(
            ("messages", "malformed", "lost_messages", "duplicates", "out_of_order", "other_well", "flagged",
             "acquisitions", "inexact", "device_spikes_untold", "device_spikes_unreadable"), 0,
        )  # fmt: skip
        self._subscriber: Subscriber | None = None
        self._map: ElectrodeMap | None = None
        self._budget = EventBudget()
        self._ready: list[Block | StreamEvent] = []
        self._held: list[list[bytes]] = []  # a last frame whose number the next one has to confirm
        self._last: int | None = None
        self._bytes = 0  # of part 1
        self._well: int | None = None  # the one well that is kept, where several share the port
        self._columns: slice | np.ndarray = slice(None)
        self._dtype = "uint16"
        self._layout: np.dtype | None = None  # of spike records, once some told it apart
        self._far = int(FAR_S * self.fs_hz)
        self._per_read = max(1, int(BATCH_S * self.fs_hz))

    def open(self, stop: threading.Event) -> StreamInfo:
        if self.cfg.electrode_map is not None:
            self._map = read_electrode_map(self.cfg.electrode_map, self.cfg.well)
        self._subscriber = Subscriber(self.address, self.cfg.queue_mb, 4 * 1027 + 8)
        raw = self._first_messages(stop)
        return self._settle(raw)

    def read(self, timeout_s: float) -> list[Block | StreamEvent]:
        if self._ready:
            out, self._ready = self._ready, []
            return out
        assert self._subscriber is not None, "open() first"
        messages = self._subscriber.drain(timeout_s, self._per_read)
        self.counters["messages"] += len(messages)
        return self._decode(messages, time.monotonic_ns()) if messages else []

    def close(self) -> None:
        if self._subscriber is not None:
            self._subscriber.close()
        self._subscriber = None

    # ---- learning the stream

    def _first_messages(self, stop: threading.Event) -> list[list[bytes]]:
        assert self._subscriber is not None
        raw: list[list[bytes]] = []
        good, begun = 0, 0.0
        deadline = time.monotonic() + self.cfg.wait_s
        while True:
            check_stopped(stop, self.address)
            over = time.monotonic() > deadline  # before the last look, not after it
            some = self._subscriber.drain(0.1, self._per_read)
            raw += some
            good += sum(_plausible(m) for m in some)
            begun = begun or (time.monotonic() if good else 0.0)
            if good > 1 and (good >= LEARN_S * self.fs_hz or time.monotonic() - begun >= LEARN_WALL_S):
                return raw
            if over:
                break
        if raw:
            raise SourceError(
                f"{len(raw)} messages from {self.address}, none of them MaxLab frames; "
                "use its raw port (default 7204)"
            )
        raise SourceError(
            f"no data from {self.address} within {self.cfg.wait_s:g} s; "
            "is MaxLab Live running and the array powered up?"
        )

    def _settle(self, raw: list[list[bytes]]) -> StreamInfo:
        """Fix columns, well and sample type, and put the frames seen so far through the ordinary path."""
        self._bytes = Counter(len(m[1]) for m in raw if _plausible(m)).most_common(1)[0][0]
        batch = self._batch(raw)
        self._settle_well(batch)
        n = self._bytes // 4
        channels, positions = self._settle_columns(n)
        values = batch.values[:, self._columns]
        self._dtype = _sample_type(values)
        whole = self._dtype != "float32"
        raw_adc = self._dtype == "uint16"
        centred = not raw_adc and abs(float(np.median(values))) < 100
        info = StreamInfo(
            name=self.cfg.name,
            fs_hz=self.fs_hz,
            channel_ids=tuple(str(c) for c in channels),
            positions_um=positions,
            dtype=self._dtype,
            gain_uv=(uv_per_bit(self.cfg.gain),) * len(channels),
            zero_code=0.0 if centred else 512.0,
            code_min=0.0 if raw_adc else -512.0 if whole else None,
            code_max=1023.0 if raw_adc else 511.0 if whole else None,
            geometry_known=self._map is not None,
            source="maxwell",
            annotations={
                "address": self.address, "gain": self.cfg.gain, "well": self.cfg.well, "columns": n,
                "electrodes": list(self._map.electrodes) if self._map else [],
            },
        )  # fmt: skip
        self.counters = {
            **dict.fromkeys(self.counters, 0),
            "messages": len(raw),
        }  # `raw` is counted once, below
        assert self._subscriber is not None
        self._subscriber.resize(self._bytes + 8)
        self._ready = self._decode(raw, time.monotonic_ns())
        return info

    def _settle_well(self, batch: Batch) -> None:
        wells = sorted({int(w) for w in batch.wells})
        if len(wells) > 1:
            if self.cfg.well not in wells:
                raise SourceError(
                    f"{self.address} carries wells {wells}, not {self.cfg.well}; set well to one of them"
                )
            self._well = self.cfg.well
            self._per_read *= len(wells)

    def _settle_columns(self, n: int) -> tuple[list[int], tuple[tuple[float, float], ...]]:
        if self._map is None:
            log.warning("stream %s: no electrode_map, positions are unknown", self.cfg.name)
            return list(range(n)), placeholder_line(n)
        channels = list(self._map.channels)
        if max(channels) >= n:
            raise ConfigError(
                f"{self.cfg.electrode_map} routes channel {max(channels)} but {self.address} sends {n} "
                "columns; give the map of this array"
            )
        rising = channels == list(range(channels[0], channels[0] + len(channels)))
        self._columns = slice(channels[0], channels[-1] + 1) if rising else np.array(channels)
        return channels, self._map.positions_um

    # ---- every message

    def _batch(self, messages: list[list[bytes]]) -> Batch:
        size = self._bytes
        good = [m for m in messages if 2 <= len(m) <= 3 and len(m[0]) == 8 and len(m[1]) == size]
        self.counters["malformed"] += len(messages) - len(good)
        heads = np.frombuffer(b"".join([m[0] for m in good]), "<u8")
        values = np.frombuffer(b"".join([m[1] for m in good]), "<f4").reshape(len(good), size // 4)
        top = (heads >> np.uint64(48)).astype(np.int64)
        self.counters["flagged"] += int(np.count_nonzero(top >> 8))
        frames = (heads & np.uint64(FRAME_MASK)).astype(np.int64)
        return Batch(frames, top & 255, values, [m[2] if len(m) == 3 else b"" for m in good])

    def _decode(self, messages: list[list[bytes]], now: int) -> list[Block | StreamEvent]:
        batch = self._batch(self._held + messages)
        self._held = []
        if self._well is not None:
            mine = np.flatnonzero(batch.wells == self._well)
            self.counters["other_well"] += len(batch.frames) - len(mine)
            batch = batch.take(mine)
        out: list[Block | StreamEvent] = []
        for keep, anew in self._runs(batch):
            part = batch if len(keep) == len(batch.frames) else batch.take(keep)
            out.append(Block(int(part.frames[0]), self._codes(part.values), now, None, anew))
            self._spikes(part, now, out)
        return out

    def _runs(self, batch: Batch) -> list[tuple[np.ndarray, bool]]:
        """Indices of consecutive frames, run by run, each with whether the counter began anew there."""
        frames = batch.frames
        if not len(frames):
            return []
        if self._last is not None and frames[0] == self._last + 1 and (np.diff(frames) == 1).all():
            self._last = int(frames[-1])
            return [(np.arange(len(frames)), False)]
        return self._broken_runs(batch)

    def _broken_runs(self, batch: Batch) -> list[tuple[np.ndarray, bool]]:
        runs: list[tuple[list[int], bool]] = []
        frames = [int(f) for f in batch.frames]
        for i, frame in enumerate(frames):
            step = self._far + 1 if self._last is None else frame - self._last
            if abs(step) > self._far:
                if i + 1 == len(frames):
                    head = frame_head(frame, int(batch.wells[i]))
                    self._held = [[head, batch.values[i].tobytes(), batch.spikes[i]]]
                    break
                if not 0 < frames[i + 1] - frame <= self._far:
                    self.counters["malformed"] += 1
                    continue
            elif step <= 0:
                self.counters["out_of_order" if step else "duplicates"] += 1
                continue
            anew = step < 0
            if step != 1 or not runs:
                runs.append(([], anew))
            if anew:
                self.counters["acquisitions"] += 1
            elif self._last is not None:
                self.counters["lost_messages"] += step - 1
            runs[-1][0].append(i)
            self._last = frame
        return [(np.array(keep), anew) for keep, anew in runs]

    def _codes(self, values: np.ndarray) -> np.ndarray:
        """(frames, columns) float32 as they came -> (samples, channels) in the stream's type."""
        part = values[:, self._columns]
        if self._dtype == "float32":
            return np.ascontiguousarray(part)
        with np.errstate(invalid="ignore"):  # NaN and values out of range are found by the comparison
            codes = part.astype(self._dtype)
        if np.array_equal(codes, part):
            return codes
        with np.errstate(invalid="ignore"):
            bad = np.count_nonzero(codes != part)
        if not self.counters["inexact"]:
            log.warning("stream %s: amplitudes are no longer whole ADC bits; they are rounded", self.cfg.name)
        self.counters["inexact"] += int(bad)
        return np.clip(np.rint(np.nan_to_num(part)), *LIMITS[self._dtype]).astype(self._dtype)

    def _spikes(self, part: Batch, now: int, out: list[Block | StreamEvent]) -> None:
        for frame, raw in zip(part.frames, part.spikes, strict=True):
            if not raw:
                continue
            fits = spike_layouts(raw, int(frame))
            if len(fits) == 1:
                self._layout = fits[0]
            if self._layout not in fits:
                self.counters["device_spikes_unreadable"] += 1
                continue
            for r in np.frombuffer(raw, self._layout):
                if self._well is not None and r["well"] != self._well:
                    continue
                if not self._budget.take(now):
                    self.counters["device_spikes_untold"] += 1
                    continue
                at = int(r["frame"])
                out.append(
                    StreamEvent(at, EventKind.DEVICE_SPIKE, int(r["channel"]), 1, float(r["amplitude"]))
                )


def _plausible(m: list[bytes]) -> bool:
    """Shaped like a frame: an 8-byte number, some whole floats, perhaps spikes."""
    return 2 <= len(m) <= 3 and len(m[0]) == 8 and len(m[1]) % 4 == 0 and 4 <= len(m[1]) <= 4 * MAX_COLUMNS


def _sample_type(values: np.ndarray) -> str:
    """uint16 or int16 when every value is a whole number of that range, else float32."""
    if not np.isfinite(values).all() or not np.array_equal(values, np.rint(values)):
        return "float32"
    low, high = float(values.min()), float(values.max())
    for dtype, (least, most) in LIMITS.items():
        if least <= low and high <= most:
            return dtype
    return "float32"
