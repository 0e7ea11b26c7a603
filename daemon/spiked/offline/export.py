"""The recording as Kilosort wants it: one plain int16 binary, zero where nothing was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spiked.config import Stim
from spiked.errors import OfflineError
from spiked.offline import stimulated
from spiked.offline.session import StreamFiles

CHUNK_BYTES = 32 << 20
FLOAT_UV = 0.195  # microvolt per code for float recordings: +-6.4 mV in int16


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
    is_float = stream.dtype.startswith("float")
    step = max(CHUNK_BYTES // (4 * stream.n_channels), 1)
    clipped = 0
    stimuli = stimulated.marks(stream) if stim is not None and stim.enabled else []
    temporary = target.with_name(target.name + ".part")
    try:
        with stream.codes() as data, temporary.open("wb") as out:
            pieces = _pieces(data, stream, step)
            if stimuli and stim is not None:
                pieces = stimulated.cleaned(stream, pieces, stimuli, stim)
            for start, codes in pieces:
                stop = start + len(codes)
                say(start / stream.n_samples, f"writing the binary, {start / stream.fs_hz:.0f} s")
                x = _microvolt_codes(codes, stream, is_float, start)
                clipped += int(((x > 32767) | (x < -32768)).sum())
                y = np.clip(x, -32768, 32767).astype("<i2")
                silence(y, start, stream.gaps)
                for a, b, channels in stream.partial:
                    if a < stop and b > start:
                        y[max(a - start, 0) : b - start, channels] = 0
                out.write(y.tobytes())
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise OfflineError(
            f"cannot write {target}: {e.strerror}; free space there", "resource", "export"
        ) from e
    temporary.replace(target)
    gain = np.full(stream.n_channels, FLOAT_UV) if is_float else stream.gain_uv
    return {
        "file": target.name,
        "bytes": target.stat().st_size,
        "gain_uv": gain.tolist(),
        "silenced_samples": int((stream.gaps[:, 1] - stream.gaps[:, 0]).sum()),
        "clipped": clipped,
        "stimuli": len(stimuli),
    }


def _pieces(data: Any, stream: StreamFiles, step: int) -> Iterator[tuple[int, np.ndarray]]:
    """(index, codes (n, channels)) of the whole recording, in order."""
    for start in range(0, stream.n_samples, step):
        yield start, np.asarray(data[start : min(start + step, stream.n_samples)])


def _microvolt_codes(x: np.ndarray, stream: StreamFiles, is_float: bool, start: int) -> np.ndarray:
    """Rounded codes around zero, wide enough for the device's range; not yet clipped."""
    if is_float:
        if not np.isfinite(x).all():
            where = start + int(np.argmin(np.isfinite(x).all(1)))
            raise OfflineError(
                f"sample {where} is not finite; the recording is damaged", "environment", "export"
            )
        scaled = (x.astype(np.float64) - stream.zero_code) * (stream.gain_uv / FLOAT_UV)
        return np.rint(scaled)
    whole = np.rint(x) if x.dtype.kind == "f" else x  # freed of an artifact
    return whole.astype(np.int32) - round(stream.zero_code)


def silence(codes: np.ndarray, start: int, gaps: np.ndarray) -> None:
    """Set the samples of `codes` (first at index `start`) that lie in `gaps` (n, 2) to zero, in place."""
    for a, b in gaps[(gaps[:, 1] > start) & (gaps[:, 0] < start + len(codes))]:
        codes[max(a - start, 0) : b - start] = 0
