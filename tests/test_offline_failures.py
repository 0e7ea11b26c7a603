"""Every way in which Kilosort fails, produced with the real Kilosort and classified from what it left behind.

What needs hardware that is not here (a GPU, MATLAB, a container) is classified from its recorded text, and told apart below.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked_sorters import results
from offline_rig import FS, neurons, stream

from spiked.offline import failures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
N = 16
POSITIONS = stream().positions
QUICK = {"batch_size": 20_000, "nblocks": 0, "nt": 41, "dmin": 35.0, "dminx": 35.0, "nearest_templates": 25}


def binary(path: Path, microvolt: np.ndarray) -> Path:
    np.clip(microvolt / 2.0, -32768, 32767).astype("<i2").tofile(path)
    return path


def job(folder: Path, name: str, data: Path, memory_gb: float = 0.0, device: str = "cpu", **params: Any) -> dict[str, Any]:  # fmt: skip
    """What sort_child is told, as sort.sorter_job would."""
    return {
        "name": name,
        "job": {
            "binary": str(data), "source": {}, "fs_hz": FS, "gain_uv": [2.0] * N, "positions_um": POSITIONS.tolist(),
            "sorter": "kilosort4", "params": {**QUICK, **params}, "left_out": [], "folder": str(folder / name), "threads": 1,
            "memory_gb": memory_gb, "device": device,
        },
    }  # fmt: skip


def call(folder: Path, name: str, data: Path, settings: dict[str, Any], probe: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:  # fmt: skip
    """What run_kilosort itself is told: rows that our own checks never let through to it."""
    kept = {"chanMap": list(range(N)), "xc": POSITIONS[:, 0].tolist(), "yc": POSITIONS[:, 1].tolist(), "kcoords": [0.0] * N, "n_chan": N}  # fmt: skip
    return {
        "name": name,
        "call": {
            "settings": {"n_chan_bin": N, "fs": FS, **QUICK, **settings}, "probe": kept if probe is None else {**kept, **probe},
            "filename": str(data), "results_dir": str(folder / name), **more,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each case."""
    pytest.importorskip("kilosort")
    at = tmp_path_factory.mktemp("failures")
    rng = np.random.default_rng(3)
    spikes, _, _ = neurons(stream(), 4.0, 3)
    noise = rng.normal(0, 5.0, spikes.shape)
    late = noise.copy()
    late[50_000:] = spikes[50_000:]
    data = {
        "spikes": spikes, "noise": noise, "late": late, "zeros": np.zeros(spikes.shape), "short": spikes[:10_000],
        "rail": np.full(spikes.shape, 65_000.0), "same": np.repeat(spikes[:, :1], N, 1),
    }  # fmt: skip
    f = {name: binary(at / f"{name}.dat", x) for name, x in data.items()}
    odd = at / "odd.dat"
    odd.write_bytes(f["spikes"].read_bytes()[:-6])
    cases = [
        job(at, "short", f["short"]),
        job(at, "noise", f["noise"]),
        job(at, "zeros", f["zeros"]),
        job(at, "rail", f["rail"]),
        job(at, "same", f["same"]),
        job(at, "late", f["late"]),
        job(at, "threshold", f["spikes"], Th_universal=10_000),
        job(at, "cuda", f["spikes"], device="cuda"),
        job(at, "torch_memory", f["spikes"], memory_gb=1.15, batch_size=70_000),
        job(at, "numpy_memory", f["spikes"], memory_gb=0.9),
        job(at, "no_memory", f["spikes"], memory_gb=0.35),
        job(at, "late_from", f["late"], tmin=2.6),
        {**job(at, "crash", f["spikes"]), "crash": 0.3},
        call(at, "odd_file", odd, {}),
        call(at, "one_based", f["spikes"], {}, {"chanMap": list(range(1, N + 1))}),
        call(at, "no_channels", f["spikes"], {"n_chan_bin": None}),
        call(at, "kcoords", f["spikes"], {}, {"kcoords": None}),
        call(at, "even", f["spikes"], {"nt": 40}),
        call(at, "unknown", f["spikes"], {"Th_univ": 9}),
        call(at, "no_such_bad", f["spikes"], {}, bad_channels=[99]),
        call(at, "all_bad", f["spikes"], {}, bad_channels=list(range(N))),
        call(at, "missing", at / "nowhere.dat", {}),
        call(at, "unwritable", f["spikes"], {}, results_dir="/proc/spiked"),
    ]
    for case in cases:
        if case["name"] == "no_channels":
            del case["call"]["settings"]["n_chan_bin"]
        if case["name"] == "kcoords":
            del case["call"]["probe"]["kcoords"]
    no_probe = call(at, "no_probe", f["spikes"], {})
    del no_probe["call"]["probe"]
    disk = at / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "spiked-test", str(disk)], capture_output=True, check=False)  # fmt: skip
    if done.returncode:
        return results([*cases, no_probe], at)
    try:
        return results([*cases, no_probe, job(disk, "disk", f["spikes"])], at)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


