"""Lab Streaming Layer outlets: spikes, rates and markers of every stream, on LSL's clock. Reads the public protocol only.

    spiked lsl --port 5572          (needs the extra `lsl`, pylsl; [lsl] enabled = true starts it with the daemon)

| outlet                   | type    | channels                                                  | when                       |
|--------------------------|---------|-----------------------------------------------------------|----------------------------|
| <rig>-<stream>-spikes    | Spikes  | unit, electrode, amplitude_uv, score, sample; double      | every spike, irregular     |
| <rig>-<stream>-rates     | Rates   | one per unit, Hz; float. Another outlet when units change | once a second              |
| <rig>-<stream>-markers   | Markers | text: stimuli, TTL edges, commands sent, gaps, events     | when they happen           |

Time stamps are those of the samples: the line that the daemon fits through sample numbers and their arrival (health:
`clock`) turns them into this computer's monotonic clock, which is LSL's. Until it knows one, in a stream's first
seconds, the arrival of the newest sample counts. Arrival is later than the sample was taken by what the device and its
program need, which nobody here can know. Since monotonic clocks compare within a computer only, the bridge runs on the
rig's; LSL synchronises the clocks of its receivers with it. LSL knows no keys: whoever is on the network can listen.
"""

from __future__ import annotations

import argparse
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from spiked_client.control import CONTROL_PORT
from spiked_client.errors import ClientError
from spiked_client.order import Batch
from spiked_client.protocol import LEDGER, OUTCOMES, newest
from spiked_client.subscribe import SyncClient

TOPICS = ("spikes", "gaps", "stim", "ledger", "health", "session")
SPIKE_CHANNELS = (
    ("unit", ""),
    ("electrode", ""),
    ("amplitude", "microvolts"),
    ("score", ""),
    ("sample", "samples"),
)
AGREE_S = 0.5  # a clock line that differs by more from the arrival belongs to another session
RETRY_S = 1.0
SENT, FAILED = OUTCOMES.index("sent"), OUTCOMES.index("failed")
KINDS = {1: "ttl", 2: "stim", 3: "device spike", 4: "message"}


