"""Spikes as they are published, in order, with every loss told.

    async with Client() as client:                     with SyncClient() as client:
        async for batch in client.spikes():                for batch in client.spikes(timeout=5):
            act(batch.spikes)                                  act(batch.spikes)

A subscription asks the replay port for messages it missed, puts them where they belong, and reports on
`Batch.missed` what could not be had. It follows a publisher that restarts, also to another port. One
subscription is one socket: use as many at once as you like, and close those you no longer read.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

import zmq
import zmq.asyncio

from spiked_client.access import ClientKey, load_key
from spiked_client.control import CONTROL_PORT, LAST_LOOK_S, Control, SyncControl, dealer, until
from spiked_client.errors import ClientError, Silence
from spiked_client.order import Batch, Order, ReplayRequest, Steps
from spiked_client.wiring import (
    LIVE_KINDS,
    PATIENCE_S,
    QUIET_S,
    RECEIVE_HWM,
    Wiring,
    rewire,
    subscriber,
    unasked,
    wire,
)

if TYPE_CHECKING:
    from spiked_client.loop import Loop

REPLAY_TIMEOUT_S = 5.0
LEAST_LATE_S = 0.001
YIELD_EVERY = 16  # messages in a row before other tasks get their turn
Subscribed = TypeVar("Subscribed")


class _Patience:
    """How long somebody waits for a message."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self.end = float("inf") if timeout is None else time.monotonic() + timeout
        self._last = False

    def over(self) -> bool:
        """Whether it is over, unless a message lies there now. Who was held up past the end looks a moment longer: what
        came meanwhile may be unread by ZeroMQ too.
        """
        late = time.monotonic() - self.end
        if late < 0 or self._last or late < LEAST_LATE_S:
            return late >= 0
        self._last = True
        self.end += late + min(late, LAST_LOOK_S)
        return False


class _Subscription:
    """What both kinds of subscription share: sockets, order, and where they are connected."""

    def __init__(self, client: Any, wanted: tuple[str, ...], timeout: float | None, order: Order) -> None:
        self._context, self._control = client._context, client.control
        self._wanted, self._timeout, self._order = wanted, timeout, order
        self._ready: deque[Batch] = deque()
        self._wiring, self._wired = Wiring(), False
        self._host, self._key = client._where[0], client.key
        self._sub = subscriber(self._context, client.hwm, self._key)
        self._replays: dict[str, Any] = {}  # stream -> DEALER
        self._heard: dict[str, float] = {}  # stream -> when; "" stands for "some stream, when there is one"
        self._look_after = 0.0
        # topics whose stored messages are still to be asked for -> not before
        self._past: dict[str, float] = {}

    @property
    def counters(self) -> Counter[str]:
        """received, replayed, missed, duplicates, malformed, restarts."""
        return self._order.counters

    def _connect(self, endpoints: dict[str, Any]) -> None:
        new = wire(self._wanted, endpoints, self._host)
        rewire(self._sub, self._wiring, new)
        for stream in list(self._replays):
            if new.replays.get(stream) != self._wiring.replays.get(stream):
                self._replays.pop(stream).close(0)
        if self._order.wants_past:
            wanted = self._past | dict.fromkeys(sorted(unasked(self._wiring, new)), 0.0)
            self._past = {topic: after for topic, after in wanted.items() if topic in new.topics}
        self._wiring, self._wired = new, True
        waits_for_any = not new.replays and any(w in LIVE_KINDS for w in self._wanted)
        streams = {*new.replays, *([""] if waits_for_any else [])}
        self._heard = {s: self._heard.get(s, 0.0) for s in streams}
        self._look_after = time.monotonic() + QUIET_S

    def _replay_socket(self, stream: str) -> Any | None:
        if stream not in self._replays:
            if stream not in self._wiring.replays:
                return None
            self._replays[stream] = dealer(self._context, self._wiring.replays[stream], self._key)
        return self._replays[stream]

    def _forget(self, stream: str) -> None:
        """Drop a replay socket that did not answer: a late answer must not meet a later question."""
        if stream in self._replays:
            self._replays.pop(stream).close(0)

    def _wants(self, frames: list[bytes]) -> bool:
        """Note who was heard; False for what a prefix brought ("spikes.A" also subscribes "spikes.AB")."""
        topic = frames[0].decode(errors="replace")
        if topic not in self._wiring.topics:
            return False
        stream = topic.partition(".")[2]
        if stream:
            self._heard[stream] = time.monotonic()
        return True

    def _past_due(self) -> str | None:
        """A topic whose stored messages are to be asked for now."""
        now = time.monotonic()
        return next((topic for topic, after in self._past.items() if after <= now), None)

    def _past_asked(self, topic: str) -> None:
        """Done with it, or later again: nobody answered."""
        del self._past[topic]
        if self._order.unanswered:
            self._past[topic] = time.monotonic() + self._patience_s()

    def _patience_s(self) -> float:
        """Until one that did not answer is asked again: what others say lies unread while it is waited for."""
        heard = max(self._heard.values(), default=0.0)
        return PATIENCE_S if time.monotonic() - heard < QUIET_S else QUIET_S

    def _look_later(self) -> None:
        self._look_after = time.monotonic() + self._patience_s()

    def _look_in(self) -> float:
        """Seconds until the daemon is asked again where it publishes, because some stream is quiet."""
        quiet_since = min(self._heard.values(), default=float("inf"))
        return max(quiet_since + QUIET_S, self._look_after) - time.monotonic()

    def _due(self, patience: _Patience) -> float:
        """Milliseconds until something other than a message is due."""
        now = time.monotonic()
        past = min(self._past.values(), default=float("inf")) - now
        return max(min(self._look_in(), past, patience.end - now, 60.0), 0.0) * 1000 + 1

    def _silence(self, patience: _Patience) -> Silence:
        what = ", ".join(self._wanted)
        return Silence(f"nothing came on {what} for {patience.timeout:g} s; see `spiked status`")

    def _close_sockets(self) -> None:
        for socket in (self._sub, *self._replays.values()):
            socket.close(0)
        self._replays.clear()


