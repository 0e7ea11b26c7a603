"""`spiked init`: what it writes, from flags and at a terminal, and that every option in it is the configuration's own."""

from __future__ import annotations

import codecs
import os
import pty
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from source_rig import some_info

from spiked import config as configuration
from spiked.rehearsal import free_ports
from spiked.rig.described import options, tables
from spiked.rig.discover import discover
from spiked.rig.doctor import examine
from spiked.rig.write import rig_file
from spiked.sources import wire_maxwell
from spiked.sources.simulate import Cycle
from spiked.sources.simulate_spikeglx import SimProbe, SpikeGlxServer

ANSWERS: dict[str, Any] = {"rig": {"name": "rigA"}, "stream": [{"name": "p", "source": "openephys"}]}


def spiked(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "spiked.cli", *words], capture_output=True, text=True, cwd=cwd, check=False, stdin=subprocess.DEVNULL)  # fmt: skip


def test_every_option_is_in_the_file_with_its_default() -> None:
    text = rig_file(ANSWERS, "head")
    plain = configuration.parse(ANSWERS)
    assert configuration.parse(tomllib.loads(text)) == plain
    every = re.sub(r'(?m)^# ([a-z_0-9]+ = (?!NUMBER|"FILE"|"\.\.\."|\[\.\.\.\]).*)$', r"\1", text)
    for optional in ("output", "trigger"):  # their needed keys have no default
        every = re.sub(rf"(?s)\n# \[\[{optional}\]\].*?\n\n", "\n\n", every)
    assert configuration.parse(tomllib.loads(every)) == plain
    for name, model, _ in tables(configuration.Config):
        for key in [o.key for o in options(model)]:
            assert re.search(rf"(?m)^(# )?{key} = ", text), f"{name}.{key}"
    assert all(len(row) < 160 for row in text.splitlines())


def test_options_are_described_by_the_configurations_source() -> None:
    stream = {o.key: o for o in options(configuration.Stream)}
    assert stream["silence_s"].about == "how long the stream may stop before the session ends"
    assert stream["uv_per_bit"].about.startswith('openephys: "float"')  # a comment within brackets
    live = {o.key: o for o in options(configuration.Live)}
    assert (
        live["templates_from"].about.startswith("Who finds the units")
        and "lupin" in live["templates_from"].choices
    )
    assert {o.key for o in options(configuration.Trigger) if o.needed} == {"name", "when"}


