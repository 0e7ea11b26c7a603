"""Why a job failed, from what it left behind: biology (skip), environment (stop and fix), resource (retry smaller).

SpikeInterface raises one type for everything and drops the chain, so the text in spikeinterface_log.json and
the child's exit status are all there is. CAUSES are tried in order; the first that matches wins.
"""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiked.errors import OfflineError

POLICIES = {
    "biology": "skip this recording",
    "environment": "stop and fix",
    "resource": "retry smaller, or with more room",
}


@dataclass(frozen=True)
class Cause:
    """`pattern` is searched in the failure's text; `meaning` is what it says, `remedy` what to do."""

    name: str
    kind: str
    pattern: str
    meaning: str
    remedy: str


GPU_MEMORY = r"CUDA out of memory|OOM in kmeans_plus_plus|CUBLAS_STATUS_ALLOC_FAILED"
HOST_MEMORY = (
    r"DefaultCPUAllocator: can't allocate|Unable to allocate|MemoryError|Cannot allocate memory|std::bad_alloc|Buffer allocation failed"
    "|could not (create|execute) a (primitive|memory)"  # oneDNN, which does torch's convolutions on a CPU
)
INSTALL = "install spiked[offline]"
CAUSES: tuple[Cause, ...] = (
    Cause("slay_version", "environment", r"spikeinterface\.qualitymetrics|failed to un-serialize",
          "SLAy does not work beside this SpikeInterface", "install 'spikeinterface>=0.104,<0.105'"),
    Cause("versions", "environment", r"only supports kilosort versions|versions before [\d.]+ are not supported|'np\.in1d'|no attribute 'in1d'|[Kk]ilosort.{0,80}numpy ?>=? ?2\.4",
          "Kilosort does not work beside these versions of numpy and SpikeInterface", "install 'kilosort>=4.1.7'"),
    Cause("matlab", "environment", r"sorter kilosort2 is not installed|KILOSORT2_PATH|kilosort2 returned a non-zero",
          "Kilosort2 needs MATLAB and its own code", "set KILOSORT2_PATH to the folder with master_kilosort.m, or use its container"),
    Cause("container", "environment",
          r"docker. package must be installed|python docker package|cuda-python|fetching server API version|requires a NVIDIA GPU|Singularity is not installed|DockerException|[Ii]mage.*not found",
          "the sorter's container cannot be run", "install docker, its Python package and cuda-python, and start the docker service"),
    Cause("package_missing", "environment", r"No module named|is not installed", "a package is missing", INSTALL),
    Cause("cuda_missing", "environment", r"not compiled with CUDA|Found no NVIDIA driver|no CUDA-capable device|driver on your system is too old",
          "CUDA was asked for and is not there", "set device = 'auto', or install a CUDA build of torch and the driver it needs"),
    Cause("gpu_memory", "resource", GPU_MEMORY, "the GPU's memory is full", "use a smaller batch_size"),
    Cause("gpu_lost", "environment", r"CUDA error|device-side assert|unspecified launch failure|AcceleratorError",
          "the GPU failed", "look at dmesg and nvidia-smi, then start the job again"),
    Cause("host_memory", "resource", HOST_MEMORY, "the computer's memory is full", "use a smaller batch_size"),
    Cause("disk_full", "resource", r"No space left on device|Errno 28|Disk quota exceeded|Errno 122",
          "the disk is full", "free space and start the job again"),
    Cause("hdf5_plugin", "environment", r"required filter|HDF5 filter|HDF5_PLUGIN_PATH|can't open directory.*plugin|filter.*not registered",
          "the recording is compressed with a filter that HDF5 does not find here",
          "set HDF5_PLUGIN_PATH to the folder of the maker's plugin"),
    Cause("still_written", "environment", r"unable to lock file|is being written|Resource temporarily unavailable",
          "the recording is still being written", "end that session first"),
    Cause("file_damaged", "environment",
          r"truncated file|file signature not found|bad object header|already open for write|not a valid HDF5|is cut off|not an HDF5 file|Can't (synchronously )?read data|cannot open the file",
          "the recording's file is damaged", "run `spiked recover` on the session, or copy the file again"),
    Cause("read_only", "environment", r"PermissionError|Read-only file system|Errno 13\b|Errno 30\b",
          "the results' folder cannot be written", "check its owner and how the drive is mounted"),
    Cause("input_missing", "environment", r"FileExistsError: filename|does not exist|not an existing file|FileNotFoundError|Errno 2\b",
          "a file is not there", "check that the recording and the results' folder are where they were, and their drive mounted"),
    Cause("input_output", "environment", r"Input/output error|Errno 5\b|Stale file handle|Errno 116\b",
          "the drive does not answer", "look at dmesg and the drive's cable or network"),
    Cause("download", "environment", r"urlopen error|Name or service not known",
          "Kilosort wanted to download its templates", "keep templates_from_data = true"),
    Cause("probe", "environment",
          r"no probe_name or probe_path|Channel locations are required|KeyError: 'kcoords'|Array-valued probe|positions must be unique|no electrode positions|share positions",
          "the recording has no usable probe", "give the right probe file with --probe"),
    Cause("parameters", "environment",
          r"Unrecognized settings|Invalid parameters|must be odd|is a required setting|was not in probe|did not divide evenly|Largest value of chanMap",
          "Kilosort does not accept a parameter", "correct it in [offline] params"),
    Cause("non_finite", "environment", r"is not finite", "the recording holds samples that are not finite",
          "write it again without them"),
    Cause("no_good_channels", "biology", r"zero-size array to reduction operation maximum", "no channel is left to sort",
          "check bad_channels, the amplifier and the electrodes"),
    Cause("too_few_spikes", "biology", r"TruncatedSVD|should be >= n_clusters|No spikes detected|0 sample\(s\)",
          "too few spikes to sort", "look at the raw traces, or sort a part of the recording that has activity"),
    Cause("unusable_start", "biology", r"linalg\.svd|non-finite|LinAlgError",
          "the recording is too short or its first seconds are not usable", "record longer than one batch (batch_size)"),
)  # fmt: skip
MEMORY = re.compile(f"{GPU_MEMORY}|{HOST_MEMORY}")
CLUSTERING = re.compile(r"clustering_qr|swarmsplitter|kmeans_plus_plus")
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


