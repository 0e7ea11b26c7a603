"""SpikeGLX files: scale against neo, original channel numbers, sync edges, lost samples, clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spiked.errors import ConfigError, RecordingError
from spiked.sources.recordings import open_recording
from spiked.stream import EventKind

N, RATE, FIRST = 6000, 30000.0, 1_253_397
KINDS = {
    "NP1010": {"imDatPrb_type": "0", "imAiRangeMax": "0.6", "imMaxInt": "512"},
    "NP2010": {"imDatPrb_type": "24", "imAiRangeMax": "0.5", "imMaxInt": "8192"},
    "NP2014": {"imDatPrb_type": "2013", "imAiRangeMax": "0.62", "imMaxInt": "2048", "imChan0apGain": "100"},
}
UV = {"NP1010": 2.34375, "NP2010": 0.762939453125, "NP2014": 3.02734375}


def write(
    folder: Path,
    part: str = "NP1010",
    saved: tuple[int, ...] = tuple(range(16)),
    band: str = "ap",
    **more: str,
) -> Path:
    """A run's file pair with SY as its last column; AP gain of channel c is 500, but 1000 for channel 7."""
    n = len(saved)
    binary = folder / f"run_g0_t0.imec0.{band}.bin"
    folder.mkdir(parents=True, exist_ok=True)
    words = ((np.arange(N)[:, None] * 7 + np.array([*saved, 0]) * 31) % 1000 - 500).astype("<i2")
    sync = np.zeros(N, np.int16)
    sync[1500:3000] |= 1 << 6
    sync[4000:4090] |= 1 << 11
    words[4000:4090] = 0
    words[:, n] = sync
    words.tofile(binary)
    imro = "(0,384)" + "".join(f"({c} 0 0 {1000 if c == 7 else 500} 250 1)" for c in range(384))
    if part != "NP1010":
        imro = "(24,384)" + "".join(f"({c} 0 0 0 {c})" for c in range(384))
    geometry = f"({part},2,250,70)" + "".join(f"({c % 2}:{27 + c % 3}:{15 * c}:1)" for c in saved)
    offset = 384 if band == "lf" else 0
    meta = {
        "typeThis": "imec",
        "fileName": f"D:/data/{binary.name}",
        "fileSizeBytes": str(binary.stat().st_size),
        "firstSample": str(FIRST),
        "imDatPrb_pn": part,
        "imSampRate": str(RATE if band == "ap" else 2500.0),
        "nSavedChans": str(n + 1),
        "snsApLfSy": f"{n},0,1" if band == "ap" else f"0,{n},1",
        "acqApLfSy": "384,384,1",
        "snsSaveChanSubset": ",".join(str(c + offset) for c in saved) + ",768",
        "~snsChanMap": "(384,0,1)" + "".join(f"(AP{c};{c}:{c})" for c in saved) + "(SY0;768:768)",
        "~imroTbl": imro,
        "~snsGeomMap": geometry,
        **KINDS[part],
        **more,
    }
    binary.with_suffix(".meta").write_text("".join(f"{k}={v}\n" for k, v in meta.items()))
    return binary


@pytest.mark.parametrize("part", sorted(KINDS))
def test_scale_and_samples_equal_neo(tmp_path: Path, part: str) -> None:
    rawio = pytest.importorskip("neo.rawio")
    binary = write(tmp_path / "r", part)
    theirs = rawio.SpikeGLXRawIO(str(tmp_path / "r"))
    theirs.parse_header()
    stream = list(theirs.header["signal_streams"]["id"]).index("imec0.ap")
    chunk = theirs.get_analogsignal_chunk(stream_index=stream, i_start=100, i_stop=400)
    theirs_uv = theirs.rescale_signal_raw_to_float(chunk, dtype="float64", stream_index=stream)
    with open_recording(binary) as rec:
        ours_uv = (rec.read(100, 400) - rec.info.zero_code) * np.asarray(rec.info.gain_uv)
        assert rec.info.gain_uv[0] == pytest.approx(UV[part])
    assert ours_uv.shape == theirs_uv.shape == (300, 16)
    assert np.allclose(ours_uv, theirs_uv, rtol=1e-6, atol=1e-6)