class Subscription(_Subscription):
    """Asynchronous iterator of Batch. Closed with `close()`, `async with`, or its Client."""

    def __init__(self, client: Any, wanted: tuple[str, ...], timeout: float | None, order: Order) -> None:
        super().__init__(client, wanted, timeout, order)
        self._plain: Any = zmq.Socket.shadow(self._sub)
        self._in_a_row = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        if self._sub.closed:
            raise StopAsyncIteration
        try:
            return await self._next(self._timeout)
        except (asyncio.CancelledError, zmq.ZMQError):  # a socket that is closed cancels whoever waits for it
            task = asyncio.current_task()
            if self._sub.closed and not (task and task.cancelling()):
                raise StopAsyncIteration from None
            raise

    async def get(self, timeout: float) -> Batch | None:
        """The next batch, or None when none comes within `timeout` seconds."""
        try:
            return await self._next(timeout)
        except Silence:
            return None

    async def _next(self, timeout: float | None) -> Batch:
        if not self._wired:
            self._connect(await self._control.endpoints())
        patience = _Patience(timeout)
        while not self._ready:
            if (topic := self._past_due()) is not None:
                self._ready.extend(await self._drive(self._order.past(topic)))
                self._past_asked(topic)
                continue
            frames = await self._receive(patience)
            if frames is not None and self._wants(frames):
                self._ready.extend(await self._drive(self._order.take(frames)))
        return self._ready.popleft()

    async def _receive(self, patience: _Patience) -> list[bytes] | None:
        if self._look_in() <= 0:
            self._look_later()
            try:
                self._connect(await self._control.attempt("endpoints", 1.0))
            except (ClientError, TimeoutError):
                self._look_later()
        self._in_a_row += 1
        if self._in_a_row % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        over = patience.over()  # before the last look, not after it
        try:  # what is there already is taken without a turn of the event loop
            frames: list[bytes] = self._plain.recv_multipart(zmq.NOBLOCK)
            return frames
        except zmq.Again:
            self._in_a_row = 0
        if over:
            raise self._silence(patience)
        await self._sub.poll(int(self._due(patience)))
        return None

    async def _drive(self, steps: Steps) -> list[Batch]:
        try:
            request = next(steps)
            while True:
                request = steps.send(await self._ask(request))
        except StopIteration as done:
            batches: list[Batch] = done.value
            return batches

    async def _ask(self, request: ReplayRequest) -> list[bytes] | None:
        socket = self._replay_socket(request.stream)
        if socket is None:
            return None

        if request.wait_s:
            await asyncio.sleep(request.wait_s)

        end = time.monotonic() + REPLAY_TIMEOUT_S
        try:
            await until(socket.send(request.data), end)
            frames: list[bytes] = await until(socket.recv_multipart(), end)
            return frames
        except TimeoutError:
            self._forget(request.stream)
            return None
        except BaseException:  # whoever waits was cancelled, and may come again with another question
            self._forget(request.stream)
            raise

    def close(self) -> None:
        """Stop the iteration and free the sockets."""
        self._close_sockets()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


