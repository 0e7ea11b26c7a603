"""SpikeGLX `.bin` with `.meta`: one imec probe's AP or LF band.

Volts are code x imAiRangeMax / imMaxInt / gain, the gain depending on the probe type (SpikeGLX's metadata
guide, https://billkarsh.github.io/SpikeGLX/Sgl_help/Metadata_30.html). The last saved channel is the status
word: its bit 6 is the sync wave, its bit 11 marks samples that were lost and zero-filled.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from spiked.errors import ConfigError, RecordingError
from spiked.sources.formats.recording import SCAN, Choice, Plain, Recording, plain
from spiked.stream import EventKind, StreamEvent, StreamInfo

SYNC_BIT, MISS_BIT = 6, 11
NP2_14BIT = ("21", "24")
NP2_12BIT = ("2003", "2004", "2013", "2014", "2020", "2021")
NXT = ("3010", "3020")
PER_FILE_GAIN = ("1110",)  # its imro table lists column groups, and the one gain stands in the header


class SpikeGlxRecording(Recording):
    """The saved AP or LF channels; sync edges are events, lost samples are `invalid`."""

    def __init__(self, binary: Path, choice: Choice) -> None:
        meta = read_meta(binary.with_suffix(".meta"))
        band = "lf" if binary.name.endswith(".lf.bin") else "ap"
        n_saved = int(_need(meta, "nSavedChans", binary))
        has_sync = int(_need(meta, "snsApLfSy", binary).split(",")[2]) > 0
        n = n_saved - has_sync
        if n < 1:
            raise RecordingError(f"{binary} saves no electrode channel; choose another file")
        self._words = _map(binary, n_saved, meta)
        self._sync = n if has_sync else None
        saved = saved_channels(meta, n_saved)[:n]
        positions, known = choice.positions(n, _geometry(meta, saved, binary))
        code_max = _max_int(meta)
        gain_uv = (
            1e6 * float(_need(meta, "imAiRangeMax", binary)) / code_max / _gains(meta, saved, band, binary)
        )
        info = StreamInfo(
            name=re.sub(r"[^A-Za-z0-9_-]", "-", binary.name.removesuffix(".bin"))[:40],
            fs_hz=choice.rate(float(_need(meta, "imSampRate", binary)), binary),
            channel_ids=tuple(f"{band.upper()}{band_index(c, meta, band)}" for c in saved),
            positions_um=positions,
            dtype="int16",
            gain_uv=choice.gains(gain_uv),
            code_min=-code_max,
            code_max=code_max - 1,
            geometry_known=known,
            source="spikeglx",
            annotations={"probe_type": meta.get("imDatPrb_type", "0"), "probe": meta.get("imDatPrb_pn", "")},
        )
        self._n = n
        super().__init__(binary, info, len(self._words), int(meta.get("firstSample", 0)))
        self._on_close.append(self._let_go)
        self._invalid: list[tuple[int, int]] | None = None

    def _let_go(self) -> None:
        self._words = np.zeros((0, self._n + 1), np.int16)

    @property
    def plain(self) -> Plain | None:
        return plain(self._words, np.arange(self._n))

    def _rows(self, start: int, stop: int) -> np.ndarray:
        return self._words[start:stop, : self._n]

    def _bit(self, bit: int, start: int, stop: int) -> np.ndarray:
        assert self._sync is not None
        return (self._words[start:stop, self._sync] >> bit & 1).astype(np.int8)

    @property
    def invalid(self) -> list[tuple[int, int]]:
        """Index intervals that were lost before they reached SpikeGLX. The first use reads the whole file."""
        if self._invalid is None:
            runs = [
                r
                for a in range(0, self.n_samples, SCAN)
                for r in self._invalid_in(a, min(a + SCAN, self.n_samples))
            ]
            self._invalid = []
            for a, b in runs:
                if self._invalid and self._invalid[-1][1] == a:
                    a = self._invalid.pop()[0]
                self._invalid.append((a, b))
        return self._invalid

    def _invalid_in(self, start: int, stop: int) -> list[tuple[int, int]]:
        if self._sync is None:
            return []
        edges = np.flatnonzero(np.diff(self._bit(MISS_BIT, start, stop), prepend=0, append=0)) + start
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

    def events_in(self, start: int, stop: int) -> list[StreamEvent]:
        """Edges of the sync wave within [start, stop) by index, as TTL line 6."""
        out: list[StreamEvent] = []
        for a in range(start, stop, SCAN) if self._sync is not None else ():
            low = max(a - 1, 0)
            bit = self._bit(SYNC_BIT, low, min(a + SCAN, stop))
            out += [
                StreamEvent(self.device_sample(low + 1 + int(i)), EventKind.TTL, SYNC_BIT, int(bit[i + 1]))
                for i in np.flatnonzero(np.diff(bit))
            ]
        return out


def find_spikeglx(path: Path, choice: Choice) -> Path:
    """The .bin meant by a .bin, a .meta or a folder of a run. Raises ConfigError if several could be."""
    if path.suffix == ".meta":
        path = path.with_suffix(".bin")
        if not path.exists():
            raise RecordingError(f"{path} is missing beside its .meta; copy both")
    if path.is_file():
        if not re.search(r"\.(ap|lf)\.bin$", path.name):
            raise ConfigError(f"{path} is not a probe's stream; give the .ap.bin or .lf.bin of an imec probe")
        return path
    found = sorted(p for p in path.rglob("*.bin") if re.search(r"\.(ap|lf)\.bin$", p.name))
    named = [
        p for p in found if choice.stream and choice.stream in (_stream(p), _stream(p).replace(".", "-"))
    ]
    ap = [p for p in found if p.name.endswith(".ap.bin")]
    for some in (named, found, ap):
        if len(some) == 1:
            return some[0]
    if not found:
        raise RecordingError(f"{path} holds .meta files but no .ap.bin or .lf.bin; copy both")
    names = ", ".join(str(p.relative_to(path)) for p in found[:8])
    raise ConfigError(f"{path} holds {names}; give the path of one of them")


def _stream(path: Path) -> str:
    return ".".join(path.name.split(".")[-3:-1])


def read_meta(path: Path) -> dict[str, str]:
    """key=value lines; the ~ of table keys is dropped. Raises RecordingError if the file is absent."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise RecordingError(f"{path} cannot be read ({e.strerror}); copy it beside the .bin") from e
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {k.strip().removeprefix("~"): v.strip() for k, v in pairs}


