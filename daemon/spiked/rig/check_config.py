"""Checks of the rig's file: what it says, and the files it names."""

from __future__ import annotations

from collections.abc import Iterator

from spiked.config import Stream
from spiked.errors import SpikedError
from spiked.rig.findings import FAIL, OK, WARN, Expected, Finding, Scene
from spiked.rig.paths import named
from spiked.sources.electrode_map import read_electrode_map
from spiked.sources.probe import load_probe

# source: (channels where nothing tells, Hz, bytes of a stored sample, bytes of a sample on the wire)
USUAL = {
    "openephys": (384, 30_000.0, 2, 4),
    "maxwell": (1024, 20_000.0, 2, 4),
    "spikeglx": (384, 30_000.0, 2, 2),
    "replay": (384, 30_000.0, 2, 2),
}


def expected(stream: Stream, channels: int | None) -> Expected:
    """What the stream will bring; `channels` as its probe or map says, None where there is none."""
    usual, fs_hz, stored, wire = USUAL.get(stream.source, USUAL["openephys"])
    stored = 4 if stream.uv_per_bit == "float" else stored
    return Expected(stream.name, channels or usual, stream.fs_hz or fs_hz, stored, wire, channels is None)


def streams(scene: Scene) -> Iterator[Finding]:
    """Each stream's channels and where they sit."""
    for stream in scene.config.stream if scene.config else ():
        channels: int | None = None
        try:
            channels, text = _channels(stream)
        except SpikedError as e:
            what, _, fix = str(e).partition("; ")
            yield Finding("probe", FAIL, f"{stream.name}: {what}", fix or f"correct it in {scene.rig}")
        else:
            if channels is None and stream.source in ("spikeglx", "replay"):
                yield Finding("probe", OK, f"{stream.name}: {text}")
            elif channels is None:
                key = "electrode_map" if stream.source == "maxwell" else "probe"
                fix = f'add {key} = "..." to [[stream]] {stream.name} in {scene.rig}'
                yield Finding("probe", WARN, f"{stream.name}: {text}", fix)
            else:
                yield Finding("probe", OK, f"{stream.name}: {text}")
        scene.streams.append(expected(stream, channels))


def _channels(stream: Stream) -> tuple[int | None, str]:
    """(channels or None, where that is from). SpikedError where a file is wrong."""
    if stream.source == "maxwell" and stream.electrode_map is not None:
        found = read_electrode_map(stream.electrode_map, stream.well)
        return len(found.channels), f"{len(found.channels)} electrodes of {stream.electrode_map}"
    if stream.probe is not None:
        probe = load_probe(stream.probe)
        wired = int((probe.device_channel_indices >= 0).sum()) or len(probe.positions)
        return wired, f"{wired} contacts of {stream.probe}"
    if stream.source == "spikeglx":
        return None, "SpikeGLX tells its probe"
    if stream.source == "replay":
        return None, f"the recording {stream.path} tells its channels"
    return None, "no probe map: positions are a made-up line, so drift, merging and maps mean nothing"


def files(scene: Scene) -> Iterator[Finding]:
    """Files that the configuration names, beside probes."""
    if scene.config is None:
        return
    probes = (": probe", ": electrode_map")  # told by the check of the streams
    named_there = [(key, path) for key, path in named(scene.config) if not key.endswith(probes)]
    missing = [(key, path) for key, path in named_there if not path.exists()]
    for key, path in missing:
        how = "spiked keys init" if key == "publish.keys" else f"correct {key} in {scene.rig}"
        yield Finding("files", FAIL, f"{key}: there is no {path}", how)
    if named_there and not missing:
        yield Finding("files", OK, f"all {len(named_there)} files that the configuration names are there")
    for key, path in named_there:
        secret = key.endswith(("password_file", "key_file", "token_file", "client_key"))
        if secret and path.exists() and path.stat().st_mode & 0o004:
            yield Finding(
                "files", WARN, f"{key}: everybody on this computer can read {path}", f"chmod o-r {path}"
            )