def test_saved_subset_keeps_original_numbers_and_their_gains(tmp_path: Path) -> None:
    with open_recording(write(tmp_path, saved=(3, 7, 200))) as rec:
        assert rec.info.channel_ids == ("AP3", "AP7", "AP200")
        assert rec.info.gain_uv == pytest.approx((2.34375, 1.171875, 2.34375))
        assert rec.info.positions_um[1] == (250 + 28, 105) and rec.info.geometry_known
        assert (rec.info.code_min, rec.info.code_max) == (-512, 511)


def test_lf_band_takes_the_lf_gain(tmp_path: Path) -> None:
    with open_recording(write(tmp_path, saved=(3, 7), band="lf")) as rec:
        assert rec.info.channel_ids == ("LF3", "LF7") and rec.info.fs_hz == 2500
        assert rec.info.gain_uv == pytest.approx((4.6875, 4.6875))


def test_nxt_without_imax_in_the_meta_is_scaled(tmp_path: Path) -> None:
    path = write(tmp_path, "NP2014", imDatPrb_type="3010", imAiRangeMax="0.67", imMaxInt="")
    with open_recording(path) as rec:
        assert rec.info.gain_uv[0] == pytest.approx(3.271, abs=1e-3)


def test_sync_edges_and_lost_samples(tmp_path: Path) -> None:
    with open_recording(write(tmp_path)) as rec:
        assert rec.first_sample == FIRST and rec.n_samples == N
        edges = [(e.sample - FIRST, e.kind, e.line, e.state) for e in rec.events]
        assert edges == [(1500, EventKind.TTL, 6, 1), (3000, EventKind.TTL, 6, 0)]
        assert rec.events_in(1400, 1500) == [] and len(rec.events_in(1500, 1501)) == 1
        pieces = [e for a in range(0, N, 250) for e in rec.events_in(a, a + 250)]
        assert pieces == rec.events
        assert rec.invalid == [(4000, 4090)]
        assert list(rec.runs(3990, 4100)) == [(3990, 4000), (4090, 4100)]
        assert list(rec.runs(4010, 4020)) == []


def test_probe_known_by_its_part_number_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "NP1010", tuple(range(384)))
    meta = path.with_suffix(".meta")
    meta.write_text("\n".join(x for x in meta.read_text().splitlines() if "snsGeomMap" not in x) + "\n")
    with open_recording(path) as rec:
        xy = np.asarray(rec.info.positions_um)
    assert rec.info.geometry_known
    assert np.unique(np.diff(np.unique(xy[:, 1]))).tolist() == [20.0]


def test_folder_with_one_ap_file_opens_and_two_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "run_g0" / "run_g0_imec0")
    write(tmp_path / "run_g0" / "run_g0_imec0", band="lf")
    with open_recording(tmp_path) as rec:
        assert rec.info.fs_hz == 30000
    with open_recording(tmp_path, stream="imec0-lf") as rec:
        assert rec.info.fs_hz == 2500
    write(tmp_path / "run_g1")
    with pytest.raises(ConfigError, match=r"run_g1/run_g0_t0\.imec0\.ap\.bin"):
        open_recording(tmp_path)


@pytest.mark.parametrize("cut", [3, 34 * 10])
def test_cut_off_file_says_so(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(RecordingError, match="cut off"):
        open_recording(path)


def test_missing_halves_and_keys_are_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    meta = path.with_suffix(".meta")
    text = meta.read_text()
    meta.write_text(text.replace("imAiRangeMax=0.6\n", ""))
    with pytest.raises(RecordingError, match="does not say imAiRangeMax"):
        open_recording(path)
    meta.unlink()
    with pytest.raises(RecordingError, match=r"ap\.meta is missing"):
        open_recording(path)
    meta.write_text(text)
    path.unlink()
    with pytest.raises(RecordingError, match=r"ap\.bin is missing"):
        open_recording(meta)
    (tmp_path / "run_g0_t0.nidq.meta").write_text(text)
    (tmp_path / "run_g0_t0.nidq.bin").write_bytes(b"\0" * 68)
    with pytest.raises(ConfigError, match="not a probe's stream"):
        open_recording(tmp_path / "run_g0_t0.nidq.bin")
