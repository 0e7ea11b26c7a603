"""Ways to a stimulator, against peers that answer as the real ones: well, late, never, no, and gone."""

from __future__ import annotations

import os
import socket
import statistics
import time
from itertools import accumulate, pairwise
from typing import Any

import pytest
import zmq
from output_rig import (
    PATIENT_MS,
    Board,
    acks,
    closing,
    command,
    connected,
    eventually,
    given_up,
    gui_http,
    maxlab,
    network_events,
    opened,
    quickly,
    ready,
    sent_and_done,
    spikeglx,
)

from spiked.act.outputs import exchange, serial_byte
from spiked.act.outputs.base import Output
from spiked.config import Output as OutputConfig
from spiked.config import parse
from spiked.errors import ConfigError, SourceError
from spiked.rehearsal import free_ports

PEERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "network_events": (network_events, "tcp", {"patterns": {"tetanus": 5}}),
    "oe_message": (gui_http, "http", {"patterns": {"tetanus": "ACQBOARD TRIGGER 3 1"}}),
    "maxlab": (maxlab, "tcp", {}),
    "spikeglx": (spikeglx, "tcp", {"patterns": {"tetanus": "Dev4/port0/line5"}}),
}
FIRST = {
    "network_events": "TTL Line=5 State=1",
    "oe_message": 'PUT /api/message HTTP/1.1 {"text": "ACQBOARD TRIGGER 3 1"}',
    "maxlab": "sequence_send tetanus",
    "spikeglx": "NIDOSET Dev4/port0/line5 255",
}
LOWERED = {"network_events": "TTL Line=5 State=0", "spikeglx": "NIDOSET Dev4/port0/line5 0"}


@pytest.fixture(autouse=True)
def kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy computer may be silent for long, and what keeps a connection open then is not what these tests count."""
    monkeypatch.setattr("spiked.act.outputs.spikeglx.ALIVE_S", 600.0)


def ways(kind: str, port: int, **more: Any) -> Output:
    return opened(
        kind, f"{PEERS[kind][1]}://127.0.0.1:{port}", **{**PEERS[kind][2], "timeout_ms": PATIENT_MS, **more}
    )


def settle(output: Output, seconds: float) -> None:
    """Nothing is told for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert quickly(output.poll) == []
        time.sleep(0.001)


def patiently(output: Output) -> None:
    """From here on answers are meant to come."""
    output._patience_ns = round(PATIENT_MS * 1e6)  # type: ignore[attr-defined]


def again(output: Output) -> None:
    """Until it is connected again; then what is up comes down."""
    eventually(lambda: settle(output, 0.005) or connected(output))
    output.halt()
    ready(output)


@pytest.mark.parametrize("kind", PEERS)
def test_said_as_the_peer_understands_it_and_acknowledged(kind: str) -> None:
    with PEERS[kind][0]() as peer, closing(ways(kind, peer.port, pulse_ms=5)) as output:
        ready(output)
        took_ms: list[float] = []

        def up_s() -> list[float]:
            return [b - a for (_, a), (_, b) in list(pairwise(peer.got))[::2]]

        def punctual() -> bool:
            up = kind not in LOWERED or 0.004 < statistics.median(up_s()[-3:]) < 0.05
            return up and min(took_ms) < 50

        while len(took_ms) < 3 or (len(took_ms) < 100 and not punctual()):  # a busy computer may hold some up
            ack = sent_and_done(output, command())
            assert ack.ok, ack.text
            took_ms.append((ack.ack_ns - ack.sent_ns) / 1e6)
            ready(output)
        assert min(took_ms) > 0 and punctual(), (took_ms, up_s())
        said = [text for text, _ in peer.got]
        assert said[0] == FIRST[kind] and said.count(FIRST[kind]) == len(took_ms)
        if kind in LOWERED:
            assert said[:2] == [FIRST[kind], LOWERED[kind]] and len(said) == 2 * len(took_ms)
        else:
            assert len(said) == len(took_ms)


@pytest.mark.parametrize("kind", PEERS)
def test_a_refusal_is_told_in_the_peers_own_words(kind: str) -> None:
    with PEERS[kind][0]() as peer, closing(ways(kind, peer.port)) as output:
        ready(output)
        peer.mood = "refuses"
        ack = sent_and_done(output, command())
        assert not ack.ok and ack.sent_ns > 0 and " refused: " in ack.text and "\n" not in ack.text
        peer.mood = "well"
        assert sent_and_done(output, command()).ok


