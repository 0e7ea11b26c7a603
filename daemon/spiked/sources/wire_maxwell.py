"""Bytes of a MaxLab Live stream: one sampling instant per message, and two layouts of spike records.

A message is [frame number, amplitudes, spikes]. The number is 8 bytes of which 48 bits count; the upper ones
carry the well, as far as is known. Amplitudes are float32 in ADC bits, one per readout channel. The spike
part may be empty or absent. Records are 24 bytes up to MaxLab 22 and 16 from 24.1 (vendor's spike_event.hpp).
"""

from __future__ import annotations

import numpy as np

DEFAULT_ADDRESS = "tcp://127.0.0.1:7204"
DEFAULT_FS_HZ = 20_000.0
N_READOUT = 1024
FRAME_MASK = (1 << 48) - 1

SPIKE_OLD = np.dtype(
    {"names": ["well", "frame", "channel", "amplitude"], "formats": ["u1", "<u8", "<i4", "<f4"],
     "offsets": [7, 8, 16, 20], "itemsize": 24}
)  # fmt: skip
SPIKE_NEW = np.dtype(
    {"names": ["frame", "amplitude", "channel", "well"], "formats": ["<u8", "<f4", "<u2", "u1"],
     "offsets": [0, 8, 12, 14], "itemsize": 16}
)  # fmt: skip
NEAR_FRAMES = 1 << 16


def uv_per_bit(gain: float) -> float:
    """Microvolt per ADC bit at an amplifier gain: 3.3 V over 1024 codes."""
    return 3.3e6 / 1024 / gain


def spike_layouts(part: bytes, frame: int, n_channels: int = 1030) -> list[np.dtype]:
    """Layouts in which every record makes sense: near `frame`, on a real channel, with a usual amplitude.

    48, 96, ... bytes fit both by size.
    """
    fits = []
    for dtype in (SPIKE_NEW, SPIKE_OLD):
        if not part or len(part) % dtype.itemsize:
            continue
        r = np.frombuffer(part, dtype)
        channel, size = r["channel"].astype(np.int64), np.abs(r["amplitude"])
        near = np.abs(r["frame"].astype(np.int64) - frame) < NEAR_FRAMES
        usual = (size == 0) | ((size > 1e-6) & (size < 1e6))
        if (near & usual & (channel >= 0) & (channel < n_channels)).all():
            fits.append(dtype)
    return fits


def frame_head(frame: int, well: int = 0, flags: int = 0) -> bytes:
    """The first part of a message."""
    return ((frame & FRAME_MASK) | (well & 255) << 48 | (flags & 255) << 56).to_bytes(8, "little")


def spike_part(
    frames: np.ndarray, channels: np.ndarray, amplitudes: np.ndarray, layout: np.dtype, well: int = 0
) -> bytes:
    """The third part of a message."""
    r = np.zeros(len(frames), layout)
    r["frame"], r["channel"], r["amplitude"], r["well"] = frames, channels, amplitudes, well
    return r.tobytes()
