"""The publisher and its replay port: never waits, numbers everything, survives anything sent to it."""

from __future__ import annotations

import contextlib
import io
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from client_rig import HOST, blind, port_of, say, spikes
from hypothesis import given, settings
from hypothesis import strategies as st

from spiked.errors import ConfigError
from spiked.publish.replay import PAGE_BYTES, PAGE_MESSAGES, History
from spiked.publish.zmq_pub import Publisher
from spiked.rehearsal import free_ports
from spiked_client import protocol
from spiked_client.protocol import VERSION, ProtocolError


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with Publisher(HOST, 0, 0, "run-1", replay_messages=64) as p:
        yield p


@contextlib.contextmanager
def connected(kind: int, endpoint: str) -> Iterator[Any]:
    with zmq.Context() as context, context.socket(kind) as s:
        s.linger = 0
        s.rcvtimeo = 60_000
        s.connect(endpoint)
        yield s


def ask(dealer: Any, **fields: Any) -> tuple[dict[str, Any], list[list[bytes]]]:
    dealer.send(protocol.encode_request(7, **fields))
    head, *data = dealer.recv_multipart()
    reply, raw = msgpack.unpackb(head), io.BytesIO(b"".join(data))
    return reply, [[raw.read(n) for n in sizes] for sizes in reply.get("sizes", [])]


def test_numbers_run_from_one_per_topic_and_come_back_as_they_were_sent(publisher: Publisher) -> None:
    for n in range(5):
        assert (
            publisher.send("spikes.A", {"first": n, "stop": n + 1}, spikes=spikes(n), blind=blind((n, n + 1)))
            == n + 1
        )
    assert publisher.send("gaps.A") == 1
    with connected(zmq.DEALER, publisher.endpoints["replay"]) as d:
        head, frames = ask(d, topic="spikes.A", **{"from": 2, "to": 4})
        assert (head["ok"], head["id"], head["run"], head["newest"], head["gone"], head["next"]) == (
            True,
            7,
            "run-1",
            5,
            0,
            0,
        )
        got = [protocol.decode(f) for f in frames]
        assert [
            (m.seq, m.arrays["spikes"]["sample"].tolist(), m.arrays["blind"]["stop"].tolist()) for m in got
        ] == [(n, [n - 1], [n]) for n in (2, 3, 4)]
        assert ask(d, topic="spikes.A", **{"from": 6, "to": 9})[1] == []  # not published yet: no error
        assert ask(d, topic="mua.A", **{"from": 1, "to": 9})[0]["newest"] == 0
        other_life = ask(d, topic="spikes.A", run="run-0", **{"from": 2, "to": 4})[0]
        assert (other_life["run"], other_life["gone"], other_life["sizes"]) == ("run-1", 4, [])


def test_stamps_get_the_time_of_publication_and_the_callers_header_stays(publisher: Publisher) -> None:
    header = {"stamps": {"arrival": 5}}
    before = time.monotonic_ns()
    publisher.send("spikes.A", header)
    publisher.send("spikes.A", {"stamps": {"arrival": 5, "published": 6}})
    with connected(zmq.DEALER, publisher.endpoints["replay"]) as d:
        _, frames = ask(d, topic="spikes.A", **{"from": 1, "to": 2})
    stamps = [protocol.decode(f).header["stamps"] for f in frames]
    assert before <= stamps[0]["published"] <= time.monotonic_ns() and stamps[1] == {
        "arrival": 5,
        "published": 6,
    }
    assert header == {"stamps": {"arrival": 5}}


def test_a_wrong_array_is_refused_before_it_takes_a_number(publisher: Publisher) -> None:
    with pytest.raises(ProtocolError, match="array spikes has dtype float64"):
        publisher.send("spikes.A", {}, spikes=np.zeros(3))
    assert publisher.send("spikes.A") == 1


def test_a_taken_port_is_one_line(publisher: Publisher) -> None:
    for ports in ((port_of(publisher.endpoints["pub"]), 0), (0, port_of(publisher.endpoints["replay"]))):
        with pytest.raises(
            ConfigError, match=r"cannot listen on 127\.0\.0\.1:\d+: .* in use; stop the program"
        ) as e:
            Publisher(HOST, *ports, "run-2")
        assert "\n" not in str(e.value)


