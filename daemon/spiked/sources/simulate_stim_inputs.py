"""How commands reach a simulated device: the daemon's trigger socket, or MaxLab's text port."""

from __future__ import annotations

import argparse
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from spiked.errors import ConfigError, SourceError
from spiked.sources.simulate_stim import DEFAULT_UA, Pattern, Pulse, Stimulation, cells_made, cells_seen
from spiked.stream import StreamInfo
from spiked_client.errors import ClientError
from spiked_client.stimulator import TRIGGER_ADDRESS, Stimulator, Wanted

LOOK_S = 0.1  # how soon an input notices that it is to end
PATTERN = re.compile(r"([\w-]{1,40})=(\d+(?:,\d+)*)(?::(\d+)@([\d.]+))?")


def options(p: argparse.ArgumentParser) -> None:
    """Arguments of `spiked simulate` that close the loop."""
    p.add_argument(
        "--stim", nargs="?", const=TRIGGER_ADDRESS, metavar="ADDRESS", help="carry out what this zmq output commands"
    )  # fmt: skip
    p.add_argument("--stim-text", metavar="ADDRESS", help="answer MaxLab's `sequence_send NAME` here")
    p.add_argument(
        "--pattern", action="append", default=[], metavar="NAME=E,E[:PULSES@HZ]",
        help="a prepared sequence: channels, and how many pulses at what rate",
    )  # fmt: skip
    p.add_argument(
        "--evoked-prob", type=float, default=0.5, help="that a cell right at the electrode answers"
    )
    p.add_argument(
        "--stim-line", type=int, default=0, help="Open Ephys: TTL line that goes up at every pulse"
    )
    p.add_argument("--stim-log", type=Path, help="write every stimulus and evoked spike here (npz)")


def patterns(texts: list[str], n_channels: int) -> dict[str, Pattern]:
    """NAME=12,13:4@100 as patterns. Raises ConfigError."""
    out = {}
    for text in texts:
        found = PATTERN.fullmatch(text)
        if found is None:
            raise ConfigError(f"--pattern {text!r} must look like tetanus=12,13:4@100")
        electrodes = tuple(int(e) for e in found[2].split(","))
        if max(electrodes) >= n_channels:
            raise ConfigError(f"--pattern {text!r}: there are channels 0 to {n_channels - 1}")
        hz = float(found[4] or 100)
        if hz <= 0:
            raise ConfigError(f"--pattern {text!r}: the rate must be above 0")
        out[found[1]] = Pattern(electrodes, int(found[3] or 1), hz)
    return out


def make(args: argparse.Namespace, info: StreamInfo, recording: Any) -> Inputs | None:
    """The inputs that the arguments ask for, not yet started; `recording` is the synthetic or the stored one."""
    if not (args.stim or args.stim_text):
        return None
    if args.speed <= 0:
        raise ConfigError("a loop closes in real time only; leave --speed at 1")
    cells = cells_made(recording) if args.recording is None else cells_seen(recording)
    stimulation = Stimulation(info, cells, args.evoked_prob, args.seed, args.stim_line)
    return Inputs(stimulation, patterns(args.pattern, info.n_channels), args.stim, args.stim_text)


class Inputs:
    """The threads that receive; `with` starts and ends them. Raises SourceError when an address is taken."""

    def __init__(
        self, stimulation: Stimulation, known: dict[str, Pattern], trigger: str | None, text: str | None
    ) -> None:
        self.stimulation, self.known = stimulation, known
        self.errors: list[str] = []
        self._stop, self._threads = threading.Event(), list[threading.Thread]()
        self._addresses = (trigger, text)
        for pattern in known.values():
            stimulation.shapes(Pulse(pattern, 0))

    def __enter__(self) -> Inputs:
        trigger, text = self._addresses
        if text is not None:
            self._start(self._text, _bound(text))
        if trigger is not None:
            self._start(self._trigger, trigger)
        return self

    def _start(self, way: Callable[[Any], None], what: Any) -> None:
        self._threads.append(threading.Thread(target=way, args=(what,), daemon=True))
        self._threads[-1].start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for t in self._threads:
            t.join(5)

    def _trigger(self, address: str) -> None:
        with Stimulator(address, "spiked simulate") as stimulator:
            while not self._stop.is_set():
                try:
                    wanted = stimulator.receive(LOOK_S)
                except ClientError as e:
                    self.errors.append(str(e))
                    return
                if wanted is not None:
                    stimulator.answer(wanted, *self._carry_out(wanted))

    def _carry_out(self, w: Wanted) -> tuple[bool, str]:
        known = self.known.get(w.pattern, Pattern(w.electrodes))
        if not known.electrodes:
            return False, f"no pattern {w.pattern!r}, and no electrodes were given"
        if max(known.electrodes) >= self.stimulation.info.n_channels or min(known.electrodes) < 0:
            return False, f"there are channels 0 to {self.stimulation.info.n_channels - 1}"
        amplitude = DEFAULT_UA if w.amplitude_ua is None else w.amplitude_ua
        self.stimulation.fire(Pulse(known, w.received_ns, w.number, w.sample, w.decided_ns, amplitude))
        return True, ""

    def _text(self, socket: Any) -> None:
        while not self._stop.is_set():
            if socket.poll(round(1000 * LOOK_S)):
                text = socket.recv()
                socket.send(self._sequence(text.decode("utf-8", "replace"), time.monotonic_ns()).encode())
        socket.close(0)
        socket.context.term()

    def _sequence(self, text: str, received_ns: int) -> str:
        verb, _, name = text.strip().partition(" ")
        if verb != "sequence_send" or name not in self.known:
            return f"Error: unknown {'sequence ' + name if verb == 'sequence_send' else 'command ' + verb}"
        self.stimulation.fire(Pulse(self.known[name], received_ns))
        return "OK"


def _bound(address: str) -> Any:
    """A REP socket at this address. Raises SourceError when that is taken."""
    context = zmq.Context()
    socket = context.socket(zmq.REP)
    try:
        socket.bind(address)
    except zmq.ZMQError as e:
        socket.close(0)
        context.term()
        raise SourceError(f"cannot answer on {address} ({e}); choose another port") from e
    return socket
