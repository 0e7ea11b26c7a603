"""Checks of the computer: disk, memory, real time, clock, processor, GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from spiked.priority import REALTIME
from spiked.rig.findings import FAIL, OK, WARN, Finding, Scene

TEST_MB = 256
BLOCK = 4 << 20
NETWORK_DISKS = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")
LIMITS = "/etc/security/limits.d/spiked.conf"
SLOW_SYNC_S = 2.0
SHORTEST_H = 1 / 6  # of recording that the disk has to hold


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB"


def _mount(path: Path) -> tuple[str, str]:
    """(mount point, file system) that a path lies on."""
    best = ("/", "")
    with contextlib.suppress(OSError):
        for row in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
            _, point, kind, *_ = row.split()
            point = point.replace("\\040", " ")
            if path.is_relative_to(point) and len(point) >= len(best[0]):
                best = (point, kind)
    return best


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def disk(scene: Scene) -> Iterator[Finding]:
    """The sessions folder can be written, is fast enough and large enough."""
    if scene.config is None:
        return
    sessions = scene.config.rig.sessions.expanduser().absolute()
    there = _existing(sessions)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = f"{sessions} cannot be written by you" if there == sessions else f"there is no {sessions}, and you cannot make it in {there}"  # fmt: skip
        yield Finding("disk", FAIL, what, f'sudo install -d -o "$USER" {sessions}; or correct rig.sessions in {scene.rig}')  # fmt: skip
        return
    point, kind = _mount(there)
    if kind in ("tmpfs", "ramfs"):
        yield Finding("disk", WARN, f"{sessions} is in memory ({kind}): recordings go with the power", f"choose a disk for rig.sessions in {scene.rig}")  # fmt: skip
    if kind in NETWORK_DISKS:
        yield Finding("disk", WARN, f"{sessions} is on a network disk ({kind}): a network that stalls loses samples", f"record to a local disk and copy afterwards: rig.sessions in {scene.rig}")  # fmt: skip
    yield _space(scene, there, point)
    if not scene.quick:
        yield _speed(scene, there)


def _space(scene: Scene, folder: Path, point: str) -> Finding:
    assert scene.config is not None
    free = shutil.disk_usage(folder).free - scene.config.record.min_free_gb * 1e9
    hours = free / scene.stored_per_s / 3600 if scene.stored_per_s else float("inf")
    rate = f"{scene.stored_per_s / 1e6:.1f} MB/s"
    text = f"{_gb(max(free, 0))} to record on at {point}: {hours:.1f} hours at {rate}" if free > 0 else f"less than record.min_free_gb = {scene.config.record.min_free_gb:g} GB is free at {point}"  # fmt: skip
    level = OK if hours >= 24 else WARN if hours >= SHORTEST_H else FAIL
    return Finding("space", level, text, "" if level == OK else f"free some, or choose a larger disk: du -xh --max-depth=2 {point} | sort -h | tail")  # fmt: skip


def _speed(scene: Scene, folder: Path) -> Finding:
    """Write and sync what a recorder would, for real."""
    size = min(TEST_MB << 20, shutil.disk_usage(folder).free // 4)
    block = os.urandom(BLOCK)
    slowest, began = 0.0, time.monotonic()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".spiked-doctor-") as f:
            for _ in range(max(1, size // BLOCK)):
                f.write(block)
                before = time.monotonic()
                os.fdatasync(f.fileno())
                slowest = max(slowest, time.monotonic() - before)
    except OSError as e:
        return Finding(
            "disk", FAIL, f"writing to {folder} failed: {e.strerror}", f"df -h {folder}; df -i {folder}"
        )
    per_s = max(1, size // BLOCK) * BLOCK / (time.monotonic() - began)
    need = max(scene.stored_per_s, 1.0)
    text = f"{folder}: {per_s / 1e6:.0f} MB/s with fsync, {per_s / need:.0f} times what the streams bring ({need / 1e6:.1f} MB/s); slowest sync {slowest * 1000:.0f} ms"  # fmt: skip
    if per_s < 1.2 * need:
        return Finding("disk", FAIL, text, f"record to a faster disk: rig.sessions in {scene.rig}")
    if per_s < 3 * need or slowest > SLOW_SYNC_S:
        return Finding(
            "disk", WARN, text, "see what else uses it: iotop -oPa; a local NVMe disk has room to spare"
        )
    return Finding("disk", OK, text)


def memory(scene: Scene) -> Iterator[Finding]:
    """Room for the rings, and whether they may be swapped out."""
    if scene.config is not None:
        runtime = scene.config.rig.runtime
        need = int(scene.stored_per_s * scene.config.ring.seconds * 1.1) + (16 << 20) * len(scene.streams)
        if not runtime.is_dir() or not os.access(runtime, os.W_OK):
            yield Finding("shm", FAIL, f"rig.runtime = {runtime} cannot be written", f'remove runtime from [rig] in {scene.rig}: "/dev/shm" is the default')  # fmt: skip
        else:
            yield _ring(scene, runtime, need)
        yield from _locking(need)
    total = psutil.virtual_memory()
    level = OK if total.available > 4e9 else WARN
    yield Finding("memory", level, f"{_gb(total.available)} of {_gb(total.total)} available", "" if level == OK else "ps aux --sort=-rss | head")  # fmt: skip


def _ring(scene: Scene, runtime: Path, need: int) -> Finding:
    assert scene.config is not None
    free = shutil.disk_usage(runtime).free
    text = f"the rings need {need / 1e6:.0f} MB of {runtime}, {free / 1e6:.0f} MB are free"
    if free < need:
        gb = max(1, -(-2 * need // 10**9))
        return Finding("shm", FAIL, text, f"sudo mount -o remount,size={gb}G {runtime}; or a smaller ring.seconds in {scene.rig}")  # fmt: skip
    if _mount(runtime)[1] != "tmpfs":
        return Finding(
            "shm", WARN, f"{text}; it is not in memory (tmpfs)", f"remove runtime from [rig] in {scene.rig}"
        )
    return Finding("shm", OK, text)


def _locking(need: int) -> Iterator[Finding]:
    """Try it: lock as much memory as the rings take."""
    swap = psutil.swap_memory()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    size = min(need, 64 << 20)  # the limit is compared with all of it below
    at = libc.mmap(None, size, 3, 0x22, -1, 0)  # PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS
    locked = libc.mlock(ctypes.c_void_p(at), ctypes.c_size_t(size)) == 0
    libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    may = locked and (os.geteuid() == 0 or soft in (resource.RLIM_INFINITY, -1) or soft >= need)
    if may:
        yield Finding("memlock", OK, f"{need / 1e6:.0f} MB may be locked in memory")
        return
    limit = "nothing" if soft == 0 else f"{soft / 1e6:.0f} MB"
    text = f"only {limit} may be locked in memory (the rings take {need / 1e6:.0f} MB)"
    fix = f"echo '@spiked - memlock unlimited' | sudo tee -a {LIMITS}; then log in again (the service has it)"
    if swap.total:
        yield Finding("memlock", WARN, f"{text}, and there is swap", fix)
    else:
        yield Finding("memlock", OK, f"{text}; without swap nothing is swapped out")


def realtime(_scene: Scene) -> Iterator[Finding]:
    """Try it: take acquire's priority on a thread of its own."""
    got: list[str] = []

    def take() -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REALTIME["acquire_network"]))
            got.append("")
        except OSError as e:
            got.append(e.strerror or str(e))

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    if not got[0]:
        yield Finding("rtprio", OK, f"real-time priority {REALTIME['acquire_network']} is allowed")
        return
    fix = f"echo '@spiked - rtprio 50' | sudo tee -a {LIMITS}; sudo usermod -aG spiked \"$USER\", then log in again (the service has it)"  # fmt: skip
    yield Finding("rtprio", WARN, f"no real-time priority for programs started by you ({got[0]}): other programs delay acquisition", fix)  # fmt: skip