class OutOfMemory(OfflineError):
    """The sorter had too little memory, of the computer or of the GPU; it may fit in smaller pieces."""

    def __init__(
        self, message: str, stage: str = "", name: str = "host_memory", evidence: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, "resource", stage, name, evidence)

    @property
    def in_clustering(self) -> bool:
        """Where smaller batches do not help, but clustering fewer spikes at a time does."""
        return any(CLUSTERING.search(line) for line in self.evidence)


def classify(text: str) -> Cause | None:
    """What a failure's text means; None when no rule knows it."""
    return next((c for c in CAUSES if re.search(c.pattern, text)), None)


def from_exit(returncode: int, oom_kills: int | None = None, limited: bool = False) -> Cause | None:
    """What it means that a process was ended by a signal, else None.

    `oom_kills` is how many processes the system ended meanwhile for want of memory, None where it does not say.
    `limited`: it could have no more than memory_gb, and compilers and libraries crash where an allocation fails.
    """
    number = -returncode if returncode < 0 else returncode - 128
    if number == signal.SIGKILL:
        if oom_kills == 0:
            return Cause("killed", "environment", "", "the sorter was killed from outside, though not for want of memory", "start the job again")  # fmt: skip
        return Cause("host_memory", "resource", "", "the sorter was killed, most likely because memory ran out", "use a smaller batch_size")  # fmt: skip
    if number in CRASHES:
        name = signal.Signals(number).name
        if limited:
            return Cause("host_memory", "resource", "", f"the sorter crashed ({name}), as it does when the memory is full that memory_gb allows", "use a smaller batch_size")  # fmt: skip
        return Cause("crash", "environment", "", f"the sorter crashed ({name})", f"re{INSTALL}")
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return Cause("killed", "environment", "", "the sorter was told to end by somebody else", "start the job again")  # fmt: skip
    return None


