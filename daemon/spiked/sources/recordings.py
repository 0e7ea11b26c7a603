"""Open a recording of any format the daemon knows; the format is found by looking, not by being told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spiked.errors import ConfigError, RecordingError
from spiked.sources.formats.recording import Choice, GroundTruth, Recording

__all__ = ["Choice", "GroundTruth", "Recording", "open_recording"]

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# what h5py, numpy and plain parsing raise on files whose content contradicts itself
DAMAGE = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError,
    ZeroDivisionError, MemoryError,
)  # fmt: skip
KNOWN = (
    "Maxwell .raw.h5, SpikeGLX, Open Ephys binary, NWB, SpikeInterface folder, traces.npy folder, plain array"
)


def open_recording(
    path: Path | str,
    *,
    probe: Path | str | None = None,
    stream: str | None = None,
    well: int | None = None,
    fs_hz: float | None = None,
    n_channels: int | None = None,
    dtype: str | None = None,
    gain_uv: float | None = None,
    zero_code: float | None = None,
) -> Recording:
    """Open a file or folder for reading, whatever its format.

    `probe` replaces the positions that are in the file; `stream` (a name) and `well` choose where the file
    holds several; the others describe a plain array. Raises ConfigError or RecordingError with one line that
    says what to do: path absent, format unknown, several streams, file cut off, description incomplete.
    """
    path = Path(os.path.expanduser(path))
    choice = Choice(
        Path(os.path.expanduser(probe)) if probe is not None else None,
        stream, well, fs_hz, n_channels, dtype, gain_uv, zero_code,
    )  # fmt: skip
    if not path.exists():
        raise ConfigError(f"there is no recording {path}; check the path")
    try:
        return _open_folder(path, choice) if path.is_dir() else _open_file(path, choice)
    except DAMAGE as e:
        why = " ".join(f"{type(e).__name__} {e}".split())[:120]
        raise RecordingError(f"{path} is damaged, or not what it seems ({why}); copy it again") from e


def _open_file(path: Path, choice: Choice) -> Recording:
    try:
        with open(path, "rb") as f:
            head = f.read(8)
    except OSError as e:
        raise RecordingError(f"{path} cannot be read ({e.strerror}); check its permissions") from e
    if head == HDF5_MAGIC:
        return _open_hdf5(path, choice)
    if path.suffix in (".h5", ".hdf5", ".nwb"):
        raise RecordingError(f"{path} is not an HDF5 file (its first bytes are wrong); copy it again")
    if path.suffix == ".meta" or path.with_suffix(".meta").exists():
        from spiked.sources.formats.spikeglx import SpikeGlxRecording, find_spikeglx

        return SpikeGlxRecording(find_spikeglx(path, choice), choice)
    if path.name == "structure.oebin" or (path.parent / "sample_numbers.npy").exists():
        from spiked.sources.formats.openephys import open_openephys

        return open_openephys(path, choice)
    if path.name.endswith((".ap.bin", ".lf.bin")):
        raise RecordingError(f"{path.with_suffix('.meta')} is missing; copy it beside the .bin")
    from spiked.sources.formats import arrays

    if path.suffix in arrays.SUFFIXES:
        whole = path.name == "traces.npy" and (path.parent / "params.json").exists()
        return arrays.open_folder(path.parent, choice) if whole else arrays.open_array(path, choice)
    raise RecordingError(f"{path} is of no known format; give one of: {KNOWN}")


def _open_folder(path: Path, choice: Choice) -> Recording:
    from spiked.sources.formats import arrays, spikeinterface_folder

    if spikeinterface_folder.is_spikeinterface(path):
        return spikeinterface_folder.open_spikeinterface(path, choice)
    if (path / "traces.npy").exists():
        return arrays.open_folder(path, choice)
    from spiked.sources.formats import openephys, spikeglx

    if any((p / openephys.OEBIN).exists() for p in (path, *path.parents[:4])):
        return openephys.open_openephys(path, choice)
    files = sorted(p for p in path.iterdir() if p.suffix in (".nwb", ".h5"))
    named = [p for p in files if choice.stream and p.name.split(".")[0] == choice.stream]
    files = named or [p for p in files if not p.name.endswith(".sequences.h5")]
    if len(files) == 1:
        return _open_file(files[0], choice)
    if files:
        names = ", ".join(p.name for p in files[:8])
        raise ConfigError(f"{path} holds {names}; give the path of one of them")
    if next(path.rglob(openephys.OEBIN), None):
        return openephys.open_openephys(path, choice)
    if next(path.rglob("*.meta"), None):
        return spikeglx.SpikeGlxRecording(spikeglx.find_spikeglx(path, choice), choice)
    raise RecordingError(f"{path} holds no recording that is known; give one of: {KNOWN}")


def _open_hdf5(path: Path, choice: Choice) -> Recording:
    file = _hdf5(path)
    try:
        if "nwb_version" in file.attrs:
            from spiked.sources.formats.nwb import open_nwb

            return open_nwb(path, file, choice)
        if "sig" in file or "data_store" in file or "wells" in file:
            from spiked.sources.formats.maxwell import open_maxwell

            return open_maxwell(path, file, choice)
        raise RecordingError(f"{path} is HDF5 but neither Maxwell's nor NWB; give one of: {KNOWN}")
    except BaseException:
        file.close()
        raise


def _hdf5(path: Path) -> Any:
    """The open file; one that is being written, or was when its writer died, is opened as a SWMR reader."""
    try:
        import h5py
    except ImportError as e:
        raise ConfigError(f"{path} needs h5py; pip install 'spiked[daemon]'") from e
    try:
        return h5py.File(path, "r", rdcc_nbytes=64 << 20)
    except OSError as e:
        why = str(e)
    if "truncated" in why:
        raise RecordingError(
            f"{path} is cut off ({path.stat().st_size} bytes); copy it again, or run spiked recover on it"
        )
    # only then: on a damaged file a SWMR reader waits for minutes for a writer to put it right
    if "open for write" not in why and "lock" not in why:
        raise RecordingError(f"{path} cannot be opened ({' '.join(why.split())[:120]}); copy it again")
    try:
        return h5py.File(path, "r", rdcc_nbytes=64 << 20, libver="latest", swmr=True)
    except OSError as e:
        why = " ".join(str(e).split())[:120]
        if "lock" in why:
            raise RecordingError(
                f"{path} is being written ({why}); wait until its program has closed it"
            ) from e
        raise RecordingError(
            f"{path} cannot be opened ({why}); if its writer died, run spiked recover on it"
        ) from e