def buffers(scene: Scene) -> Iterator[Finding]:
    """The kernel's receive buffer holds what comes while acquire is away for a tenth of a second."""
    try:
        largest = int(Path("/proc/sys/net/ipv4/tcp_rmem").read_text(encoding="utf-8").split()[2])
        rmem = int(Path("/proc/sys/net/core/rmem_max").read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError):
        return
    need = max(4_000_000, int(0.1 * sum(s.received_per_s for s in scene.streams)))
    text = f"TCP receive buffers up to {largest / 1e6:.1f} MB (rmem_max {rmem / 1e6:.1f} MB); {need / 1e6:.1f} MB arrive in 0.1 s"  # fmt: skip
    if largest >= need:
        yield Finding("rmem", OK, text)
        return
    size = max(need, 16_000_000)
    fix = f"printf 'net.core.rmem_max={size}\\nnet.ipv4.tcp_rmem=4096 131072 {size}\\n' | sudo tee /etc/sysctl.d/60-spiked.conf && sudo sysctl --system"  # fmt: skip
    yield Finding("rmem", WARN, text, fix)


def limits(_scene: Scene) -> Iterator[Finding]:
    """Open files; and whether logind deletes rings of a user who logs out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        yield Finding(
            "nofile",
            WARN,
            f"only {soft} files may be open at once",
            f"ulimit -n {max(4096, min(hard, 65536))}",
        )
    else:
        yield Finding("nofile", OK, f"{soft} files may be open at once")
    if os.geteuid() >= 1000 and Path("/run/systemd/seats").exists():
        lingers = Path("/var/lib/systemd/linger").joinpath(psutil.Process().username()).exists()
        if not lingers:
            text = "logind deletes your files in /dev/shm, the rings too, when you log out of this computer"
            yield Finding("logout", WARN, text, 'sudo loginctl enable-linger "$USER"; or use the service')


# ---- clock, processor, GPU -------------------------------------------------------------------------------------


class _Timex(ctypes.Structure):
    """struct timex (adjtimex(2)); what follows `tai` is padding."""

    _fields_ = [
        ("modes", ctypes.c_int), ("offset", ctypes.c_long), ("freq", ctypes.c_long), ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long), ("status", ctypes.c_int), ("rest", ctypes.c_long * 24),
    ]  # fmt: skip


STA_UNSYNC = 0x40


def clock(_scene: Scene) -> Iterator[Finding]:
    """The wall clock is kept by NTP; the clock that stamps samples is cheap to read."""
    timex = _Timex()
    state = ctypes.CDLL(None).adjtimex(ctypes.byref(timex))
    if state < 0 or timex.status & STA_UNSYNC:
        fix = "sudo timedatectl set-ntp true; or sudo apt install chrony"
        yield Finding(
            "clock", WARN, "the wall clock is not synchronised (NTP): session times may be off", fix
        )
    else:
        yield Finding("clock", OK, f"the wall clock is synchronised, within {timex.maxerror / 1000:.0f} ms")
    source = _read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    if source in ("hpet", "acpi_pm", "jiffies"):
        yield Finding("clock", WARN, f"the monotonic clock is {source}, which is slow to read", "boot with tsc=reliable where the processor's counter is constant")  # fmt: skip
    elif source:
        yield Finding("clock", OK, f"the monotonic clock is {source}")


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return ""


def processor(scene: Scene) -> Iterator[Finding]:
    """Cores enough, at their full speed."""
    cores = os.cpu_count() or 1
    streams = max(1, len(scene.streams))
    wanted = 2 + 2 * streams
    level = OK if cores >= wanted else WARN
    yield Finding("cpu", level, f"{cores} cores for {streams} stream{'s' if streams > 1 else ''}", "" if level == OK else f"{wanted} cores keep acquisition, recording and live sorting from waiting for each other; [live] enabled = false in {scene.rig} saves most")  # fmt: skip
    paths = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    governors = {_read(str(p)) for p in paths} - {""}
    if not governors:
        yield Finding("governor", OK, "the processor's speed is not the system's to choose here")
    elif governors == {"performance"}:
        yield Finding("governor", OK, "the processor runs at full speed (governor performance)")
    else:
        fix = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        yield Finding("governor", WARN, f"the processor slows down when idle (governor {', '.join(sorted(governors))}): spikes wait for it to wake", fix)  # fmt: skip


def gpu(scene: Scene) -> Iterator[Finding]:
    """What the configuration asks of a GPU is there."""
    wants = [s.device for s in (scene.config.live, scene.config.offline)] if scene.config else []
    needed = any(str(d).startswith("cuda") for d in wants)
    driver = Path("/dev/nvidiactl").exists()
    try:
        import torch
    except ImportError:
        yield Finding("gpu", FAIL, "PyTorch is not installed", "pip install torch; which build: pytorch.org")
        return
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            level = OK if free > 2e9 else WARN
            yield Finding("gpu", level, f"{torch.cuda.get_device_name(i)}: {_gb(free)} of {_gb(total)} free", "" if level == OK else "nvidia-smi shows who has it")  # fmt: skip
    elif driver:
        yield Finding("gpu", FAIL if needed else WARN, f"there is an NVIDIA driver, but this PyTorch ({torch.__version__}) cannot use it", "pip install --force-reinstall torch; which build: pytorch.org")  # fmt: skip
    elif needed:
        yield Finding("gpu", FAIL, "the configuration wants CUDA, and there is no GPU", f'device = "auto" in {scene.rig}; or install the driver: sudo apt install nvidia-driver')  # fmt: skip
    else:
        yield Finding("gpu", OK, "no GPU; live sorting and Kilosort run on the processor")
