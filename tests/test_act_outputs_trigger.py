"""The trigger socket and the receiving end that stimulators use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq
from output_rig import (
    PATIENT_MS,
    acks,
    closing,
    command,
    eventually,
    given_up,
    opened,
    quickly,
    sent_and_done,
)

from spiked.act.outputs import trigger
from spiked.act.outputs.base import Output
from spiked.config import Output as OutputConfig
from spiked.errors import ConfigError
from spiked.rehearsal import free_ports
from spiked_client.errors import ClientError
from spiked_client.stimulator import Stimulator, Wanted, encode


@contextmanager
def pulser(
    address: str, act: Callable[[Stimulator, Wanted], None] = Stimulator.answer, name: str = "pulser"
) -> Iterator[list[Wanted]]:
    """A stimulator's program in a thread."""
    got: list[Wanted] = []
    done = threading.Event()

    def run() -> None:
        with Stimulator(address, name) as s:
            while not done.is_set():
                wanted = s.receive(0.02)
                if wanted is not None:
                    got.append(wanted)
                    act(s, wanted)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield got
    finally:
        done.set()
        thread.join(30)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy computer may keep a stimulator from saying that it is there; the tests of its silence say how long that is."""
    monkeypatch.setattr(trigger, "SILENT_NS", 60_000_000_000)


def socket_at(port: int | None = None, **options: object) -> trigger.TriggerSocket:
    options = {"timeout_ms": PATIENT_MS, **options}
    return opened("zmq", f"tcp://127.0.0.1:{port or free_ports(1)[0]}", **options)  # type: ignore[return-value]


def until_there(output: Output, there: bool = True) -> None:
    until = time.monotonic() + 30
    while (output.there is not None) != there:  # type: ignore[attr-defined]
        assert time.monotonic() < until
        assert output.poll() == []
        time.sleep(0.002)


def test_a_command_arrives_whole_and_its_answer_comes_back() -> None:
    with closing(socket_at(patterns={"tetanus": "T1"})) as output, pulser(output.endpoint) as got:
        until_there(output)
        c = command(width_us=200.0)
        ack = sent_and_done(output, c)
        assert ack.ok and ack.ack_ns > ack.sent_ns
        (w,) = got
        assert (w.number, w.rule, w.sample, w.pattern, w.electrodes) == (c.number, "r", 4711, "T1", (3, 4))
        assert (w.amplitude_ua, w.width_us, w.decided_ns) == (5.0, 200.0, c.decided_ns)
        assert c.decided_ns < w.received_ns < ack.ack_ns
        assert sent_and_done(output, command("probe", amplitude_ua=None)).ok
        assert (got[1].pattern, got[1].amplitude_ua) == ("probe", None)
        for _ in range(100):  # a busy computer may hold some up
            if ack.ack_ns - ack.sent_ns < 50e6:
                break
            ack = sent_and_done(output, command())
        assert ack.ok and ack.ack_ns - ack.sent_ns < 50e6


def test_nobody_there_nothing_waits_for_them() -> None:
    with closing(socket_at()) as output:
        ack = sent_and_done(output, command())
        assert not ack.ok and ack.sent_ns == 0 and ack.text.startswith("no stimulator is connected to tcp://")
        with pulser(output.endpoint) as got:
            until_there(output)
            assert sent_and_done(output, c := command()).ok and [w.number for w in got] == [c.number]
        until_there(output, False)
        assert not sent_and_done(output, command()).ok


def test_refused_late_and_never_answered() -> None:
    too_late = threading.Event()

    def answer(s: Stimulator, w: Wanted) -> None:
        if w.pattern == "no":
            s.answer(w, False, "compliance voltage reached")
        elif w.pattern == "late":
            too_late.wait(30)
            s.answer(w)

    with closing(socket_at()) as output, pulser(output.endpoint, answer):
        until_there(output)
        ack = sent_and_done(output, command("no"))
        assert not ack.ok and ack.text == "pulser refused: compliance voltage reached"
    with closing(socket_at(timeout_ms=50)) as output, pulser(output.endpoint, answer):
        until_there(output)
        for pattern in ("late", "never"):
            ack = given_up(output, command(pattern), 50)
            assert "pulser did not answer within 50 ms; it may have acted" in ack.text
            too_late.set()
            eventually(lambda: output.poll() == [] and not output._late)  # a late answer is nobody's


class HeldUp:
    """A socket whose reader is held up just after a look that found nothing."""

    def __init__(self, real: Any, until: threading.Event) -> None:
        self._real, self._until, self._held = real, until, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def recv_multipart(self, *how: Any, **more: Any) -> Any:
        if self._held:
            return self._real.recv_multipart(*how, **more)
        self._held = True
        assert self._until.wait(60)
        time.sleep(3.0)
        raise zmq.Again


def test_an_answer_that_came_while_the_process_was_held_up_is_in_time() -> None:
    answered = threading.Event()

    def answer(s: Stimulator, w: Wanted) -> None:
        s.answer(w)
        answered.set()

    with closing(socket_at(timeout_ms=100)) as output, pulser(output.endpoint, answer):
        until_there(output)
        quickly(output.send, command())
        output._socket, real = HeldUp(output._socket, answered), output._socket  # type: ignore[attr-defined]
        found = [a.ok for _ in range(3) for a in output.poll()]
        output._socket = real  # type: ignore[attr-defined]
        assert found == [True]


def test_commands_do_not_pile_up_at_a_slow_stimulator() -> None:
    """It would go on with them for seconds after everything else has stopped."""

    going = threading.Event()

    def slowly(s: Stimulator, w: Wanted) -> None:
        going.wait(60)
        s.answer(w)

    with closing(socket_at(timeout_ms=50)) as output, pulser(output.endpoint, slowly) as got:
        until_there(output)
        told = []
        for _ in range(100):
            output.send(command())
            told += output.poll()
            time.sleep(0.01)
        eventually(lambda: got)
        going.set()
        sent = [a for a in told if a.sent_ns]
        eventually(lambda: len(got) >= len(sent))
        assert 1 <= len(sent) <= 8
        behind = [a for a in told if "is behind with" in a.text and a.text.endswith("was not sent")]
        assert len(behind) > 50 and not any(a.sent_ns or a.ok for a in behind)
        eventually(lambda: told.extend(output.poll()) or not output._late)
        assert len([a for a in told if a.sent_ns]) == len(got)
        quickly(output.send, command())  # it has caught up
        (ack,) = acks(output)
        assert ack.sent_ns


def test_who_never_answers_gets_further_commands_once_it_has_nothing_left() -> None:
    with closing(socket_at(timeout_ms=20)) as output, pulser(output.endpoint, lambda s, w: None) as got:
        until_there(output)
        assert sent_and_done(output, command()).sent_ns
        assert not sent_and_done(output, command()).sent_ns
        until = time.monotonic() + 60
        while len(got) < 2 and time.monotonic() < until:
            output.send(command())
            acks(output)
        assert len(got) == 2


def test_an_emergency_stop_reaches_commands_that_the_stimulator_has_not_begun_with() -> None:
    begun = threading.Event()

    def slowly(s: Stimulator, w: Wanted) -> None:
        if not begun.is_set():
            eventually(lambda: s._fetch() or len(s._inbox) == 2)
            begun.set()
            s._socket.poll(30_000)  # the stop lies there
        s.answer(w)

    with closing(socket_at()) as output, pulser(output.endpoint, slowly) as got:
        until_there(output)
        for _ in range(3):
            output.send(command())
        assert begun.wait(30)
        output.halt()
        told = acks(output, 3)
        assert [a.ok for a in told] == [True, False, False] and len(got) == 1
        assert all(a.text == "pulser refused: stopped before it was carried out" for a in told[1:])
        assert sent_and_done(output, command()).ok and len(got) == 2


def test_one_stimulator_at_a_time() -> None:
    with closing(socket_at()) as output, pulser(output.endpoint, name="first") as got:
        until_there(output)
        refused: list[str] = []

        def second() -> None:
            with Stimulator(output.endpoint, "second") as s:
                try:
                    s.receive(30.0)
                except ClientError as e:
                    refused.append(str(e))

        thread = threading.Thread(target=second)
        thread.start()
        while thread.is_alive():
            output.poll()
            time.sleep(0.002)
        assert refused == [f"{output.endpoint}: 'first' has this trigger socket; end that program first"]
        assert sent_and_done(output, command()).ok and len(got) == 1


def speaks(stimulator: Stimulator, output: trigger.TriggerSocket) -> None:
    """Until the output has heard of it."""
    eventually(lambda: stimulator.receive(0.02) or output.poll() or output.there is not None)


def test_a_stimulator_that_died_makes_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed: no word of farewell. The connection's end, or two seconds of silence, say it."""
    monkeypatch.setattr(trigger, "SILENT_NS", 2_000_000_000)
    with closing(socket_at(timeout_ms=100)) as output:
        dead = Stimulator(output.endpoint, "dead")
        dead.__enter__()
        speaks(dead, output)
        dead._socket.close(0)
        with pulser(output.endpoint, name="next") as got:
            until = time.monotonic() + 60
            while not got and time.monotonic() < until:
                output.send(command())
                acks(output, 1)
                time.sleep(0.02)
            assert got
        dead._context.term()


