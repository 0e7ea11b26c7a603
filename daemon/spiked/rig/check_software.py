"""Checks of what is installed: versions, compiled kernels, plugins, the service."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from spiked.errors import ConfigError
from spiked.offline.guards.versions import conflicts, installed
from spiked.rig import adapt, install, units, warm
from spiked.rig.findings import FAIL, OK, WARN, Finding, Scene

COMPRESSED = 32013  # HDF5 filter of MaxWell's recordings
SERVICE_CACHE = Path("/var/cache/spiked/numba")


def versions(scene: Scene) -> Iterator[Finding]:
    """Python and packages, as spiked asks for them and as they go with each other."""
    python = ".".join(str(n) for n in sys.version_info[:3])
    if sys.version_info < (3, 11) or sys.version_info >= (3, 14):
        yield Finding(
            "versions", FAIL, f"Python {python}", "python3.11 -m venv /opt/spiked; spiked needs 3.11 to 3.13"
        )
    wrong = list(_wrong_packages("daemon"))
    for text, fix in wrong:
        yield Finding("versions", FAIL, text, fix)
    offline = scene.config.offline if scene.config else None
    if offline is None or offline.enabled:
        sorter = str(offline.sorter) if offline else "kilosort4"
        errors, warnings = conflicts(installed(), sorter)
        for level, lines in ((FAIL, errors), (WARN, warnings)):
            for row in lines:
                text, _, fix = row.rpartition("; ")
                yield Finding("versions", level, text or fix, fix)
        wrong += [(e, "") for e in errors]
    if not wrong:
        told = ", ".join(f"{k} {v}" for k, v in installed().items())
        yield Finding("versions", OK, f"Python {python}, {told}")


def _wrong_packages(extra: str) -> Iterator[tuple[str, str]]:
    """(what, command) of each package that spiked[extra] asks for and that is absent or of another version."""
    try:
        from packaging.requirements import Requirement

        asked = [Requirement(r) for r in metadata.requires("spiked") or ()]
    except (ImportError, metadata.PackageNotFoundError):
        yield "spiked is not installed as a package", "pip install '.[offline]' in its folder"
        return
    for r in asked:
        if r.marker is not None and not r.marker.evaluate({"extra": extra}):
            continue
        try:
            have = metadata.version(r.name)
        except metadata.PackageNotFoundError:
            yield f"{r.name} is not installed", f"pip install '{r.name}{r.specifier}'"
            continue
        if not r.specifier.contains(have, prereleases=True):
            yield f"{r.name} {have} is not {r.specifier}", f"pip install '{r.name}{r.specifier}'"


def kernels(_scene: Scene) -> Iterator[Finding]:
    """Kernels are compiled, for who asks and for the service."""
    if warm.is_warm():
        yield Finding("kernels", OK, "the live path's kernels are compiled")
    else:
        yield Finding("kernels", WARN, "the live path's kernels are not compiled for this installation: the first session would wait for them", "spiked warmup")  # fmt: skip


def plugin(scene: Scene) -> Iterator[Finding]:
    """MaxWell's compressed recordings can be read, where the configuration replays one."""
    paths = [s.path for s in scene.config.stream if s.source == "replay" and s.path] if scene.config else []
    if not any(str(p).endswith((".raw.h5", ".h5")) for p in paths):
        return
    import h5py

    if h5py.h5z.filter_avail(COMPRESSED):
        yield Finding("hdf5", OK, "MaxWell's HDF5 compression can be read")
        return
    where = os.environ.get("HDF5_PLUGIN_PATH")
    text = f"MaxWell's HDF5 compression cannot be read ({f'HDF5_PLUGIN_PATH = {where}' if where else 'HDF5_PLUGIN_PATH is not set'})"  # fmt: skip
    yield Finding("hdf5", WARN, text, "export HDF5_PLUGIN_PATH=FOLDER of MaxLab's libcompression.so; older files do not need it")  # fmt: skip


def service(scene: Scene) -> Iterator[Finding]:
    """The installed service fits this configuration; it could not know of an address that was changed since."""
    if scene.config is None or scene.path is None:
        return
    for layout in _installed(scene.path.absolute()):
        unit = layout.unit("spiked")
        mends = ["spiked", "install-service", *(["--user"] if layout.user else ["sudo"]), *(["--instance", layout.instance] if layout.instance else []), "--config", str(layout.config)]  # fmt: skip
        if not layout.user:
            mends = [
                "sudo",
                str(Path(sys.executable).with_name("spiked")),
                *[w for w in mends[1:] if w != "sudo"],
            ]
        try:
            wrong = [c for c in install.changes(layout, units.files(layout, adapt.drop_in(scene.config, layout))) if c.kind != "same"]  # fmt: skip
        except ConfigError as e:
            yield Finding("service", WARN, str(e))
            continue
        if wrong:
            names = ", ".join(c.path.name for c in wrong)
            yield Finding("service", FAIL, f"{unit} was installed for another version or configuration ({names})", units.shell(mends))  # fmt: skip
        else:
            yield Finding("service", OK, f"{unit} is installed for this configuration")
        for text, fix in install.refused(layout):
            yield Finding("service", FAIL, text, fix)
        if not layout.user and not warm.is_warm(SERVICE_CACHE / warm.STAMP) and os.access(SERVICE_CACHE.parent, os.X_OK):  # fmt: skip
            yield Finding("kernels", WARN, f"{unit} compiles its kernels at its next start, which takes a minute or two", f"sudo systemctl restart {unit}")  # fmt: skip


def _installed(config: Path) -> list[units.Layout]:
    """The services on this computer that run this configuration."""
    found = []
    system = units.Layout(config)
    own = units.Layout(config, user=True)
    for layout in (system, own):
        drop_in = layout.units / "spiked.service.d/10-rig.conf"
        told = (
            drop_in.read_text(encoding="utf-8") if drop_in.is_file() and os.access(drop_in, os.R_OK) else ""
        )
        usual = str(config) == units.CONFIG and not layout.user
        if (layout.units / "spiked.service").is_file() and (f"SPIKED_CONFIG={config}" in told or (usual and "SPIKED_CONFIG" not in told)):  # fmt: skip
            found.append(layout)
    for drop_in in system.units.glob("spiked@*.service.d/10-rig.conf"):
        instance = drop_in.parent.name.removeprefix("spiked@").removesuffix(".service.d")
        told = drop_in.read_text(encoding="utf-8") if os.access(drop_in, os.R_OK) else ""
        if f"SPIKED_CONFIG={config}" in told or str(config) == f"/etc/spiked/{instance}.toml":
            found.append(units.Layout(config, instance))
    return found