def _need(meta: dict[str, str], key: str, binary: Path) -> str:
    if not meta.get(key):
        raise RecordingError(
            f"{binary.with_suffix('.meta')} does not say {key}; copy the .meta of this .bin again"
        )
    return meta[key]


def _map(binary: Path, n_saved: int, meta: dict[str, str]) -> np.ndarray:
    """The file as (samples, saved channels) int16, memory-mapped. Raises RecordingError if it is cut off."""
    size = binary.stat().st_size
    told = int(meta.get("fileSizeBytes") or size)
    if size < told or size % (2 * n_saved):
        frame = f", not whole samples of {2 * n_saved} bytes" if size % (2 * n_saved) else ""
        raise RecordingError(f"{binary} is cut off: {size} bytes{frame}, {told} by its .meta; copy it again")
    if not size:
        raise RecordingError(f"{binary} is empty; copy it again")
    return np.memmap(binary, "<i2", "r").reshape(-1, n_saved)


def saved_channels(meta: dict[str, str], n_saved: int) -> list[int]:
    """Original numbers of the saved channels, in file order (0 .. AP-1, then LF, then SY)."""
    subset = meta.get("snsSaveChanSubset", "all")
    if subset in ("", "all"):
        return list(range(n_saved))
    out: list[int] = []
    for part in subset.split(","):
        a, _, b = part.partition(":")
        out += range(int(a), int(b or a) + 1)
    return out


def band_index(channel: int, meta: dict[str, str], band: str) -> int:
    """Readout channel (0 .. AP-1) of an original number; LF numbers follow the AP ones."""
    n_ap = int(meta.get("acqApLfSy", "384,0,1").split(",")[0])
    return channel - n_ap if band == "lf" and channel >= n_ap else channel


def _max_int(meta: dict[str, str]) -> int:
    if meta.get("imMaxInt"):
        return int(meta["imMaxInt"])
    kind = meta.get("imDatPrb_type", "0")
    return 8192 if kind in NP2_14BIT else 2048 if kind in NP2_12BIT + NXT else 512


def _gains(meta: dict[str, str], saved: list[int], band: str, binary: Path) -> np.ndarray:
    """Amplifier gain of each saved channel."""
    kind = meta.get("imDatPrb_type", "0")
    n = len(saved)
    if kind in NP2_14BIT:
        return np.full(n, float(meta.get("imChan0apGain") or 80))
    if kind in NP2_12BIT + NXT:
        return np.full(n, float(meta.get("imChan0apGain") or 100))
    table = re.findall(r"\(([^)]*)\)", meta.get("imroTbl", ""))
    column = 4 if band == "lf" else 3
    if kind in PER_FILE_GAIN and table:
        return np.full(n, float(table[0].split(",")[column]))
    entries = [e.split() for e in table[1:]]
    by_channel = {int(e[0]): float(e[column]) for e in entries if len(e) > column}
    try:
        return np.array([by_channel[band_index(c, meta, band)] for c in saved])
    except KeyError as e:
        told = meta.get("imChan0lfGain" if band == "lf" else "imChan0apGain")
        if told:
            return np.full(n, float(told))
        raise RecordingError(
            f"{binary.with_suffix('.meta')} says no gain for channel {e}; copy it again"
        ) from e


def _geometry(meta: dict[str, str], saved: list[int], binary: Path) -> tuple[tuple[float, float], ...] | None:
    """Positions from ~snsGeomMap (shank:x:y:used, x from the shank's left edge), else by part number."""
    entries = re.findall(r"\(([^)]*)\)", meta.get("snsGeomMap", ""))
    if not entries:
        return _from_part_number(binary, len(saved))
    pitch = float(entries[0].split(",")[2])
    sites = [e.split(":") for e in entries[1:]]
    xy = [(float(s[0]) * pitch + float(s[1]), float(s[2])) for s in sites]
    if len(xy) == len(saved):
        return tuple(xy)
    if max(saved) < len(xy):
        return tuple(xy[c] for c in saved)
    raise RecordingError(
        f"{binary.with_suffix('.meta')}: {len(xy)} sites for {len(saved)} channels; give a probe file"
    )


def _from_part_number(binary: Path, n: int) -> tuple[tuple[float, float], ...] | None:
    """Positions as probeinterface knows them for this probe, None if it does not."""
    try:
        import probeinterface

        probe = probeinterface.read_spikeglx(binary.with_suffix(".meta"))
        xy = np.asarray(probe.contact_positions, np.float64)[np.argsort(probe.device_channel_indices)]
    except (ImportError, KeyError, ValueError, IndexError, AssertionError, AttributeError, TypeError):
        return None
    return tuple((float(x), float(y)) for x, y in xy) if len(xy) == n else None
