"""Words and bytes of SpikeGLX's command server: requests, replies, the header of a FETCH, gains, the status word.

A request is a line of ASCII words. The reply is any number of lines and then `OK`, or one line `ERROR text`. FETCH
answers `BINARY_DATA channels samples uint64(first)`, then that many int16, sample after sample, then `OK`.
Written from the behaviour of its `CmdServer` (release 20260101 and about).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

DEFAULT_ADDRESS = "tcp://127.0.0.1:4142"
JS = {"nidq": 0, "onebox": 1, "imec": 2}  # device of the configuration -> the server's stream type
KINDS = {"nidq": ("MN", "MA", "XA", "XD"), "onebox": ("XA", "XD", "SY"), "imec": ("AP", "LF", "SY")}

# bits of the status word SY
START, SYNC, MISS = 0, 6, 11
TOLD_BITS = (START, SYNC)  # these become TTL edges; the others say how the probe's link is
ERROR_BITS = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 7  # COUNT, SERDES, LOCK, POP, SYNC
MISS_BIT = 1 << MISS

TOO_LATE = "FETCH: Too late."
NOT_RUNNING = "FETCH: Not running or stream not enabled."
MAX_LINE = 1 << 20
MAX_REQUEST = 65_536

_BINARY = re.compile(r"BINARY_DATA (\d+) (\d+) uint64\((\d+)\)")
_CHANNEL = re.compile(r"ch(\d+)_([sxzu])")


class WireError(ValueError):
    """Bytes that no SpikeGLX sends."""


class Refused(Exception):
    """The server answered ERROR; `text` is what it said."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class ProbeType(NamedTuple):
    """What the codes of a probe mean: volt = code * v_max / i_max / gain."""

    v_max: float
    i_max: int
    ap_gain: float
    lf_gain: float  # 0: the probe has no LF channels


# The simulator's probes; the source asks the server instead.
PROBE_TYPES = {
    0: ProbeType(0.6, 512, 500.0, 250.0),  # Neuropixels 1.0
    21: ProbeType(0.5, 8192, 80.0, 0.0),  # 2.0
    24: ProbeType(0.5, 8192, 80.0, 0.0),  # 2.0, four shanks
    2013: ProbeType(0.62, 2048, 100.0, 0.0),
}


class Geometry(NamedTuple):
    """Per AP channel: (x, y) in micrometre (shanks side by side), and whether it is in use."""

    part: str
    positions_um: tuple[tuple[float, float], ...]
    used: tuple[bool, ...]


def request(*words: object) -> bytes:
    """One line. Raises ValueError when a word holds a blank or the line is too long."""
    texts = [str(w) for w in words]
    if any(not t or t != "".join(t.split()) for t in texts):
        raise ValueError(f"a word of {texts} is empty or holds a blank")
    line = (" ".join(texts) + "\n").encode("ascii")
    if len(line) > MAX_REQUEST:
        raise ValueError(f"a request of {len(line)} bytes; the server takes {MAX_REQUEST}")
    return line


def channel_list(channels: Sequence[int]) -> str:
    """For FETCH. The server answers them in ascending order, each once, whatever the list says."""
    return "#".join(str(c) for c in channels) + "#"


def binary_header(line: str) -> tuple[int, int, int] | None:
    """(channels, samples, first sample) of the line before samples; None for any other line."""
    found = _BINARY.fullmatch(line)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def numbers(lines: Sequence[str], n: int) -> list[float]:
    """The `n` numbers of a one-line reply. WireError when it has not so many."""
    try:
        out = [float(w) for w in lines[0].split()]
    except (IndexError, ValueError) as e:
        raise WireError(f"{list(lines)[:2]} is no list of numbers") from e
    if not all(map(math.isfinite, out)):
        raise WireError(f"{lines[0][:60]!r} is no list of numbers")
    if len(out) != n:
        raise WireError(f"{lines[0][:60]!r} has {len(out)} numbers, {n} expected")
    return out


def geometry(lines: Sequence[str], n_channels: int) -> Geometry:
    """GETGEOMMAP's `key=value` lines. WireError when a channel is missing or a value is no number."""
    told: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition("=")
        told[key.strip()] = value.strip()
    try:
        pitch = float(told["head_shankPitch"])
        spots = [
            (float(told[f"ch{c}_s"]) * pitch + float(told[f"ch{c}_x"]), float(told[f"ch{c}_z"]))
            for c in range(n_channels)
        ]
        used = tuple(int(told.get(f"ch{c}_u", "1")) != 0 for c in range(n_channels))
    except (KeyError, ValueError, OverflowError) as e:
        raise WireError(f"the geometry map lacks or garbles {e}") from e
    return Geometry(told.get("head_partNumber", ""), tuple(spots), used)


def geometry_lines(part: str, positions_um: Sequence[tuple[float, float]], unused: Sequence[int] = ()) -> str:
    """GETGEOMMAP's reply for a probe of one shank."""
    width = max((x for x, _ in positions_um), default=0.0) + 20
    out = [f"head_partNumber={part}", "head_numShanks=1", "head_shankPitch=0", f"head_shankWidth={width:g}"]
    for c, (x, z) in enumerate(positions_um):
        out += [f"ch{c}_s=0", f"ch{c}_x={x:g}", f"ch{c}_z={z:g}", f"ch{c}_u={0 if c in unused else 1}"]
    return "\n".join(out) + "\n"


def gain_uv(volt_per_bit: float, v_max: float, i_max: float) -> float:
    """Microvolt per code. The server prints volt per bit with six digits; range, codes and a whole gain are exact."""
    if volt_per_bit <= 0 or v_max <= 0 or i_max <= 0:
        raise WireError(f"{volt_per_bit:g} volt per bit of {v_max:g} V and {i_max:g} codes is no scale")
    gain = v_max / i_max / volt_per_bit
    if not math.isfinite(gain):
        raise WireError(f"{volt_per_bit:g} volt per bit is no scale")
    whole = round(gain)
    exact = whole > 0 and abs(gain - whole) < 2e-5 * whole
    return v_max / i_max / whole * 1e6 if exact else volt_per_bit * 1e6