class Clock:
    """Sample numbers of one stream as seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._line: tuple[int, float, float] | None = None  # sample, seconds, samples per second
        self._arrival: tuple[int, float] | None = None
        self.fs_hz = 20_000.0

    def told(self, stream: dict[str, Any]) -> None:
        """What a health message says of the stream."""
        fs = stream.get("fs_hz")
        self.fs_hz = float(fs) if isinstance(fs, int | float) and fs > 0 else self.fs_hz
        processes = stream.get("processes")
        acquire = processes.get("acquire") if isinstance(processes, dict) else None
        line = acquire.get("clock") if isinstance(acquire, dict) else None
        if isinstance(line, dict) and all(
            isinstance(line.get(k), int | float) for k in ("sample", "t_ns", "fs_hz")
        ):
            self._line = (int(line["sample"]), line["t_ns"] / 1e9, float(line["fs_hz"]))

    def arrived(self, stop: int, ns: int) -> None:
        """The samples before `stop` were there at `ns`."""
        self._arrival = (stop, ns / 1e9)

    def seconds(self, samples: np.ndarray) -> np.ndarray:
        """Monotonic seconds at which they were taken; now where nothing is known of the stream yet."""
        now = time.monotonic()
        stop, at = self._arrival or (int(samples[-1]) if len(samples) else 0, now)
        if self._line is not None:
            sample, t, fs = self._line
            if abs(t + (stop - sample) / fs - at) < AGREE_S:
                return t + (samples - sample) / fs
        return at + (samples - stop) / self.fs_hz


class Outlets:
    """The LSL outlets of one stream; made when there is something to send. `offset_s` is LSL's clock less the monotonic one."""

    def __init__(self, rig: str, stream: str, offset_s: float) -> None:
        self.clock, self._offset_s = Clock(), offset_s
        self._name = f"{rig}-{stream}"
        self._told: dict[str, Any] = {"rig": rig, "stream": stream}
        self._spikes = self._make("spikes", "Spikes", SPIKE_CHANNELS, "double64")
        self._markers = self._make("markers", "Markers", (("marker", ""),), "string")
        self._rates: Any = None
        self._units: tuple[str, ...] = ()
        self._sent: set[int] = set()

    def _make(self, what: str, kind: str, channels: Iterable[tuple[str, str]], form: str) -> Any:
        import pylsl

        listed = list(channels)
        # With one id for all its lives, inlets find an outlet again after a restart of the bridge.
        source = f"spiked-{self._name}-{what}" + (
            "" if what != "rates" else "-" + "-".join(n for n, _ in listed)
        )
        info = pylsl.StreamInfo(
            f"{self._name}-{what}", kind, len(listed), pylsl.IRREGULAR_RATE, form, source[:200]
        )
        about = info.desc()
        for key, value in {"manufacturer": "spiked", **self._told}.items():
            about.append_child_value(key, value)
        tree = about.append_child("channels")
        for label, unit in listed:
            channel = tree.append_child("channel")
            channel.append_child_value("label", label)
            channel.append_child_value("unit", unit)
            channel.append_child_value("type", kind)
        return pylsl.StreamOutlet(info)

    def spikes(self, spikes: np.ndarray) -> None:
        """Records of dtype SPIKE, unsorted ones left out."""
        spikes = spikes[spikes["unit"] >= 0]
        if len(spikes):
            columns = [
                spikes[k].astype(float) for k in ("unit", "channel", "amplitude_uv", "score", "sample")
            ]
            stamps = self.clock.seconds(spikes["sample"]) + self._offset_s
            self._spikes.push_chunk(np.column_stack(columns), stamps.tolist())

    def rates(self, rates_hz: dict[Any, Any]) -> None:
        """Unit -> Hz of this second."""
        units = tuple(sorted((str(u) for u in rates_hz), key=lambda u: (len(u), u)))
        if not units:
            return
        if units != self._units:
            self._units, self._rates = units, None  # the old outlet ends with this
            self._rates = self._make("rates", "Rates", ((u, "hertz") for u in units), "float32")
        by_name = {str(u): hz for u, hz in rates_hz.items()}
        self._rates.push_sample([float(by_name[u]) for u in units])

    def mark(self, text: str, sample: int | None = None, ns: int | None = None) -> None:
        """A marker at a sample, or at a monotonic time."""
        at = (
            self.clock.seconds(np.array([sample]))[0]
            if sample is not None
            else (ns or time.monotonic_ns()) / 1e9
        )
        self._markers.push_sample([text], float(at) + self._offset_s)

    def ledger(self, rows: np.ndarray) -> None:
        """Commands that were sent, each once, when they were sent."""
        rows = newest(rows)  # what failed before it left was told as sent in the same message
        for row in rows[np.isin(rows["outcome"], (SENT, FAILED)) & (rows["sent_ns"] > 0)]:
            number = int(row["number"])
            if number not in self._sent:
                self._sent.add(number)
                rule = row["rule"].decode("utf-8", "replace") or "client"
                text = f"sent number={number} rule={rule} pattern={row['pattern'].decode('utf-8', 'replace')}"
                self.mark(text, ns=int(row["sent_ns"]))


