"""One stream as the pages see it: frames of spikes, their last seconds, rates, units, gaps, stimuli and the ledger.

No sockets and no clock of its own: times are monotonic seconds, given by the caller.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Any

import numpy as np

from spiked_client import protocol
from spiked_client.order import Batch
from spiked_client.protocol import BLIND, BLIND_REASONS, GAP_REASONS, OUTCOMES, REASONS, SPIKE, UNIT
from spiked_client.web.frames import Gathered, as_old

WINDOW_S = 5.0  # of the rates
HISTORY_S, HISTORY_BYTES = 12.0, 1 << 20  # frames for a page that comes now
KEPT_ROWS = 500  # gaps, stimuli and decisions, each
SNIPPETS = 24  # spikes that one picture of a unit is made of
STIMULUS = 2  # the kind of a STIM record that is one
QUIET_S = 0.1  # after a stimulus: what was received then is its artifact too


class Stream:
    """A stream of one session; `number` is what its frames are marked with."""

    def __init__(self, name: str, session: str, number: int) -> None:
        self.name, self.session, self.number = name, session, number
        self.about: dict[str, Any] = {}  # as the control port describes it
        self.units = np.zeros(0, UNIT)
        self.units_about: dict[str, Any] = {}
        self.gaps: deque[list[Any]] = deque(maxlen=KEPT_ROWS)
        self.stims: deque[list[Any]] = deque(maxlen=KEPT_ROWS)
        self.ledger: dict[int, list[Any]] = {}
        self._stimulated: deque[int] = deque(maxlen=KEPT_ROWS)  # samples of stimuli, whoever gave them
        self.heard_s = 0.0
        self.lost = 0
        self._now = Gathered()
        self._stop = 0
        self._history: deque[tuple[float, bytes, np.ndarray]] = deque()
        self._history_bytes = 0
        self._second: list[np.ndarray] = []
        self._blind: deque[tuple[float, np.ndarray, int]] = deque()
        self._counts: deque[tuple[float, np.ndarray, np.ndarray, np.ndarray]] = deque()
        self._counted_s = 0.0

    # ---- spikes ------------------------------------------------------------------------------------------------

    def add(self, batch: Batch, now_s: float) -> None:
        """A message of `spikes` or `mua`."""
        self.heard_s = now_s
        if batch.missed is not None:
            self._now.lost += batch.missed.count
            self.lost += batch.missed.count
        if len(batch.spikes):
            self._now.spikes.append(batch.spikes)
        if batch.message.kind != "spikes":
            return
        if len(batch.blind):
            self._now.blind.append(batch.blind)
        first, stop = batch.first, batch.stop
        if isinstance(first, int) and isinstance(stop, int):
            self._now.stop = max(stop, self._now.stop)
            self._blind.append((now_s, batch.blind, stop - first))

    def frame(self, now_s: float) -> tuple[bytes, int] | None:
        """What came since the last frame; None when nothing did."""
        if not self._now and self._now.stop <= self._stop:
            return None
        self._stop = self._now.stop
        spikes = np.concatenate(self._now.spikes) if self._now.spikes else np.zeros(0, SPIKE)
        self._second.append(spikes)
        data, n = self._now.frame(self.number)
        self._history.append((now_s, data, spikes))
        self._history_bytes += len(data)
        while self._history and (
            self._history[0][0] < now_s - HISTORY_S or self._history_bytes > HISTORY_BYTES
        ):
            self._history_bytes -= len(self._history.popleft()[1])
        return data, n

    def history(self) -> list[tuple[bytes, int]]:
        """The frames of the last seconds, oldest first, marked as old."""
        return [(as_old(data), len(spikes)) for _, data, spikes in self._history]

    def last_spikes(self, unit: int) -> list[int]:
        """Samples of the newest spikes of a unit that do not follow a stimulus, oldest first."""
        stims, quiet = np.sort(np.array(self._stimulated, np.int64)), QUIET_S * self.fs_hz
        found: list[int] = []
        for _, _, spikes in reversed(self._history):
            samples = spikes["sample"][spikes["unit"] == unit]
            if len(stims) and len(samples):
                before = stims[np.maximum(np.searchsorted(stims, samples, "right") - 1, 0)]
                samples = samples[(samples < before) | (samples - before > quiet)]
            found += samples.tolist()
            if len(found) >= SNIPPETS:
                break
        return sorted(found)[-SNIPPETS:]

    # ---- figures -----------------------------------------------------------------------------------------------

    def figures(self, now_s: float) -> dict[str, Any]:
        """Once a second: rates per unit and per electrode (unsorted detections) over the last seconds, and what was blind."""
        spikes = np.concatenate(self._second) if self._second else np.zeros(0, SPIKE)
        self._second = []
        sorted_ = spikes["unit"] >= 0
        units, counts = np.unique(spikes["unit"][sorted_], return_counts=True)
        channels = np.bincount(spikes["channel"][~sorted_], minlength=self.n_channels)
        begun = self._counted_s or now_s - 1.0
        self._counts.append((begun, units, counts, channels))
        self._counted_s = now_s
        while self._counts and self._counts[0][0] < now_s - WINDOW_S - 0.5:
            self._counts.popleft()
        while self._blind and self._blind[0][0] < now_s - WINDOW_S:
            self._blind.popleft()
        seconds = max(now_s - self._counts[0][0], 0.5)
        total: Counter[int] = Counter()
        mua = np.zeros(self.n_channels)
        for _, u, n, c in self._counts:
            total.update(dict(zip(u.tolist(), n.tolist(), strict=True)))
            mua[: len(c)] += c[: len(mua)]
        rates = {u: round(n / seconds, 2) for u, n in total.items()}
        return {
            "rates_hz": rates, "mua_hz": np.round(mua / seconds, 1).tolist(), "spikes_hz": round(sum(rates.values()), 1),
            "detections_hz": round(float(mua.sum()) / seconds, 1), "blind": round(self._blind_share(), 4),
            "age_s": round(now_s - self.heard_s, 1) if self.heard_s else None, "lost": self.lost,
        }  # fmt: skip

    def _blind_share(self) -> float:
        """Of the last seconds, the part in which spikes could not be seen; units that are not known yet do not count."""
        covered = sum(n for _, _, n in self._blind)
        if not covered:
            return 0.0
        rows = np.concatenate([b for _, b, _ in self._blind]) if self._blind else np.zeros(0, BLIND)
        rows = rows[rows["reason"] != BLIND_REASONS.index("uncalibrated")]
        weight = np.where(rows["channel"] < 0, 1.0, 1 / max(self.n_channels, 1))
        return min(float(((rows["stop"] - rows["start"]) * weight).sum()) / covered, 1.0)

    @property
    def n_channels(self) -> int:
        return len(self.about.get("channel_ids") or ())

    @property
    def fs_hz(self) -> float:
        return float(self.about.get("fs_hz") or 0.0)

    # ---- what is told seldom -----------------------------------------------------------------------------------

    def tell(self, batch: Batch) -> dict[str, Any] | None:
        """Note a message of units, gaps, stim or ledger; the JSON that pages get of it."""
        kind, arrays = batch.message.kind, batch.message.arrays
        if kind == "units" and "units" in arrays:
            self.units = arrays["units"]
            self.units_about = {
                k: batch.header.get(k) for k in ("sorter", "id_confidence", "expected", "from_sample")
            }
            return self.units_message()
        if kind == "gaps" and "gaps" in arrays:
            rows = [row for g in arrays["gaps"] if (row := _gap(g)) not in self.gaps]
            self.gaps += rows
        elif kind == "stim" and "stims" in arrays:
            given = arrays["stims"][
                arrays["stims"]["kind"] == STIMULUS
            ]  # not a camera's or the clocks' pulses
            rows = [[int(s["sample"]), int(s["kind"]), int(s["line"]), int(s["state"])] for s in given]
            rows = [row for row in rows if row not in self.stims]
            self.stims += rows
            self._stimulated += [row[0] for row in rows]
        elif kind == "ledger" and "ledger" in arrays:
            rows = [_decision(r, self.fs_hz) for r in protocol.newest(arrays["ledger"])]
            self._stimulated += [row[-1] for row in rows if row[-1] >= 0]
            for row in rows:
                self.ledger.pop(row[0], None)
                self.ledger[row[0]] = row
            while len(self.ledger) > KEPT_ROWS:
                del self.ledger[min(self.ledger)]
        else:
            return None
        if not rows:
            return None
        return {"t": kind, "stream": self.name, "rows": rows}

    def units_message(self) -> dict[str, Any]:
        """The units in use, as parallel lists."""
        u = self.units
        rows = {
            "id": u["unit"].tolist(), "channel": u["channel"].tolist(), "x": np.round(u["x_um"], 2).tolist(), "y": np.round(u["y_um"], 2).tolist(),
            "uv": np.round(u["amplitude_uv"], 1).tolist(), "hz": np.round(u["rate_hz"], 3).tolist(),
        }  # fmt: skip
        return {"t": "units", "stream": self.name, **rows, **self.units_about}

    def all_messages(self) -> list[dict[str, Any]]:
        """For a page that comes now."""
        lists = {"gaps": list(self.gaps), "stim": list(self.stims), "ledger": list(self.ledger.values())}
        told = [{"t": k, "stream": self.name, "rows": rows} for k, rows in lists.items() if rows]
        return [self.units_message(), *told] if len(self.units) else told

    def around(self, channel: int, most: int) -> list[int]:
        """The electrodes nearest to one, itself first."""
        positions = np.asarray(self.about.get("positions_um") or [], float).reshape(-1, 2)
        if not 0 <= channel < len(positions):
            return []
        far = np.hypot(*(positions - positions[channel]).T)
        return [int(c) for c in np.argsort(far, kind="stable")[:most]]


def _gap(g: Any) -> list[Any]:
    reason = GAP_REASONS[g["reason"]] if 0 <= g["reason"] < len(GAP_REASONS) else "?"
    return [int(g["start"]), int(g["stop"]), int(g["n_channels"]), reason]


def _name(names: tuple[str, ...], index: int) -> str:
    return names[index] if 0 <= index < len(names) else "?"


def _decision(r: Any, fs_hz: float) -> list[Any]:
    """[number, rule, pattern, outcome, reason, sample, decided ms, sent ms, acknowledged ms, artifact ms, uA, us, units,
    sent sample]: the times since the trough's arrival (a client's: since it was decided), None where it did not come to that."""
    zero = int(r["trigger_ns"]) or int(r["decided_ns"])
    times = [
        round((int(r[k]) - zero) / 1e6, 3) if r[k] else None for k in ("decided_ns", "sent_ns", "ack_ns")
    ]
    seen = None
    if r["artifact_sample"] >= 0 and r["sent_sample"] >= 0 and fs_hz:
        seen = round(1000 * int(r["artifact_sample"] - r["sent_sample"]) / fs_hz, 3)
    size = [round(float(r[k]), 3) if math.isfinite(r[k]) else None for k in ("amplitude_ua", "width_us")]
    units = r["trigger_unit"][: max(min(int(r["n_triggers"]), protocol.TRIGGERS), 0)].tolist()
    text = [bytes(r[k]).decode("utf-8", "replace") for k in ("rule", "pattern")]
    names = [_name(OUTCOMES, int(r["outcome"])), _name(REASONS, int(r["reason"]))]
    return [
        int(r["number"]),
        *text,
        *names,
        int(r["sample"]),
        *times,
        seen,
        *size,
        units,
        int(r["sent_sample"]),
    ]
