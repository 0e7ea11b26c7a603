"""The contract: what is written reads back, anything else is a ProtocolError and nothing worse."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from client_rig import blind, spikes
from hypothesis import given, settings
from hypothesis import strategies as st

from spiked_client import protocol
from spiked_client.protocol import ARRAYS, Message, ProtocolError, VersionMismatch

# One message of protocol 1.0 as bytes, made without this code. It must read while the major version is 1.
GOLDEN = [
    b"spikes.A",
    bytes.fromhex(
        "87 a5 6669727374 1e a4 73746f70 3c a5 7374657073 04 a1 76 92 01 00 a3 736571 07 a3 72756e"
        "a5 72756e2d31 a6 617272617973 92 a6 7370696b6573 a5 626c696e64"
    ),
    struct.pack("<qiHHff", 42, 7, 3, 1, -55.5, 0.75),
    struct.pack("<qqii", 30, 40, -1, 2),
]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
texts = st.text(max_size=8) | st.sampled_from([*ARRAYS, "health"])


def test_bytes_of_protocol_1_0_still_read() -> None:
    m = protocol.decode(GOLDEN)
    assert (m.topic, m.kind, m.stream, m.seq, m.header["run"]) == ("spikes.A", "spikes", "A", 7, "run-1")
    assert (m.header["first"], m.header["stop"], m.header["steps"]) == (30, 60, 4)  # `steps`: unknown, kept
    assert m.arrays["spikes"].tolist() == [(42, 7, 3, 1, -55.5, 0.75)]
    assert m.arrays["blind"].tolist() == [(30, 40, -1, 2)]
    assert {k: v.itemsize for k, v in ARRAYS.items()} == {
        "spikes": 24,
        "early": 32,
        "resolved": 32,
        "blind": 24,
        "gaps": 24,
        "stims": 28,
        "units": 24,
        "ledger": 252,
    }


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.text(max_size=8), values, max_size=5),
    st.integers(1, 2**63 - 1),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20),
)
def test_what_is_encoded_decodes(header: dict[str, Any], seq: int, samples: list[int]) -> None:
    m = protocol.decode(protocol.encode("spikes.A", seq, "r", header, spikes=spikes(*samples), blind=blind()))
    own = ("v", "seq", "run", "arrays", "sent_ns")
    assert {k: v for k, v in m.header.items() if k not in own} == {
        k: v for k, v in header.items() if k not in own
    }
    assert (m.seq, m.arrays["spikes"]["sample"].tolist(), len(m.arrays["blind"])) == (seq, samples, 0)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.binary(max_size=60), max_size=6)
    | st.tuples(st.binary(max_size=10), values.map(msgpack.packb)).map(list)
    | st.tuples(
        st.just(b"spikes.A"),
        st.fixed_dictionaries(
            {},
            optional={
                "v": st.just([1, 0]) | st.just([1, 7]) | values,
                "seq": st.integers().filter(lambda n: abs(n) < 2**63) | values,
                "run": st.text(max_size=3) | values,
                "arrays": st.lists(texts, max_size=2) | values,
            },
        ).map(msgpack.packb),
        st.binary(max_size=60),
    ).map(list)
)  # fmt: skip
def test_decode_of_anything_gives_a_message_or_a_protocol_error(frames: list[bytes]) -> None:
    with contextlib.suppress(ProtocolError):
        m = protocol.decode(frames)
        assert (
            isinstance(m, Message)
            and m.seq >= 1
            and isinstance(m.header["run"], str)
            and m.header["v"][0] == 1
        )


def test_every_truncation_and_every_flipped_byte_of_a_message() -> None:
    frames = protocol.encode("spikes.A", 7, "run-1", {"first": 1}, spikes=spikes(1, 2))
    refused = 0
    for i, frame in enumerate(frames):
        damaged = [frame[:n] for n in range(len(frame))]
        damaged += [bytes([*frame[:n], frame[n] ^ 0xFF, *frame[n + 1 :]]) for n in range(len(frame))]
        for d in damaged:
            try:
                protocol.decode([*frames[:i], d, *frames[i + 1 :]])
            except ProtocolError:
                refused += 1
    assert refused > len(frames[1])  # at least every truncated header
    for n in range(len(frames)):
        with pytest.raises(ProtocolError):
            protocol.decode(frames[:n])


@pytest.mark.parametrize("v", [[2, 0], [0, 9], (7, 1)])
def test_another_major_version_is_refused_by_name(v: Any) -> None:
    head = msgpack.packb({"v": v, "seq": 1, "run": "r", "arrays": []})
    with pytest.raises(VersionMismatch, match=rf"peer speaks spiked protocol {v[0]}\.{v[1]}, this"):
        protocol.decode([b"health", head])


def test_a_newer_minor_version_may_add_fields_and_arrays() -> None:
    head = {
        "v": [1, protocol.VERSION[1] + 1],
        "seq": 1,
        "run": "r",
        "arrays": ["waveforms", "spikes"],
        "tempo": "allegro",
    }
    m = protocol.decode([b"spikes.A", msgpack.packb(head), b"xyz", spikes(5).tobytes()])
    assert list(m.arrays) == ["spikes"] and m.arrays["spikes"]["sample"].tolist() == [5]
    with pytest.raises(ProtocolError, match="'waveforms' of 3 bytes does not follow"):
        protocol.decode([b"spikes.A", msgpack.packb({**head, "v": [1, 0]}), b"xyz", spikes(5).tobytes()])


def test_figures_of_a_header_may_be_keyed_by_unit_and_come_from_numpy() -> None:
    figures = {"rates_hz": {3: np.float32(1.5), 5: 2}, "n": np.int64(4), "folder": Path("/data/s1")}
    got = protocol.decode(protocol.encode("health", 1, "r", figures)).header
    assert (got["rates_hz"], got["n"], got["folder"]) == ({3: 1.5, 5: 2}, 4, "/data/s1")
    with pytest.raises(ProtocolError, match="text keys"):
        protocol.unpack(msgpack.packb({1: 2}))


def test_arrays_of_another_dtype_are_not_sent() -> None:
    with pytest.raises(ProtocolError, match="array spikes has dtype float64, the contract says"):
        protocol.encode("spikes.A", 1, "r", spikes=np.zeros(2))
