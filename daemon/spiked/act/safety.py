"""What every stimulation command must pass, whoever asks for it. Time is monotonic ns, given by the caller."""

from __future__ import annotations

from collections import deque
from typing import Any

from pydantic import ValidationError

from spiked.config import Act
from spiked.errors import SpikedError

SECOND_NS = 1_000_000_000
LIMITS = ("max_per_s", "max_count", "lockout_ms", "max_nc_per_pulse", "max_nc_per_s")


class Safety:
    """Rate, count, lock-out and charge. `refusal` asks, `sent` and `seen` tell what happened, `take` asks and tells."""

    def __init__(self, limits: Act, count: int = 0) -> None:
        self.limits, self.count = limits, count
        self._recent: deque[tuple[int, float]] = deque()  # (ns, nC) of the last second
        self._charge = 0.0
        self._last_ns: int | None = None

    def refusal(self, now_ns: int, charge_nc: float | None, pulses: int = 1) -> str:
        """Why a stimulus of so many pulses, each with this charge per phase, may not go out now; empty: it may."""
        limits = self.limits
        self._forget(now_ns)
        if self.count >= limits.max_count:
            return "count"
        if self._last_ns is not None and now_ns - self._last_ns < limits.lockout_ms * 1e6:
            return "lockout"
        if len(self._recent) >= limits.max_per_s:
            return "rate"
        if charge_nc is None:
            return ""
        if limits.max_nc_per_pulse is not None and charge_nc > limits.max_nc_per_pulse:
            return "pulse charge"
        if limits.max_nc_per_s is not None and self._charge + pulses * charge_nc > limits.max_nc_per_s:
            return "charge rate"
        return ""

    def sent(self, now_ns: int, charge_nc: float | None, pulses: int = 1) -> None:
        """A command goes out now."""
        charge = (charge_nc or 0.0) * pulses
        self._recent.append((now_ns, charge))
        self._charge += charge
        self.count += 1
        self._last_ns = now_ns

    def take(self, now_ns: int, charge_nc: float | None, pulses: int = 1) -> str:
        """`refusal`, and `sent` when there is none, in one step."""
        refusal = self.refusal(now_ns, charge_nc, pulses)
        if not refusal:
            self.sent(now_ns, charge_nc, pulses)
        return refusal

    def seen(self, at_ns: int) -> None:
        """A stimulus happened at this time, whoever gave it."""
        self._last_ns = at_ns if self._last_ns is None else max(self._last_ns, at_ns)

    def _forget(self, now_ns: int) -> None:
        while self._recent and self._recent[0][0] <= now_ns - SECOND_NS:
            self._charge -= self._recent.popleft()[1]
        if not self._recent:
            self._charge = 0.0

    def set_limits(self, changes: dict[str, Any], armed: bool) -> None:
        """Change some of LIMITS. Raises SpikedError, one line: unknown, wrong, or raised while armed."""
        unknown = sorted(set(changes) - set(LIMITS))
        if unknown:
            raise SpikedError(f"no limit {unknown[0][:40]!r}; there are {', '.join(LIMITS)}")
        try:
            new = Act.model_validate({**self.limits.model_dump(), **changes})
        except ValidationError as e:
            first = e.errors()[0]
            raise SpikedError(f"limit {first['loc'][0]} = {first['input']!r}: {first['msg']}") from e
        raised = [name for name in changes if _looser(name, self.limits, new)]
        if armed and raised:
            raise SpikedError(f"{', '.join(raised)} cannot be raised while armed; disarm first")
        self.limits = new

    def told(self) -> dict[str, Any]:
        """The limits, and how much of them is used."""
        return {**{name: getattr(self.limits, name) for name in LIMITS}, "count": self.count}


def _looser(name: str, old: Act, new: Act) -> bool:
    a, b = getattr(old, name), getattr(new, name)
    if name == "lockout_ms":
        return bool(b < a)
    return a is not None and (b is None or b > a)
