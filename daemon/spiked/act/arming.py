"""Who armed what, and whether stimulation is stopped. Nothing is armed when a process starts.

An arming is a lease: the client renews it, and when it falls silent its rules are disarmed. The emergency stop is the file STOP in the
session folder, so that it holds for every process of the session and outlives each of them; whoever can write there can stop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spiked.errors import SpikedError

STOP = "STOP"
LEAST_LEASE_S, MOST_LEASE_S = 0.2, 60.0
MAX_LEASES = 64


@dataclass
class Lease:
    """One client's arming. `rules` None: all of them, and commands over the control port."""

    token: str
    rules: frozenset[str] | None
    seconds: float
    until_ns: int


class Arming:
    """Leases and the latch. Time is monotonic ns, given by the caller."""

    def __init__(self, session: Path) -> None:
        self._path = session / STOP
        self._leases: dict[str, Lease] = {}
        self.stops = 0  # so far, those that began before this process included
        self.stopped = ""  # why; empty: not stopped
        self.look()

    @property
    def armed(self) -> bool:
        return bool(self._leases)

    def allows(self, rule: str) -> bool:
        """Whether some lease covers the rule."""
        return bool(self.covering(rule))

    def covering(self, rule: str) -> frozenset[str]:
        """Tokens of the leases that cover the rule."""
        return frozenset(
            lease.token for lease in self._leases.values() if lease.rules is None or rule in lease.rules
        )

    def armed_rules(self, rules: Iterable[str]) -> list[str]:
        return [r for r in rules if self.allows(r)]

    def arm(self, token: str, rules: Iterable[str] | None, seconds: float, now_ns: int) -> None:
        """Begin a lease. Raises SpikedError while stopped, or for a lease that is too long or too short."""
        if self.look():
            raise SpikedError(f"stimulation was stopped ({self.stopped}); clear_stop first, then arm")
        if not LEAST_LEASE_S <= seconds <= MOST_LEASE_S:
            raise SpikedError(f"a lease lasts {LEAST_LEASE_S:g} to {MOST_LEASE_S:g} s, not {seconds:g} s")
        if len(self._leases) >= MAX_LEASES:
            raise SpikedError(f"{MAX_LEASES} clients have armed already; disarm one")
        names = None if rules is None else frozenset(rules)
        self._leases[token] = Lease(token, names, seconds, now_ns + round(seconds * 1e9))

    def renew(self, token: str, now_ns: int) -> None:
        """Raises SpikedError when the lease is over."""
        lease = self._leases.get(token)
        if lease is None or lease.until_ns <= now_ns:
            raise SpikedError("this lease is over: its rules were disarmed; arm again")
        lease.until_ns = now_ns + round(lease.seconds * 1e9)

    def holds(self, token: str) -> bool:
        return token in self._leases

    def disarm(self, token: str | None = None) -> bool:
        """End one lease, or all; whether there was one."""
        gone = list(self._leases) if token is None else [t for t in self._leases if t == token]
        for t in gone:
            del self._leases[t]
        return bool(gone)

    def expire(self, now_ns: int) -> list[Lease]:
        """End and return the leases that were not renewed in time."""
        over = [lease for lease in self._leases.values() if lease.until_ns <= now_ns]
        for lease in over:
            del self._leases[lease.token]
        return over

    def stop(self, why: str) -> None:
        """Stop now and until `clear`: everything is disarmed, in every process of the session."""
        self._latch(why)
        self.put_on_file(why)

    def put_on_file(self, why: str) -> None:
        """For every process of the session, and for the next life of this one; `look` acts on it."""
        try:
            if not self._path.exists():
                self._path.write_text(why + "\n", encoding="utf-8")
        except OSError:  # a full disk must not keep the stop from holding here
            return

    def look(self) -> bool:
        """Whether stimulation is stopped, by the file too, and where nobody can tell whether it is there."""
        if not self.stopped:
            try:
                there = self._path.exists()
            except OSError as e:  # a disk that went away
                self._latch(f"{self._path} cannot be looked for ({e.strerror})")
                return True
            if there:
                self._latch(self._reason() or f"file {STOP}")
        return bool(self.stopped)

    def _reason(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def _latch(self, why: str) -> None:
        self.stops += not self.stopped
        self.stopped = self.stopped or why
        self._leases.clear()

    def clear(self) -> None:
        """Lift the stop; nothing is armed by that. Raises SpikedError when the file cannot be removed."""
        self.look()  # a stop that nobody looked at yet was one nevertheless
        try:
            self._path.unlink(missing_ok=True)
        except OSError as e:
            raise SpikedError(f"{self._path} cannot be removed ({e.strerror}); the stop holds") from e
        self.stopped = ""
