"""Commands over MQTT: read, limited, carried out once, answered by their id.

A command is JSON of at most 4 KiB: {"id": "a1", "op": "start"}. `id` is text of the sender's choice, of at most 64
characters; the answer repeats it. The same command with the same id again, as QoS 1 may deliver it, is not carried out again:
the answer is. Another command with an id that was used is refused. The emergency stop is carried out every time, whatever its id, and
also without one or with arguments that it does not know.

| op               | does                                   | takes                                |
|------------------|----------------------------------------|--------------------------------------|
| start            | start a session                        |                                      |
| stop             | end the session                        |                                      |
| mark             | note a stimulus that somebody gave     | sample, line, text, value, stream    |
| stop_stimulation | the emergency stop                     | why                                  |

Nothing here stimulates or arms. Except for the emergency stop, commands are obeyed only where the configuration says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from spiked.errors import SpikedError

log = logging.getLogger(__name__)

Op = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]
OPERATIONS = {
    "start": "start_session",
    "stop": "stop_session",
    "mark": "mark_stim",
    "stop_stimulation": "stop_stimulation",
}
STOP = "stop_stimulation"
TAKES: dict[str, dict[str, Any]] = {
    "mark": {"sample": int, "line": int, "text": str, "value": (int, float), "stream": str},
}
MAX_BYTES = 4096
MAX_ID = 64
PER_S, BURST = 5.0, 20.0
REMEMBERED = 256
ANSWER_S = 10.0


class Malformed(ValueError):
    """A command that cannot be read; the text says why."""


def read(payload: bytes) -> dict[str, Any]:
    """A command with id, op and its arguments. Raises Malformed, with the id in `args[1]` where it could be read."""
    if len(payload) > MAX_BYTES:
        raise Malformed(f"a command has at most {MAX_BYTES} bytes, this one {len(payload)}", None)
    try:
        command = json.loads(payload.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Malformed('a command is JSON, such as {"id": "a1", "op": "start"}', None) from None
    if not isinstance(command, dict):
        raise Malformed("a command is a JSON object with id and op", None)
    request_id, op = command.pop("id", None), command.pop("op", None)
    if op == STOP:  # what else may be wrong with it is no reason to go on
        known = isinstance(request_id, str) and len(request_id) <= MAX_ID
        why = command.get("why")
        return {
            "id": request_id if known else None,
            "op": op,
            "arguments": {"why": why} if isinstance(why, str) else {},
        }
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID:
        raise Malformed(f"id must be text of 1 to {MAX_ID} characters", None)
    if not isinstance(op, str) or op not in OPERATIONS:
        raise Malformed(f"no operation {str(op)[:40]!r}; there are {', '.join(OPERATIONS)}", request_id)
    takes = TAKES.get(op, {})
    for key, value in command.items():
        if key not in takes:
            raise Malformed(
                f"{op} does not take {key[:40]!r}; it takes {', '.join(takes) or 'nothing'}", request_id
            )
        if not isinstance(value, takes[key]) or isinstance(value, bool):
            raise Malformed(f"{op}: {key} is of the wrong type", request_id)
    return {"id": request_id, "op": op, "arguments": command}


class Commands:
    """`hear` a payload, and `answer` gets the map to send back. `handlers` are the control port's operations.

    At most 20 commands at once and 5 a second; what comes beyond is counted and, once a second, answered as too many. The
    emergency stop is not limited. `counters`: commands, refused, malformed, repeated, busy, retained.
    """

    def __init__(
        self, handlers: Mapping[str, Op], answer: Callable[[dict[str, Any]], None], counters: Counter[str], *, obey: bool
    ) -> None:  # fmt: skip
        self._handlers, self._answer, self._counters, self._obey = handlers, answer, counters, obey
        # id -> the command, and its answer; None: still being carried out
        self._answers: OrderedDict[str, tuple[dict[str, Any], dict[str, Any] | None]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._left, self._refilled, self._complained = BURST, time.monotonic(), 0.0

    def hear(self, payload: bytes, retained: bool) -> None:
        """One message of the command topic; returns at once."""
        try:
            command = read(payload)
            if retained:  # the broker hands it out at every connection, however old it is
                self._counters["retained"] += 1
                raise Malformed("a command must not be retained; it was not carried out", command["id"])
        except Malformed as e:
            if self._may():
                self._counters["malformed"] += 1
                self._answer({"id": e.args[1], "ok": False, "error": e.args[0]})
            return
        request_id, op = command["id"], command["op"]
        known, told = self._answers.get(request_id, (None, None))
        if op == STOP:  # a button sends the same every time, and the last stop may have been lifted
            self._begin(command)
        elif known == command:
            self._counters["repeated"] += 1
            if told is not None and self._may():
                self._answer({**told, "repeated": True})
        elif self._may():
            if known is None:
                self._remember(command, None)
                self._begin(command)
                return
            self._counters["refused"] += 1
            error = f"the id was used for another command, {known['op']}; take a new one"
            self._answer({"id": request_id, "op": op, "ok": False, "error": error})

    def _begin(self, command: dict[str, Any]) -> None:
        self._counters["commands"] += 1
        task = asyncio.create_task(self._carry_out(command), name=f"mqtt {command['op']}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _may(self) -> bool:
        now = time.monotonic()
        self._left = min(self._left + (now - self._refilled) * PER_S, BURST)
        self._refilled = now
        if self._left >= 1:
            self._left -= 1
            return True
        self._counters["busy"] += 1
        if now - self._complained > 1:
            self._complained = now
            self._answer(
                {"id": None, "ok": False, "error": f"too many commands; at most {PER_S:g} a second are heard"}
            )
        return False

    def _remember(self, command: dict[str, Any], answer: dict[str, Any] | None) -> None:
        self._answers[command["id"]] = command, answer
        while len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)

    async def _carry_out(self, command: dict[str, Any]) -> None:
        op = command["op"]
        answer: dict[str, Any] = {"id": command["id"], "op": op, "ok": False}
        try:
            if not self._obey and op != STOP:
                raise SpikedError(
                    "this rig takes no commands over MQTT; set mqtt.commands = true in its TOML file"
                )
            request = {"op": OPERATIONS[op], **command["arguments"]}
            async with asyncio.timeout(ANSWER_S):
                told = await self._handlers[OPERATIONS[op]](request)
            answer |= {**(told or {}), "ok": True}
        except SpikedError as e:
            self._counters["refused"] += 1
            answer["error"] = str(e)
        except TimeoutError:
            self._counters["failed"] += 1
            answer["error"] = f"{op} is not done after {ANSWER_S:g} s; see `spiked status`"
        except Exception as e:  # one broken operation must not take the daemon down
            self._counters["failed"] += 1
            log.exception("MQTT command %s failed", op)
            answer["error"] = f"{op} failed inside the daemon ({type(e).__name__}); its log says more"
        if op != STOP:
            self._remember(command, answer)
        self._answer(answer)
