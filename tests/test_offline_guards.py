"""What watches a sorter: real processes stopped, silent, too large, on a full disk; a GPU as nvidia-smi tells of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from spiked import config as configuration
from spiked.config import Guards
from spiked.errors import ConfigError, OfflineError
from spiked.offline import sort, sorters
from spiked.offline.failures import OutOfMemory, told
from spiked.offline.guards import canary, sensors, smaller, versions
from spiked.offline.guards.limits import Disk, GpuState, HostMemory, Silence, Stall
from spiked.offline.guards.sensors import Gpu, Memory, Tree
from spiked.offline.guards.watch import Watch
from spiked.offline.presets import JobSettings, params_of

OFF = dict.fromkeys(
    ("memory_percent", "gpu_memory_percent", "gpu_celsius", "disk_gb", "stall_s", "silent_s"), 0.0
)


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs `code`, begun when it has written a line; it is killed at the end of the block."""
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        child.stdout.readline()
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def looked_at(
    child: subprocess.Popen[bytes], watch: Watch, pulse: object = 0, within_s: float = 200.0
) -> OfflineError:
    """What the watch says when it has had enough."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            watch.look(child.pid, pulse)
        except OfflineError as e:
            return e
        time.sleep(0.05)
    raise AssertionError("the watch has let it pass")


WAITS = "import time; print(flush=True); time.sleep(600)"
WORKS = "print(flush=True)\nwhile True: pass"


def test_a_sorter_that_neither_computes_nor_reads_is_stalled(tmp_path: Path) -> None:
    with process(WORKS) as child:
        os.kill(child.pid, signal.SIGSTOP)  # as a disk does that does not answer
        error = looked_at(child, Watch(Guards(**OFF | {"stall_s": 2.0}), tmp_path))
        assert (error.name, error.kind, error.stage) == ("stall", "environment", "sort")
        assert "neither computed nor read" in str(error) and "disk or network drive" in error.remedy
        assert any("sorter_gb" in line for line in error.evidence)
        began = time.monotonic()
        sort.GRACE_S, grace = 1.0, sort.GRACE_S
        try:
            sort.end(child)  # a stopped process does not hear SIGTERM
        finally:
            sort.GRACE_S = grace
        assert child.returncode == -signal.SIGKILL and time.monotonic() - began < 120


def test_a_sorter_that_computes_is_not_stalled_but_may_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process(WORKS) as child:
        spent = psutil.Process(child.pid).cpu_times
        # a busy computer gives it little time: the watch's clock stands still meanwhile
        clock = SimpleNamespace(monotonic=lambda: 10 * sum(spent()[:2]))
        monkeypatch.setattr("spiked.offline.guards.watch.time", clock)
        watch = Watch(Guards(**OFF | {"stall_s": 6.0, "silent_s": 10.0}), tmp_path)
        error = looked_at(child, watch)
        assert (error.name, error.kind) == ("silence", "resource") and "no progress for" in str(error)
        sort.end(child)
        assert child.returncode == -signal.SIGTERM


def test_progress_of_any_kind_is_a_sign_of_life(tmp_path: Path) -> None:
    with process(WAITS) as child:
        watch = Watch(Guards(**OFF | {"silent_s": 2.5}), tmp_path)
        until, pulse = time.monotonic() + 6, 0
        while time.monotonic() < until:
            watch.look(child.pid, pulse)
            pulse += 1
            time.sleep(0.1)
        assert watch.seen["warnings"] == []


def test_a_sorter_larger_than_it_may_be_is_out_of_memory_with_its_children(tmp_path: Path) -> None:
    code = """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; x = bytearray(3 * 10**8); print(flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
        child.stdout.readline()
        print(flush=True)
        child.wait()
    """
    with process(code) as child:
        error = looked_at(child, Watch(Guards(**OFF), tmp_path, memory_gb=0.25))
        assert (
            isinstance(error, OutOfMemory)
            and error.name == "host_memory"
            and "memory_gb allows 0.25" in str(error)
        )
        assert sensors.tree(child.pid).rss_gb > 0.3  # type: ignore[union-attr]
        for each in psutil.Process(child.pid).children():
            each.kill()


def test_a_full_computer_ends_the_sorter_only_when_it_stays_full(tmp_path: Path) -> None:
    full = max(sensors.memory().percent / 4, 0.5)
    with process(WAITS) as child:
        error = looked_at(child, Watch(Guards(**OFF | {"memory_percent": full}), tmp_path))
    assert isinstance(error, OutOfMemory) and "by the sorter" in str(error)
    guard = HostMemory(90.0, 0.0)
    tree = Tree(1.0, 0.0, 0)
    assert guard.check(Memory(100, 20), tree) is None
    near = guard.check(Memory(100, 12), tree)
    assert near is not None and not near.end
    ends = [guard.check(Memory(100, 5), tree), guard.check(Memory(100, 50), tree), *(guard.check(Memory(100, 5), tree) for _ in range(3))]  # fmt: skip
    assert [a is not None and a.end for a in ends] == [False, False, False, False, True]


def test_a_full_disk_warns_before_it_ends_the_sorter(tmp_path: Path) -> None:
    free = sensors.free_gb(tmp_path)
    watch = Watch(Guards(**OFF | {"disk_gb": free / 3}), tmp_path)
    with process(WAITS) as child:
        watch.look(child.pid, 0)
        assert len(watch.seen["warnings"]) == 1 and "are free for the results" in watch.seen["warnings"][0]
        error = looked_at(child, Watch(Guards(**OFF | {"disk_gb": free * 2}), tmp_path))
    assert (error.name, error.kind, error.remedy) == (
        "disk",
        "resource",
        "free space and start the job again",
    )
    assert not isinstance(error, OutOfMemory) and Disk(0.0).check(0.0) is None


def test_every_guard_can_be_turned_off(tmp_path: Path) -> None:
    watch = Watch(Guards(**OFF), tmp_path)
    with process(WAITS) as child:
        for _ in range(3):
            watch._next = 0.0
            watch.look(child.pid, 0)
    assert watch.seen["warnings"] == [] and watch.seen["peaks"]["sorter_gb"] > 0


SMI = """#!/bin/sh
# answers as nvidia-smi does to --query-gpu=index,memory.used,memory.total,temperature.gpu --format=csv,noheader,nounits
cat "$(dirname "$0")/said"
"""


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what nvidia-smi says."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    return smi.with_name("said")


def test_a_gpu_is_read_from_nvidia_smi(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.write_text("0, 512, 8192, 41\n1, 8000, 8192, [N/A]\n")
    first, second = sensors.gpus()
    assert (first.index, round(first.percent, 2), first.celsius) == (0, 6.25, 41.0)
    assert second.celsius is None and second.free_gb == pytest.approx(192 * 2**20 / 1e9)
    assert sensors.gpu("cuda:1") == second and sensors.gpu("cuda") == first and sensors.gpu("cpu") is None
    gpu.write_text("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n")
    assert sensors.gpus() == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert sensors.gpus() == []


@pytest.mark.parametrize(
    ("said", "name", "kind"),
    [("0, 8150, 8192, 60", "gpu_memory", "resource"), ("0, 100, 8192, 95", "gpu_temperature", "environment")],
)
def test_a_full_or_hot_gpu_ends_the_sorter(
    gpu: Path, said: str, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spiked.offline.guards.watch.GPU_S", 0.0)
    gpu.write_text(said)
    guards = Guards(**OFF | {"gpu_memory_percent": 98.0, "gpu_celsius": 90.0})
    with process(WAITS) as child:
        error = looked_at(child, Watch(guards, tmp_path, "cuda"))
    assert (error.name, error.kind) == (name, kind) and isinstance(error, OutOfMemory) == (
        name == "gpu_memory"
    )
    assert "gpu_memory_percent" in error.evidence[-1] and told(error)["policy"]


def test_a_moment_of_heat_is_none() -> None:
    state = GpuState(98.0, 90.0)
    hot, cool = Gpu(0, 1.0, 8.0, 95.0), Gpu(0, 1.0, 8.0, 60.0)
    alarms = [state.check(g) for g in (hot, hot, cool, hot, hot, hot)]
    assert [a is not None and a.end for a in alarms] == [False] * 5 + [True]
    assert GpuState(0.0, 0.0).check(Gpu(0, 8.0, 8.0, 120.0)) is None


def test_stall_and_silence_by_their_clocks() -> None:
    stall = Stall(10.0)
    idle = Tree(1.0, 5.0, 100)
    assert [stall.check(t, idle) for t in (0.0, 9.0)] == [None, None]
    assert stall.check(10.0, idle) is not None
    assert stall.check(11.0, Tree(1.0, 5.0, 101)) is None and stall.check(20.0, Tree(1.0, 5.05, 101)) is None
    assert stall.check(30.0, Tree(1.0, 9.0, 101)) is None  # it computes
    silence = Silence(10.0)
    assert silence.check(0.0, (1, 2)) is None and silence.check(9.0, (1, 3)) is None
    assert silence.check(18.0, (1, 3)) is None and silence.check(19.0, (1, 3)) is not None


def test_a_control_groups_limit_is_the_computers(tmp_path: Path) -> None:
    slice_ = tmp_path / "spiked.slice"
    unit = slice_ / "jobs.service"
    unit.mkdir(parents=True)
    for folder, limit, used in ((slice_, "8000000000", 6_000_000_000), (unit, "max", 1_000_000_000)):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(used))
        (folder / "memory.stat").write_text("anon 1\ninactive_file 1000000000\n")
    listed = tmp_path / "cgroup"
    listed.write_text("0::/spiked.slice/jobs.service\n")
    found = sensors.group_memory(tmp_path, listed)
    assert found is not None and found.total_gb == 8.0 and found.available_gb == pytest.approx(3.0)
    listed.write_text("12:memory:/x\n")
    assert sensors.group_memory(tmp_path, listed) is None


# ---- smaller pieces -----------------------------------------------------------------------------------------


def test_only_out_of_memory_is_tried_again() -> None:
    def fails(error: OfflineError, times: int) -> tuple[list[str], dict[str, object]]:
        left = [error] * times
        params: dict[str, object] = {}

        def run(_: dict[str, object]) -> None:
            if left:
                raise left.pop()

        return smaller.until_it_fits("kilosort4", params, run, 2, True, lambda f, text: None), params

    tried, params = fails(OutOfMemory("the GPU's memory is full; smaller", "sort", "gpu_memory"), 2)
    assert params == {"batch_size": 15_000, "clear_cache": True} and [t[:16] for t in tried] == ["batch_size 60000", "batch_size 30000"]  # fmt: skip
    with pytest.raises(OutOfMemory) as e:
        fails(OutOfMemory("x; y"), 3)
    assert sum(line.startswith("tried: batch_size") for line in e.value.evidence) == 2
    in_clustering = OutOfMemory(
        "x; y", "sort", "gpu_memory", ('File "kilosort/clustering_qr.py", line 5, in cluster',)
    )
    assert fails(in_clustering, 1)[1] == {
        "clear_cache": True,
        "cluster_downsampling": 40,
        "max_cluster_subset": 12_500,
    }
    for kind in ("biology", "environment", "resource"):
        with pytest.raises(OfflineError, match="once"):
            fails(OfflineError("once; never again", kind, "sort"), 1)


@pytest.mark.parametrize("sorter", smaller.PIECES)
def test_what_is_made_smaller_is_a_parameter_of_the_sorter(sorter: str) -> None:
    piece = smaller.PIECES[sorter]
    try:
        table = {p.name: p for p in sorters.of(sorter).parameters()}
    except (ImportError, ConfigError) as e:
        pytest.skip(f"{sorter} is not installed here: {e}")
    assert piece.name in table and table[piece.name].default in (piece.default, None)


# ---- the canary ---------------------------------------------------------------------------------------------


def test_biology_and_the_unknown_do_not_stop_the_canary_and_the_rest_does() -> None:
    def sing(error: OfflineError) -> dict[str, object]:
        def sort() -> list[str]:
            raise error

        return canary.sing(sort, 10.0)

    assert (
        sing(OfflineError("too few spikes; look", "biology", "sort", "too_few_spikes"))["outcome"]
        == "biology"
    )
    assert sing(OfflineError("KeyError", "environment", "sort", "unknown"))["outcome"] == "unclear"
    with pytest.raises(OfflineError, match=r"first 10 s already: .*CUDA") as e:
        sing(OfflineError("no CUDA; install it", "environment", "sort", "cuda_missing"))
    assert e.value.stage == "canary" and e.value.remedy == "install it"


# ---- packages -----------------------------------------------------------------------------------------------

GOOD = {"kilosort": "4.1.7", "spikeinterface": "0.104.9", "slay": "0.1.0a0", "numpy": "2.4.6", "torch": "2.13.0+cpu", "zarr": "2.18.7"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "warning"),
    [
        ({}, "", ""),
        ({"kilosort": "4.1.6"}, "numpy 2.4.6; pip install 'kilosort>=4.1.7'", ""),
        ({"kilosort": "4.1.6", "numpy": "2.3.5"}, "", ""),
        ({"kilosort": "4.0.30", "spikeinterface": "0.105.3"}, "does not run kilosort 4.0.30", "SLAy"),
        ({"spikeinterface": "0.105.3"}, "", "SLAy 0.1.0a0 cannot be imported"),
        ({"zarr": "3.1"}, "zarr<3", ""),
        ({"kilosort": None}, "kilosort, which is not installed; pip install 'spiked[offline]'", ""),
        ({"slay": None}, "", "SLAy is not installed"),
    ],
)
def test_packages_that_do_not_work_together(change: dict[str, str | None], error: str, warning: str) -> None:
    have = {k: v for k, v in (GOOD | change).items() if v is not None}
    errors, warnings = versions.conflicts(have, "kilosort4")
    assert error in " ".join(errors) and bool(errors) == bool(error)
    assert warning in " ".join(warnings) and bool(warnings) == bool(warning)


def test_what_is_installed_here_works_together() -> None:
    pytest.importorskip("kilosort")
    have = versions.installed()
    assert {"torch", "numpy"} <= set(have) and versions.conflicts(have, "kilosort4")[0] == []


# ---- their settings -----------------------------------------------------------------------------------------


def test_guards_are_set_in_the_configuration_and_by_the_command() -> None:
    text = {"stream": [{"name": "m", "source": "replay", "path": "x"}], "offline": {"guards": {"disk_gb": 20, "gpu_celsius": 0}}}  # fmt: skip
    settings = JobSettings.of(params_of(configuration.parse(text).offline))
    assert settings.guards["disk_gb"] == 20 and settings.guards["silent_s"] == Guards().silent_s
    with pytest.raises(ConfigError, match="disk_mb"):
        JobSettings.of({"guards": {"disk_mb": 1}})
    with pytest.raises(ConfigError, match="memory_percent"):
        JobSettings.of({"guards": {"memory_percent": 150}})
