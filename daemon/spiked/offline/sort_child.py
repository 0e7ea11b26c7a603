"""The sorter's own process: `python -m spiked.offline.sort_child JOB.json`. Kilosort through SpikeInterface.

A fresh process per sort, because a failed in-process run leaves log handlers behind, memory is only returned
by ending, and thread settings must stand in the environment before torch is imported. The job file holds
binary, fs_hz, gain_uv, positions_um, sorter, params, folder, threads, memory_gb (0: no limit)
and parent, the process with which this one ends.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from spiked.priority import end_with


def recording_of(job: dict[str, Any]) -> Any:
    """The SpikeInterface recording of a job's int16 binary, with gains and a probe."""
    import numpy as np
    import probeinterface
    import spikeinterface.core as si

    n = len(job["gain_uv"])
    recording = si.BinaryRecordingExtractor(
        [job["binary"]],
        sampling_frequency=job["fs_hz"],
        dtype="int16",
        num_channels=n,
        gain_to_uV=job["gain_uv"],
        offset_to_uV=[0.0] * n,
    )
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(np.asarray(job["positions_um"]), shapes="circle", shape_params={"radius": 5.0})
    probe.set_device_channel_indices(np.arange(n))
    return recording.set_probe(probe)


def main(path: str) -> int:
    """Run the sorter; the outcome is in spikeinterface_log.json and the exit status."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    end_with(job["parent"])
    if limit := int(job["memory_gb"] * 1e9):  # of what it allocates; a GPU's mappings do not count
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import spikeinterface.sorters as ss
    import torch

    torch.set_num_threads(job["threads"])
    ss.run_sorter(
        job["sorter"],
        recording_of(job),
        folder=job["folder"],
        remove_existing_folder=True,
        verbose=False,
        raise_error=False,
        with_output=False,
        **job["params"],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
