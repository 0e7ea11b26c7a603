"""A recording saved by SpikeInterface (binary folder or zarr), read with its own `load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError, RecordingError
from spiked.sources.formats.recording import Choice, Paged, Recording, codes_dtype
from spiked.stream import StreamInfo


class SpikeInterfaceRecording(Recording):
    """The one segment of a saved SpikeInterface recording."""

    def __init__(self, path: Path, saved: Any, choice: Choice) -> None:
        n_channels = int(saved.get_num_channels())
        gains, offsets = saved.get_channel_gains(), saved.get_channel_offsets()
        if choice.gain_uv is not None:
            gains = np.full(n_channels, choice.gain_uv)
        if gains is None:
            raise ConfigError(f"{path} does not say its gain; give gain_uv")
        gains = np.asarray(gains, np.float64)
        zero = -np.zeros(n_channels) if offsets is None else -np.asarray(offsets, np.float64) / gains
        if np.ptp(zero) > 1e-3 * max(1.0, float(np.abs(zero).max())):
            raise RecordingError(f"{path}: the zero code differs between channels; save it with one offset")
        xy = np.asarray(saved.get_channel_locations(), np.float64)[:, :2] if saved.has_probe() else None
        positions, known = choice.positions(
            n_channels, None if xy is None else tuple((float(x), float(y)) for x, y in xy)
        )
        info = StreamInfo(
            name=path.stem,
            fs_hz=choice.rate(float(saved.get_sampling_frequency()), path),
            channel_ids=tuple(str(c) for c in saved.get_channel_ids()),
            positions_um=positions,
            dtype=codes_dtype(saved.get_dtype()),
            gain_uv=tuple(float(g) for g in gains),
            zero_code=float(round(zero[0], 6)),
            geometry_known=known,
            source="spikeinterface",
        )
        n = int(saved.get_num_samples(segment_index=0))
        super().__init__(path, info, n)
        self._saved = saved
        self._pages = Paged(self._load, n, saved.get_dtype().itemsize * n_channels)
        self._on_close.append(self._let_go)

    def _let_go(self) -> None:
        self._saved = None

    def _load(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self._saved.get_traces(segment_index=0, start_frame=start, end_frame=stop))

    def _rows(self, start: int, stop: int) -> np.ndarray:
        return self._pages(start, stop)


def is_spikeinterface(path: Path) -> bool:
    """True for a folder that SpikeInterface saved without pickled parts of the recording itself."""
    return (path / "si_folder.json").is_file() or (
        path.suffix == ".zarr" and any((path / f).is_file() for f in (".zattrs", ".zgroup", "zarr.json"))
    )


def open_spikeinterface(path: Path, choice: Choice) -> SpikeInterfaceRecording:
    """Open a saved recording. Raises ConfigError without SpikeInterface, RecordingError if it is none."""
    try:
        import spikeinterface
    except ImportError as e:
        raise ConfigError(
            f"{path} was saved by SpikeInterface; pip install 'spiked[offline]' to read it"
        ) from e
    try:
        saved = spikeinterface.load(path)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, UnboundLocalError) as e:
        why = " ".join(f"{type(e).__name__} {e}".split())[:100]
        raise RecordingError(f"SpikeInterface cannot load {path} ({why}); save the recording again") from e
    if not isinstance(saved, spikeinterface.BaseRecording):
        raise RecordingError(
            f"{path} is a saved {type(saved).__name__}, not a recording; choose another folder"
        )
    if saved.get_num_segments() != 1:
        raise RecordingError(
            f"{path} has {saved.get_num_segments()} segments; save one of them (select_segments)"
        )
    return SpikeInterfaceRecording(path, saved, choice)
