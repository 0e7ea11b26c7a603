"""A stimulated recording on its way to the sorter: artifacts are taken out as in the live stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spiked.act.ledger import path_of, read
from spiked.clean.stim.cleaner import StimCleaner
from spiked.config import Stim
from spiked.errors import OfflineError
from spiked.offline.foreign import Foreign, open_any
from spiked.offline.session import StreamFiles, opened_file
from spiked.sources.formats.nwb import NwbRecording
from spiked.stream import StreamInfo


def marks(stream: StreamFiles) -> list[tuple[int, int]]:
    """(index into the stream, pattern) of every stimulus that the device, a TTL line, a client or the ledger tells of; sorted."""
    found: list[tuple[int, str]] = []
    if isinstance(stream, Foreign):
        for epoch in stream.epochs:
            with open_any(epoch.path, stream.choice) as recording:
                path, first = recording.path, recording.first_sample
            if isinstance(recording, NwbRecording):  # what we recorded, elsewhere or several sessions as one
                own = _of_file(path, path.stem, first)
                n = epoch.stop - epoch.start
                found += [(epoch.start + at, name) for at, name in own if 0 <= at < n]
    else:
        found = _of_file(stream.nwb, stream.name, stream.first_sample)
    numbers: dict[str, int] = {}
    numbered = [(at, numbers.setdefault(name, len(numbers))) for at, name in found]
    return sorted((at, pattern) for at, pattern in numbered if 0 <= at < stream.n_samples)


def _of_file(nwb: Path, name: str, first_sample: int) -> list[tuple[int, str]]:
    """(index into the file, pattern) of the stimuli in a session's file and in the ledger beside it."""
    found: list[tuple[int, str]] = []
    try:
        with opened_file(nwb) as f:
            table = f["acquisition/events"]
            columns = (table[k][...].tolist() for k in ("kind", "state", "sample", "line", "text"))
            for kind, state, sample, line, text in zip(*columns, strict=True):
                if _text(kind) == "stim" and state == 1:
                    found.append((sample, _text(text) or f"line {line}"))
    except (KeyError, OfflineError):  # no events, or a file that is not ours
        pass
    for row in read(path_of(nwb.parent, name)):
        at = max(int(row["artifact_sample"]), int(row["sent_sample"]))
        if at >= 0:
            found.append((at, _text(row["pattern"])))
    return [(at - first_sample, pattern) for at, pattern in found]


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def cleaned(
    stream: StreamFiles,
    pieces: Iterator[tuple[int, np.ndarray]],
    stimuli: list[tuple[int, int]],
    settings: Stim,
) -> Iterator[tuple[int, np.ndarray]]:
    """The pieces (index, codes (n, channels)) without artifacts: float32 codes after a stimulus, what is blank at its baseline."""
    info = StreamInfo(
        stream.name, stream.fs_hz, tuple(map(str, range(stream.n_channels))), tuple(map(tuple, stream.positions_um.tolist())), stream.dtype,
        tuple(stream.gain_uv.tolist()), stream.zero_code,
    )  # fmt: skip
    cleaner = StimCleaner(info, settings)
    for at, pattern in stimuli:
        cleaner.mark(at, pattern)
    lost = np.ones((0, stream.n_channels), bool)
    for start, codes in pieces:
        dead = lost
        if ((stream.gaps[:, 0] < start + len(codes)) & (stream.gaps[:, 1] > start)).any():
            dead = np.zeros(codes.shape, bool)
            for a, b in stream.gaps:
                dead[max(a - start, 0) : max(b - start, 0)] = True
        first, x, _ = cleaner.process(start, codes, dead if len(dead) else None)
        yield first, x
    first, x, _ = cleaner.flush()
    if len(x):
        yield first, x
