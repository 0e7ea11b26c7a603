"""Float microvolts back to the ADC's codes, at the rails."""

from __future__ import annotations

import numpy as np

from spiked.sources.codes import Quantizer


def test_the_lower_rail_is_a_code_like_any_other() -> None:
    counters = {"clipped": 0, "inexact": 0}
    quantize = Quantizer(0.195, "s", counters)
    codes = np.array([[-32768, -32767, 0, 32767]], np.float32)
    assert quantize(codes * np.float32(0.195)).ravel().tolist() == [-32768, -32767, 0, 32767]
    assert counters == {"clipped": 0, "inexact": 0}
    beyond = np.array([[-32769, 32768, np.nan, 5]], np.float32)
    assert quantize(beyond * np.float32(0.195)).ravel().tolist() == [-32768, 32767, 0, 5]
    assert counters["clipped"] == 3