@pytest.mark.parametrize("mood", ["silent", "slow"])
@pytest.mark.parametrize("kind", PEERS)
def test_no_answer_in_time_fails_and_the_next_command_is_answered(kind: str, mood: str) -> None:
    """The late answer to the first must not be taken for one to the second."""
    with PEERS[kind][0]() as peer, closing(ways(kind, peer.port, timeout_ms=150, pulse_ms=60_000)) as output:
        ready(output)
        peer.mood = mood
        ack = given_up(output, command(), 150)
        assert "did not answer within 150 ms; it may have acted" in ack.text
        patiently(output)
        peer.mood = "well"
        again(output)  # and the line of the first is down
        assert sent_and_done(output, command()).ok


class HeldUp:
    """A connection on which the answer comes just after it was looked for; only then time goes on, by a second."""

    def __init__(self) -> None:
        self.looks, self.renewed = 0, False

    def send(self, _data: bytes) -> bool:
        return True

    def receive(self) -> bytes | None:
        self.looks += 1
        if self.looks == 1:
            time.sleep(1.0)
            return None
        return b"Ok" if self.looks == 2 else None

    def renew(self) -> None:
        self.renewed = True

    def close(self) -> None: ...


def test_an_answer_that_came_while_the_process_was_held_up_is_in_time() -> None:
    """Else the peer would get no commands for a while, for nothing."""
    connection = HeldUp()
    words = exchange.Words(raise_=str.encode, judge=lambda reply: (reply == b"Ok", "?"))
    output = exchange.Exchange("out", "peer", connection, words, 100.0)
    output.send(command())
    acks_ = [a for _ in range(3) for a in output.poll()]
    assert [a.ok for a in acks_] == [True] and not connection.renewed


@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_that_goes_away_and_comes_back(kind: str) -> None:
    """What is commanded meanwhile is refused at once and never sent later."""
    port = free_ports(1)[0]
    with PEERS[kind][0](port) as peer:
        output = ways(kind, port)
        ready(output)
        assert sent_and_done(output, command()).ok
        ready(output)
    eventually(lambda: quickly(output.poll) == [] and not connected(output))
    ack = sent_and_done(output, command())
    assert not ack.ok and ack.text.startswith("no connection to ") and ack.sent_ns == 0
    with PEERS[kind][0](port) as peer:
        settle(output, 1.6)
        ready(output)
        assert peer.got == []
        assert sent_and_done(output, command()).ok
        output.close()


@pytest.mark.parametrize("kind", ["spikeglx", "oe_message"])
def test_a_connection_that_ends_instead_of_an_answer(kind: str) -> None:
    with PEERS[kind][0]() as peer, closing(ways(kind, peer.port, pulse_ms=60_000)) as output:
        ready(output)
        peer.mood = "leaves"
        ack = sent_and_done(output, command())
        assert not ack.ok and "closed the connection; it may have acted" in ack.text
        peer.mood = "well"
        again(output)
        assert sent_and_done(output, command()).ok


@pytest.mark.parametrize("kind", PEERS)
def test_nobody_there_at_the_start(kind: str) -> None:
    (port,) = free_ports(1)
    with pytest.raises(
        SourceError, match=rf"output out: nobody listens on 127.0.0.1:{port} .*start the program"
    ):
        ways(kind, port)


def test_commands_wait_for_the_answer_before_them_but_not_for_long() -> None:
    with maxlab() as peer, closing(ways("maxlab", peer.port, timeout_ms=100)) as output:
        patiently(output)
        ready(output)
        burst = [command() for _ in range(5)]
        for c in burst:
            quickly(output.send, c)
        assert [a.number for a in acks(output, 5) if a.ok] == [c.number for c in burst]
        peer.mood = "silent"
        output._patience_ns = 100_000_000  # type: ignore[attr-defined]
        burst = [command() for _ in range(12)]
        for c in burst:
            quickly(output.send, c)
        eventually(lambda: len(peer.got) >= 6)  # before anybody gives it up
        got = {a.number: a for a in acks(output, 12)}
        texts = [got[c.number].text for c in burst]
        assert "did not answer within 100 ms" in texts[0]
        assert all("too late; this one was not sent" in t for t in texts[1:9])
        assert all("8 commands wait" in t and "not sent" in t for t in texts[9:])
        assert [got[c.number].sent_ns > 0 for c in burst] == [True] + [False] * 11
        assert len(peer.got) == 6


