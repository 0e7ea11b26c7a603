"""The words every room shares: StreamInfo, Block, Chunk, Gap, StreamEvent."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np

from spiked.errors import ConfigError


@dataclass(frozen=True)
class StreamInfo:
    """One probe, array or well as its samples arrive. Immutable; travels as JSON in the ring's header.

    microvolts = (code - zero_code) * gain_uv[channel]
    """

    name: str
    fs_hz: float
    channel_ids: tuple[str, ...]
    positions_um: tuple[tuple[float, float], ...]  # x, y per channel
    dtype: str  # "int16", "uint16" or "float32": the device's own codes as they are stored
    gain_uv: tuple[float, ...]  # microvolt per code, per channel
    zero_code: float = 0.0  # the code that means 0 microvolt (512 for Maxwell's 10-bit ADC)
    code_min: float | None = None  # ADC rails in codes, where the device has them
    code_max: float | None = None
    geometry_known: bool = True  # False: positions are a placeholder line, nothing spatial may be trusted
    source: str = ""  # "openephys", "maxwell", "replay", ...
    annotations: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.channel_ids)
        if not 0 < self.fs_hz < math.inf or n == 0:
            raise ConfigError(f"stream {self.name}: rate {self.fs_hz} Hz with {n} channels is not a stream")
        if len(self.positions_um) != n or len(self.gain_uv) != n:
            raise ConfigError(
                f"stream {self.name}: {n} channels but {len(self.positions_um)} positions and "
                f"{len(self.gain_uv)} gains; check the probe file"
            )
        if not all(map(math.isfinite, self.gain_uv)):
            raise ConfigError(f"stream {self.name}: a gain is not a finite number; correct it")
        if self.dtype not in ("int16", "uint16", "float32"):
            raise ConfigError(f"stream {self.name}: sample type {self.dtype} is not int16, uint16 or float32")

    @property
    def n_channels(self) -> int:
        return len(self.channel_ids)

    @property
    def positions(self) -> np.ndarray:
        """(channels, 2) float64, micrometre."""
        return np.asarray(self.positions_um, float).reshape(-1, 2)

    @property
    def gains(self) -> np.ndarray:
        """(channels,) float32, microvolt per code."""
        return np.asarray(self.gain_uv, np.float32)

    def samples(self, ms: float) -> int:
        """Milliseconds as a whole number of samples."""
        return round(ms * self.fs_hz / 1000)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> StreamInfo:
        """What `to_json` wrote; ConfigError for anything else."""
        try:
            d = json.loads(text)
            d["name"], d["source"], d["dtype"] = str(d["name"]), str(d.get("source", "")), str(d["dtype"])
            d["fs_hz"], d["zero_code"] = float(d["fs_hz"]), float(d.get("zero_code", 0.0))
            d["channel_ids"] = tuple(map(str, d["channel_ids"]))
            d["positions_um"] = tuple((float(x), float(y)) for x, y in d["positions_um"])
            d["gain_uv"] = tuple(map(float, d["gain_uv"]))
            return cls(**d)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
            raise ConfigError(
                f"not the description of a stream ({type(e).__name__}); is the file damaged?"
            ) from e

    def check_array(
        self, what: str, fs_hz: float, channel_ids: tuple[str, ...], positions_um: np.ndarray
    ) -> None:
        """ConfigError unless `what` (sequences, templates), made on these channels at this rate, fits the stream."""
        if len(channel_ids) != self.n_channels:
            other = f"{len(channel_ids)} channels, the stream has {self.n_channels}"
        elif abs(fs_hz - self.fs_hz) > 0.01 * self.fs_hz:
            other = f"{fs_hz:g} Hz, the stream runs at {self.fs_hz:g} Hz"
        elif tuple(channel_ids) != tuple(self.channel_ids):
            pairs = enumerate(zip(channel_ids, self.channel_ids, strict=True))
            k = next(i for i, (a, b) in pairs if a != b)
            other = f"channel {k} being {channel_ids[k]}, in the stream it is {self.channel_ids[k]}"
        elif self.geometry_known and not np.allclose(positions_um, self.positions, atol=1.0):
            other = "other electrode positions"
        else:
            return
        raise ConfigError(f"stream {self.name}: the {what} were made with {other}; calibrate again")

    def same_wire(self, other: StreamInfo) -> bool:
        """True if samples of `other` can continue this stream: same rate, channels and sample type."""
        return (self.fs_hz, self.channel_ids, self.dtype) == (other.fs_hz, other.channel_ids, other.dtype)


class Flag(IntFlag):
    """Flags of a chunk."""

    NONE = 0
    GAP = 1  # never arrived: every sample is zero
    PARTIAL = 2  # some channels of some samples never arrived (they are zero)
    RESET = 4  # the device's counter jumped back here; internal numbering went on without a hole
    RESTART = 8  # first chunk after an acquire process was restarted


class EventKind(IntEnum):
    """What a StreamEvent is."""

    TTL = 1
    STIM = 2
    DEVICE_SPIKE = 3
    MESSAGE = 4


@dataclass(frozen=True)
class Block:
    """Consecutive samples as a source hands them over, before the integrity check.

    `data` is (samples, channels) in the stream's dtype. `missing` (channels,) bool marks channels of this
    block that never arrived (their columns are zero). `new_acquisition` says that the device restarted.
    `recv_ns` is the monotonic time at which the last part of it was received.
    """

    first_sample: int  # the device's own counter
    data: np.ndarray
    recv_ns: int
    missing: np.ndarray | None = None
    new_acquisition: bool = False
    reason: str = "lost"  # of the gap, where all channels are missing


@dataclass(frozen=True)
class StreamEvent:
    """A TTL edge, stimulation or device message, in the device's sample numbers."""

    sample: int
    kind: EventKind
    line: int = 0  # TTL line, 0-based; or event id
    state: int = 1
    value: float = 0.0  # word, amplitude, ...
    text: str = ""


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples read from the ring: (samples, channels) in the device's dtype."""

    first_sample: int
    data: np.ndarray
    arrival_ns: int
    flags: Flag = Flag.NONE

    @property
    def stop(self) -> int:
        return self.first_sample + len(self.data)


@dataclass(frozen=True)
class Gap:
    """Sample numbers [start, stop) that never arrived. `channels` None means all of them."""

    start: int
    stop: int
    reason: str  # "lost" | "partial" | "restart" | "device"
    n_channels: int = 0  # how many channels are affected (all, unless partial)
