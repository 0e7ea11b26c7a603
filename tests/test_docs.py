"""What the documentation says is so: records, operations, commands."""

from __future__ import annotations

import re
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

from spiked import cli
from spiked.config import Config
from spiked.publish.zmq_pub import Publisher
from spiked.service import Service
from spiked_client import protocol

ROOT = Path(__file__).parent.parent
PROTOCOL = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS = {"int64": "q", "int32": "i", "uint16": "H", "float32": "f", "float64": "d", "char": "s"}


def records() -> dict[str, tuple[int, list[tuple[int, str, str, str]]]]:
    """Array -> its size and (offset, type, field, meaning) rows, from the tables of the page."""
    found = {}
    for name, size, rest in re.findall(
        r"^`(\w+)`, (\d+) bytes[^\n]*\n\n((?:\|.*\n)+)", PROTOCOL, re.MULTILINE
    ):
        rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in rest.splitlines()[2:]]
        found[name] = int(size), [(int(r[0]), r[1], r[2], r[3] if len(r) > 3 else "") for r in rows]
    return found


def test_every_array_is_described_as_it_is() -> None:
    described = records()
    assert set(described) == set(protocol.ARRAYS)
    for name, (size, rows) in described.items():
        dtype = protocol.ARRAYS[name]
        assert size == dtype.itemsize and [r[2] for r in rows] == list(dtype.names or ())
        for offset, kind, field, _ in rows:
            item, count = re.fullmatch(r"(\w+?)(?:\[(\d+)\])?", kind).groups()  # type: ignore[union-attr]
            code = f"S{count}" if item == "char" else item
            want = np.dtype(code) if item == "char" or not count else np.dtype((code, (int(count),)))
            assert dtype.fields is not None and dtype.fields[field][:2] == (want, offset), (name, field)


@pytest.mark.parametrize(
    ("array", "field", "names"),
    [
        ("blind", "reason", protocol.BLIND_REASONS),
        ("gaps", "reason", protocol.GAP_REASONS),
        ("ledger", "outcome", protocol.OUTCOMES),
        ("ledger", "reason", ("none", *protocol.REASONS[1:])),
    ],
)
def test_numbers_stand_for_what_is_said(array: str, field: str, names: tuple[str, ...]) -> None:
    meaning = next(r[3] for r in records()[array][1] if r[2] == field)
    assert meaning == ", ".join(f"{i} {name}" for i, name in enumerate(names))


def test_the_version_and_the_operations_are_those_of_the_daemon() -> None:
    assert f"**{protocol.VERSION[0]}.{protocol.VERSION[1]}**" in PROTOCOL
    table = PROTOCOL[PROTOCOL.index("| op | takes") : PROTOCOL.index("`stream` may be left out")]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(
        Service(Config.model_validate({"stream": [{"name": "x", "source": "maxwell"}]}))._handlers()
    )


def test_a_client_made_from_the_tables_reads_a_real_message() -> None:
    spikes = np.zeros(3, protocol.SPIKE)
    spikes["sample"], spikes["unit"], spikes["amplitude_uv"] = [7, 8, 1 << 40], [-1, 2, 3], [-80, -90.5, -55]
    blind = np.array([(5, 9, -1, 2)], protocol.BLIND)
    context = zmq.Context()
    with Publisher("127.0.0.1", 0, None, "a") as publisher:
        sub = context.socket(zmq.SUB)
        sub.connect(publisher.endpoints["pub"])
        sub.subscribe("spikes.")
        while not sub.poll(20):
            publisher.send("spikes.x", {"first": 5, "stop": 9}, spikes=spikes, blind=blind)
        frames = sub.recv_multipart()
        sub.close(0)
    context.term()
    head = msgpack.unpackb(frames[1])
    assert frames[0] == b"spikes.x" and head["stop"] == 9 and head["arrays"] == ["spikes", "blind"]
    described = records()
    told = {name: list(unpacked(*described[name], frames[2 + i])) for i, name in enumerate(head["arrays"])}
    assert [s["sample"] for s in told["spikes"]] == [7, 8, 1 << 40]
    assert [s["unit"] for s in told["spikes"]] == [-1, 2, 3]
    assert [s["amplitude_uv"] for s in told["spikes"]] == [-80.0, -90.5, -55.0]
    assert told["blind"] == [{"start": 5, "stop": 9, "channel": -1, "reason": 2}]


def unpacked(size: int, rows: list[tuple[int, str, str, str]], raw: bytes) -> Iterator[dict[str, object]]:
    for at in range(0, len(raw), size):
        yield {r[2]: struct.unpack_from("<" + KINDS[r[1]], raw, at + r[0])[0] for r in rows}


def commands(page: Path) -> list[str]:
    """Every line of the page's shell blocks that calls `spiked`."""
    blocks = re.findall(r"^```(?:sh|console|bash)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    calls = [line.strip() for line in lines if re.match(r"(?:sudo )?spiked ", line.strip())]
    return [line.removesuffix("&") for line in calls if line.isascii()]  # else part of a figure


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_is_one(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(re.split(r"\s(?:\|\|?|&&|2?>)\s", line)[0], comments=True)
        words = words[words.index("spiked") + 1 :]
        try:
            cli.parser().parse_args(words)
        except SystemExit as e:
            raise AssertionError(f"{page.name}: `{line}` is not a command") from e


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