def test_from_flags(tmp_path: Path) -> None:
    words = ("init", "rig.toml", "--source", "openephys", "--name", "rigA", "--sessions", str(tmp_path / "s"), "--stim-lines", "0,3", "--subject", "m1", "--yes")  # fmt: skip
    done = spiked(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = configuration.load(tmp_path / "rig.toml")
    assert (config.rig.name, config.rig.sessions, config.subject.id) == ("rigA", tmp_path / "s", "m1")
    assert config.stream[0].stim_lines == (0, 3)
    assert (tmp_path / "rig.toml").stat().st_mode & 0o777 == 0o640
    shape = [f for f in examine(tmp_path / "rig.toml", only=("probe", "files")) if f.level == "fail"]
    assert shape == []
    before = (tmp_path / "rig.toml").read_text()
    again = spiked(*words, cwd=tmp_path)
    assert (
        again.returncode == 2 and "--force" in again.stderr and (tmp_path / "rig.toml").read_text() == before
    )
    assert spiked(*words, "--force", cwd=tmp_path).returncode == 0
    wrong = spiked(
        "init", "x.toml", "--source", "openephys", "--name", "no spaces please", "--yes", cwd=tmp_path
    )
    assert wrong.returncode == 2 and "rig.name" in wrong.stderr and not list(tmp_path.glob("x.toml*"))
    assert "--yes" in spiked("init", "y.toml", cwd=tmp_path).stderr


def test_asked_at_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "map.cfg").write_text("0(1)0/0;1(2)17.5/0;2(3)0/17.5;3(4)17.5/17.5;")
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "spiked.cli", "init", "rig.toml"], stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path)  # fmt: skip
    os.close(slave)
    said, decoder = "", codecs.getincrementaldecoder("utf-8")()

    def until(text: str) -> None:
        nonlocal said
        end = time.monotonic() + 200
        while text not in said:
            assert time.monotonic() < end, said
            try:  # what it said last can still be read when it has ended
                said += decoder.decode(os.read(master, 4096))
            except OSError as e:
                raise AssertionError(said) from e
        said = said[said.index(text) + len(text) :]

    def answer(question: str, text: str) -> None:
        until(question)
        os.write(master, text.encode() + b"\n")

    try:
        answer("Name of the rig [", "rigB")
        answer("Folder for sessions [", str(tmp_path / "sessions"))
        until("Who sends the samples?")
        until("MaxLab Live")
        until("Number [1]:")
        os.write(master, b"9\n")
        until("a number from 1 to 3")
        listed = ["openephys", "maxwell", "spikeglx"]  # none of them runs here
        answer("Number [1]:", str(listed.index("maxwell") + 1))
        answer("Name of the stream [chip0]", "")
        answer("Address of MaxLab Live [tcp://127.0.0.1:7204]", "tcp://127.0.0.1:1")
        answer("electrode map", "nowhere.cfg")
        until("there is no")
        answer("electrode map", "map.cfg")
        answer("gain", "many")
        until("a number, please")
        answer("gain", "1024")
        answer("Subject", "mouse-17")
        until("wrote rig.toml")
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    config = configuration.load(tmp_path / "rig.toml")
    (stream,) = config.stream
    assert (stream.source, stream.name, stream.gain, stream.address) == ("maxwell", "chip0", 1024, "tcp://127.0.0.1:1")  # fmt: skip
    assert stream.electrode_map == tmp_path / "map.cfg" and config.subject.id == "mouse-17"


def test_what_listens_is_found() -> None:
    nobody, somebody = free_ports(2)
    with zmq.Context() as context, context.socket(zmq.PUB) as device:
        device.linger = 0
        address = f"tcp://127.0.0.1:{somebody}"
        device.bind(address)
        none = dict.fromkeys(("openephys", "spikeglx"), f"tcp://127.0.0.1:{nobody}")
        quiet = discover(addresses={**none, "maxwell": address})
        assert [(f.source, f.address) for f in quiet] == [("maxwell", address)] and "nothing yet" in quiet[
            0
        ].text
        import threading

        over = threading.Event()

        def send() -> None:
            while not over.wait(0.01):
                device.send_multipart([wire_maxwell.frame_head(7), bytes(4 * 64), b""])

        sender = threading.Thread(target=send)
        sender.start()
        try:
            (found,) = discover(addresses={**none, "maxwell": address})
            end = time.monotonic() + 60
            while "nothing yet" in found.text and time.monotonic() < end:  # it listens for a second or two
                (found,) = discover(addresses={**none, "maxwell": address})
        finally:
            over.set()
            sender.join()
    assert found.text == "MaxLab Live: 64 columns"


def test_all_streams_of_spikeglx(tmp_path: Path) -> None:
    codes = np.zeros((6000, 4), np.int16)
    probes = [SimProbe(Cycle(some_info(4, 30_000.0), codes), **more) for more in ({}, {}, {"device": "nidq"})]
    with SpikeGlxServer(probes) as server:
        words = ("--source", "spikeglx", "--address", server.address, "--sessions", str(tmp_path), "--yes")
        done = spiked("init", "rig.toml", *words, cwd=tmp_path)
        assert done.returncode == 0 and "has 3 streams" in done.stdout, done.stderr
        config = configuration.load(tmp_path / "rig.toml")
        told = [(s.name, s.device, s.probe_index, s.spikes, s.address) for s in config.stream]
        assert told == [
            ("imec0", "imec", 0, True, server.address), ("imec1", "imec", 1, True, server.address), ("nidq0", "nidq", 0, False, server.address),
        ]  # fmt: skip
        peers = [f for f in examine(tmp_path / "rig.toml", only=("peers",)) if f.check == "peers"]
        assert [f.level for f in peers] == ["ok"] * 3
