"""The closed loop inside the live process: its engine, the operations that clients ask for, and what is told of it."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from spiked import config as configuration
from spiked.act.arming import Arming
from spiked.act.engine import Engine
from spiked.act.ledger import Ledger
from spiked.act.outputs.base import Output, open_output
from spiked.act.rules import UnitFacts
from spiked.act.safety import LIMITS, Safety
from spiked.act.shared import SharedSafety, account
from spiked.errors import SpikedError
from spiked.live.pipeline import LivePipeline, LiveResult, Units
from spiked.processes.link import Link
from spiked.publish.zmq_pub import Publisher
from spiked.stream import Chunk, EventKind, StreamInfo
from spiked.templates.library import Templates

log = logging.getLogger(__name__)
ALWAYS = (
    "stop_stimulation",
    "disarm",
    "stimulate",
)  # when nobody waits for an answer any more; the last is refused, in the ledger
MOST_PATTERNS = 256  # with an artifact template of their own; the others share one


def facts_of(units: Units) -> UnitFacts:
    """What the rules need to know of the sorter's units."""
    ptr, channel, accuracy = units.ptr, np.zeros(0, np.int64), [0.0] * len(units)
    if isinstance(units, Templates):
        channel, accuracy = units.channel, units.expected.get("templates", {}).get("accuracy", accuracy)
    else:
        channel = units.electrode
    electrodes = tuple(channel[a:b].astype(np.int64) for a, b in pairwise(ptr))
    ids = units.unit_ids.astype(np.int64)
    return UnitFacts(ids, electrodes, np.asarray(units.id_confidence), np.asarray(accuracy))