class SyncSubscription(_Subscription):
    """Iterator of Batch. Closed with `close()`, `with`, or its SyncClient."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._sub.closed:
            raise StopIteration
        return self._next(self._timeout)

    def get(self, timeout: float) -> Batch | None:
        """The next batch, or None when none comes within `timeout` seconds."""
        try:
            return self._next(timeout)
        except Silence:
            return None

    def _next(self, timeout: float | None) -> Batch:
        if not self._wired:
            self._connect(self._control.endpoints())
        patience = _Patience(timeout)
        while not self._ready:
            if (topic := self._past_due()) is not None:
                self._ready.extend(self._drive(self._order.past(topic)))
                self._past_asked(topic)
                continue
            frames = self._receive(patience)
            if frames is not None and self._wants(frames):
                self._ready.extend(self._drive(self._order.take(frames)))
        return self._ready.popleft()

    def _receive(self, patience: _Patience) -> list[bytes] | None:
        if self._look_in() <= 0:
            self._look_later()
            try:
                self._connect(self._control.attempt("endpoints", 1.0))
            except (ClientError, TimeoutError):
                self._look_later()
        over = patience.over()  # before the last look, not after it
        try:
            frames: list[bytes] = self._sub.recv_multipart(zmq.NOBLOCK)
            return frames
        except zmq.Again:
            pass
        if over:
            raise self._silence(patience)
        try:
            # Waiting inside libzmq has a message in hand sooner than being told that there is one.
            self._sub.rcvtimeo = int(self._due(patience))
            frames = self._sub.recv_multipart()
        except zmq.Again:
            return None
        return frames

    def _drive(self, steps: Steps) -> list[Batch]:
        try:
            request = next(steps)
            while True:
                request = steps.send(self._ask(request))
        except StopIteration as done:
            batches: list[Batch] = done.value
            return batches

    def _ask(self, request: ReplayRequest) -> list[bytes] | None:
        socket = self._replay_socket(request.stream)
        if socket is None:
            return None
        time.sleep(request.wait_s)
        end = time.monotonic() + REPLAY_TIMEOUT_S
        frames: list[bytes] | None = None
        try:
            if socket.poll(int(REPLAY_TIMEOUT_S * 1000), zmq.POLLOUT):
                socket.send(request.data, zmq.NOBLOCK)
                if socket.poll(int(max(end - time.monotonic(), LAST_LOOK_S) * 1000)):
                    frames = socket.recv_multipart()
        except zmq.Again:  # the publisher went away just now
            pass
        finally:
            if frames is None:
                self._forget(request.stream)
        return frames

    def close(self) -> None:
        """Stop the iteration and free the sockets."""
        self._close_sockets()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Topics(Generic[Subscribed]):
    """The subscriptions a client offers; `Subscribed` is the iterator of Batch that they give.

    Everywhere, `timeout` is how many seconds may pass without a message before Silence is raised (None: wait
    for ever). A live stream has a heartbeat ten times a second, so seconds are plenty. `hwm` messages wait in
    a subscription that is not read; the ones after them have to come from the replay port. `keys` is the key file for
    a daemon that uses keys (`spiked keys add` on the rig made it; else SPIKED_KEYS names it).
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        control_port: int = CONTROL_PORT,
        *,
        wait_s: float = 10.0,
        hwm: int = RECEIVE_HWM,
        keys: Path | str | ClientKey | None = None,
    ) -> None:
        self.hwm = hwm
        self.key = keys if isinstance(keys, ClientKey) else load_key(keys)
        self._where = (host, control_port)
        self._wait_s = wait_s
        self._open: list[Any] = []

    def messages(
        self,
        topics: str | Iterable[str],
        *,
        units: Collection[int] | None = None,
        timeout: float | None = None,
        replay: bool = True,
        from_start: bool = False,
    ) -> Subscribed:
        """Any topics ("spikes.probeA", "health") or kinds of topics ("spikes": of all streams there are).

        `from_start` begins with what the replay port still has, also on topics that are silent now; `replay` False reports losses without asking
        for them. Iterating raises UnknownStream, Silence, DaemonAbsent or Incompatible.
        """
        wanted = (topics,) if isinstance(topics, str) else tuple(topics)
        return self._subscribe(wanted, timeout, Order(units, replay=replay, from_start=from_start))

    def spikes(
        self,
        stream: str | None = None,
        units: Collection[int] | None = None,
        *,
        timeout: float | None = None,
        replay: bool = True,
        from_start: bool = False,
    ) -> Subscribed:
        """Sorted spikes and blind intervals of one stream or all; of `units` only, where given.

        Batches without spikes come too: they say which samples were looked at.
        """
        topic = _named("spikes", stream)
        return self.messages(topic, units=units, timeout=timeout, replay=replay, from_start=from_start)

    def mua(self, stream: str | None = None, *, timeout: float | None = None) -> Subscribed:
        """Unsorted detections per electrode."""
        return self.messages(_named("mua", stream), timeout=timeout)

    def gaps(self, stream: str | None = None, *, timeout: float | None = None) -> Subscribed:
        """Samples that never arrived; silent while all is well."""
        return self.messages(_named("gaps", stream), timeout=timeout)

    def health(self, *, timeout: float | None = None) -> Subscribed:
        """The daemon's figures once a second, and session events."""
        return self.messages(("health", "session"), timeout=timeout)

    def _subscribe(self, wanted: tuple[str, ...], timeout: float | None, order: Order) -> Subscribed:
        raise TypeError("use Client or SyncClient")

    def _keep(self, subscription: Any) -> None:
        """To be closed with the client; those that were closed are forgotten."""
        self._open = [*(s for s in self._open if not s._sub.closed), subscription]


