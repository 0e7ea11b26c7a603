"""One of our recordings as SpikeInterface knows one: the same codes, gain, zero and positions. It lives in this process only."""

from __future__ import annotations

from typing import Any

import numpy as np
import probeinterface
from spikeinterface.core import BaseRecording, BaseRecordingSegment

from spiked.errors import ConfigError
from spiked.sources.formats.recording import Recording


class OpenRecording(BaseRecording):
    """As long as `recording` is open. ConfigError where its electrodes have no positions."""

    def __init__(self, recording: Recording) -> None:
        info = recording.info
        if not info.geometry_known:
            raise ConfigError(
                f"{recording.path} has no electrode positions; give them with --probe FILE.json"
            )
        BaseRecording.__init__(self, info.fs_hz, list(range(info.n_channels)), np.dtype(info.dtype))
        self.add_recording_segment(_Segment(recording))
        self.set_channel_gains(info.gains)
        self.set_channel_offsets(-info.zero_code * info.gains)
        probe = probeinterface.Probe(ndim=2, si_units="um")
        probe.set_contacts(info.positions, shapes="circle", shape_params={"radius": 5.0})
        probe.set_device_channel_indices(np.arange(info.n_channels))
        self.set_probe(probe, in_place=True)
        self._serializability = {"memory": True, "json": False, "pickle": False}
        self._kwargs = {"recording": recording}


class _Segment(BaseRecordingSegment):
    def __init__(self, recording: Recording) -> None:
        BaseRecordingSegment.__init__(self, sampling_frequency=recording.info.fs_hz)
        self.recording = recording

    def get_num_samples(self) -> int:
        return self.recording.n_samples

    def get_traces(
        self, start_frame: int | None = None, end_frame: int | None = None, channel_indices: Any = None
    ) -> np.ndarray:
        start = 0 if start_frame is None else start_frame
        stop = self.recording.n_samples if end_frame is None else end_frame
        codes = self.recording.read(start, stop)
        return codes if channel_indices is None else codes[:, channel_indices]
