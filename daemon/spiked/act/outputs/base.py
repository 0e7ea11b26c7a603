"""What every output is: a place that a stimulation command goes to, and that says what became of it.

An output belongs to the live process and is used from its one thread. `send` and `poll` take microseconds and
never wait for the peer: sockets are non-blocking, and what the peer answered is noticed by the next `poll`,
which also keeps the connection alive and brings it back. Call it at every chunk.

Exactly one Ack follows every command, at most `timeout_ms` after it. A peer that does something later which
the operator must know (a line that could not be lowered again) is told with a second Ack, `ok` False, of the
same number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from spiked.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Command:
    """One stimulation that a rule or a client decided on.

    `number` counts the commands of a session from 1; `sample` is the sample number of the spike or event that
    triggered it; `electrodes` are channel indices of the stream. Amplitude and width are None where the
    pattern is prepared on the device and its charge is not known here. `decided_ns` is monotonic. `apart_ns`: not
    sooner than this after the one before it, also when both had to wait for the peer.
    """

    number: int
    rule: str
    sample: int
    pattern: str
    electrodes: tuple[int, ...]
    amplitude_ua: float | None
    width_us: float | None
    decided_ns: int
    apart_ns: int = 0


@dataclass(frozen=True, slots=True)
class Ack:
    """What became of command `number`: handed to the peer at `sent_ns`, answered (or given up) at `ack_ns`.

    Both are monotonic. `ok` False: refused, never sent, or not answered in time; `text` is then one line for
    the operator, otherwise the peer's own words. `sent_ns` 0: it was never sent, so nothing can have happened.
    """

    number: int
    sent_ns: int
    ack_ns: int
    ok: bool
    text: str


class Output(Protocol):
    """A way to a stimulator."""

    name: str

    def send(self, command: Command) -> None:
        """Hand a command over. Never blocks, never raises: what fails comes back as an Ack."""

    def poll(self) -> list[Ack]:
        """What became of earlier commands, in the order it was learned."""

    def waiting(self) -> tuple[int, ...]:
        """Numbers of the commands that have not left yet: they can still be withdrawn."""

    def withdraw(self, number: int) -> bool:
        """Give a waiting command up; no Ack follows. False: it has left."""

    def halt(self) -> None:
        """An emergency stop: lower lines that are up, and tell the peer, as far as it can be told."""

    def take_over(self) -> None:
        """A process that had this output before was killed: lower the lines that it may have left up."""

    def close(self) -> None:
        """Free the socket or port. Commands without an Ack stay without one."""


def open_output(config: Any, keys: Path | None = None) -> Output:
    """The output that an [[output]] section describes; `keys` guard those that listen.

    Raises SpikedError with one line when the address makes no sense, the port is taken, a package is missing,
    or a peer that should be there cannot be reached.
    """
    if config.kind == "zmq":
        from spiked.act.outputs.trigger import TriggerSocket

        return TriggerSocket(config, keys)
    if config.kind in ("network_events", "oe_message"):
        from spiked.act.outputs import openephys

        return openephys.open_output(config)
    if config.kind == "maxlab":
        from spiked.act.outputs import maxlab

        return maxlab.open_output(config)
    if config.kind == "spikeglx":
        from spiked.act.outputs import spikeglx

        return spikeglx.open_output(config)
    if config.kind == "serial":
        from spiked.act.outputs.serial_byte import SerialByte

        return SerialByte(config)
    raise ConfigError(f"no output of kind {config.kind!r}")
