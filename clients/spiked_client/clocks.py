"""Sample numbers of one stream as those of another, with the error: live, or from a session folder.

    with SyncClient() as client:                                clocks = Clocks.load(session / "clocks.json")
        clocks = Clocks(client.control.request("clocks"))       there = clocks.convert(samples, "probeB", "probeA")
        for batch in client.messages(("spikes", "clock")):
            if clocks.take(batch.message):
                continue
            there = clocks.convert(batch.spikes["sample"], batch.stream, "probeA")

One object may be fed from session to session: what belonged to the last one is forgotten. Between two known instants the mapping is a straight line, beyond them the last rate goes on. Where a clock jumped, a
new segment begins and nothing is carried across.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from spiked_client.errors import UnknownStream
from spiked_client.protocol import Message

OLD_NEWS_S = 10.0  # a message may be so much older than the answer with which this began


@dataclass
class _Segment:
    start: float  # first sample of it
    sample: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    error_ms: list[float] = field(default_factory=list)

    def add(self, sample: float, reference: float, ratio: float, error_ms: float) -> None:
        if self.sample and sample <= self.sample[-1]:
            return
        for values, x in zip(
            (self.sample, self.reference, self.ratio, self.error_ms),
            (sample, reference, ratio, error_ms),
            strict=True,
        ):
            values.append(float(x))

    def forward(self, s: np.ndarray) -> np.ndarray:
        """Samples -> reference samples."""
        x, y = np.array(self.sample), np.array(self.reference)
        out = np.interp(s, x, y)
        out = np.where(s < x[0], y[0] + (s - x[0]) * self.ratio[0], out)
        return np.where(s > x[-1], y[-1] + (s - x[-1]) * self.ratio[-1], out)

    def back(self, r: np.ndarray) -> np.ndarray:
        """Reference samples -> samples."""
        x, y = np.array(self.sample), np.array(self.reference)
        out = np.interp(r, y, x)
        out = np.where(r < y[0], x[0] + (r - y[0]) / self.ratio[0], out)
        return np.where(r > y[-1], x[-1] + (r - y[-1]) / self.ratio[-1], out)


class Clocks:
    """`told` is the control port's answer to "clocks", or the content of a session's clocks.json."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.reference: str | None = told.get("reference")
        self.streams: dict[
            str, dict[str, Any]
        ] = {}  # the newest figures of each: ppm, error_ms, method, n, steps
        self._segments: dict[str, dict[int, _Segment]] = {}
        for name, s in (told.get("streams") or {}).items():
            self.streams[name] = {k: v for k, v in s.items() if k not in ("table", "starts")}
            mine = self._segments[name] = {
                int(n): _Segment(float(start)) for n, start in s.get("starts") or ()
            }
            for sample, reference, ratio, error_ms, _method, segment in s.get("table") or ():
                mine.setdefault(int(segment), _Segment(float(sample))).add(sample, reference, ratio, error_ms)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """From clocks.json of a session folder."""
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))

    def take(self, message: Message) -> bool:
        """Take in a message of the topic `clock`; False for any other."""
        if message.topic != "clock":
            return False
        self.reference = message.header.get("reference")
        for name, s in (message.header.get("streams") or {}).items():
            self.streams[name] = dict(s)
            if "reference_sample" not in s or name == self.reference:
                continue
            if self._is_another_session(name, s):
                self._segments.clear()
            mine = self._segments.setdefault(name, {})
            segment = mine.setdefault(int(s["segment"]), _Segment(float(s["from_sample"])))
            segment.add(s["sample"], s["reference_sample"], s["ratio"], s["error_ms"])
        return True

    def _is_another_session(self, name: str, s: dict[str, Any]) -> bool:
        """Whether these figures of a stream cannot follow what is known of it: its samples and segments only ever go on."""
        mine = self._segments.get(name)
        if not mine or not any(known.sample for known in mine.values()):
            return False
        known = mine.get(int(s["segment"]))
        if known is None:
            return int(s["segment"]) < max(mine)
        back = known.sample[-1] - float(s["sample"]) if known.sample else 0.0
        return known.start != float(s["from_sample"]) or back > OLD_NEWS_S * float(s.get("fs_hz") or 30_000.0)

    def known(self, stream: str) -> bool:
        """Whether samples of this stream can be converted."""
        return stream == self.reference or any(s.sample for s in self._segments.get(stream, {}).values())

    def convert(self, samples: Any, stream: str, to: str) -> np.ndarray:
        """Sample numbers (fractions too) of `stream` as those of `to`, float64. Raises UnknownStream."""
        there = np.asarray(samples, float)
        if stream == to:
            return there
        if stream != self.reference:
            there = self._through(there, stream, back=False)
        return there if to == self.reference else self._through(there, to, back=True)

    def _through(self, x: np.ndarray, stream: str, back: bool) -> np.ndarray:
        segments = sorted(
            (s for s in self._segments.get(stream, {}).values() if s.sample), key=lambda s: s.start
        )
        if not segments:
            raise UnknownStream(
                f"the clock of {stream!r} is not known; there are {', '.join(self.streams) or 'none yet'}"
            )
        starts = [float(s.forward(np.array([s.start]))[0]) if back else s.start for s in segments]
        which = np.clip(np.searchsorted(starts, x, side="right") - 1, 0, None)
        out = np.empty_like(x)
        for k, s in enumerate(segments):
            mine = which == k
            out[mine] = s.back(x[mine]) if back else s.forward(x[mine])
        return out

    def error_ms(self, stream: str) -> float | None:
        """One standard deviation of where the newest samples of this stream lie in the reference stream."""
        return 0.0 if stream == self.reference else self.streams.get(stream, {}).get("error_ms")
