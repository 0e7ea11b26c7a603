"""A real systemd for tests, on any Linux where we are root: PID 1 of its own namespaces, over a copy of this very system.

The root is an overlay in memory, so whatever is installed, written or created in the box is gone with it; processes,
network, control groups and /dev/shm are its own too. Kernel and packages are this computer's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

SYSTEMD = next((p for p in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if Path(p).exists()), "")
TOOLS = ("unshare", "nsenter", "pivot_root", "systemctl", "journalctl")
CONTROLLERS = ("cpu", "cpuacct", "memory", "blkio", "pids", "devices", "cpu,cpuacct")

SCRIPT = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs -o size=4G tmpfs "$BOX"
mkdir "$BOX/up" "$BOX/work" "$BOX/root"
mount -t overlay overlay -o "lowerdir=$BOX_ROOT,upperdir=$BOX/up,workdir=$BOX/work" "$BOX/root"
cd "$BOX/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs dev
for d in null zero full random urandom tty; do touch dev/$d; mount --bind /dev/$d dev/$d; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
touch dev/console
mount --bind "$BOX_CONSOLE" dev/console
eval "$BOX_CGROUPS"
rm -rf etc/systemd/system/*.wants etc/systemd/network
mkdir -p etc/tmpfiles.d
ln -sf /dev/null etc/tmpfiles.d/tmp.conf  # a checkout may lie in /tmp, which would be emptied
mkdir old
pivot_root . old
umount -l /old
exec env -i container=box PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$BOX_INIT" --system --unit=multi-user.target --log-target=console --show-status=no
"""


def missing() -> str:
    """Why there can be no box here; "" when there can."""
    if os.geteuid() != 0:
        return "needs root"
    if not SYSTEMD:
        return "systemd is not installed"
    absent = [t for t in TOOLS if shutil.which(t) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


def _hierarchies() -> list[tuple[str, Path, str]]:
    """(controllers, "" for v2; where it is mounted; our own group in it) of each control group hierarchy used here."""
    mounts = {}
    for row in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = row.partition(" - ")
        kind, _, extra = right.split(" ", 2)
        if kind == "cgroup2":
            mounts[""] = Path(left.split()[4])
        elif kind == "cgroup":
            for option in extra.split(","):
                mounts.setdefault(option, Path(left.split()[4]))
    out = []
    for row in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, group = row.split(":", 2)
        at = mounts.get(names.split(",")[0])
        if at is not None and (names in ("", "name=systemd") or names in CONTROLLERS):
            out.append((names, at, group))
    return out


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; unshare then takes the box with it


def _clear(group: Path) -> None:
    """Remove a control group with what is below it, as far as nobody is in it."""
    with contextlib.suppress(OSError):  # somebody else clears it, too
        for inner in sorted(group.rglob("*"), reverse=True):
            if inner.is_dir():
                with contextlib.suppress(OSError):
                    inner.rmdir()
    with contextlib.suppress(OSError):
        group.rmdir()


class Box:
    """`with Box(folder) as box: box.run("systemctl", "start", ...)`. Raises RuntimeError where it does not boot."""

    def __init__(self, folder: Path, root: Path = Path("/")) -> None:
        self.folder, self.root = folder, root  # the system that is copied: this one, or one in a folder
        self.console = folder / "console.log"
        self.pid = 0
        self._groups: list[Path] = []
        self._outer: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        base = self.folder / "box"
        base.mkdir(parents=True)
        self.console.touch()
        hybrid = any(names for names, _, _ in _hierarchies())
        mounts = ["mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup"] if hybrid else []
        for names, at, group in _hierarchies():
            for left in (at / group.lstrip("/")).glob("spiked-box-*"):
                if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
                    _clear(left)
            own = at / group.lstrip("/") / f"spiked-box-{os.getpid()}"
            own.mkdir()
            self._groups.append(own)
            if not names:
                point = "sys/fs/cgroup/unified" if hybrid else "sys/fs/cgroup"
                mounts.append(f"mkdir -p {point}; mount -t cgroup2 cgroup2 {point}")
            else:
                point = f"sys/fs/cgroup/{names.removeprefix('name=')}"
                how = f"none,{names}" if names.startswith("name=") else names
                mounts.append(f"mkdir -p {point}; mount -t cgroup -o {how} cgroup {point}")
        env = {**os.environ, "BOX": str(base), "BOX_ROOT": str(self.root), "BOX_CONSOLE": str(self.console), "BOX_INIT": SYSTEMD, "BOX_CGROUPS": "\n".join(mounts)}  # fmt: skip

        enter = "".join(f"echo $$ > {own}/cgroup.procs\n" for own in self._groups)
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--ipc", "--uts", "--net", "bash", "-c", '"$BOX_SCRIPT"']  # fmt: skip
        with self.console.open("ab") as log:
            self._outer = subprocess.Popen(
                ["bash", "-c", f"set -e\n{enter}exec {' '.join(words)}"], env={**env, "BOX_SCRIPT": SCRIPT},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_us,
            )  # fmt: skip
        try:
            self._wait_booted()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _wait_booted(self, timeout_s: float = 120.0) -> None:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until and self._outer is not None and self._outer.poll() is None:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(self._outer.pid).children():
                    if child.cmdline()[:1] == [SYSTEMD]:
                        self.pid = child.pid
            if self.pid and self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded"):  # fmt: skip
                return
            time.sleep(0.2)
        raise RuntimeError(f"systemd did not boot: {self.console.read_text(errors='replace')[-2000:]}")

    def enter(self, *words: str) -> list[str]:
        """The command line that runs `words` in the box."""
        return ["nsenter", "-t", str(self.pid), "-m", "-p", "-n", "-u", "-i", "-C", "--", *words]

    def run(self, *words: str, check: bool = True, timeout_s: float = 300.0, **options: Any) -> subprocess.CompletedProcess[str]:  # fmt: skip
        done = subprocess.run(self.enter(*words), capture_output=True, text=True, timeout=timeout_s, check=False, cwd="/", **options)  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def show(self, unit: str, key: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "-p", key, "--value", unit).stdout.strip()

    def journal(self, unit: str, *more: str) -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit, *more).stdout

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._outer is not None and self._outer.poll() is None:
            if self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)  # the kernel ends everything in its namespace
            else:
                self._outer.kill()
            self._outer.wait(120)
        until = time.monotonic() + 60
        for group in self._groups:
            while group.exists() and time.monotonic() < until:
                _clear(group)
                time.sleep(0.05)
