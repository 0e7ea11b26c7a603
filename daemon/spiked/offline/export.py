"""A plain int16 binary of the recording, for sorters that cannot read it where it lies, or once it was freed of artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spiked.config import Stim
from spiked.errors import OfflineError
from spiked.offline import reading, stimulated
from spiked.offline.reading import FLOAT_UV, centred, fitted, silence
from spiked.offline.session import StreamFiles

__all__ = ["FLOAT_UV", "prepare", "write_binary"]

INT16 = np.dtype("<i2")


def copies(stream: StreamFiles, stim: Stim | None, needs_binary: bool) -> bool:
    """Whether the recording has to be written once more for the sorter."""
    return needs_binary or (stim is not None and stim.enabled and bool(stimulated.marks(stream)))


def prepare(
    stream: StreamFiles,
    target: Path,
    say: Callable[[float, str], None],
    stim: Stim | None = None,
    needs_binary: bool = False,
) -> dict[str, Any]:
    """What the sorter reads: nothing is written where it can read the recording itself.

    With stimuli in it a binary is, because artifacts are taken out from the first sample to the last, and when
    the sorter only reads binaries. The mapping is that of `write_binary`; "file" is "" and "bytes" 0 without one.
    """
    if copies(stream, stim, needs_binary):
        told = write_binary(stream, target, say, stim)
        why = "stimulation artifacts are taken out" if told["stimuli"] else "the sorter only reads binaries"
        return {**told, "why": why}
    clipped = reading.scan(stream, say)
    return {
        **_told(stream, "", 0, clipped, 0),
        "why": "read from where it was recorded",
    }


def write_binary(
    stream: StreamFiles, target: Path, say: Callable[[float, str], None], stim: Stim | None = None
) -> dict[str, Any]:
    """Write (samples, channels) int16 in C order: codes less the zero code; zeros in gaps.

    With `stim` the artifacts of the stimuli that the session knows are taken out, as live.

    Float recordings are scaled to FLOAT_UV microvolt per code. Values beyond int16 are clipped and
    counted. Returns {"file", "bytes", "gain_uv": (channels,) microvolt per code of the binary,
    "silenced_samples", "clipped", "stimuli"}. Raises OfflineError('environment') on samples that are not finite,
    ('resource') when the disk is full.
    """
    clipped = 0
    stimuli = stimulated.marks(stream) if stim is not None and stim.enabled else []
    temporary = target.with_name(target.name + ".part")
    try:
        with stream.codes() as data, temporary.open("wb") as out:
            raw: Iterator[tuple[int, np.ndarray]] = (
                (start, np.asarray(data[start:stop])) for start, stop in reading.pieces(stream)
            )
            if stimuli and stim is not None:
                raw = stimulated.cleaned(stream, raw, stimuli, stim)
            for start, codes in raw:
                say(start / stream.n_samples, f"writing the binary, {start / stream.fs_hz:.0f} s")
                x = centred(codes, stream, start)
                clipped += int(((x > 32767) | (x < -32768)).sum())
                y = fitted(x, INT16)
                silence(y, start, stream)
                out.write(y.tobytes())
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise OfflineError(
            f"cannot write {target}: {e.strerror}; free space there", "resource", "export"
        ) from e
    temporary.replace(target)
    return _told(stream, target.name, target.stat().st_size, clipped, len(stimuli))


def _told(stream: StreamFiles, file: str, n_bytes: int, clipped: int, stimuli: int) -> dict[str, Any]:
    return {
        "file": file,
        "bytes": n_bytes,
        "gain_uv": reading.gain_uv(stream).tolist(),
        "silenced_samples": int((stream.gaps[:, 1] - stream.gaps[:, 0]).sum()),
        "clipped": clipped,
        "stimuli": stimuli,
    }