def test_the_port_is_free_again_after_close_and_late_sends_only_count() -> None:
    # not of those that the system gives away meanwhile
    first = Publisher(HOST, *free_ports(2), "run-1")
    first.close()
    first.send("spikes.A")
    assert first.counters["dropped"] == 1
    with Publisher(HOST, *(port_of(first.endpoints[k]) for k in ("pub", "replay")), "run-2") as second:
        assert second.send("spikes.A") == 1


def test_numbers_are_unique_when_several_threads_send(publisher: Publisher) -> None:
    got: list[int] = []
    threads = [
        threading.Thread(target=lambda: got.extend([publisher.send("spikes.A") for _ in range(500)]))
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(got) == list(range(1, 2001))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.integers(0, 300), max_size=120),
    st.integers(1, 2000),
    st.integers(1, 130),
    st.integers(0, 130),
)
def test_history_gives_exactly_the_newest_that_fit(
    slots: int, sizes: list[int], limit: int, first: int, span: int
) -> None:
    history = History(slots, limit)
    for seq, size in enumerate(sizes, 1):
        history.put(seq, [bytes(size)])
    kept: list[int] = []
    for seq in range(len(sizes), 0, -1):  # newest first, as many as fit, the newest in any case
        if len(kept) == slots or (kept and sum(sizes[seq - 1 :]) > limit):
            break
        kept.append(seq)
    gone, found, rest = history.get(first, first + span)
    wanted = [s for s in range(first, first + span + 1) if s <= len(sizes)]
    assert rest == 0
    assert [s for s, _ in found] == [s for s in wanted if s in kept]
    assert gone == max((s for s in wanted if s not in kept), default=0)
    assert all(len(f[0]) == sizes[s - 1] for s, f in found)


def test_answers_come_in_pages() -> None:
    history = History(5000, 1 << 30)
    for seq in range(1, 1001):
        history.put(seq, [b"x"])
    pages, at = [], 1
    while at:
        _, found, at = history.get(at or 1, 1000)
        pages.append([s for s, _ in found])
    assert max(map(len, pages)) == PAGE_MESSAGES and [*itertools.chain(*pages)] == list(range(1, 1001))
    for seq in range(1001, 1011):
        history.put(seq, [bytes(PAGE_BYTES + 1)])
    assert [s for s, _ in history.get(1001, 1010)[1]] == [1001]


def test_garbage_on_the_replay_port_is_counted_answered_and_survived(publisher: Publisher) -> None:
    say(publisher, "spikes.A", 0)
    rng = np.random.default_rng(5)
    good = protocol.encode_request(1, topic="spikes.A", **{"from": 1, "to": 1})
    bad = [rng.bytes(rng.integers(0, 200)) for _ in range(300)]
    bad += [good[:n] for n in range(len(good))]
    hostile: list[Any] = [
        {"from": 0, "to": 1}, {"from": 2, "to": 1}, {"from": "1", "to": 1}, {"from": 1, "to": 2**64 - 1},
        {"from": True, "to": 1}, {"from": 1, "to": 1, "topic": 5}, {"from": 1, "to": 1, "topic": None},
        {"from": 1}, {"from": 1, "to": 1, "v": [2, 0]},
    ]  # fmt: skip
    bad += [msgpack.packb({"v": [1, 0], "id": 1, "topic": "spikes.A", **h}) for h in hostile]
    bad += [
        msgpack.packb({"v": [1, 0], "topic": "spikes.A", "from": 1, "to": 1}),
        b"\xdd\xff\xff\xff\xff",
        b"\x81" * 5000,
    ]
    with connected(zmq.DEALER, publisher.endpoints["replay"]) as d:
        stored = ask(d, topic="spikes.A", **{"from": 1, "to": 1})[1]
        assert [len(f) for f in stored] == [4]
        for data in bad:
            d.send(data)
            reply = msgpack.unpackb(d.recv())
            assert reply["ok"] is False and "\n" not in reply["error"]
        assert publisher.counters["malformed"] == len(bad)
        for frames in ([b"", b"", good], [good, good, good, good], [b""]):
            d.send_multipart(frames)
            assert msgpack.unpackb(d.recv_multipart()[-1])["ok"] is False
        d.send(msgpack.packb({"v": [9, 4], "id": 1}))
        assert (
            msgpack.unpackb(d.recv())["error"]
            == f"peer speaks spiked protocol 9.4, this side {'.'.join(map(str, VERSION))}; update one"
        )
        assert ask(d, topic="spikes.A", **{"from": 1, "to": 1})[1] == stored
        # a huge range costs nothing
        assert ask(d, topic="spikes.A", **{"from": 1, "to": 2**62})[1] == stored


