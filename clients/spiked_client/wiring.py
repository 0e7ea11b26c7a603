"""Which topic comes from which socket, and how the sockets are made."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import zmq

from spiked_client.access import ClientKey
from spiked_client.errors import UnknownStream

LIVE_KINDS = ("spikes", "early", "mua", "gaps", "stim", "units", "ledger")
SERVICE_TOPICS = ("health", "session", "clock")
QUIET_S = 2.0  # a live stream talks ten times a second; quiet for longer: ask again where it is published
PATIENCE_S = 10.0  # until one that did not answer is asked again, while some stream talks; else QUIET_S
RECEIVE_HWM = 10_000  # messages that wait in a subscription that nobody reads


@dataclass(frozen=True)
class Wiring:
    """Topics, the PUB addresses that carry them, and each stream's replay address."""

    topics: frozenset[str] = frozenset()
    pubs: frozenset[str] = frozenset()
    replays: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(
        default_factory=dict
    )  # stream -> its publisher's life, where the daemon says it


def _matching(wanted: str, streams: Collection[str]) -> list[str]:
    """The topics that one wish means: "spikes" (of all streams), "spikes.A", "health"."""
    if wanted in SERVICE_TOPICS:
        return [wanted]
    kind, _, stream = wanted.partition(".")
    if kind not in LIVE_KINDS:
        raise UnknownStream(f"no topic {wanted!r}; there are {', '.join((*LIVE_KINDS, *SERVICE_TOPICS))}")
    if stream and stream not in streams:
        have = (
            f"it publishes {', '.join(sorted(streams))}"
            if streams
            else "it publishes none now; start a session"
        )
        raise UnknownStream(f"the daemon has no stream {stream!r}; {have}")
    return [f"{kind}.{stream}"] if stream else [f"{kind}.{s}" for s in streams]


def reachable(endpoint: str, host: str) -> str:
    """Where to connect: a daemon that listens on all its addresses is where its control port was found."""
    for anywhere in ("tcp://0.0.0.0:", "tcp://[::]:", "tcp://*:"):
        if endpoint.startswith(anywhere):
            port = endpoint.rpartition(":")[2]
            return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
    return endpoint


def wire(wanted: Iterable[str], endpoints: dict[str, Any], host: str = "127.0.0.1") -> Wiring:
    """Wiring for topics or kinds of topics, from the answer of the control port at `host`. Raises UnknownStream.

    Kinds without a stream mean all streams there are, and may mean none before a session runs.
    """
    told = endpoints.get("streams")
    streams = {str(k): v for k, v in told.items() if isinstance(v, dict)} if isinstance(told, dict) else {}
    topics = [t for w in wanted for t in _matching(w, streams)]
    of = {t.partition(".")[2] for t in topics if "." in t}
    pubs = {reachable(str(streams[s]["pub"]), host) for s in of if "pub" in streams[s]}
    if any(t in SERVICE_TOPICS for t in topics) and endpoints.get("health"):
        pubs.add(reachable(str(endpoints["health"]), host))
    replays = {s: reachable(str(streams[s]["replay"]), host) for s in of if "replay" in streams[s]}
    runs = {s: str(streams[s].get("run", "")) for s in of}
    return Wiring(frozenset(topics), frozenset(pubs), replays, runs)


def subscriber(context: Any, hwm: int, key: ClientKey | None = None) -> Any:
    """A SUB socket that is not connected yet."""
    socket = context.socket(zmq.SUB)
    socket.linger = 0
    socket.setsockopt(zmq.RCVHWM, hwm)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    socket.ipv6 = True
    if key is not None:
        key.secure(socket)
    return socket


def rewire(socket: Any, old: Wiring, new: Wiring) -> None:
    """Bring a SUB socket from one wiring to the next."""
    for topic in new.topics - old.topics:
        socket.subscribe(topic.encode())
    for topic in old.topics - new.topics:
        socket.unsubscribe(topic.encode())
    for pub in old.pubs - new.pubs:
        socket.disconnect(pub)
    for pub in new.pubs - old.pubs:
        socket.connect(pub)


def unasked(old: Wiring, new: Wiring) -> list[str]:
    """Topics of which nobody asked yet what was published before: new ones, and those of a restarted publisher."""
    same = {
        s
        for s, run in new.runs.items()
        if old.runs.get(s) == run and old.replays.get(s) == new.replays.get(s)
    }
    return sorted(t for t in new.topics if "." in t and not (t in old.topics and t.partition(".")[2] in same))