def test_a_hung_stimulator_is_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger, "SILENT_NS", 200_000_000)
    with closing(socket_at()) as output, Stimulator(output.endpoint) as hung:
        speaks(hung, output)
        time.sleep(0.25)
        assert output.poll() == []
        time.sleep(0.25)
        assert not sent_and_done(output, command()).ok
        monkeypatch.setattr(trigger, "SILENT_NS", 60_000_000_000)
        before_ns = output._heard_ns

        def moves() -> bool:  # and it gets new commands only
            assert hung.receive(0.1) is None and output.poll() == []
            return output._heard_ns > before_ns

        eventually(moves)
        output.send(c := command())
        wanted = hung.receive(30.0)
        assert wanted is not None and wanted.number == c.number


def test_the_daemon_restarts_and_the_stimulator_finds_it_again() -> None:
    (port,) = free_ports(1)
    first = socket_at(port)
    with pulser(first.endpoint) as got:
        until_there(first)
        first.close()
        with closing(socket_at(port)) as output:
            until_there(output)
            assert sent_and_done(output, command()).ok and len(got) == 1


def test_nonsense_changes_nothing() -> None:
    with (
        closing(socket_at()) as output,
        pulser(output.endpoint) as got,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as stranger,
    ):
        until_there(output)
        stranger.linger = 0
        stranger.connect(output.endpoint)
        nonsense = [b"", b"\xff", encode("done", number=1, ok=True), encode("leave"), encode("ready") + b"x"]
        for data in nonsense:
            stranger.send(data)
        stranger.send_multipart([b"a", b"b"])
        for _ in range(100):
            assert quickly(output.poll) == []
            time.sleep(0.001)
        assert sent_and_done(output, command()).ok and len(got) == 1


def test_a_taken_port() -> None:
    with (
        closing(socket_at()) as output,
        pytest.raises(ConfigError, match=r"cannot bind .* choose another port"),
    ):
        trigger.TriggerSocket(OutputConfig(name="b", kind="zmq", address=output.endpoint))