def error_of(sorter_folder: Path) -> str | None:
    """The error trace SpikeInterface logged, '' when it logged success, None when it logged nothing."""
    try:
        log = json.loads((sorter_folder / "spikeinterface_log.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not log.get("error"):
        return ""
    trace = log.get("error_trace") or []
    return "\n".join(str(line).rstrip("\n") for line in trace) if isinstance(trace, list) else str(trace)


def sorting_error(
    sorter: str,
    returncode: int,
    sorter_folder: Path,
    stderr_tail: str,
    oom_kills: int | None = None,
    seen: dict[str, float] | None = None,
    limited: bool = False,
) -> OfflineError:
    """The OfflineError for a sorter process that did not succeed. `seen` are the guards' worst readings."""
    trace = error_of(sorter_folder) or stderr_tail
    killed = from_exit(returncode, oom_kills, limited)
    if killed and MEMORY.search(trace):  # C++ ends with SIGABRT when an allocation fails
        killed = None
    cause = killed or classify(trace)
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    last = _telling(lines, cause) or f"exit status {returncode}"
    evidence = [f"exit status {returncode}", *dict.fromkeys([last, *lines[-1:]]), *_place(lines)]
    if seen:
        evidence.append("at most: " + ", ".join(f"{k} {v:g}" for k, v in seen.items()))
    if cause is None:
        return OfflineError(f"{sorter}: {last}; see {sorter_folder}", "environment", "sort", "unknown", tuple(evidence))  # fmt: skip
    said = cause.meaning if killed else f"{cause.meaning} ({last.replace('; ', ', ')})"
    message = f"{sorter}: {said}; {cause.remedy}"
    if cause.name in ("host_memory", "gpu_memory"):
        return OutOfMemory(message, "sort", cause.name, tuple(evidence))
    return OfflineError(message, cause.kind, "sort", cause.name, tuple(evidence))


def of_exception(error: BaseException, stage: str, where: str = "") -> OfflineError:
    """Any exception of our own stages as one that says what to do; OfflineErrors get what they lack.

    `where` is the file or folder at hand, for errors that name none.
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    cause = classify(text)
    if isinstance(error, OfflineError):
        error.stage = error.stage or stage
        error.name = error.name or (cause.name if cause else "")
        return error
    evidence = (text[:400], *_place(_frames(error)))
    if cause is None:
        message = f"{stage or 'the job'} failed ({text[:200].replace('; ', ', ')}); see offline.stderr"
        return OfflineError(message, "environment", stage, "unknown", evidence)
    at = getattr(error, "filename", None) or where
    said = f"{cause.meaning}{f' at {at}' if at else ''} ({text[:160].replace('; ', ', ')})"
    kind = OutOfMemory if cause.name in ("host_memory", "gpu_memory") else None
    if kind is not None:
        return kind(f"{said}; {cause.remedy}", stage, cause.name, evidence)
    return OfflineError(f"{said}; {cause.remedy}", cause.kind, stage, cause.name, evidence)


def told(error: Any, stage: str = "") -> dict[str, Any]:
    """A failure as the queue, the report and `spiked jobs show` say it: JSON types only."""
    kind = str(getattr(error, "kind", "environment"))
    text = str(error)
    what, _, remedy = text.rpartition("; ")
    cause = classify(text)
    return {
        "class": kind,
        "name": str(getattr(error, "name", "")) or (cause.name if cause else "unknown"),
        "stage": str(getattr(error, "stage", "")) or stage,
        "what": what or text,
        "remedy": remedy if what else "",
        "policy": POLICIES.get(kind, ""),
        "evidence": list(getattr(error, "evidence", ())),
    }


def _telling(lines: list[str], cause: Cause | None) -> str:
    """The line that says it: Kilosort may stumble over a variable while it tells of something else."""
    said = [line for line in lines if cause is not None and cause.pattern and re.search(cause.pattern, line)]
    return (said or lines or [""])[-1][:200]


def _place(lines: list[str]) -> list[str]:
    """The innermost line of a traceback that is in the sorter's own code, or else the innermost."""
    files = [line.strip() for line in lines if line.strip().startswith("File ")]
    own = [f for f in files if re.search(r"/(kilosort|dartsort|slay)/", f)]
    return [re.sub(r'"[^"]*/((?:[^/"]+/)?[^/"]+)"', r"\1", f) for f in (own or files)[-1:]]


def _frames(error: BaseException) -> list[str]:
    frames, at = [], error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        frames.append(f'File "{code.co_filename}", line {at.tb_lineno}, in {code.co_name}')
        at = at.tb_next
    return frames
