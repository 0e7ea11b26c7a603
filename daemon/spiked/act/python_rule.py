"""A rule written in Python by the experimenter, called with every batch of spikes under a time budget."""

from __future__ import annotations

import importlib
import importlib.util
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spiked.act.rules import Firing
from spiked.config import Trigger
from spiked.errors import ConfigError
from spiked_client.protocol import TRIGGERS

PATIENCE = 20  # budgets after which a call is cut off
LEAST_PATIENCE_S = 0.02
STRIKES = 5  # overruns or errors in a row that suspend the rule

Decide = Callable[[np.ndarray], Any]


class Overdue(BaseException):
    """Raised inside a call that is cut off; not an Exception, so that the rule does not swallow it."""


def load(call: str) -> Decide:
    """The function that `module:function` or `path/to/file.py:function` names. Raises ConfigError."""
    where, _, name = call.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location("spiked_rule", where)
            if spec is None or spec.loader is None:
                raise ConfigError(f"trigger call {call}: {where} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        found = getattr(module, name)
    except Exception as e:
        raise ConfigError(f"trigger call {call} cannot be loaded: {type(e).__name__}: {e}; correct it") from e
    if not callable(found):
        raise ConfigError(f"trigger call {call}: {name} is not a function")
    return found


class PythonRule:
    """`function(spikes)` gets SPIKE records, read only, and returns None, True, False, or the sample numbers to decide at.

    True means the newest spike's. Anything else, and a sample number after the newest, counts as an error. A call longer than `budget_ms` counts as an overrun; one that takes twenty times as long is cut
    off. After five overruns or errors in a row the rule is suspended, and `told` says so, once.

    `counters`: calls, overruns, errors, suspended.
    """

    def __init__(self, trigger: Trigger, fs_hz: float, tell: Callable[[str], None]) -> None:
        self.trigger, self._tell, self._decide = trigger, tell, load(trigger.call)
        self.counters = {"calls": 0, "overruns": 0, "errors": 0, "suspended": 0}
        self._refractory = round(trigger.refractory_ms * fs_hz / 1000)
        self._budget_ns = round(trigger.budget_ms * 1e6)
        self._patience_s = max(PATIENCE * trigger.budget_ms / 1000, LEAST_PATIENCE_S)
        self._strikes, self._last = 0, -(1 << 62)

    def resume(self, decided: Mapping[str, int]) -> None:
        """Rule -> sample of its last decision: the refractory time goes on from there."""
        self._last = max(decided.get(self.trigger.name, self._last), self._last)

    def process(self, spikes: np.ndarray) -> list[Firing]:
        """The rule's firings for a batch."""
        if self.counters["suspended"] or not len(spikes):
            return []
        self.counters["calls"] += 1
        spikes.flags.writeable, was = False, spikes.flags.writeable
        begun = time.perf_counter_ns()
        samples: list[int] = []
        try:
            samples, problem = sample_numbers(self._in_time(spikes), spikes["sample"]), ""
        except Overdue:
            problem = f"did not return within {1000 * self._patience_s:g} ms"
        except Exception as e:  # noqa: BLE001 - a rule's error must not end the live path
            problem = f"{type(e).__name__}: {e}"
            self.counters["errors"] += 1
        finally:
            spikes.flags.writeable = was
        took = time.perf_counter_ns() - begun
        if took > self._budget_ns and not problem:
            problem = f"took {took / 1e6:.2f} ms, {self.trigger.budget_ms:g} ms are allowed"
        self.counters["overruns"] += took > self._budget_ns
        self._judge(problem)
        return self._firings(samples, spikes)

    def _in_time(self, spikes: np.ndarray) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return self._decide(spikes)
        former = signal.signal(signal.SIGALRM, _cut_off)
        left, again = signal.setitimer(signal.ITIMER_REAL, self._patience_s)
        try:
            return self._decide(spikes)
        finally:
            signal.setitimer(signal.ITIMER_REAL, left, again)
            signal.signal(signal.SIGALRM, former)

    def _judge(self, problem: str) -> None:
        self._strikes = self._strikes + 1 if problem else 0
        if self._strikes >= STRIKES:
            self.counters["suspended"] = 1
            self._tell(f"trigger {self.trigger.name} is suspended: its function {problem}")

    def _firings(self, samples: list[int], spikes: np.ndarray) -> list[Firing]:
        last, found = spikes[-TRIGGERS:], []
        for sample in samples:
            if sample - self._last >= self._refractory:
                self._last = sample
                units, at = tuple(last["unit"].tolist()), tuple(last["sample"].tolist())
                found.append(Firing(self.trigger, sample, units, at))
        return found


def sample_numbers(answer: Any, known: np.ndarray) -> list[int]:
    """What a rule's answer to spikes at these samples means. Raises TypeError or ValueError, one line."""
    if answer is None:
        return []
    told = np.atleast_1d(answer)
    if told.dtype == bool:
        if np.ndim(answer):
            raise TypeError("a list of truth values; return sample numbers, such as spikes['sample'][mask]")
        return [int(known[-1])] if told[0] else []
    if told.dtype.kind not in "iuf" and told.size:
        raise TypeError(f"returned {type(answer).__name__}; return None, True, False or sample numbers")
    samples = [int(s) for s in told.ravel()]
    if any(not 0 <= s <= known.max() for s in samples):
        raise ValueError("a sample number after the newest spike, or below 0")
    return samples


def _cut_off(_signal: int, _frame: Any) -> None:
    raise Overdue
