"""One byte over a serial port: Arduino, Teensy, PulsePal, BNC boxes that show a byte as TTL lines."""

from __future__ import annotations

import termios
import time
from collections import deque
from typing import Any

from spiked.act.outputs.base import Ack, Command
from spiked.config import Output
from spiked.errors import ConfigError, SourceError

RETRY_S = 1.0
LATE_NS = 1_000_000_000  # an echo that did not come by then does not come any more


class SerialByte:
    """A command is acknowledged when the byte has left this computer, or, with `echo`, when it came back.

    A device that was unplugged is opened again once a second. Raises SpikedError when the port cannot be
    opened, or pyserial is missing.
    """

    def __init__(self, config: Output) -> None:
        self.name, self._path, self._baud, self._echo = config.name, config.address, config.baud, config.echo
        self._bytes = {p: _byte(config.name, p, v) for p, v in config.patterns.items()}
        self._timeout_ms, self._patience_ns = config.timeout_ms, round(config.timeout_ms * 1e6)
        self._open: deque[tuple[int, int, int]] = deque()  # number, byte, sent
        self._late: deque[tuple[int, int]] = deque()  # byte, given up: their echoes may still come
        self._acks: list[Ack] = []
        self._retry_at = 0.0
        try:
            import serial
        except ImportError as e:
            raise ConfigError("serial outputs need pyserial; pip install pyserial") from e
        self._serial = serial
        try:
            self._port: Any = self._opened()
        except (OSError, ValueError) as e:
            raise SourceError(
                f"output {self.name}: cannot open {self._path} ({e}); check the cable, the path, and the group that may use it"
            ) from e

    def _opened(self) -> Any:
        return self._serial.Serial(self._path, self._baud, timeout=0, write_timeout=0, exclusive=True)

    def send(self, command: Command) -> None:
        byte = self._bytes.get(command.pattern)
        if byte is None:
            self._refuse(command, f"output {self.name} knows no pattern {command.pattern!r}; not sent")
            return
        if self._port is None:
            self._refuse(command, f"{self._path} is not there; not sent")
            return
        now = time.monotonic_ns()
        try:
            written = self._port.write(bytes([byte]))
        except OSError as e:
            self._lose(str(e))
            self._refuse(command, f"{self._path} is gone ({e}); not sent")
            return
        if written == 1:
            self._open.append((command.number, byte, now))
        else:
            self._refuse(command, f"{self._path} takes no more bytes; not sent")

    def poll(self) -> list[Ack]:
        if self._port is None:
            self._reopen()
        elif self._open:
            try:
                self._look()
            except OSError as e:
                self._lose(str(e))
        acks, self._acks = self._acks, []
        return acks

    def waiting(self) -> tuple[int, ...]:
        return ()

    def withdraw(self, number: int) -> bool:
        return False

    def halt(self) -> None:
        """A byte that has left cannot be taken back; those that the computer still has can."""
        if self._port is None:
            return
        try:
            waiting = min(self._port.out_waiting, len(self._open))
            self._port.reset_output_buffer()
        except (OSError, termios.error) as e:
            self._lose(str(e))
            return
        now = time.monotonic_ns()
        for number, _, sent in [self._open.pop() for _ in range(waiting)]:
            text = f"{self._path} had not taken it, and it was taken back; the device may have acted nevertheless"
            self._acks.append(Ack(number, sent, now, False, text))

    def take_over(self) -> None:
        """There are no lines."""

    def close(self) -> None:
        if self._port is not None:
            self._port.close()
        self._port, self._retry_at = None, float("inf")

    def _look(self) -> None:
        if self._echo:
            for byte in self._port.read(4096):
                if self._was_late(byte):
                    continue
                if self._open and byte == self._open[0][1]:
                    self._done(True, f"echo {byte}")
        elif self._port.out_waiting == 0:
            while self._open:
                self._done(True, "written")
        if self._open and time.monotonic_ns() - self._open[0][2] > self._patience_ns:
            self.halt()  # a device that hangs must not get them all when it moves again
        while self._open and time.monotonic_ns() - self._open[0][2] > self._patience_ns:
            what = "did not echo" if self._echo else "did not take the byte"
            if self._echo:
                self._late.append((self._open[0][1], time.monotonic_ns()))
            self._done(
                False,
                f"{self._path} {what} within {self._timeout_ms:g} ms; the device may have acted nevertheless",
            )

    def _was_late(self, byte: int) -> bool:
        """Whether this is the echo of a command that was given up, and none of a later one."""
        while self._late and time.monotonic_ns() - self._late[0][1] > LATE_NS:
            self._late.popleft()
        found = bool(self._late) and self._late[0][0] == byte
        if found:
            self._late.popleft()
        return found

    def _lose(self, why: str) -> None:
        self._port.close()
        self._port, self._retry_at = None, time.monotonic() + RETRY_S
        self._late.clear()
        while self._open:
            self._done(False, f"{self._path} is gone ({why}); the device may have acted nevertheless")

    def _reopen(self) -> None:
        if time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + RETRY_S
        try:
            self._port = self._opened()
        except (OSError, ValueError):
            self._port = None

    def _done(self, ok: bool, text: str) -> None:
        number, _, sent = self._open.popleft()
        self._acks.append(Ack(number, sent, time.monotonic_ns(), ok, text))

    def _refuse(self, command: Command, text: str) -> None:
        self._acks.append(Ack(command.number, 0, time.monotonic_ns(), False, text))


def _byte(name: str, pattern: str, value: str | int) -> int:
    """A number from 0 to 255, or one character."""
    if isinstance(value, int) and 0 <= value <= 255:
        return value
    if isinstance(value, str) and len(value.encode()) == 1:
        return value.encode()[0]
    raise ConfigError(
        f"output {name}: {pattern} = {value!r} must be a byte, 0 to 255, or one plain character"
    )
