"""Operations on triggers over several streams: one answer, and nothing half armed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spiked.errors import SpikedError
from spiked.stimulation import KEPT_LEASES, Stimulation


class FakeLive:
    """A live process with some triggers."""

    running = True

    def __init__(self, *triggers: str, silent: bool = False) -> None:
        self.triggers, self.silent = triggers, silent
        self.leases: set[str] = set()
        self.commands: list[str] = []

    async def ask(self, op: str, _timeout_s: float, **fields: Any) -> dict[str, Any] | None:
        if self.silent:
            return None
        if op == "set_limits" and self.leases:
            return {"ok": False, "error": "max_count cannot be raised while armed; disarm first"}
        if not fields.get("check"):
            self.commands.append(op)
        if op == "disarm":
            self.leases -= {fields["lease"]} if fields["lease"] else self.leases
        if op == "arm":
            mine = [t for t in self.triggers if fields["triggers"] is None or t in fields["triggers"]]
            self.leases |= {fields["lease"]} if mine else set()
            return {"ok": True, "armed": mine}
        if op == "renew" and fields["lease"] not in self.leases:
            return {"ok": False, "error": "this lease is over"}
        return {"ok": True}

    def command(self, op: str, **fields: Any) -> None:
        self.commands.append(op)
        if op == "disarm":
            self.leases.discard(fields["lease"])


def rig(folder: Path, **lives: FakeLive) -> Stimulation:
    tracks = {name: SimpleNamespace(children={"live": live}) for name, live in lives.items()}
    journal = SimpleNamespace(note=lambda *_, **__: None)
    session = SimpleNamespace(state="recording", folder=folder, tracks=tracks, journal=journal)
    return Stimulation(lambda: session)  # type: ignore[arg-type, return-value]


async def test_arming_some_of_two_streams(tmp_path: Path) -> None:
    a, b = FakeLive("x", "y"), FakeLive("z")
    s = rig(tmp_path, a=a, b=b)
    told = await s.arm({"triggers": ["x"], "lease_s": 2})
    assert told["armed"] == ["x"] and a.leases == {told["lease"]} and not b.leases
    await s.renew(told)
    a.leases.clear()  # it was restarted
    with pytest.raises(SpikedError, match="lease is over"):
        await s.renew(told)
    everything = await s.arm({})
    assert everything["armed"] == ["x", "y", "z"]
    await s.renew(everything)
    b.leases.clear()
    with pytest.raises(SpikedError, match="lease is over"):
        await s.renew(everything)


async def test_a_lease_that_is_renewed_is_not_forgotten_for_those_that_are_not(tmp_path: Path) -> None:
    a = FakeLive("x")
    s = rig(tmp_path, a=a)
    told = await s.arm({"triggers": ["x"]})
    for _ in range(KEPT_LEASES + 20):
        await s.arm({})
        await s.renew(told)
    assert len(s._leases) == KEPT_LEASES


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"triggers": ["x", "none"]}, "there is no trigger 'none'; nothing was armed"),
        ({"triggers": "x"}, "list of names"),
        ({"lease_s": "long"}, "number of seconds"),
        ({"stream": "c"}, "no stream c; the session has a, b"),
    ],
)
async def test_what_cannot_be_armed_whole_is_not_armed(
    tmp_path: Path, request_: dict[str, Any], said: str
) -> None:
    a, b = FakeLive("x"), FakeLive("z")
    with pytest.raises(SpikedError, match=said):
        await rig(tmp_path, a=a, b=b).arm(request_)
    assert not a.leases and not b.leases


async def test_a_live_process_that_does_not_answer_is_named(tmp_path: Path) -> None:
    a = FakeLive("x")
    s = rig(tmp_path, a=a, b=FakeLive(silent=True))
    with pytest.raises(SpikedError, match=r"^b: the live process did not answer"):
        await s.arm({})
    assert not a.leases


async def test_the_stop_needs_no_answer(tmp_path: Path) -> None:
    a = FakeLive("x", silent=True)
    await rig(tmp_path, a=a).stop_stimulation({"why": "smoke"})
    assert (tmp_path / "STOP").read_text() == "smoke\n" and a.commands == ["stop_stimulation"]
    nobody = Stimulation(lambda: None)
    with pytest.raises(SpikedError, match="no session"):
        await nobody.stop_stimulation({})
    over = SimpleNamespace(state="queued", folder=tmp_path, tracks={})
    with pytest.raises(SpikedError, match="no session"):  # the next session would know nothing of it
        await Stimulation(lambda: over).stop_stimulation({})  # type: ignore[arg-type, return-value]
    with pytest.raises(SpikedError, match="start one first"):
        await nobody.triggers({})


async def test_a_stop_that_cannot_be_put_on_file_is_confirmed_by_every_live_process(tmp_path: Path) -> None:
    """Else it would be acknowledged, and a live process that did not hear of it would go on."""
    gone = tmp_path / "gone"
    a, b = FakeLive("x"), FakeLive("z")
    s = rig(gone, a=a, b=b)
    await s.stop_stimulation({"why": "smoke"})
    assert a.commands == b.commands == ["stop_stimulation"] * 2
    with pytest.raises(
        SpikedError, match="stimulation was stopped; clear_stop first"
    ):  # also of one that was restarted since
        await s.arm({})
    await s.clear_stop({})
    assert (await s.arm({}))["armed"] == ["x", "z"]
    with pytest.raises(
        SpikedError,
        match=r"^the file STOP cannot be written .*, and not every live process confirmed the stop: b: [^\n]*$",
    ):
        await rig(gone, a=FakeLive("x"), b=FakeLive(silent=True)).stop_stimulation({})


async def test_limits_are_changed_in_all_streams_or_in_none(tmp_path: Path) -> None:
    a, b = FakeLive("x"), FakeLive("z")
    s = rig(tmp_path, a=a, b=b)
    await s.arm({"triggers": ["x"]})
    for request in ({"limits": {"max_count": 9}}, {"limits": {"max_count": 9}, "stream": "b"}):
        with pytest.raises(SpikedError, match="cannot be raised while armed"):
            await s.set_limits(request)
    assert "set_limits" not in a.commands + b.commands
    await s.disarm({})
    assert set((await s.set_limits({"limits": {"max_count": 9}, "stream": "b"}))["streams"]) == {"b"}
    assert "set_limits" in b.commands and "set_limits" not in a.commands


async def test_nobody_arms_between_the_check_of_limits_and_their_change(tmp_path: Path) -> None:
    a, b = FakeLive("x"), FakeLive("z")
    s = rig(tmp_path, a=a, b=b)
    going, ask = asyncio.Event(), b.ask

    async def slowly(op: str, timeout_s: float, **fields: Any) -> dict[str, Any] | None:
        if op == "set_limits":
            await going.wait()
        return await ask(op, timeout_s, **fields)

    b.ask = slowly  # type: ignore[method-assign]
    change = asyncio.create_task(s.set_limits({"limits": {"max_count": 9}}))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(SpikedError, match="limits are being changed just now; arm again"):
        await s.arm({"stream": "a"})
    going.set()
    await change
    assert "set_limits" in a.commands and not a.leases
    b.ask, b.silent = ask, True  # type: ignore[method-assign]
    hung = asyncio.create_task(s.arm({"stream": "b"}))
    assert (await s.arm({"stream": "a"}))["armed"] == ["x"]  # one that hangs holds up no other
    with pytest.raises(SpikedError):
        await hung


async def test_one_of_several_streams_must_be_named(tmp_path: Path) -> None:
    s = rig(tmp_path, a=FakeLive("x"), b=FakeLive("z"))
    with pytest.raises(SpikedError, match="name the stream: a, b"):
        await s.set_trigger({"trigger": {"name": "n"}})
    b = FakeLive("z")
    await rig(tmp_path, a=FakeLive("x"), b=b).set_trigger({"trigger": {"name": "n", "stream": "b"}})
    assert b.commands == ["set_trigger"]