def test_who_asks_is_not_kept_waiting_for_what_held_up_the_computer(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rest as long as that would have every client give up."""
    monkeypatch.setattr("spiked.publish.replay.PAUSES", 1e9)  # as when it was held up for hours
    say(publisher, "spikes.A", 0)
    with connected(zmq.DEALER, publisher.endpoints["replay"]) as d:
        for _ in range(3):
            assert len(ask(d, topic="spikes.A", **{"from": 1, "to": 1})[1]) == 1


def test_a_request_socket_may_ask_too_and_an_oversized_one_is_cut_off(publisher: Publisher) -> None:
    say(publisher, "spikes.A", 0)
    with connected(zmq.REQ, publisher.endpoints["replay"]) as req:
        req.send(protocol.encode_request(3, topic="spikes.A", **{"from": 1, "to": 1}))
        assert len(msgpack.unpackb(req.recv_multipart()[0])["sizes"]) == 1
    with connected(zmq.DEALER, publisher.endpoints["replay"]) as d:
        d.rcvtimeo = 300
        d.send(bytes(protocol.MAX_REQUEST_BYTES + 1))
        with pytest.raises(zmq.Again):
            d.recv()
    for endpoint in publisher.endpoints.values():  # not even ZeroMQ
        with socket.create_connection((HOST, port_of(endpoint)), 5) as raw:
            raw.sendall(np.random.default_rng(1).bytes(4096))
    with connected(zmq.DEALER, publisher.endpoints["replay"]) as d:
        assert len(ask(d, topic="spikes.A", **{"from": 1, "to": 1})[1]) == 1


def median_send_us(publisher: Publisher, n: int = 1500) -> float:
    took = []
    for i in range(n):
        start = time.perf_counter_ns()
        say(publisher, "spikes.A", i)
        took.append(time.perf_counter_ns() - start)
        if i % 50 == 0:
            time.sleep(0.001)
    return float(np.median(took)) / 1e3


def test_stalled_vanishing_and_greedy_clients_do_not_slow_the_sender() -> None:
    with Publisher(HOST, 0, 0, "run-1", hwm=100) as p, zmq.Context() as context:
        alone = median_send_us(p)
        stalled = [context.socket(zmq.SUB) for _ in range(3)]
        for s in stalled:
            s.linger, s.rcvhwm = 0, 1
            s.connect(p.endpoints["pub"])
            s.subscribe(b"")
        greedy = context.socket(zmq.DEALER)  # asks and never reads
        greedy.linger, greedy.rcvhwm = 0, 1
        greedy.connect(p.endpoints["replay"])
        time.sleep(0.2)
        worst = 0.0
        for _ in range(4):
            for _ in range(200):
                with contextlib.suppress(zmq.Again):
                    greedy.send(
                        protocol.encode_request(1, topic="spikes.A", **{"from": 1, "to": 4000}), zmq.NOBLOCK
                    )
            with connected(zmq.SUB, p.endpoints["pub"]) as brief:
                brief.subscribe(b"")
                worst = max(worst, median_send_us(p))
        for s in (*stalled, greedy):
            s.close(0)
        assert p.counters["dropped"] == 0 and p.counters["sent"] == p._seq["spikes.A"]
        # far above what was measured (10 to 30 microseconds), far below a chunk of 1 ms
        assert worst < max(200.0, 20 * alone)
