"""What SpikeGLX tells of a stream: rate, channels, gains and geometry, as a StreamInfo. Nothing has to be configured."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from spiked.errors import ConfigError, SourceError
from spiked.sources.probe import placeholder_line, positions_for
from spiked.sources.spikeglx_link import SpikeGlxLink
from spiked.sources.wire_spikeglx import JS, KINDS, SYNC, Geometry, Refused, WireError, channel_list, gain_uv
from spiked.sources.wire_spikeglx import geometry as read_geometry
from spiked.stream import StreamInfo

MAX_CHANNELS = 4096


@dataclass(frozen=True)
class Described:
    """A stream of SpikeGLX: what is fetched, and what it means.

    The columns of a FETCH of `channels` are the analog ones of `info`, `n_words` digital words (16 lines each), and
    the status word where `has_status`.
    """

    info: StreamInfo
    channels: str
    n_words: int
    has_status: bool

    @property
    def width(self) -> int:
        return self.info.n_channels + self.n_words + self.has_status


def describe(
    link: SpikeGlxLink, device: str, ip: int, name: str, address: str, probe: Path | None = None
) -> Described:
    """Ask for everything. Raises SourceError when there is no such stream or it has no analog channels."""
    js = JS[device]
    n_streams = link.count("GETSTREAMNP", js)
    if ip >= n_streams:
        there = f"it has {device} 0 to {n_streams - 1}" if n_streams else f"it acquires no {device} stream"
        raise SourceError(f"SpikeGLX at {address} has no {device} {ip}: {there}; see `spiked discover`")
    counts = [int(n) for n in link.numbers(len(KINDS[device]), "GETSTREAMACQCHANS", js, ip)]
    if any(n < 0 for n in counts) or sum(counts) > MAX_CHANNELS:
        raise WireError(f"GETSTREAMACQCHANS {counts}")
    names, analog, words, status = _columns(device, counts)
    if not analog:
        raise SourceError(f"{device} {ip} of SpikeGLX at {address} has no analog channels to record")
    gains, i_max = _gains(link, js, ip, analog)
    positions, known, extra = _positions(link, device, ip, names, probe)
    info = StreamInfo(
        name=name,
        fs_hz=link.numbers(1, "GETSTREAMSAMPLERATE", js, ip)[0],
        channel_ids=tuple(names),
        positions_um=positions,
        dtype="int16",
        gain_uv=gains,
        code_min=float(-i_max),
        code_max=float(i_max - 1),
        geometry_known=known,
        source="spikeglx",
        annotations={"address": address, "device": device, "probe_index": ip, **extra, **_sync(device, len(words))},
    )  # fmt: skip
    return Described(info, channel_list([*analog, *words, *status]), len(words), bool(status))


def _columns(device: str, counts: list[int]) -> tuple[list[str], list[int], list[int], list[int]]:
    """Names and numbers of the analog channels, numbers of the digital words and of the status word.

    The LF band of a Neuropixels 1.0 is left out: its spikes are in the AP band.
    """
    names: list[str] = []
    parts: dict[str, list[int]] = {"analog": [], "words": [], "status": [], "none": []}
    at = 0
    for kind, n in zip(KINDS[device], counts, strict=True):
        use = {"LF": "none", "XD": "words", "SY": "status"}.get(kind, "analog")
        parts[use] += range(at, at + n)
        if use == "analog":
            names += [f"{kind}{i}" for i in range(n)]
        at += n
    return names, parts["analog"], parts["words"], parts["status"][:1]


def _gains(link: SpikeGlxLink, js: int, ip: int, channels: list[int]) -> tuple[tuple[float, ...], int]:
    """Microvolt per code of each channel, and the largest code."""
    v_max = link.numbers(2, "GETSTREAMVOLTAGERANGE", js, ip)[1]
    i_max = link.count("GETSTREAMMAXINT", js, ip)
    volts = [link.numbers(1, "GETSTREAMI16TOVOLTS", js, ip, c)[0] for c in channels]
    return tuple(gain_uv(v, v_max, i_max) for v in volts), i_max


def _positions(
    link: SpikeGlxLink, device: str, ip: int, names: list[str], probe: Path | None
) -> tuple[tuple[tuple[float, float], ...], bool, dict[str, object]]:
    """Positions, whether they are known, and what else the probe says of itself."""
    extra: dict[str, object] = {}
    if device != "nidq":
        with contextlib.suppress(Refused, IndexError):  # versions before 2023 do not tell
            extra["serial"] = link.ask("GETSTREAMSN", JS[device], ip)[0].split()[0]
    if probe is not None:
        return positions_for(probe, len(names)), True, extra
    if device != "imec":
        return placeholder_line(len(names)), False, extra
    try:
        told: Geometry = read_geometry(link.ask("GETGEOMMAP", ip), len(names))
    except Refused:  # a version before 2023
        return placeholder_line(len(names)), False, extra
    if len(set(told.positions_um)) < len(names):
        raise ConfigError(
            f"imec {ip}: SpikeGLX puts several channels at one position; give probe = '...' for this stream"
        )
    extra |= {"part": told.part, "unused": [c for c, used in enumerate(told.used) if not used]}
    return told.positions_um, True, extra


def _sync(device: str, n_words: int) -> dict[str, int]:
    """The TTL line on which the sync wave is told, where it is known: bit 6 of the status word."""
    return {} if device == "nidq" else {"sync_line": 16 * n_words + SYNC}