class Acting:
    """Sits between the pipeline and the outputs of one stream. `take` after every chunk, `poll` in every turn of the loop."""

    def __init__(
        self, config: configuration.Config, info: StreamInfo, session: Path, link: Link, publisher: Publisher,
        pipeline: LivePipeline, life: int,
    ) -> None:  # fmt: skip
        self.config, self.info, self.link, self.publisher, self.pipeline = (
            config,
            info,
            link,
            publisher,
            pipeline,
        )
        self._topic = f"ledger.{info.name}"
        self._patterns: dict[str, int] = {}
        self._orphaned = False
        self._absent: dict[str, str] = {}
        self._changed_path = session / f"{info.name}.act.json"
        triggers, limits = self._as_changed()
        ledger = Ledger(session, info.name)
        self.engine = Engine(
            triggers, limits, info.fs_hz, info.n_channels, self._open_outputs(),
            ledger, Arming(session), self._tell, self._expected, self._safety(session, ledger, limits),
        )  # fmt: skip
        if pipeline.units is not None:
            self.engine.use(facts_of(pipeline.units))
        self._ops: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
            "arm": self._arm, "renew": self._renew, "disarm": self._disarm, "triggers": self._triggers,
            "set_trigger": self._set_trigger, "remove_trigger": self._remove_trigger, "set_limits": self._set_limits,
            "stop_stimulation": self._stop, "clear_stop": self._clear, "stimulate": self._stimulate,
        }  # fmt: skip
        signal.signal(signal.SIGUSR2, self._signalled)
        if life:
            for output in self.engine.outputs.values():
                output.take_over()
            self._tell("warning", "the live process was restarted: nothing is armed")

    def _safety(self, session: Path, ledger: Ledger, limits: configuration.Act) -> Safety | None:
        """The limits hold for the session: for all its streams together, and for every life of their processes."""
        if not self.config.output:
            return None
        path = account(self.config.rig.runtime, os.getppid(), session.name)
        return SharedSafety(path, limits, ledger.sent)

    def _as_changed(self) -> tuple[tuple[configuration.Trigger, ...], configuration.Act]:
        """Rules and limits: the configured ones, or what clients made of them in an earlier life of this process."""
        try:
            d = json.loads(self._changed_path.read_text(encoding="utf-8"))
            triggers = tuple(configuration.Trigger.model_validate(t) for t in d["triggers"])
            return triggers, configuration.Act.model_validate({**self.config.act.model_dump(), **d["limits"]})
        except FileNotFoundError:
            return self.config.triggers_of(self.info.name), self.config.act
        except (OSError, ValueError, KeyError, TypeError) as e:  # the configured limits may be looser
            raise SpikedError(
                f"{self._changed_path} cannot be read ({type(e).__name__}); remove it to return to the configured rules and limits"
            ) from e

    def _keep_changes(self) -> None:
        """What clients changed outlives this process."""
        limits = {name: getattr(self.engine.safety.limits, name) for name in LIMITS}
        d = {"triggers": [t.model_dump(mode="json") for t in self.engine.triggers], "limits": limits}
        new = self._changed_path.with_name(self._changed_path.name + ".new")
        try:
            new.write_text(json.dumps(d), encoding="utf-8")
            new.replace(self._changed_path)
        except OSError as e:
            text = f"{self._changed_path} cannot be written ({e.strerror}): this change is lost when the live process is restarted"
            self._tell("error", text)

    def _open_outputs(self) -> dict[str, Output]:
        """A stimulator that is not there must not cost the sorting: its triggers cannot be armed."""
        found: dict[str, Output] = {}
        for o in self.config.outputs_of(self.info.name):
            try:
                found[o.name] = open_output(o, self.config.publish.keys)
            except SpikedError as e:
                self._absent[o.name] = str(e)
                self.link.tell(
                    "log", level="error", text=f"{e}; its triggers cannot be armed in this session"
                )
        return found

    # ---- in every chunk ----------------------------------------------------------------------------------------

    def take(self, chunk: Chunk, result: LiveResult) -> None:
        """What the chunk brought; commands go out before anything is published."""
        now = time.monotonic_ns()
        self.engine.clock.chunk(chunk.stop, chunk.arrival_ns)
        self.engine.process(result.spikes, result.blind, result.decided_until, now)
        for stim in self.pipeline.stims_found() if self._patterns or self.config.stim.detect else ():
            if stim["peak_uv"] > 0:  # else nothing was seen where one was expected
                self.engine.seen(int(stim["sample"]), now)

    def early(self, found: np.ndarray, resolved: np.ndarray) -> None:
        """Spikes that are not final yet (EARLY), and what became of earlier ones (RESOLVED)."""
        self.engine.early(found, resolved, time.monotonic_ns())

    def poll(self) -> None:
        """What is due, and what was heard."""
        now = time.monotonic_ns()
        if self.link.orphaned and not self._orphaned:
            self._orphaned = True
            self.engine.orphaned()
        self.engine.poll(now)
        if len(news := self.engine.take_news()):
            self.publisher.send(self._topic, ledger=news)

    def blind(self, rows: np.ndarray) -> None:
        """BLIND records that no result holds."""
        self.engine.rules.note_blind(rows)

    def stims(self, events: np.ndarray) -> None:
        """Rows of the ring's event table: stimuli that the device, a TTL line or a client told of."""
        now = time.monotonic_ns()
        for row in events[(events["kind"] == EventKind.STIM) & (events["state"] == 1)]:
            name = row["text"].decode("utf-8", "replace") or f"line {row['line']}"
            self.engine.seen(int(row["sample"]), now)
            self._expected(int(row["sample"]), name)

    def _expected(self, sample: int, pattern: str) -> None:
        """A stimulus is in the samples here, or will be."""
        if len(self._patterns) < MOST_PATTERNS:
            self._patterns.setdefault(pattern, len(self._patterns))
        self.pipeline.mark_stim(sample, self._patterns.get(pattern, MOST_PATTERNS))

    def use(self, units: Units) -> None:
        """The sorter's units from now on."""
        self.engine.use(facts_of(units))

    # ---- told --------------------------------------------------------------------------------------------------

    def _tell(self, level: str, text: str) -> None:
        arming = self.engine.arming
        self.link.tell("act", level=level, text=text, armed=arming.armed, stopped=arming.stopped)

    def summary(self) -> dict[str, Any]:
        """For the status."""
        e = self.engine
        return {
            "armed": e.arming.armed_rules(t.name for t in e.triggers),
            "stopped": e.arming.stopped,
            "count": e.safety.count,
            "decisions": dict(e.counters),
            "refusals": dict(e.refusals),
            "on_early": dict(e.conditional.counters),
        }

    def _signalled(self, _signal: int, _frame: Any) -> None:
        self.engine.stop_asked = "signal SIGUSR2"
        self.engine.arming.put_on_file("signal SIGUSR2")  # also if this process hangs, and is killed for it

    # ---- what clients ask --------------------------------------------------------------------------------------

    def answer(self, command: dict[str, Any]) -> bool:
        """Carry out one command of the supervisor and answer it; False when it is not for the loop."""
        op = self._ops.get(str(command.get("op")))
        if op is None:
            return False
        late = time.monotonic_ns() - int(command.get("until_ns", 1 << 62)) > 0
        try:
            if late and command["op"] not in ALWAYS:
                raise SpikedError(f"{command['op']} came too late; whoever asked was told that it failed")
            reply = {"ok": True, **(op(command) or {})}
        except SpikedError as e:
            reply = {"ok": False, "error": str(e)}
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(str(x) for x in first["loc"]) or "trigger"
            reply = {"ok": False, "error": f"{where}: {first['msg'].removeprefix('Value error, ')}"}
        except Exception as e:  # a request that nobody foresaw must not cost the live path
            log.exception("operation %s failed", command.get("op"))
            reply = {
                "ok": False,
                "error": f"{command.get('op')} failed inside the live process ({type(e).__name__})",
            }
        self.link.tell("answer", id=command.get("id"), **reply)
        return True

    def _arm(self, command: dict[str, Any]) -> dict[str, Any]:
        names, lease = command.get("triggers"), str(command["lease"])
        mine = [t.name for t in self.engine.triggers if names is None or t.name in names]
        seconds = float(command.get("lease_s", 5.0))
        for t in self.engine.triggers:
            if t.name in mine and t.output in self._absent:
                raise SpikedError(f"trigger {t.name} cannot be armed: {self._absent[t.output]}")
        if names is None or mine:
            self.engine.arming.arm(lease, None if names is None else mine, seconds, time.monotonic_ns())
            self._tell("info", f"armed for {seconds:g} s at a time: {', '.join(mine) or 'no triggers'}")
        return {"armed": mine}

    def _renew(self, command: dict[str, Any]) -> None:
        """Raises where the lease is over."""
        self.engine.arming.renew(str(command["lease"]), time.monotonic_ns())

    def _disarm(self, command: dict[str, Any]) -> None:
        if self.engine.arming.disarm(command.get("lease")):
            self._tell("info", "disarmed")

    def _triggers(self, _command: dict[str, Any]) -> dict[str, Any]:
        return self.engine.told()

    def _changeable(self) -> None:
        if self.engine.arming.armed:
            raise SpikedError("triggers cannot be changed while armed; disarm first")

    def _set_trigger(self, command: dict[str, Any]) -> None:
        self._changeable()
        t = configuration.Trigger.model_validate(command.get("trigger"))
        if t.when == "python":
            raise SpikedError("a trigger in Python is code: it comes from the rig's TOML file only")
        try:
            self.config.check_trigger(t)
        except ValueError as e:
            raise SpikedError(str(e)) from e
        if t.output and t.output not in self.engine.outputs and t.output not in self._absent:
            raise SpikedError(
                f"output {t.output} belongs to another stream than {self.info.name}; name one of its own"
            )
        others = tuple(o for o in self.engine.triggers if o.name != t.name)
        self.engine.set_triggers((*others, t))
        self._keep_changes()
        self._tell("info", f"trigger {t.name} is set: {t.model_dump_json(exclude_defaults=True)}")

    def _remove_trigger(self, command: dict[str, Any]) -> None:
        self._changeable()
        name = command.get("name")
        left = tuple(t for t in self.engine.triggers if t.name != name)
        if len(left) == len(self.engine.triggers):
            raise SpikedError(f"there is no trigger {str(name)[:40]!r}")
        self.engine.set_triggers(left)
        self._keep_changes()
        self._tell("info", f"trigger {name} is removed")

    def _set_limits(self, command: dict[str, Any]) -> dict[str, Any]:
        changes = command.get("limits")
        if not isinstance(changes, dict) or not changes:
            raise SpikedError("set_limits needs limits = {NAME: VALUE, ...}")
        safety, armed = self.engine.safety, self.engine.arming.armed
        if command.get("check"):
            Safety(safety.limits).set_limits(changes, armed)
            return {}
        safety.set_limits(changes, armed)
        self._keep_changes()
        self._tell("info", f"limits changed: {', '.join(f'{k} = {v}' for k, v in changes.items())}")
        return {"limits": self.engine.safety.told()}

    def _stop(self, command: dict[str, Any]) -> None:
        self.engine.stop(str(command.get("why") or "asked for"))

    def _clear(self, _command: dict[str, Any]) -> None:
        self.engine.arming.clear()
        self._tell("info", "the stop is cleared; nothing is armed")

    def _stimulate(self, command: dict[str, Any]) -> dict[str, Any]:
        keys = ("output", "pattern", "electrodes", "amplitude_ua", "width_us", "pulses")
        given = {k: command[k] for k in keys if command.get(k) is not None}
        asked = configuration.Trigger.model_validate(
            {"name": "client", "when": "unit", "units": [0], **given}
        )
        lease, now = str(command.get("lease", "")), time.monotonic_ns()
        return self.engine.stimulate(asked, lease, now, int(command.get("asked_ns", now)))

    def close(self) -> None:
        self.engine.close()