ROWS = {
    "short": ("biology", "unusable_start", "linalg.svd"),
    "noise": ("biology", "too_few_spikes", "TruncatedSVD"),
    "zeros": ("biology", "too_few_spikes", "TruncatedSVD"),
    "rail": ("biology", "too_few_spikes", "TruncatedSVD"),
    "same": ("biology", "too_few_spikes", "TruncatedSVD"),
    "late": ("biology", "too_few_spikes", "TruncatedSVD"),
    "threshold": ("biology", "too_few_spikes", "No spikes detected"),
    "cuda": ("environment", "cuda_missing", "not compiled with CUDA"),
    "torch_memory": ("resource", "host_memory", "DefaultCPUAllocator"),
    "numpy_memory": ("resource", "host_memory", "Unable to allocate"),
    "no_memory": ("resource", "host_memory", "MemoryError"),
    "disk": ("resource", "disk_full", "No space left on device"),
    "crash": ("environment", "crash", "SIGSEGV"),
    "odd_file": ("environment", "parameters", "did not divide evenly"),
    "one_based": ("environment", "parameters", "chanMap"),
    "no_channels": ("environment", "parameters", "required setting"),
    "kcoords": ("environment", "probe", "kcoords"),
    "even": ("environment", "parameters", "must be odd"),
    "unknown": ("environment", "parameters", "Th_univ"),
    "no_such_bad": ("environment", "parameters", "99"),
    "all_bad": ("biology", "no_good_channels", "zero-size array"),
    "missing": ("environment", "input_missing", "does not exist"),
    "unwritable": ("environment", "input_missing", "spiked"),
    "no_probe": ("environment", "probe", "no probe_name or probe_path"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_what_kilosort_left_behind_is_classified(ends: dict[str, dict[str, Any]], row: str, tmp_path: Path) -> None:  # fmt: skip
    kind, name, evidence = ROWS[row]
    if row not in ends:
        pytest.skip("no file system can be mounted here")
    end = ends[row]
    assert end["code"] not in (0, 99), end
    error = failures.sorting_error("kilosort4", end["code"], tmp_path, end["error"])
    told = failures.told(error)
    assert (told["class"], told["name"]) == (kind, name), end["error"][-600:]
    assert evidence in str(error) and "\n" not in str(error)
    assert told["remedy"] and told["policy"] and f"exit status {end['code']}" in told["evidence"]
    assert isinstance(error, failures.OutOfMemory) == (name == "host_memory")


def test_the_remedy_for_a_silent_beginning_works(ends: dict[str, dict[str, Any]]) -> None:
    assert ends["late"]["code"] == 1 and ends["late_from"]["code"] == 0


def test_the_place_in_kilosorts_code_is_evidence(ends: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    end = ends["noise"]
    told = failures.told(failures.sorting_error("kilosort4", end["code"], tmp_path, end["error"]))
    assert any("spikedetect.py" in line and "extract_wPCA_wTEMP" in line for line in told["evidence"])


RECORDED = {  # from users' logs and the packages' sources: there is no GPU, MATLAB or container here
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.33 GiB. GPU 0 has a total capacity of 7.79 GiB": ("resource", "gpu_memory"),
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 26911488 bytes.\n"
    "During handling of the above exception, another exception occurred:\nUnboundLocalError: cannot access local variable 'stt'": ("resource", "host_memory"),
    "RuntimeError: could not execute a primitive": ("resource", "host_memory"),  # seen under memory_gb, in one run of eighteen
    "OOM in kmeans_plus_plus iter 13 nsubs 200": ("resource", "gpu_memory"),
    "RuntimeError: CUDA error: unspecified launch failure": ("environment", "gpu_lost"),
    "torch.AcceleratorError: CUDA error: device-side assert triggered": ("environment", "gpu_lost"),
    "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU": ("environment", "cuda_missing"),
    "ValueError: n_samples=4 should be >= n_clusters=6.": ("biology", "too_few_spikes"),
    "Exception: The sorter kilosort2 is not installed. Please install it with:": ("environment", "matlab"),
    "Exception: kilosort2 returned a non-zero exit code": ("environment", "matlab"),
    "RuntimeError: The python `docker` package must be installed. Install with `pip install docker`": ("environment", "container"),
    "Exception: This sorter requires cuda, but the package 'cuda-python' is not installed.": ("environment", "container"),
    "AssertionError: The container requires a NVIDIA GPU capability, but it is not available": ("environment", "container"),
    "docker.errors.DockerException: Error while fetching server API version": ("environment", "container"),
    "RuntimeError: Singularity is not installed.": ("environment", "container"),
    "urllib.error.URLError: <urlopen error [Errno -2] Name or service not known>": ("environment", "download"),
    "RuntimeError: Channel locations are required for this spike sorter.": ("environment", "probe"),
    "ValueError: Contact positions must be unique within a probe.": ("environment", "probe"),
    "ModuleNotFoundError: No module named 'spikeinterface.qualitymetrics'": ("environment", "slay_version"),
    "joblib.externals.loky.process_executor.BrokenProcessPool: A task has failed to un-serialize.": ("environment", "slay_version"),
    "Exception: SpikeInterface only supports kilosort versions 4.1.1 and above. You are running version 4.0.1": ("environment", "versions"),
    "AttributeError: module 'numpy' has no attribute 'in1d'": ("environment", "versions"),
    "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 229. MiB for an array with shape (1000000, 10, 6)": ("resource", "host_memory"),
    "OSError: [Errno 28] No space left on device": ("resource", "disk_full"),
    "OSError: [Errno 122] Disk quota exceeded: '/data/x'": ("resource", "disk_full"),
    "OSError: [Errno 5] Input/output error": ("environment", "input_output"),
}  # fmt: skip


@pytest.mark.parametrize("text", RECORDED)
def test_what_cannot_be_produced_here_is_classified_from_its_recorded_text(text: str, tmp_path: Path) -> None:
    error = failures.sorting_error("kilosort4", 1, tmp_path, f"Traceback (most recent call last):\n{text}")
    assert (error.kind, error.name) == RECORDED[text]
    assert failures.told(error)["remedy"]


@pytest.mark.parametrize(
    ("code", "oom_kills", "name", "kind"),
    [
        (-9, None, "host_memory", "resource"), (137, 1, "host_memory", "resource"), (-9, 0, "killed", "environment"),
        (-15, None, "killed", "environment"), (-7, None, "crash", "environment"),
    ],
)  # fmt: skip
def test_the_end_by_a_signal_is_told_with_what_the_system_says(
    code: int, oom_kills: int | None, name: str, kind: str, tmp_path: Path
) -> None:
    error = failures.sorting_error("kilosort4", code, tmp_path, "", oom_kills, {"memory_percent": 97.0})
    assert (error.name, error.kind) == (name, kind) and "at most: memory_percent 97" in error.evidence


def test_a_crash_of_a_sorter_that_may_have_no_more_memory_is_that(tmp_path: Path) -> None:
    """Seen: LLVM, which compiles for numba, ends with SIGSEGV in place of an error."""
    trace = "Fatal Python error: Segmentation fault\nffi.lib.LLVMPY_DisposePipelineTuningOptions(self)"
    for limited, name in ((True, "host_memory"), (False, "crash")):
        error = failures.sorting_error("kilosort4", -11, tmp_path, trace, 0, limited=limited)
        assert error.name == name and "SIGSEGV" in str(error)
        assert isinstance(error, failures.OutOfMemory) == limited == ("memory is full" in str(error))


def test_an_unknown_failure_keeps_its_last_line(tmp_path: Path) -> None:
    error = failures.sorting_error("kilosort4", 1, tmp_path, "KeyError: 'lunch'")
    assert (error.kind, error.name) == ("environment", "unknown") and "lunch" in str(error) and str(tmp_path) in str(error)  # fmt: skip