def test_what_waited_for_an_answer_leaves_no_closer_together_than_it_may() -> None:
    with maxlab() as peer, closing(ways("maxlab", peer.port)) as output:
        ready(output)
        peer.mood = "slow"
        for _ in range(4):
            quickly(output.send, command(apart_ns=40_000_000))
        time.sleep(0.02)
        peer.mood = "well"
        told = acks(output, 4)
        left = [a.sent_ns for a in told]
        assert all(a.ok for a in told) and min(b - a for a, b in pairwise(left)) >= 40_000_000


@pytest.mark.parametrize("kind", PEERS)
def test_commands_do_not_pile_up_at_a_program_that_hangs(kind: str) -> None:
    """Its connections are taken for it, and what was sent over them lies there until it goes on."""
    with socket.socket() as listening, zmq.Context() as context, context.socket(zmq.REP) as rep:
        rep.linger = 0
        if PEERS[kind][1] == "tcp" and kind != "spikeglx":
            port = rep.bind_to_random_port("tcp://127.0.0.1")
        else:
            listening.bind(("127.0.0.1", 0))
            listening.listen(128)
            port = listening.getsockname()[1]
        with closing(ways(kind, port, timeout_ms=20, pulse_ms=1)) as output:
            eventually(lambda: connected(output))
            told, begun = [], time.monotonic()
            while (took := time.monotonic() - begun) < 2 or (len(told) <= 50 and took < 60):
                output.send(command())
                told += output.poll()
                time.sleep(0.005)
        left = {a.number for a in told if a.sent_ns}
        pauses_s = (0.5, 1.0, 2.0, *[4.0] * 20)
        assert 1 <= len(left) <= 1 + sum(took > s for s in accumulate(pauses_s)) and len(told) > 50
        if kind not in LOWERED:  # there the line that could not be lowered is in the way first
            assert any("did not answer lately, it is tried again in" in a.text for a in told)


def test_a_pattern_that_the_output_does_not_know() -> None:
    with spikeglx() as peer, closing(ways("spikeglx", peer.port)) as output:
        ready(output)
        ack = sent_and_done(output, command("other"))
        assert not ack.ok and ack.text == "output out knows no pattern 'other'; not sent" and peer.got == []


@pytest.mark.parametrize("kind", LOWERED)
def test_a_line_that_is_still_up_cannot_rise(kind: str) -> None:
    with PEERS[kind][0]() as peer, closing(ways(kind, peer.port, pulse_ms=60_000)) as output:
        ready(output)
        assert sent_and_done(output, command()).ok
        ack = sent_and_done(output, command())
        assert not ack.ok and ack.text == "the line of 'tetanus' is still up; not sent"
        output.halt()
        ready(output)
        assert sent_and_done(output, command()).ok


@pytest.mark.parametrize("kind", LOWERED)
def test_a_line_comes_down_when_the_output_is_closed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CLOSE_S", 30.0)
    with PEERS[kind][0]() as peer:
        output = ways(kind, peer.port, pulse_ms=60_000)
        ready(output)
        assert sent_and_done(output, command()).ok
        output.close()
        assert [t for t, _ in peer.got] == [FIRST[kind], LOWERED[kind]]


@pytest.mark.parametrize("kind", LOWERED)
def test_a_line_that_a_killed_process_left_up_is_lowered_by_the_next(kind: str) -> None:
    with PEERS[kind][0]() as peer:
        killed = ways(kind, peer.port, pulse_ms=60_000)
        ready(killed)
        assert sent_and_done(killed, command()).ok
        killed._transport.close()  # type: ignore[attr-defined]  # no last words
        with closing(ways(kind, peer.port, pulse_ms=10)) as output:
            output.take_over()
            assert not sent_and_done(output, command()).ok  # it may still be up
            ready(output)
            assert [t for t, _ in peer.got] == [FIRST[kind], LOWERED[kind]]
            assert sent_and_done(output, command()).ok