class Bridge:
    """From batches to outlets. `counters`: spikes, markers, rates."""

    def __init__(self) -> None:
        import pylsl

        ends = [(pylsl.local_clock() - time.monotonic()) for _ in range(9)]
        self._offset_s = float(np.median(ends))
        self.counters: Counter[str] = Counter()
        self._rig, self._session = "", ""
        self._outlets: dict[str, Outlets] = {}

    def take(self, batch: Batch) -> None:
        """One message of any topic."""
        kind = batch.message.kind
        if kind == "health":
            self._health(batch.header)
        elif kind == "session":
            self._event(batch)
        elif self._rig and batch.stream:
            self._live(self._of(batch.stream), batch)

    def _of(self, stream: str) -> Outlets:
        if stream not in self._outlets:
            self._outlets[stream] = Outlets(self._rig, stream, self._offset_s)
        return self._outlets[stream]

    def _health(self, status: dict[str, Any]) -> None:
        self._rig = str(status.get("rig") or "spiked")
        told = status.get("streams")
        streams = (
            {str(n): s for n, s in told.items() if isinstance(s, dict)} if isinstance(told, dict) else {}
        )
        if (session := str(status.get("session") or "")) != self._session:
            self._session = session
            self._outlets = {n: o for n, o in self._outlets.items() if n in streams}
            for outlets in self._outlets.values():
                outlets.clock, outlets._sent = Clock(), set()
        for name, s in streams.items():
            outlets = self._of(name)
            outlets.clock.told(s)
            processes = s.get("processes")
            live = processes.get("live") if isinstance(processes, dict) else None
            rates = live.get("rates_hz") if isinstance(live, dict) else None
            if isinstance(rates, dict) and status.get("state") == "recording":
                outlets.rates({u: hz for u, hz in rates.items() if isinstance(hz, int | float)})
                self.counters["rates"] += 1

    def _live(self, outlets: Outlets, batch: Batch) -> None:
        kind = batch.message.kind
        if kind == "spikes":
            arrival = batch.stamps.get("arrival")
            if isinstance(arrival, int) and isinstance(batch.stop, int) and not batch.replayed:
                outlets.clock.arrived(batch.stop, arrival)
            outlets.spikes(batch.spikes)
            self.counters["spikes"] += len(batch.spikes)
        elif kind == "ledger":
            rows = batch.message.arrays.get("ledger")
            outlets.ledger(rows if rows is not None else np.zeros(0, LEDGER))
        elif kind == "gaps":
            for gap in batch.gaps:
                self._mark(outlets, f"gap samples={int(gap['stop'] - gap['start'])}", int(gap["start"]))
        elif kind == "stim":
            for s in batch.stims:
                name = KINDS.get(int(s["kind"]), str(s["kind"]))
                self._mark(
                    outlets,
                    f"{name} line={s['line']} state={s['state']} value={s['value']:g}",
                    int(s["sample"]),
                )

    def _mark(self, outlets: Outlets, text: str, sample: int | None = None, ns: int | None = None) -> None:
        outlets.mark(f"{text} sample={sample}" if sample is not None else text, sample, ns)
        self.counters["markers"] += 1

    def _event(self, batch: Batch) -> None:
        """States and calibrations, to the streams that they are about."""
        h = batch.header
        event, sent = h.get("event"), h.get("sent_ns")
        if event not in ("state", "calibrated"):
            return
        text = f"state {h.get('state')}" if event == "state" else f"calibrated units={h.get('units')}"
        for name, outlets in self._outlets.items():
            if h.get("stream") in (None, name):
                self._mark(outlets, text, ns=sent if isinstance(sent, int) else None)


def is_here(host: str) -> bool:
    """Whether that is an address of this computer."""
    try:
        for family, kind, proto, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, proto) as s:
                s.bind(address)
                return True
    except OSError:
        return False
    return False


def run(host: str, port: int, keys: str | None, stop: threading.Event) -> None:
    """Until `stop`; follows a daemon that goes and comes back. Raises ClientError where it cannot work at all."""
    if not is_here(host):
        raise ClientError(
            f"the LSL bridge needs the clock of the rig's computer; run `spiked lsl` there, not for {host}"
        )
    try:
        import pylsl  # noqa: F401
    except (ImportError, RuntimeError) as e:  # RuntimeError: liblsl itself is missing
        raise ClientError(
            f"spiked lsl needs pylsl ({str(e).splitlines()[0]}); pip install 'spiked[lsl]'"
        ) from e
    bridge, complained = Bridge(), ""
    while not stop.is_set():
        try:
            with SyncClient(host, port, wait_s=5.0, keys=keys) as client, client.messages(TOPICS) as messages:
                complained = ""
                while not stop.is_set():
                    batch = messages.get(0.25)
                    if batch is not None:
                        bridge.take(batch)
        except ClientError as e:
            if str(e) != complained:
                sys.stderr.write(f"lsl: {e}\n")
                complained = str(e)
            stop.wait(RETRY_S)


def main(argv: list[str] | None = None) -> int:
    """Command line of the bridge."""
    parser = argparse.ArgumentParser(
        prog="spiked lsl", description="Lab Streaming Layer outlets of a spiked daemon."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=CONTROL_PORT, help="control port (default %(default)s)")
    parser.add_argument("--keys", default=None, help="key file for a daemon that uses keys")
    parser.add_argument("--parent", action="store_true", help="end when standard input is closed")
    args = parser.parse_args(argv)
    stop = threading.Event()
    if args.parent:

        def until_closed() -> None:
            sys.stdin.buffer.read()
            stop.set()

        threading.Thread(target=until_closed, name="parent", daemon=True).start()
    try:
        run(args.host, args.port, args.keys, stop)
    except ClientError as e:
        sys.stderr.write(f"{e}\n")
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