def _named(kind: str, stream: str | None) -> str:
    return kind if stream is None else f"{kind}.{stream}"


class Client(_Topics[Subscription]):
    """Subscriber for asyncio. Entering it waits up to `wait_s` for the daemon, then raises DaemonAbsent.

    `control` asks the daemon for anything else.
    """

    def loop(
        self,
        stream: str | None = None,
        units: Collection[int] | None = None,
        *,
        deadline_ms: float = 5.0,
        on_missed: Literal["flag", "raise"] = "flag",
        lease_s: float = 2.0,
        timeout: float | None = None,
        early: bool = False,
    ) -> Loop:
        """A closed loop over one stream or all, for `async with`: ticks that know their age, and stimulation.

        A tick older than `deadline_ms`, or after a loss, is flagged (`Tick.missed`) or raised as DeadlineMissed. What the
        loop arms is disarmed by the daemon `lease_s` after the last tick was taken. `early`: spikes before they are final too, and what
        became of each, where the rig has live.early.
        """
        from spiked_client.loop import Loop

        return Loop(self, stream, units, deadline_ms, on_missed, lease_s, timeout, early)

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        self.control = Control(*self._where, timeout=self._wait_s, keys=self.key)
        await self.control.__aenter__()
        try:
            await self.control.endpoints()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        for subscription in self._open:
            subscription.close()
        await self.control.__aexit__()
        self._context.term()

    def _subscribe(self, wanted: tuple[str, ...], timeout: float | None, order: Order) -> Subscription:
        subscription = Subscription(self, wanted, timeout, order)
        self._keep(subscription)
        return subscription


class SyncClient(_Topics[SyncSubscription]):
    """Client without asyncio: plain blocking sockets, one thread."""

    def __enter__(self) -> Self:
        self._context = zmq.Context()
        self.control = SyncControl(*self._where, timeout=self._wait_s, keys=self.key)
        self.control.__enter__()
        try:
            self.control.endpoints()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for subscription in self._open:
            subscription.close()
        self.control.__exit__()
        self._context.term()

    def _subscribe(self, wanted: tuple[str, ...], timeout: float | None, order: Order) -> SyncSubscription:
        subscription = SyncSubscription(self, wanted, timeout, order)
        self._keep(subscription)
        return subscription
