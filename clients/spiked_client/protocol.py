"""The message contract between the daemon and everybody else. Both sides import this module and nothing else.

A published message is `[topic, header, array, array, ...]`: the topic is ASCII, the header MessagePack, each
array raw little-endian records whose dtype the header names. Every topic counts its messages from 1 (`seq`);
`run` names the publisher's life, so that a restarted publisher is recognised and its `seq` starts again.

| topic             | arrays             | when                                                              |
|-------------------|--------------------|-------------------------------------------------------------------|
| spikes.<stream>   | spikes, blind      | one per chunk with sorted spikes or blindness, else every 100 ms  |
| early.<stream>    | early, resolved    | with live.early: spikes before they are final, and what became of |
|                   |                    | each: exactly one record of `resolved` per record of `early`      |
| mua.<stream>      | spikes             | unsorted detections per electrode (unit -1), from the first second|
| gaps.<stream>     | gaps               | samples that never arrived                                        |
| stim.<stream>     | stims              | TTL edges and stimulations                                        |
| units.<stream>    | units              | at the start where they are known, and after each calibration     |
| ledger.<stream>   | ledger             | every decision to stimulate, and again when more is known of it   |
| health            | none               | once a second: rates, latencies, counters                         |
| session           | none               | session started, stopped, calibrated, job finished                |
| clock             | none               | once a second: what each stream's sample numbers are in the first |

Every header holds `v` (version), `seq`, `run`, `arrays` (their names, in order) and `sent_ns`. Live messages
(all topics with a stream) also carry, where they apply:

| header field    | meaning                                                                       |
|-----------------|-------------------------------------------------------------------------------|
| first, stop     | sample numbers [first, stop) covered; consecutive messages leave no hole      |
| stamps          | map of monotonic ns: arrival (of the newest sample's chunk), cleaned,         |
|                 | detected, sorted, published                                                   |
| deadline_missed | true when the chunk took longer than the deadline                             |
| behind          | samples that already waited in the ring when this chunk was done              |
| latency_ms      | map n, mean, max over this message's spikes: from the arrival of the chunk    |
|                 | that held the trough to publication                                           |

| from_sample     | units: sorted with these units from this sample number on                     |
| sorter          | units: templates or rt_sort                                                   |
| id_confidence   | units: per unit, how surely it is the earlier unit of this id; 0: a new one   |
| expected        | units of templates: sorter -> accuracy, recall, precision -> per unit, from   |
|                 | spikes injected into the calibration; 0 for a unit that sorter has not        |

Monotonic nanoseconds compare between processes of one machine only.

The header of `health` is the control port's status: rig, state, session, error, and `streams`, a map of
stream name to samples (recorded so far), fs_hz, channels, gaps, gap_samples, processes, calibration (None, or state:
collecting, calculating, done, failed or cancelled; fraction; stage: the same in words), jobs, gpus and alarms (those
that stand); what its figures mean: spiked_client.figures. The header of `session` holds `event` (state, calibrated,
restart, error, gap, alarm, job ...) and whatever belongs to it. All of it is for display: a reader must bear any field missing.

The header of `clock` holds `reference` (the first stream's name) and `streams`: name -> sample and reference_sample (a
fraction too): taken at the same instant; ratio: reference samples per sample around it; ppm: how much faster than
nominal, against the reference; computer_ppm: against this computer; error_ms: one standard deviation; method: pulses,
arrival or same; n: points behind it; segment, from_sample: no line may be drawn across a new segment; steps: jumps so far;
pulses: matched, left_over, ambiguous. Before a clock is known all from sample to n are missing. A jump is told at once
on `session`: event "clock_step", stream, sample, ms, method. A stream whose source goes away while others record is told
there as "stream_lost", then "stream_back"; "stream_ended" and "stream_failed" are for good.

Requests. A request is one MessagePack map, a reply is one map, on the replay port followed by one raw frame.
Both carry `v` and `id`; the reply repeats the request's `id` and says `ok`, and when that is false, `error`
is one line for the operator. At most 1 MiB per request (replay: 4 KiB), of plain values: text, finite numbers below 2^63, lists
and maps with text keys. `retry_ms` in a refusal: it was for the rate, and the same may be asked again after so long.

| port    | request               | reply                                                                 |
|---------|-----------------------|-----------------------------------------------------------------------|
| control | op, and its arguments | the operation's own fields                                            |
| control | op "endpoints"        | streams: name -> {pub, replay, run}; health: address                  |
| control | op "describe"         | session; streams: name -> {fs_hz, channel_ids, positions_um (x, y per |
|         |                       | channel), geometry_known, source, first_sample}                       |
| control | op "template": stream,| kind, channels, fs_hz; templates: before, uv (float32 bytes, channels |
|         | unit                  | x samples, filtered); sequences: latency_ms, sd (in noise SDs)        |
| control | op "snippets": stream,| samples (those that could still be had), channels, uv (float32 bytes, |
|         | samples, channels,    | samples x channels x (before + after), raw); at most 32 samples and   |
|         | before, after         | 32 channels, before + after at most 512 samples                       |
| control | op "clocks"           | reference, columns; streams: name -> what `clock` tells, steps as a   |
|         |                       | list, starts: [segment, first sample], table: rows of `columns`       |
| control | op "jobs"             | jobs: the offline jobs, as `spiked jobs --json` lists them            |
| control | op "cancel_job",      | job, state                                                            |
|         | "retry_job": job      |                                                                       |
| control | op "arm"              | lease, lease_s, armed: names; what it takes: spiked_client.control    |
| replay  | topic, run, from, to  | run, newest, gone, next, sizes; then the stored messages in one frame |
|         |                       | (without run: of whoever publishes now)                               |

Ranges of the replay port are inclusive. `gone` is the last number of the range that is no longer stored (0:
nothing is gone), `next` the number to ask from for the rest (0: complete). `sizes` holds, per message, the
list of its frames' lengths; these frames follow one another in the reply's second frame. What lies beyond
`newest` is not an error: it was not published yet.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

VERSION = (1, 4)  # a differing first number is refused by name

SPIKE = np.dtype(
    [
        ("sample", "<i8"),  # sample number of the trough
        ("unit", "<i4"),  # -1: unsorted
        ("channel", "<u2"),  # index of the electrode with the largest deflection
        ("flags", "<u2"),  # TOLD_EARLY, or 0
        ("amplitude_uv", "<f4"),  # at the trough, negative for ordinary spikes
        # RT-Sort's confidence; a matched template's gain over its unit's threshold; an unsorted spike's probability
        ("score", "<f4"),
    ]
)
TOLD_EARLY = 1  # flag of a spike that was told on the early topic before it was final, or is told there now
EARLY = np.dtype([*SPIKE.descr, ("number", "<i8")])  # from 1, per stream and run
RESOLVED = np.dtype(
    [
        ("number", "<i8"),  # of the early decision
        ("early_sample", "<i8"),  # as it was told
        ("sample", "<i8"),  # of the final spike, maybe some samples off; -1: there is none
        ("unit", "<i4"),
        ("fate", "<i4"),  # index into FATES
    ]
)
# channel -1: all of them
BLIND = np.dtype([("start", "<i8"), ("stop", "<i8"), ("channel", "<i4"), ("reason", "<i4")])
GAP = np.dtype([("start", "<i8"), ("stop", "<i8"), ("n_channels", "<i4"), ("reason", "<i4")])
STIM = np.dtype([("sample", "<i8"), ("kind", "<i4"), ("line", "<i4"), ("state", "<i4"), ("value", "<f8")])
UNIT = np.dtype(
    [
        ("unit", "<i4"),
        ("channel", "<i4"),
        ("x_um", "<f4"),
        ("y_um", "<f4"),
        ("amplitude_uv", "<f4"),
        ("rate_hz", "<f4"),
    ]
)
TRIGGERS = 8  # spikes that a ledger record holds, the newest ones
LEDGER = np.dtype(
    [
        ("number", "<i8"),  # from 1, per stream and session; a later record of a number replaces the earlier
        ("rule", "S32"),  # empty: asked for over the control port
        ("pattern", "S32"),
        ("outcome", "<i4"),  # index into OUTCOMES
        ("reason", "<i4"),  # index into REASONS
        ("sample", "<i8"),  # of the spike that completed the rule
        ("trigger_ns", "<i8"),  # when that sample was taken, by the arrival of its chunk; 0: no spike
        ("decided_ns", "<i8"),
        ("sent_ns", "<i8"),  # 0: not sent
        ("sent_sample", "<i8"),  # the stream's sample number at that moment; -1: not sent
        ("ack_ns", "<i8"),  # 0: not acknowledged
        ("artifact_sample", "<i8"),  # where the stimulus was seen; -1: it was not
        ("artifact_ns", "<i8"),  # when it was known; 0: it was not seen
        ("amplitude_ua", "<f4"),  # nan: not known
        ("width_us", "<f4"),
        ("n_triggers", "<i4"),
        ("trigger_unit", "<i4", (TRIGGERS,)),
        ("trigger_sample", "<i8", (TRIGGERS,)),
    ]
)
ARRAYS = {
    "spikes": SPIKE, "early": EARLY, "resolved": RESOLVED, "blind": BLIND, "gaps": GAP, "stims": STIM, "units": UNIT, "ledger": LEDGER,
}  # fmt: skip

BLIND_REASONS = ("gap", "clipped", "artifact", "restart", "uncalibrated", "behind", "partial", "warmup")
GAP_REASONS = ("lost", "partial", "restart", "device", "reset")
# held: waits for its time. dry: nothing was armed. chance: `probability` said no. failed: the output could not.
OUTCOMES = ("held", "dry", "chance", "sham", "refused", "sent", "failed")
REASONS = (
    "", "blind", "confidence", "accuracy", "doubtful", "late", "stopped", "rate", "count", "lockout", "pulse charge", "charge rate",
    "queue full", "no output", "output", "ledger",
    # of what was decided on early spikes and not refused: not known yet, and what became of them
    "early", "confirmed", "withdrawn",
)  # fmt: skip
FATES = ("lost", "confirmed", "withdrawn")  # lost: a client's word for what it will not be told any more

MAX_FRAME_BYTES = 64 << 20
MAX_REQUEST_BYTES = 1 << 20


class ProtocolError(ValueError):
    """A message that does not follow the contract. Counted and dropped by whoever received it."""


class VersionMismatch(ProtocolError):
    """Client and daemon speak different major versions."""


@dataclass(frozen=True)
class Message:
    """One decoded message. `header` holds at least v, seq, run, sent_ns."""

    topic: str
    header: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def seq(self) -> int:
        return int(self.header["seq"])

    @property
    def kind(self) -> str:
        return self.topic.split(".", 1)[0]

    @property
    def stream(self) -> str:
        return self.topic.partition(".")[2]


def newest(ledger: np.ndarray) -> np.ndarray:
    """The last record of every number, by number; from LEDGER records in the order they were told."""
    _, last = np.unique(ledger["number"][::-1], return_index=True)
    return np.asarray(ledger[::-1][last])


def is_count(n: Any, least: int = 1) -> bool:
    """True for a whole number from `least` to 2^63 - 1."""
    return type(n) is int and least <= n < 1 << 63


def encode(
    topic: str, seq: int, run: str, header: dict[str, Any] | None = None, **arrays: np.ndarray
) -> list[bytes]:
    """Frames of one message. Array names are keys of ARRAYS; each must have that dtype.

    NumPy values and paths in the header become plain numbers and text; TypeError on anything else.
    """
    for name, a in arrays.items():
        if a.dtype != ARRAYS[name]:
            raise ProtocolError(f"array {name} has dtype {a.dtype}, the contract says {ARRAYS[name]}")
    head = {**(header or {}), "v": VERSION, "seq": seq, "run": run, "arrays": list(arrays)}
    head.setdefault("sent_ns", time.monotonic_ns())
    return [
        topic.encode(),
        msgpack.packb(head, default=_plain),
        *(np.ascontiguousarray(a).tobytes() for a in arrays.values()),
    ]


def unpack(data: bytes) -> dict[str, Any]:
    """A MessagePack map with text keys, or ProtocolError."""
    if len(data) > MAX_FRAME_BYTES:
        raise ProtocolError(f"frame of {len(data)} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        d = msgpack.unpackb(data, raw=False, strict_map_key=False)  # figures may be keyed by unit
    except Exception as e:  # msgpack raises many types on hostile bytes
        raise ProtocolError(f"not MessagePack: {type(e).__name__}") from e
    if not isinstance(d, dict) or not all(isinstance(k, str) for k in d):
        raise ProtocolError("not a MessagePack map with text keys")
    return d


def check_version(v: Any) -> None:
    """Raise VersionMismatch when the peer's major version differs from ours."""
    if not isinstance(v, list | tuple) or len(v) != 2 or not all(isinstance(n, int) for n in v):
        raise ProtocolError("message without a protocol version")
    if v[0] != VERSION[0]:
        raise VersionMismatch(
            f"peer speaks spiked protocol {v[0]}.{v[1]}, this side {VERSION[0]}.{VERSION[1]}; update one"
        )


