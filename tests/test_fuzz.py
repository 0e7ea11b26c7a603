"""Hostile messages: every decoder takes them or refuses them as it says it does, and nothing else happens."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiked.bench import fuzz
from spiked.bench.fuzz import Decoder, Mutations, feed
from spiked.bench.fuzz_clients import published_message
from spiked.bench.fuzz_decoders import MAKERS, NAMES
from spiked.bench.fuzz_seeds import WEIGHTS
from spiked.errors import ConfigError
from spiked.publish.control import MOST_VALUES, read_request
from spiked.publish.mqtt_commands import Malformed
from spiked.publish.mqtt_commands import read as read_command
from spiked.sources.wire_openephys import WireError, data_fields, parse_header, parse_spike
from spiked.stream import StreamInfo
from spiked_client import protocol
from spiked_client.protocol import ProtocolError


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What is logged of hostile messages is no news here; and nothing of it leaves a timer behind."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder for files that are written thousands of times."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="spiked-fuzz-", dir=shm if shm.is_dir() else tmp_path) as folder:
        yield Path(folder)


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loaded machine may take; `spiked bench fuzz` has the real limits."""
    monkeypatch.setattr(fuzz, "SLOW_S", 30.0)
    monkeypatch.setattr(fuzz, "HANG_S", 600.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_takes_or_refuses_whatever_comes(
    name: str, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch)
    before = signal.getsignal(signal.SIGUSR2)
    decoder = MAKERS[name](memory)
    for (
        message
    ) in decoder.seeds:  # what is real gets through, or is refused as documented (an ERROR reply, say)
        for _ in range(2):
            with contextlib.suppress(*decoder.errors):
                decoder.feed(list(message))
    try:
        told = feed(decoder, max(int(4000 * WEIGHTS.get(name, 1.0)), 15), seed_of(name))
    finally:
        decoder.close()
        signal.signal(signal.SIGUSR2, before)
    assert not told.findings
    assert told.messages >= 15


def seed_of(name: str) -> int:
    return sum(map(ord, name))


def test_the_same_seed_makes_the_same_messages_and_another_does_not(tmp_path: Path) -> None:
    seeds = published_message(tmp_path).seeds
    a, b, c = (Mutations(seeds, n) for n in (1, 1, 2))
    first = [a.next() for _ in range(300)]
    assert first == [b.next() for _ in range(300)] != [c.next() for _ in range(300)]
    refused = 0
    for message in first:
        try:
            protocol.decode(message)
        except ProtocolError:
            refused += 1
    assert 100 < refused < 290  # neither noise only nor harmless only


def test_what_a_decoder_must_not_do_is_found_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder with the mistakes that were found in real ones."""
    patient(monkeypatch)

    def careless(frames: list[bytes]) -> None:
        header = msgpack.unpackb(frames[1], strict_map_key=False)
        int(header["seq"])

    told = feed(Decoder("careless", published_message(tmp_path).seeds, careless, (ProtocolError,)), 8000, 1)
    kinds = {f["error"].partition(":")[0] for f in told.findings}
    assert {"IndexError", "KeyError", "OverflowError", "TypeError"} <= kinds
    found = told.findings[0]
    with pytest.raises(Exception):  # noqa: B017 - the message that is shown makes the same again
        careless([bytes.fromhex(f.removesuffix("...")) for f in found["message"]])
    assert found["where"] and found["decoder"] == "careless"


def test_a_process_that_dies_is_a_finding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(fuzz, "_portion", patiently)
    result = fuzz.bench(60, 1, 1, told.append, only="superblock")
    assert (result["messages"], result["findings"], result["missing"]) == (60, 0, False)
    monkeypatch.setattr(fuzz, "_portion", die)
    result = fuzz.bench(60, 1, 1, told.append, only="superblock")
    assert result["missing"] and "the process died in or beside superblock" in result["found"][0]
    with pytest.raises(ConfigError, match="no decoder has 'nothing'"):
        fuzz.bench(60, 1, 1, told.append, only="nothing")


def patiently(name: str, messages: int, number: int) -> fuzz.Told:
    """As the workers do it, where a loaded machine may hold one up."""
    fuzz.SLOW_S = 30.0
    return feed(fuzz._decoders[name], messages, number)


def die(_name: str, _messages: int, _number: int) -> None:
    import os

    os._exit(1)


# ---- by hypothesis, which makes the failing message small ------------------------------------------------------

plain: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip
headers = st.dictionaries(
    st.sampled_from(["v", "seq", "run", "arrays", "sent_ns", "first", "stop", "stamps", "x"]), plain
)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=20), headers, st.lists(st.binary(max_size=100), max_size=3))
def test_any_header_makes_a_message_or_a_protocol_error(
    topic: bytes, header: dict[str, Any], arrays: list[bytes]
) -> None:
    frames = [
        topic,
        msgpack.packb(
            {"v": protocol.VERSION, "seq": 1, "run": "r", "arrays": ["spikes"] * len(arrays), **header}
        ),
        *arrays,
    ]
    try:
        message = protocol.decode(frames)
    except ProtocolError:
        return
    assert message.seq >= 1 and isinstance(message.header["run"], str)
    assert all(a.dtype == protocol.ARRAYS[name] for name, a in message.arrays.items())


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(["v", "id", "op", "stream", "sample", "trigger", "limits"]), plain))
def test_a_request_is_plain_or_refused(fields: dict[str, Any]) -> None:
    request: dict[str, Any] = {}
    try:
        read_request([msgpack.packb({"v": protocol.VERSION, "id": 1, "op": "status", **fields})], request)
    except ProtocolError:
        return
    json.loads(json.dumps(request, allow_nan=False))  # it goes on to other processes like this
    assert isinstance(request.get("stream"), str | None) and isinstance(request["op"], str)
    assert not any(isinstance(v, float) and not math.isfinite(v) for v in request.values())


@pytest.mark.parametrize(
    "bad", [b"x", float("nan"), float("inf"), 1 << 63, {1: 2}, [[[b""]]], [None] * (MOST_VALUES + 1)]
)
def test_a_request_with_this_in_it_is_refused(bad: Any) -> None:
    with pytest.raises(ProtocolError, match="a request h"):
        read_request([protocol.encode_request(1, op="x", deep={"er": [bad]})], {})
    with pytest.raises(ProtocolError):
        read_request([protocol.encode_request(1, op="x", stream=bad)], {})


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | headers.map(lambda d: repr(d).replace("'", '"').encode()))
def test_an_open_ephys_header_is_read_or_a_wire_error(raw: bytes) -> None:
    with contextlib.suppress(WireError):
        assert abs(data_fields(parse_header(raw))[3]) < 1 << 62
    with contextlib.suppress(WireError):
        parse_spike(raw, raw)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_an_mqtt_command_is_read_or_malformed(payload: bytes) -> None:
    try:
        assert {"id", "op", "arguments"} == set(read_command(payload))
    except Malformed as e:
        json.dumps({"id": e.args[1], "error": e.args[0]})  # what is answered


@settings(max_examples=200, deadline=None)
@given(plain)
def test_a_stream_description_is_whole_or_a_config_error(value: Any) -> None:
    good = json.loads(StreamInfo("s", 20_000.0, ("a",), ((0.0, 1.0),), "int16", (1.0,)).to_json())
    for key in good:
        try:
            text = json.dumps({**good, key: value})
        except (TypeError, ValueError):
            return
        try:
            with np.errstate(all="ignore"):
                info = StreamInfo.from_json(text)
        except ConfigError:
            continue
        assert info.n_channels == len(info.gain_uv) == len(info.positions_um)
