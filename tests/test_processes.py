"""The line between the supervisor and its processes, where it is thin: long words, last words, signals, orphans."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
from record_rig import FIRST, Feed, config, samples, stream

from spiked import config as configuration
from spiked.processes.acquire import Acquire
from spiked.processes.child import Child
from spiked.record.nwbfile import DATA
from spiked.ring import H_WRITER, Ring
from spiked.stream import Block


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_description_longer_than_a_pipe_arrives() -> None:
    """A stream of 1536 channels takes 75 kB, a pipe holds 64: acquire waits for the answer, and must send the rest."""
    code = """
from spiked.processes.link import Link
link = Link("acquire")
link.tell("stream", info="x" * 300_000)
while not link.stop.is_set():
    link.next_command(0.02)
"""
    with child(code) as p:
        assert p.stdout is not None and p.stdin is not None
        lines: list[bytes] = []
        reader = threading.Thread(target=lambda: lines.append(p.stdout.readline()), daemon=True)
        reader.start()
        reader.join(120.0)
        p.stdin.close()
        p.wait(120)
    assert lines and json.loads(lines[0])["info"] == "x" * 300_000


def test_last_words_are_heard_by_a_supervisor_that_was_busy() -> None:
    code = """
import sys, types
from spiked.errors import SourceError
from spiked.processes import run
role = types.ModuleType("role")
def main(args, link):
    for _ in range(40):
        link.tell("log", text="x" * 3000)
    raise SourceError("the device is gone; look for it")
role.main = main
sys.modules["role"] = role
run.ROLES["acquire"] = "role"
sys.exit(run.main(["acquire", "--session", ".", "--stream", "s", "--ring", "r"]))
"""
    with child(code) as p:
        assert p.stdout is not None
        time.sleep(1.0)  # it has filled the pipe, and wants to go
        events = [json.loads(line) for line in p.stdout]
        assert p.wait(120) == 3
    assert events[-1]["event"] == "fatal" and "the device is gone" in events[-1]["error"]


async def started(folder: Path, code: str, on_event: Callable[[Child, dict[str, Any]], Any]) -> Child:
    """A process that runs `code`."""
    (folder / "played.py").write_text(code, encoding="utf-8")
    process = Child("played", "played", [], on_event)
    await process.start(folder / "log", env={"PYTHONPATH": str(folder)})
    return process


async def test_what_a_dead_process_left_running_is_heard_and_not_waited_for(tmp_path: Path) -> None:
    """Its pipe stays open; the supervisor starts the successor soon nevertheless."""
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    time.sleep(0.5)\n"
        '    os.write(1, b\'{"event": "late", "pid": %d}\\n\' % os.getpid())\n'
        "    time.sleep(300)\n"
        "os._exit(7)\n"
    )
    heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    process = await started(tmp_path, code, lambda _, event: heard.put_nowait(event))
    (listening,) = (t for t in asyncio.all_tasks() if t.get_name() == "listen played")
    assert await process.wait(120) == 7
    async with asyncio.timeout(120):
        late = await heard.get()
    assert late["event"] == "late" and not listening.done()  # it is still there
    os.kill(late["pid"], signal.SIGKILL)
    async with asyncio.timeout(120):
        await listening


async def test_what_a_process_did_while_its_supervisor_was_held_up_counts(tmp_path: Path) -> None:
    """The time is over then, but its answer and its end lie there unread."""
    code = (
        "import json, sys\n"
        "print(json.dumps({'event': 'ready'}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    told = json.loads(line)\n"
        "    if told['op'] == 'stop':\n"
        "        sys.exit(7)\n"
        "    print(json.dumps({'event': 'answer', 'id': told['id'], 'ok': True}), flush=True)\n"
    )
    ready = asyncio.Event()
    process = await started(tmp_path, code, lambda *_: ready.set())
    async with asyncio.timeout(120):
        await ready.wait()
    asked = asyncio.create_task(process.ask("anything", 0.5))
    await asyncio.sleep(0)
    time.sleep(6.0)  # noqa: ASYNC251 - this is what holds the supervisor up
    assert await asked == {"ok": True}
    ended = asyncio.create_task(process.wait(0.5))
    process.command("stop")
    await asyncio.sleep(0)
    time.sleep(6.0)  # noqa: ASYNC251
    assert await ended == 7


class Late(SimpleNamespace):
    """A source whose reader is held up past the device's patience once, while samples come."""

    flow_controlled = exhausted = False

    def read(self, _timeout_s: float) -> list[Block]:
        self.looks += 1
        if self.looks == 1:
            time.sleep(0.5)
        if self.looks != 2:
            return []
        self.link.stop.set()
        return [Block(FIRST, samples(FIRST, FIRST + 30, stream()), time.monotonic_ns())]


def test_samples_that_came_while_acquire_was_held_up_are_no_silence(tmp_path: Path) -> None:
    link = SimpleNamespace(
        stop=threading.Event(), dropped=0, tell=lambda *_, **__: None, next_command=lambda: None
    )
    ring = Ring.create(tmp_path / "ring", stream(), 2.0)
    source: Any = Late(looks=0, link=link, counters={}, cfg=None)
    Acquire(source, ring, ring.info, 0.3, link, ()).run()  # type: ignore[arg-type]
    assert source.looks == 3 and ring.committed == 30


def test_sigterm_within_the_events_lock_is_no_deadlock() -> None:
    """Who waits for `stop` holds its lock for an instant; a handler that wants it in the same thread would wait for ever."""
    code = """
import os, signal
from spiked.processes.link import Link
link = Link("acquire")
with link.stop._cond:
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        pass
print(link.stop.wait(60), file=__import__("sys").stderr)
"""
    with child(code) as p:
        try:
            _, err = p.communicate(timeout=200)
        finally:
            p.kill()
    assert err.decode().strip() == "True"


def test_a_recorder_whose_supervisor_and_writer_died_closes_its_file(tmp_path: Path) -> None:
    """Nobody is left to end the ring: without a look at its writer it would keep the file, and the next start from it."""
    folder = tmp_path / "session"
    folder.mkdir()
    (folder / "session.toml").write_text(configuration.dump(config()))
    ring = Ring.create(tmp_path / "ring", stream(), 4.0)
    feed = Feed(ring)
    feed.put(20_000)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    args = ["--session", str(folder), "--stream", "probe", "--ring", str(tmp_path / "ring")]
    with subprocess.Popen(
        [sys.executable, "-m", "spiked.processes.run", "record", *args],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as p:  # fmt: skip
        assert p.stdin is not None
        try:
            p.stdin.close()  # the supervisor is gone
            time.sleep(1.0)
            assert p.poll() is None  # its writer goes on: more may come
            ring.header[H_WRITER] = dead.pid
            assert p.wait(200) == 0
        finally:
            p.kill()
    with h5py.File(folder / "probe.nwb") as f:
        assert np.array_equal(f[DATA][:], samples(FIRST, FIRST + 20_000, ring.info))
