"""What one job sorts: a session, or recordings of any format; as JSON, because it is read on another process."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from spiked.errors import ConfigError, OfflineError
from spiked.offline.manifest import digest
from spiked.offline.session import Session, open_session
from spiked.sources.formats.recording import Choice

SUFFIXES = (".nwb", ".h5", ".bin", ".dat", ".raw", ".npy", ".rhd", ".rhs", ".ns5", ".ns6", ".plx", ".pl2", ".brw", ".smr", ".smrx", ".edf", ".rec")  # fmt: skip
OURS = (".lf.bin", ".nidq.bin", ".sequences.h5", ".spikes.bin", ".units.h5")  # beside recordings, but none


@dataclass(frozen=True)
class Task:
    """Paths are absolute. Without `out` the one path is a session folder; with it the results go there.

    Several paths are sorted as one recording, in this order. `choice` are fields of Choice that say what the
    files do not, `stream` is one stream of a session, `params` are fields of presets.JobSettings.
    """

    paths: tuple[str, ...]
    out: str = ""
    stream: str = ""
    choice: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)
        object.__setattr__(self, "paths", paths)
        texts = (*paths, self.out, self.stream)
        if not paths or not all(isinstance(t, str) and "\0" not in t for t in texts):
            raise TypeError("paths, out and stream are text, and there is at least one path")
        if not isinstance(self.choice, dict) or not isinstance(self.params, dict):
            raise TypeError("choice and params are maps")

    @classmethod
    def of_session(cls, path: Path | str, params: dict[str, Any], stream: str = "") -> Self:
        return cls((str(Path(path).resolve()),), stream=stream, params=params)

    @classmethod
    def load(cls, text: str) -> Self:
        """From `dump`; OfflineError for anything else."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError) as e:
            raise OfflineError(f"{text[:80]!r} is not a task ({e}); give the session folder") from e

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @property
    def sorter(self) -> str:
        return str(self.params.get("sorter", "kilosort4"))

    @property
    def is_session(self) -> bool:
        return not self.out

    @property
    def folder(self) -> Path:
        """Where the results go: the session itself, or `out`."""
        return Path(self.out or self.paths[0])

    @property
    def name(self) -> str:
        name = self.folder.name.removesuffix(".spiked")
        return f"{name} ({len(self.paths)} joined)" if len(self.paths) > 1 else name

    @property
    def key(self) -> str:
        """The same for the same results, whatever the parameters: there is one job for them."""
        return digest(str(self.folder.resolve()), self.sorter, self.stream, self.choice.get("well"))

    def open(self) -> Session:
        """The recorded streams. ConfigError, RecordingError or OfflineError where they cannot be sorted."""
        if self.is_session:
            return open_session(self.paths[0])
        from spiked.offline.foreign import open_foreign

        return open_foreign([Path(p) for p in self.paths], Path(self.out), self._choice())

    def _choice(self) -> Choice:
        choice = dict(self.choice)
        if choice.get("probe"):
            choice["probe"] = Path(choice["probe"])
        return Choice(**choice)


def is_session(path: Path) -> bool:
    """A folder that the daemon recorded."""
    return (path / "session.toml").is_file() and any(path.glob("*.nwb"))


def natural(path: Path) -> list[Any]:
    """Sorts file 10 after file 9."""
    return [int(t) if t.isdecimal() else t.lower() for t in re.split(r"(\d+)", path.name)]


def tasks(
    paths: list[Path],
    joined: bool = False,
    out: Path | None = None,
    stream: str = "",
    choice: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
) -> list[Task]:
    """What to sort for these paths: each on its own, the recordings of a folder as one, all as one if `joined`.

    The results of a session go into it; those of others to `out`/NAME, or NAME.spiked beside the recording.
    A folder of sessions is one task per session unless `joined`. ConfigError for what cannot be.
    """
    for path in paths:
        if not path.exists():
            raise ConfigError(f"there is no recording {path}; check the path")
    paths = [p.resolve() for p in paths]
    for path in [*paths, *([out] if out else [])]:
        if (
            "\udc80" <= max(str(path)) <= "\udcff"
        ):  # bytes that are no text: no queue or report could hold them
            raise ConfigError(f"the name of {str(path)!a} is not UTF-8; rename it")
    params, found = params or {}, []
    if joined:
        parts = [p for path in paths for p in (_inside(path) or [path])]
        if len(parts) < 2:
            raise ConfigError(f"{paths[0]} holds one recording; there is nothing to join")
        top = paths[0] if len(paths) == 1 else paths[0].with_name(f"{_stem(paths[0])}-joined")
        return [_foreign(parts, top, out, stream, choice, params)]
    for path in paths:
        inside = _inside(path)
        if is_session(path) or (inside and all(is_session(p) for p in inside)):
            if out is not None or choice:
                raise ConfigError(
                    f"{path} is a session: its results go into it; leave out --out and the like, or give the .nwb file in it"
                )
            found += [Task.of_session(p, params, stream) for p in inside or [path]]
        else:
            found.append(_foreign(inside or [path], path, out, stream, choice, params))
    return _apart(found)


def _apart(found: list[Task]) -> list[Task]:
    """Each once; ConfigError where two recordings would leave their results in one folder."""
    of_folder: dict[Path, Task] = {}
    for task in found:
        other = of_folder.setdefault(task.folder, task)
        if other.paths != task.paths:
            raise ConfigError(
                f"{other.paths[0]} and {task.paths[0]} would both leave their results in {task.folder}; sort them one "
                "after the other, with different --out"
            )
    return list(of_folder.values())


def _foreign(
    parts: list[Path],
    top: Path,
    out: Path | None,
    stream: str,
    choice: dict[str, Any] | None,
    params: dict[str, Any],
) -> Task:
    chosen = [f"well{choice['well']:03d}"] if choice and choice.get("well") is not None else []
    chosen += [re.sub(r"[^A-Za-z0-9_.-]", "-", stream)] if stream else []
    name = "-".join([_stem(top), *chosen])  # one well or stream does not take the place of another
    folder = out / name if out is not None else top.with_name(f"{name}.spiked")
    said = {**(choice or {}), **({"stream": stream} if stream else {})}
    return Task(tuple(map(str, parts)), str(folder.resolve()), stream, said, params)


def _stem(path: Path) -> str:
    """The name without what says the format."""
    name = path.name
    for suffix in (".raw.h5", ".ap.bin", ".ap.meta", *SUFFIXES):
        name = name.removesuffix(suffix)
    return name


def _inside(path: Path) -> list[Path]:
    """The recordings of a folder that is none itself, in natural order; [] for a recording."""
    if not path.is_dir() or is_session(path):
        return []
    files = sorted(
        (p for p in path.iterdir() if p.name.endswith(SUFFIXES) and not p.name.endswith(OURS)), key=natural
    )
    single = {
        "raw.mda",
        "traces.npy",
        "si_folder.json",
        "structure.oebin",
        "continuous.dat",
        ".zattrs",
        ".zgroup",
    }
    if any((path / name).exists() for name in single):
        return []
    if len(files) > 1:
        if len({p.suffix for p in files}) > 1:
            kinds = ", ".join(sorted({p.suffix for p in files}))
            raise ConfigError(
                f"{path} holds files of several kinds ({kinds}); give the paths of those to join"
            )
        probes = {m.group() for p in files if (m := re.search(r"imec\d+", p.name))}
        if len(probes) > 1:
            raise ConfigError(
                f"{path} holds several probes ({', '.join(sorted(probes))}); give the files of one"
            )
        return files
    sessions = sorted((p for p in path.iterdir() if is_session(p)), key=natural)
    return sessions if not files else []
