"""What the fuzzed decoders share."""

from __future__ import annotations

import numpy as np

from spiked_client.protocol import SPIKE

FS, CHANNELS = 20_000.0, 4
WEIGHTS = {  # how many of the messages a decoder gets, of what the fast ones get: these are slow
    "replay answer": 0.3, "operation": 0.3, "configuration": 0.1, "probe file": 0.03, "sequences": 0.01, "templates": 0.01, "session file": 0.001, "redo log": 0.2,
    "electrode map": 0.3, "access list": 0.3, "key file": 0.3, "ledger": 0.2, "spool": 0.3, "state file": 0.3,
}  # fmt: skip


def spikes(n: int = 3) -> np.ndarray:
    """n SPIKE records of two units."""
    out = np.zeros(n, SPIKE)
    out["sample"], out["unit"], out["amplitude_uv"] = np.arange(n) * 100 + 1000, np.arange(n) % 2, -60
    return out
