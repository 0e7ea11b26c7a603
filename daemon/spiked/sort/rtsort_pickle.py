"""Reads a pickled RT-Sort sorter without running anything in it. A program of its own: pickle in, npz out.

    python -I -B rtsort_pickle.py < rt_sort.pickle > fields.npz

A pickle names the functions that rebuild it. Here every name leads to a plain stand-in defined in this file, classes
of the sorter's package and of torch.nn become inert records, and any other name ends the program. Neither the
sorter's package nor torch is needed; tensors of a GPU are read like all others. Nothing is opened: while the pickle
is read, whatever asks the interpreter for a file, a process, a socket or an import is refused too.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import posixpath
import re
import resource
import sys
import zipfile  # noqa: F401 - numpy would import it only when the result is written
from typing import Any

import numpy as np

MEMORY = 4 << 30  # bytes; a sorter of 3000 sequences on 1000 electrodes takes 0.1 GB
SECONDS = 120
INERT = ("spikelab", "braindance", "torch.nn")
SORTERS = ("spikelab", "braindance")
STORAGE = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "bf16", "LongStorage": "<i8",
    "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1", "BoolStorage": "?",
}  # fmt: skip
MAGIC = 0x1950A86A20F9469CFC6C  # torch's own, of a storage inside a pickle
REFUSED, BROKEN = 3, 4
TABLES = (
    "seqs_latencies", "seqs_amps", "seqs_amp_weights", "seqs_inner_loose_elecs", "seqs_loose_elecs", "seqs_min_loose_elecs",
    "seqs_root_amp_means", "seqs_root_amp_stds", "comp_elecs_flattened", "seqs_root_elecs_rel_comp_elecs",
)  # fmt: skip
SCALARS = (
    "samp_freq", "seq_n_before", "stringent_thresh_logit", "loose_thresh_logit", "min_elecs_for_array_noise",
    "min_inner_loose_detections", "max_latency_diff_spikes", "clip_latency_diff", "max_amp_median_diff_spikes",
    "max_root_amp_median_std_spikes", "overlap",
)  # fmt: skip


class Refused(Exception):
    """The pickle asks for something that a sorter does not need."""


class Broken(Exception):
    """Not a whole pickle of a sorter."""


class Record:
    """In place of an object whose class is not here: what was stored, and nothing that it could do."""

    origin = ""
    state: Any = None

    def __new__(cls, *_args: Any, **_kw: Any) -> Record:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kw: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Dtype:
    """numpy.dtype, of plain numbers only."""

    def __init__(self, spec: str, *_args: Any) -> None:
        if not isinstance(spec, str) or not re.fullmatch(r"([biufc]\d{1,2}|\?|O8?|[SU]\d{1,9})", spec):
            raise Refused(f"an array of type {str(spec)[:40]!r}")
        self.spec, self.order = spec, "="

    def __setstate__(self, state: Any) -> None:
        if any(part is not None for part in state[2:5]) or state[1] not in ("<", ">", "=", "|"):
            raise Refused("a structured array")
        self.order = state[1]

    @property
    def objects(self) -> bool:
        return self.spec.startswith("O")

    def of(self, data: Any) -> np.ndarray:
        """The flat array in these bytes."""
        return np.frombuffer(bytes(data), np.dtype(self.order + self.spec))


class Array:
    """numpy.ndarray; one of objects becomes a list."""

    value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        order = "F" if fortran else "C"
        self.value = list(data) if dtype.objects else dtype.of(data).reshape(shape, order=order)


def array(_type: Any, _shape: Any, _typecode: Any) -> Array:
    return Array()


def from_buffer(data: Any, dtype: Dtype, shape: Any, order: str) -> np.ndarray:
    return dtype.of(data).reshape(shape, order="F" if order == "F" else "C")


def scalar(dtype: Dtype, data: bytes) -> Any:
    return dtype.of(data)[0]


def tensor(flat: np.ndarray, offset: int, size: Any, stride: Any, *_rest: Any) -> np.ndarray:
    """A torch tensor from its storage."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if min((offset, *size, *stride), default=0) < 0 or len(size) != len(stride):
        raise Broken("a tensor's shape makes no sense")
    if 0 in size:
        return np.zeros(size, flat.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(flat):
        raise Broken("a tensor reaches beyond its storage")
    steps = [step * flat.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(flat[offset:], size, steps).copy()


def typed(rebuild: Any, _type: Any, args: Any, _state: Any) -> Any:
    return rebuild(*args)


def parameter(data: Any, *_rest: Any) -> Any:
    return data


def storage(data: bytes) -> np.ndarray:
    """torch's bytes of one storage: four pickles, the list of keys, then count and raw values."""
    f = io.BytesIO(data)
    if SafeUnpickler(f).load() != MAGIC:
        raise Broken("a tensor is stored in a way that torch.storage does not use")
    SafeUnpickler(f).load(), SafeUnpickler(f).load()
    content = SafeUnpickler(f, in_storage=True)
    kind = content.load()
    if not isinstance(kind, Kind) or len(SafeUnpickler(f).load()) != 1:
        raise Broken("a tensor's storage holds something else")
    count = int.from_bytes(f.read(8), "little", signed=True)
    step = 2 if kind.code == "bf16" else np.dtype(kind.code).itemsize
    raw = f.read(max(0, count) * step)
    if count < 0 or len(raw) != count * step:
        raise Broken("a tensor is cut off")
    if kind.code == "bf16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, kind.code)


class Kind:
    """What a storage holds."""

    def __init__(self, code: str) -> None:
        self.code = code


def path(*parts: Any) -> str:
    return posixpath.join("", *map(str, parts))


def encoded(text: str, _encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def nothing(*_args: Any) -> None: ...


BUILTIN = {"set": set, "frozenset": frozenset, "dict": dict, "list": list, "tuple": tuple, "bytearray": bytearray, "complex": complex}  # fmt: skip
NUMPY = re.compile(r"numpy\.(_core|core)\.(multiarray|numeric)")
KNOWN: dict[str, Any] = {
    **{f"builtins.{k}": v for k, v in BUILTIN.items()},
    "collections.OrderedDict": collections.OrderedDict, "collections.deque": collections.deque, "collections.defaultdict": collections.defaultdict,
    **{f"{m}.{c}": path for m in ("pathlib", "pathlib._local") for c in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
    "_codecs.encode": encoded,
    "numpy.dtype": Dtype, "numpy.ndarray": Array, "numpy._reconstruct": array, "numpy.scalar": scalar, "numpy._frombuffer": from_buffer,
    "torch._utils._rebuild_tensor_v2": tensor, "torch._utils._rebuild_tensor": tensor, "torch._tensor._rebuild_from_type_v2": typed,
    "torch._utils._rebuild_parameter": parameter, "torch.storage._load_from_bytes": storage, "torch.Tensor": Array, "torch.Size": tuple,
    "torch.device": nothing, **{f"torch.{k}": Kind(v) for k, v in STORAGE.items()},
    **{f"torch.{k}": k for k in ("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")},
}  # fmt: skip


class SafeUnpickler(pickle.Unpickler):
    """Resolves names to the stand-ins above and to nothing else."""

    def __init__(self, file: io.BytesIO, in_storage: bool = False) -> None:
        super().__init__(file)
        self._in_storage = in_storage

    def find_class(self, module: str, name: str) -> Any:
        full = NUMPY.sub("numpy", module) + "." + name
        if full in KNOWN:
            return KNOWN[full]
        if any(module == m or module.startswith(m + ".") for m in INERT):
            return type("Record", (Record,), {"origin": f"{module}.{name}"})
        raise Refused(f"{module}.{name}"[:120])

    def persistent_load(self, pid: Any) -> Any:
        if not self._in_storage or not isinstance(pid, tuple) or not isinstance(pid[1], Kind):
            raise Refused("an object outside the file")
        return pid[1]


def deny(event: str, _args: Any) -> None:
    """Audit hook: while a pickle is read nothing else may happen."""
    if reading and event != "pickle.find_class" and not event.startswith("object.__"):
        raise Refused(f"what it does ({event})")


reading = False


def load(data: bytes) -> tuple[str, dict[str, Any]]:
    """Class and attributes of the pickled RTSort."""
    global reading
    reading = True
    try:
        found = SafeUnpickler(io.BytesIO(data)).load()
    except (EOFError, pickle.UnpicklingError) as e:
        raise Broken(f"it is no pickle, or cut off ({str(e)[:80]})") from e
    finally:
        reading = False
    what = found.origin if isinstance(found, Record) else type(found).__name__
    ours = what.split(".")[0] in SORTERS and what.endswith(".RTSort")
    if isinstance(found, Record) and ours and isinstance(found.state, dict):
        return what, found.state
    raise Broken(f"it holds a {what}, not an RTSort of spikelab or braindance")


def plain(value: Any) -> Any:
    """Arrays out of stand-ins."""
    if isinstance(value, Array):
        value = value.value
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def fields(origin: str, state: dict[str, Any]) -> dict[str, np.ndarray]:
    """What describes the sequences, as plain arrays; one json string `scalars`."""
    absent = [k for k in (*TABLES, *SCALARS) if k not in state]
    if absent:
        raise Broken(f"it lacks {', '.join(absent[:4])}: not a finished RTSort")
    out = {k: np.asarray(plain(state[k])) for k in TABLES}
    scalars: dict[str, Any] = {"class": origin, **{k: float(plain(state[k])) for k in SCALARS}}
    for name in ("input_scale", "num_elecs", "input_size"):
        value = plain(state.get(name))
        scalars[name] = None if value is None else float(value)
    buffer = plain(state.get("pre_median_frames"))
    if scalars["num_elecs"] is None and isinstance(buffer, np.ndarray):
        scalars["num_elecs"] = float(len(buffer))
    ids = plain(state.get("chan_ids"))
    scalars["chan_ids"] = None if ids is None else [int(i) for i in ids]
    trains = [np.asarray(t, np.float64).reshape(-1) for t in plain(state.get("seq_spike_trains")) or ()]
    out["n_spikes"] = np.array([len(t) for t in trains], np.int64)
    times = np.concatenate([np.zeros(0), *trains])
    out["span_ms"] = np.array([times.min(), times.max()] if len(times) else [])
    if "seq_locs" in state:
        out["seq_locs"] = np.asarray(plain(state["seq_locs"]), np.float64)
    objects = [k for k, v in out.items() if v.dtype == object]
    if objects:
        raise Broken(f"{objects[0]} is not a table of numbers")
    return {**out, "scalars": np.array(json.dumps(scalars))}


def main() -> int:
    data = sys.stdin.buffer.read()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + len(data), MEMORY + len(data)))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    sys.addaudithook(deny)
    try:
        result = fields(*load(data))
    except Refused as e:
        sys.stderr.write(f"it asks for {e}, which no sorter needs; it was not opened\n")
        return REFUSED
    except Broken as e:
        sys.stderr.write(f"{e}\n")
        return BROKEN
    except Exception as e:  # noqa: BLE001 - whatever a wrong file does to the stand-ins is one line too
        sys.stderr.write(f"it is damaged, or not what it seems ({type(e).__name__}: {str(e)[:80]})\n")
        return BROKEN
    whole = io.BytesIO()
    np.savez(whole, **result)  # type: ignore[arg-type]
    sys.stdout.buffer.write(whole.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