def decode(frames: list[bytes]) -> Message:
    """One message from its frames; raises ProtocolError on anything that does not follow the contract."""
    if len(frames) < 2:
        raise ProtocolError(f"{len(frames)} frames, at least topic and header are needed")
    try:
        topic = bytes(frames[0]).decode("ascii")
    except UnicodeDecodeError as e:
        raise ProtocolError("topic is not ASCII") from e
    header = unpack(bytes(frames[1]))
    check_version(header.get("v"))
    names = header.get("arrays", [])
    if not isinstance(names, list) or len(names) != len(frames) - 2:
        raise ProtocolError("header and frames disagree on the arrays")
    if not is_count(header.get("seq")) or not isinstance(header.get("run"), str):
        raise ProtocolError("header without seq or run")
    newer = header["v"][1] > VERSION[1]
    arrays = {}
    for name, raw in zip(names, frames[2:], strict=True):
        dtype = ARRAYS.get(name) if isinstance(name, str) else None
        if dtype is None and newer and isinstance(name, str):
            continue  # a later minor version may add arrays; what we know still reads
        if dtype is None or len(raw) % dtype.itemsize or len(raw) > MAX_FRAME_BYTES:
            raise ProtocolError(f"array {name!r} of {len(raw)} bytes does not follow the contract")
        arrays[name] = np.frombuffer(bytes(raw), dtype)
    return Message(topic, header, arrays)


def encode_request(request_id: int, **fields: Any) -> bytes:
    """One request to the control or the replay port."""
    return bytes(msgpack.packb({**fields, "v": VERSION, "id": request_id}))


def encode_reply(request_id: int | None, ok: bool, **fields: Any) -> bytes:
    """The map of one reply. NumPy values and paths become plain numbers and text; TypeError on others."""
    return bytes(msgpack.packb({**fields, "v": VERSION, "id": request_id, "ok": ok}, default=_plain))


def decode_map(data: bytes) -> dict[str, Any]:
    """A request or a reply: a MessagePack map with a compatible version; raises ProtocolError."""
    d = unpack(data)
    check_version(d.get("v"))
    return d


def _plain(x: Any) -> Any:
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.ndarray):
        return x.tolist()
    if isinstance(x, os.PathLike):
        return os.fspath(x)
    raise TypeError(f"{type(x).__name__} does not travel in a message")
