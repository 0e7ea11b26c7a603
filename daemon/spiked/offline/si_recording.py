"""The recording as SpikeInterface knows one: read from where it lies, or the int16 binary where there had to be one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import probeinterface
import spikeinterface.core as si
from spikeinterface.core import BaseRecording, BaseRecordingSegment

from spiked.offline.reading import Reader, stream_of


class StoredRecording(BaseRecording):
    """int16 codes of a recorded stream. `source` is what reading.source_of says, as JSON: so saved analyzers find it again."""

    def __init__(self, source: str, gain_uv: list[float]) -> None:
        told = json.loads(source)
        stream = stream_of(told)
        BaseRecording.__init__(self, stream.fs_hz, list(range(stream.n_channels)), np.dtype("int16"))
        self.add_recording_segment(_Segment(Reader(stream), stream.fs_hz))
        self.set_channel_gains(gain_uv)
        self.set_channel_offsets([0.0] * stream.n_channels)
        self._kwargs = {"source": source, "gain_uv": list(gain_uv)}


class _Segment(BaseRecordingSegment):
    def __init__(self, reader: Reader, fs_hz: float) -> None:
        BaseRecordingSegment.__init__(self, sampling_frequency=fs_hz)
        self.reader = reader

    def get_num_samples(self) -> int:
        return self.reader.stream.n_samples

    def get_traces(
        self, start_frame: int | None = None, end_frame: int | None = None, channel_indices: Any = None
    ) -> np.ndarray:
        start = 0 if start_frame is None else start_frame
        stop = self.get_num_samples() if end_frame is None else end_frame
        codes = self.reader.read(start, stop)
        return codes if channel_indices is None else codes[:, channel_indices]


def recording_of(job: dict[str, Any]) -> Any:
    """The SpikeInterface recording of a job: its "binary" where it has one, else its "source"; gains and a probe."""
    n = len(job["gain_uv"])
    if job.get("binary"):
        recording: Any = si.BinaryRecordingExtractor(
            [job["binary"]],
            sampling_frequency=job["fs_hz"],
            dtype="int16",
            num_channels=n,
            gain_to_uV=job["gain_uv"],
            offset_to_uV=[0.0] * n,
        )
    else:
        recording = StoredRecording(json.dumps(job["source"]), job["gain_uv"])
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(np.asarray(job["positions_um"]), shapes="circle", shape_params={"radius": 5.0})
    probe.set_device_channel_indices(np.arange(n))
    return recording.set_probe(probe)
