"""A closed loop in the client: ticks with their age, and stimulation under a lease that lives as long as they are taken.

    async with Client() as client, client.loop(deadline_ms=5) as loop:
        await loop.arm()
        async for tick in loop:
            if not tick.missed and (tick.spikes["unit"] == 3).any():
                await loop.stimulate("pulser", electrodes=[12])

A round trip through a client costs what the client takes to wake, and the way over the control port back. Rules
that the daemon itself evaluates ([[trigger]] in the rig's file, or `control.set_trigger`) are several times faster and need no
client but one that holds the lease; a loop that arms them and only reads its ticks is that client.

With `early=True`, where the rig has `live.early`, ticks bring spikes before they are final too:

    async with client.loop(early=True) as loop:
        async for tick in loop:
            act(tick.news)                      # every spike once, as soon as it is known
            for lost in tick.withdrawn:         # what was acted on for nothing
                regret(lost["number"])
            count(tick.spikes)                  # final ones only
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from spiked_client.control import Control
from spiked_client.errors import ClientError, DaemonAbsent, DeadlineMissed, Refused
from spiked_client.order import Batch
from spiked_client.protocol import EARLY, FATES, RESOLVED, SPIKE, TOLD_EARLY

if TYPE_CHECKING:
    from spiked_client.subscribe import Client

RENEWALS = 4  # per lease: three may fail
RENEW_S = 2.0
ANSWER_S = 8.0  # the daemon itself waits five seconds for its live processes


@dataclass(frozen=True)
class Tick:
    """What became known at once.

    `spikes` (protocol.SPIKE) and `blind` (protocol.BLIND) of the samples [first, stop). `age_ms`: since the newest of
    them arrived at the daemon, when this tick was handed out. `missed`: empty, or why this tick cannot be acted on in
    time: "late" (older than the deadline), "lost" (messages before it are gone), "restarted" (a new live process).

    Of a loop that is `early`: `early` (protocol.EARLY), spikes that are not final yet, and `resolved` (protocol.RESOLVED), what became of
    earlier ones: each is confirmed, withdrawn, or lost (with the messages or the process that would have told), once. `first` and `stop` are -1 in
    a tick that brings these.
    """

    stream: str
    first: int
    stop: int
    spikes: np.ndarray
    blind: np.ndarray
    age_ms: float
    missed: str
    batch: Batch
    early: np.ndarray = field(default_factory=lambda: np.zeros(0, EARLY))
    resolved: np.ndarray = field(default_factory=lambda: np.zeros(0, RESOLVED))

    @property
    def news(self) -> np.ndarray:
        """SPIKE records of what was not told before: early spikes, and final ones that were never early. Every spike once."""
        fresh = self.spikes[(self.spikes["flags"] & TOLD_EARLY) == 0]
        if not len(self.early):
            return fresh
        found = np.zeros(len(self.early), SPIKE)
        for name in SPIKE.names or ():
            found[name] = self.early[name]
        return np.concatenate([found, fresh])

    @property
    def withdrawn(self) -> np.ndarray:
        """Of `resolved`, what was no spike in the end, or is not known to be one."""
        return self.resolved[self.resolved["fate"] != FATES.index("confirmed")]

    def sees(self, *channels: int) -> bool:
        """Whether none of these channels (none given: any channel) was blind in any of the samples."""
        at = self.blind["channel"]
        hit = (at == -1) | np.isin(at, channels) if channels else np.ones(len(at), bool)
        return not bool(hit.any())


class Loop:
    """Ticks of one stream, or of all; see `Client.loop`.

    `counters`: ticks, late, lost, restarted; of an early loop also early, confirmed, withdrawn, unresolved (lost ones).
    """

    def __init__(
        self, client: Client, stream: str | None, units: Any, deadline_ms: float, on_missed: Literal["flag", "raise"],
        lease_s: float, timeout: float | None, early: bool = False,
    ) -> None:  # fmt: skip
        self._client, self._stream, self._units = client, stream, units
        self._deadline_ms, self._raises = deadline_ms, on_missed == "raise"
        self._lease_s, self._timeout = lease_s, timeout
        self._lease, self._renewed_s = "", 0.0
        self._held_s = 0.0  # since when the lease counts that the daemon confirmed last
        self._renewing: asyncio.Task[None] | None = None
        self.counters = {"ticks": 0, "late": 0, "lost": 0, "restarted": 0}
        self._early = early
        self._open: dict[str, dict[int, np.void]] = {}  # stream -> number -> EARLY
        if early:
            self.counters |= {"early": 0, "confirmed": 0, "withdrawn": 0, "unresolved": 0}

    async def __aenter__(self) -> Self:
        self.control = Control(*self._client._where, timeout=ANSWER_S, keys=self._client.key)
        await self.control.__aenter__()
        kinds = ("spikes", "early") if self._early else ("spikes",)
        topics = [k if self._stream is None else f"{k}.{self._stream}" for k in kinds]
        self._ticks = self._client.messages(topics, units=self._units, timeout=self._timeout)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError, ClientError):
                await self._renewing
        with contextlib.suppress(ClientError):  # a daemon that is gone has nothing armed
            await self.disarm()
        self._ticks.close()
        await self.control.__aexit__()

    # ---- ticks -------------------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Tick:
        """The next tick. Raises DeadlineMissed where the loop was asked to, Silence, Refused when the lease was lost."""
        self._keep_lease()
        tick = self._tick(await self._ticks.__anext__())
        self.counters["ticks"] += 1
        if tick.missed:
            self.counters[tick.missed] += 1
            if self._raises:
                raise DeadlineMissed(self._words(tick), tick)
        return tick

    def _tick(self, batch: Batch) -> Tick:
        since = batch.stamps.get("arrival") or batch.stamps.get("published") or batch.received_ns
        age_ms = (time.monotonic_ns() - int(since)) / 1e6
        missed = (
            "restarted" if batch.restarted
            else "lost" if batch.missed is not None
            else "late" if age_ms > self._deadline_ms or batch.replayed
            else ""
        )  # fmt: skip
        first, stop = batch.first, batch.stop
        early, resolved = self._told_early(batch) if self._early else (batch.early, batch.resolved)
        return Tick(
            batch.stream, -1 if first is None else first, -1 if stop is None else stop, batch.spikes, batch.blind, age_ms, missed, batch,
            early, resolved,
        )  # fmt: skip

    def _told_early(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Early spikes of a batch, and what became of those that this loop gave out before."""
        open_ = self._open.setdefault(batch.stream, {})
        resolved = []
        if batch.restarted or (batch.missed is not None and batch.message.kind == "early"):
            resolved = [(n, e["sample"], -1, e["unit"], FATES.index("lost")) for n, e in open_.items()]
            open_.clear()
        early = batch.early
        open_.update({int(e["number"]): e for e in early})
        resolved += [tuple(r) for r in batch.resolved if open_.pop(int(r["number"]), None) is not None]
        out = np.array(resolved, RESOLVED)
        self.counters["early"] += len(early)
        for fate, name in enumerate(("unresolved", *FATES[1:])):
            self.counters[name] += int((out["fate"] == fate).sum())
        return early, out

    def _words(self, tick: Tick) -> str:
        if tick.missed == "late":
            return f"{tick.stream}: samples until {tick.stop} are {tick.age_ms:.1f} ms old, over the deadline of {self._deadline_ms:g} ms"
        lost = tick.batch.missed
        what = f"{lost.count} messages are {lost.reason}" if lost else "the live process was restarted"
        return f"{tick.stream}: before sample {tick.first} {what}"

    # ---- stimulation -------------------------------------------------------------------------------------------

    async def arm(self, triggers: list[str] | None = None) -> list[str]:
        """Arm these rules, or all of them and `stimulate`, for as long as ticks are taken; the rules that are armed.

        The lease is renewed when a tick is asked for: a loop that hangs, or that gets no ticks, is disarmed by the
        daemon after `lease_s`. Raises Refused.
        """
        await self.disarm()
        self._held_s = time.monotonic()
        reply = await self.control.arm(triggers, lease_s=self._lease_s, stream=self._stream)
        self._lease, self._renewed_s = str(reply["lease"]), time.monotonic()
        return [str(name) for name in reply.get("armed", ())]

    async def disarm(self) -> None:
        """End what this loop armed."""
        lease, self._lease = self._lease, ""
        if lease:
            await self.control.disarm(lease)

    async def stimulate(
        self, output: str, pattern: str = "default", *, electrodes: list[int] | None = None, amplitude_ua: float | None = None,
        width_us: float | None = None, pulses: int = 1,
    ) -> dict[str, Any]:  # fmt: skip
        """Ask for one stimulus now: its number in the ledger, `outcome` ("sent", "refused", "dry", ...) and `reason`.

        `electrodes` are channel indices. Dry while nothing is armed by this loop.
        """
        return await self.control.stimulate(
            self._lease, output, pattern, electrodes=electrodes, amplitude_ua=amplitude_ua, width_us=width_us, pulses=pulses,
            stream=self._stream,
        )  # fmt: skip

    async def mark_stim(self, sample: int | None = None, pattern: str = "") -> None:
        """Tell the daemon of a stimulus that somebody else gave."""
        await self.control.mark_stim(sample, pattern, stream=self._stream)

    def _keep_lease(self) -> None:
        """Renew in the background, so that no tick waits for it; what went wrong is raised with the next tick."""
        task = self._renewing
        if task is not None and task.done():
            self._renewing = None
            task.result()
        due = time.monotonic() - self._renewed_s > self._lease_s / RENEWALS
        if self._lease and due and self._renewing is None:
            self._renewed_s = time.monotonic()
            self._renewing = asyncio.create_task(self._renew(self._lease), name="renew")

    async def _renew(self, lease: str) -> None:
        asked_s = time.monotonic()
        try:
            await self.control.attempt(
                "renew", min(max(RENEW_S, self._lease_s), self.control.timeout), lease=lease
            )
            self._held_s = asked_s
        except (ClientError, TimeoutError) as e:
            over = isinstance(e, Refused) or time.monotonic() - self._held_s > self._lease_s
            if over and lease == self._lease:  # else it is tried again before the lease ends
                self._lease = ""
                if isinstance(e, TimeoutError):
                    e = DaemonAbsent(
                        f"the lease was not renewed within its {self._lease_s:g} s; the daemon did not answer"
                    )
                raise e from None