def test_a_line_that_does_not_come_down_is_told_and_tried_again() -> None:
    with spikeglx() as peer, closing(ways("spikeglx", peer.port, pulse_ms=60_000)) as output:
        ready(output)
        assert sent_and_done(output, c := command()).ok
        peer.mood = "refuses"
        output.halt()
        (told,) = acks(output)
        assert told.number == c.number and not told.ok and "could not be lowered, trying on" in told.text
        eventually(lambda: settle(output, 0.01) or len(peer.got) >= 4)  # told once
        settle(output, 0.1)
        peer.mood = "well"
        ready(output)
        assert [t for t, _ in peer.got].count(LOWERED["spikeglx"]) >= 3
        assert sent_and_done(output, command()).ok


def test_a_silent_connection_is_kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spiked.act.outputs.spikeglx.ALIVE_S", 0.1)
    with spikeglx() as peer, closing(ways("spikeglx", peer.port)) as output:
        eventually(lambda: settle(output, 0.01) or len(peer.got) >= 3)
        assert [t for t, _ in peer.got][:3] == ["NOOP"] * 3
        assert sent_and_done(output, command()).ok


# ---- serial ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("echo", [False, True])
def test_a_byte_over_a_serial_port(echo: bool) -> None:
    with (
        Board() as board,
        closing(
            opened(
                "serial", board.path, patterns={"tetanus": 7, "probe": "p"}, echo=echo, timeout_ms=PATIENT_MS
            )
        ) as output,
    ):
        assert sent_and_done(output, command()).ok
        took_ns: list[int] = []
        while not took_ns or (
            len(took_ns) < 100 and min(took_ns) >= 50e6
        ):  # a busy computer may hold some up
            ack = sent_and_done(output, command("probe"))
            assert ack.ok and ack.text == ("echo 112" if echo else "written")
            took_ns.append(ack.ack_ns - ack.sent_ns)
        assert min(took_ns) < 50e6
        assert not sent_and_done(output, command("other")).ok
        eventually(lambda: len(board.got) > len(took_ns))
        time.sleep(0.02)
        assert [b for b, _ in board.got] == [7] + [ord("p")] * len(took_ns)


@pytest.mark.parametrize("mood", ["silent", "slow"])
def test_a_board_that_does_not_echo(mood: str) -> None:
    with Board() as board:
        board.mood = mood
        with closing(
            opened("serial", board.path, patterns={"tetanus": 7}, echo=True, timeout_ms=50)
        ) as output:
            ack = given_up(output, command(), 50)
            assert "did not echo within 50 ms; the device may have acted" in ack.text


class Hanging:
    """A port whose device does not read: bytes stay in this computer."""

    def __init__(self) -> None:
        self.kept = b""

    @property
    def out_waiting(self) -> int:
        return len(self.kept)

    def write(self, data: bytes) -> int:
        self.kept += data
        return len(data)

    def read(self, _n: int) -> bytes:
        return b""

    def reset_output_buffer(self) -> None:
        self.kept = b""

    def close(self) -> None: ...


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("how", ["late", "stopped"])
def test_bytes_that_a_hanging_device_did_not_take_are_taken_back(how: str, echo: bool) -> None:
    """When it moves again it would carry them all out at once."""
    with (
        Board() as board,
        closing(
            opened("serial", board.path, patterns={"tetanus": 7}, echo=echo, timeout_ms=PATIENT_MS)
        ) as output,
    ):
        real, output._port = output._port, Hanging()  # type: ignore[attr-defined]
        real.close()
        commands = [command() for _ in range(5)]
        for c in commands:
            quickly(output.send, c)
        assert quickly(output.poll) == [] and output._port.out_waiting == 5  # type: ignore[attr-defined]
        if how == "stopped":
            quickly(output.halt)
        else:
            output._patience_ns = 0  # type: ignore[attr-defined]
        got = acks(output, 5)
        assert output._port.out_waiting == 0  # type: ignore[attr-defined]
        assert {a.number for a in got} == {c.number for c in commands} and not any(a.ok for a in got)
        assert all("may have acted nevertheless" in a.text and a.sent_ns for a in got)


