"""A real Chromium, driven over its own debugging pipe: pages opened, questions asked, pictures taken."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ANSWER_S = 120.0


def installed() -> str | None:
    """The browser's path, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab at a given width. `complaints` are console errors, warnings and exceptions since it was opened."""

    def __init__(self, profile: Path, width: int, height: int, dark: bool = False) -> None:
        program = installed()
        assert program is not None
        child_reads, self._out = os.pipe()
        self._in, child_writes = os.pipe()

        def as_3_and_4() -> None:
            a, b = os.dup(child_reads), os.dup(child_writes)
            os.dup2(a, 3)
            os.dup2(b, 4)

        args = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]  # fmt: skip
        self._browser = subprocess.Popen(
            [program, *args, "--remote-debugging-pipe", f"--user-data-dir={profile}"], preexec_fn=as_3_and_4,
            close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(child_reads)
        os.close(child_writes)
        self._number, self._buffer, self._tab = 0, b"", ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._tab = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        phone = width < 600
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        if dark:
            self.ask(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
            )

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._tab:
            message["sessionId"] = self._tab
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next(ANSWER_S)
            if told is None:
                raise TimeoutError(f"the browser does not answer {method}")
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                return dict(told["result"])

    def _next(self, timeout_s: float) -> dict[str, Any] | None:
        until = time.monotonic() + timeout_s
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(until - time.monotonic(), 0))[0]:
                return None
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise EOFError("the browser is gone")
            self._buffer += piece
        raw, self._buffer = self._buffer.split(b"\0", 1)
        told = dict(json.loads(raw))
        self._hear(told.get("method", ""), told.get("params", {}))
        return told

    def _hear(self, event: str, said: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(said["args"]))
        if event == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"]))
        if event == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(said["entry"]["text"])
        if event == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])

    def open(self, path: Path | str) -> None:
        """Load a file or an address and wait until it is there and painted."""
        self.ask("Page.navigate", url=path.as_uri() if isinstance(path, Path) else path)
        self.wait("document.readyState === 'complete'")
        self.settle()

    def wait(self, condition: str, timeout_s: float = 90.0) -> None:
        until = time.monotonic() + timeout_s
        while not self.eval(condition):
            assert time.monotonic() < until, f"never true: {condition}"
            time.sleep(0.05)

    def settle(self) -> None:
        """Two frames: what came into view has been drawn."""
        self.eval(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(() => done(1), 100))))"
        )

    def eval(self, script: str) -> Any:
        """The value of a script, awaited; an exception in it is an AssertionError."""
        told = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is in view, or of the whole page."""
        told = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(told["data"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._out)
        os.close(self._in)
        self._browser.terminate()
        try:
            self._browser.wait(10)
        except subprocess.TimeoutExpired:
            self._browser.kill()
            self._browser.wait()