def test_a_late_echo_is_not_that_of_the_next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()  # not running: the test answers

    def echo() -> None:
        os.write(board._master, b"\x07")
        time.sleep(0.01)

    with closing(opened("serial", board.path, patterns={"tetanus": 7}, echo=True, timeout_ms=50)) as output:
        monkeypatch.setattr(serial_byte, "LATE_NS", 60_000_000_000)
        assert not sent_and_done(output, command()).ok
        patiently(output)
        quickly(output.send, second := command())
        echo()
        assert quickly(output.poll) == []
        echo()
        (ack,) = acks(output)
        assert ack.ok and ack.number == second.number
        monkeypatch.setattr(serial_byte, "LATE_NS", 20_000_000)
        output._patience_ns = 50_000_000  # type: ignore[attr-defined]
        assert not sent_and_done(output, command()).ok
        patiently(output)
        time.sleep(0.03)  # lost on the way
        quickly(output.send, fourth := command())
        echo()
        (ack,) = acks(output)
        assert ack.ok and ack.number == fourth.number
    for fd in (board._master, board._slave):
        os.close(fd)


def test_a_board_that_is_unplugged() -> None:
    with (
        Board() as board,
        closing(
            opened("serial", board.path, patterns={"tetanus": 7}, echo=True, timeout_ms=PATIENT_MS)
        ) as output,
    ):
        assert sent_and_done(output, command()).ok
        board.unplug()
        ack = sent_and_done(output, command())
        assert not ack.ok and ("is gone" in ack.text or "not there" in ack.text)
        quickly(output.halt)
        ack = sent_and_done(output, command())
        assert not ack.ok and "not sent" in ack.text
        settle(output, 1.2)  # tries to open what is not there


def test_a_serial_port_that_is_not_there() -> None:
    with pytest.raises(SourceError, match=r"output out: cannot open /dev/nothing .*check the cable"):
        opened("serial", "/dev/nothing", patterns={"tetanus": 7})


# ---- configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"kind": "network_events", "patterns": {"p": 0}}, "p = 0 must be a TTL line from 1 to 256"),
        ({"kind": "network_events", "patterns": {"p": 1}, "address": "5556"}, "must look like tcp://127.0.0.1:5556"),
        ({"kind": "spikeglx", "patterns": {"p": "line5"}}, "must look like Dev4/port0/line5"),
        ({"kind": "serial", "address": "/dev/x", "patterns": {"p": 256}}, "must be a byte, 0 to 255"),
        ({"kind": "zmq", "address": "tcp://0.0.0.0:5580"}, "is not loopback; bind it on 127.0.0.1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(section: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        opened(**section)


def test_the_configuration_of_outputs() -> None:
    streams = {"stream": [{"name": "s", "source": "maxwell"}]}
    config = parse({**streams, "output": [{"name": "a", "kind": "maxlab"}, {"name": "b", "kind": "zmq"}]})
    assert [o.name for o in config.output] == ["a", "b"] and isinstance(config.output[0], OutputConfig)
    with pytest.raises(ConfigError, match="output names must differ: a, a"):
        parse({**streams, "output": [{"name": "a", "kind": "maxlab"}, {"name": "a", "kind": "zmq"}]})
    with pytest.raises(ConfigError, match="needs patterns"):
        parse({**streams, "output": [{"name": "a", "kind": "spikeglx"}]})
    with pytest.raises(ConfigError, match="needs address"):
        parse({**streams, "output": [{"name": "a", "kind": "serial", "patterns": {"p": 1}}]})


def test_streams_do_not_share_an_output() -> None:
    """One of them would have it, and the other's rules would be armed and never stimulate."""
    data = {
        "stream": [{"name": n, "source": "replay", "path": "x"} for n in "AB"], "output": [{"name": "o", "kind": "zmq"}, {"name": "p", "kind": "zmq"}],
        "trigger": [{"name": f"r{n}", "stream": n, "when": "unit", "units": [1], "output": "o"} for n in "AB"],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="triggers of A and of B name the output o; each stream needs an"):
        parse(data)
    data["trigger"][1]["output"] = "p"  # type: ignore[index]
    assert [[o.name for o in parse(data).outputs_of(n)] for n in "AB"] == [["o"], ["p"]]


def test_bits_of_the_ports_that_lines_are_on() -> None:
    from spiked.act.outputs.spikeglx import _bits

    assert _bits("Dev4/port0/line5") == _bits("Dev4/port0/line0:1,Dev4/port0/line5") == 255
    assert _bits("Dev6/port1/line2") == 255 << 8 and _bits("Dev6/port0,Dev6/port2") == 0xFF00FF
    assert _bits("Dev6") == _bits("") == 0
