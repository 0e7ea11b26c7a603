"""Sorters pickled by RT-Sort's own packages: read faithfully, and never trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sort_scene import FS, LOOSE, STRINGENT, Scene, scene

from spiked.clean.noise import NoiseTracker
from spiked.cli import main
from spiked.errors import ConfigError
from spiked.offline.truth import score
from spiked.sort import rtsort_pickle
from spiked.sort.assign import RTSort
from spiked.sort.calibrate import calibrate
from spiked.sort.import_rtsort import import_rtsort, probabilities
from spiked.sort.sequences import INNER, Sequences
from spiked.sort.sequences import LOOSE as LOOSE_FLAG

SPIKELAB, BRAINDANCE = "spikelab.spike_sorting.rt_sort._algorithm", "braindance.core.spikesorter.rt_sort"
N = 10  # samples around a spike


@pytest.fixture(scope="module")
def truth() -> tuple[Scene, Sequences]:
    s = scene(20, 5, seed=3)
    found = calibrate(s.x, s.logits, None, FS, s.positions, None, STRINGENT, LOOSE)
    assert len(found) >= 4
    return s, found


def sorter_class(monkeypatch: pytest.MonkeyPatch, module: str, name: str = "RTSort") -> type:
    """A class that pickles under another package's name, with that package absent."""
    for k in range(1, module.count(".") + 2):
        part = ".".join(module.split(".")[:k])
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    made = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, made)
    return made


def state_of(s: Sequences, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    """The attributes of a saved RTSort with these units, laid out as the package lays them out."""
    used = np.unique(s.electrode).tolist()
    shape = (len(s), len(used))
    latency, amp, prob = np.zeros(shape), np.ones(shape), np.zeros(shape)
    loose, inner = np.zeros(shape, bool), np.zeros(shape, bool)
    column = []
    for u in range(len(s)):
        k = slice(s.ptr[u], s.ptr[u + 1])
        at = [used.index(e) for e in s.electrode[k].tolist()]
        latency[u, at], amp[u, at], prob[u, at] = s.latency[k] + N, s.amp[k], s.prob[k]
        latency[u, at[0]] = 0
        loose[u, at], inner[u, at] = (s.flags[k] & LOOSE_FLAG) > 0, (s.flags[k] & INNER) > 0
        column.append(at[0])
    without_root = prob.copy()
    without_root[np.arange(len(s)), column] = 0
    rng = np.random.default_rng(0)

    def tensor(a: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(a), dtype=dtype)

    electrodes = torch.tensor(used)
    return {
        "samp_freq": round(s.fs_hz / 1000), "chan_ids": None, "max_chan_id": None, "model": None, "device": "cuda", "dtype": dtype,
        "_seq_root_elecs": [np.int64(r) for r in s.roots], "seq_comp_elecs": [[used[c]] for c in column],
        "seq_spike_trains": [np.sort(rng.uniform(1000, 19_000, n)) for n in s.n_spikes],
        "seq_locs": s.positions_um[s.roots], "comp_elecs": electrodes[:, None], "comp_elecs_flattened": electrodes,
        "seqs_inner_loose_elecs": torch.tensor(inner), "seqs_loose_elecs": torch.tensor(loose),
        "seqs_min_loose_elecs": torch.tensor(s.min_loose, dtype=torch.int16), "seqs_latencies": tensor(latency), "seqs_amps": tensor(amp),
        "seqs_latency_weights": tensor(without_root / without_root.sum(1, keepdims=True)),
        "seqs_amp_weights": tensor(prob / prob.sum(1, keepdims=True)),
        "seqs_root_amp_means": tensor(s.root_amp_mean), "seqs_root_amp_stds": tensor(s.root_amp_sd),
        "seqs_root_elecs_rel_comp_elecs": column, "seqs_root_elecs": list({int(r) for r in s.roots}),
        "max_pool": torch.nn.MaxPool1d(2 * N + 1, return_indices=True), "overlap": 4, "input_scale": np.float16(0.25),
        "pre_median_frames": torch.full((s.n_channels, 1000), torch.nan, dtype=dtype), "num_elecs": s.n_channels,
        "seq_n_before": N, "seq_n_after": N, "stringent_thresh_logit": np.float64(STRINGENT), "loose_thresh_logit": LOOSE,
        "min_elecs_for_array_noise": 100, "min_inner_loose_detections": 3, "max_latency_diff_spikes": 2.5, "clip_latency_diff": 5.0,
        "max_amp_median_diff_spikes": 0.45, "clip_amp_median_diff": 0.9, "max_root_amp_median_std_spikes": 2.5, "folder": Path("inter"),
    }  # fmt: skip


def saved(
    monkeypatch: pytest.MonkeyPatch, path: Path, s: Sequences, module: str = SPIKELAB, **changed: Any
) -> Path:
    made = sorter_class(monkeypatch, module)()
    made.__dict__.update({**state_of(s), **changed})
    path.write_bytes(pickle.dumps(made, pickle.HIGHEST_PROTOCOL))
    return path


def probe(path: Path, positions: np.ndarray) -> Path:
    contacts = {
        "ndim": 2, "si_units": "um", "annotations": {}, "contact_annotations": {}, "contact_positions": positions.tolist(),
        "contact_plane_axes": [[[1.0, 0.0], [0.0, 1.0]]] * len(positions), "contact_shapes": ["circle"] * len(positions),
        "contact_shape_params": [{"radius": 4.0}] * len(positions), "device_channel_indices": list(range(len(positions))),
    }  # fmt: skip
    path.write_text(
        json.dumps({"specification": "probeinterface", "version": "0.2.21", "probes": [contacts]})
    )
    return path


@pytest.mark.parametrize("module", [SPIKELAB, BRAINDANCE])
def test_every_stored_number_comes_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, truth: tuple[Scene, Sequences], module: str
) -> None:
    want = truth[1]
    path = saved(monkeypatch, tmp_path / "rt_sort.pickle", want, module)
    got, told = import_rtsort(path, probe(tmp_path / "probe.json", want.positions_um))
    np.testing.assert_array_equal(got.roots, want.roots)
    np.testing.assert_array_equal(got.min_loose, want.min_loose)
    np.testing.assert_array_equal(got.n_spikes, want.n_spikes)
    np.testing.assert_allclose(got.root_amp_mean, want.root_amp_mean, rtol=1e-3)
    np.testing.assert_allclose(got.root_amp_sd, want.root_amp_sd, rtol=1e-3)
    assert (got.fs_hz, got.stringent_logit, got.loose_logit) == (FS, STRINGENT, LOOSE)
    for u in range(len(want)):
        a, b = (slice(s.ptr[u], s.ptr[u + 1]) for s in (got, want))
        i, j = np.argsort(got.electrode[a]), np.argsort(want.electrode[b])
        np.testing.assert_array_equal(got.electrode[a][i], want.electrode[b][j])
        np.testing.assert_array_equal(got.flags[a][i], want.flags[b][j])
        np.testing.assert_allclose(got.latency[a][i], want.latency[b][j], atol=6e-3)
        np.testing.assert_allclose(got.amp[a][i], want.amp[b][j], rtol=1e-3)
        shares = got.prob[a][i] / got.prob[a].sum(), want.prob[b][j] / want.prob[b].sum()
        np.testing.assert_allclose(*shares, rtol=2e-3)
        assert 1 >= got.prob[a].max() >= want.prob[b].max() - 1e-3
    assert got.parameters.max_latency_diff_ms == pytest.approx(0.125)
    assert got.parameters.overlap_ms == pytest.approx(0.2)
    assert got.imported_from["class"] == f"{module}.RTSort" and "latency SD" in told[0]
    assert 0 < got.first_sample < got.stop_sample <= 19_000 * FS / 1000 + 1


def test_probabilities_keep_their_shares_and_say_how_sure_their_size_is() -> None:
    true = np.array([0.9, 0.6, 0.3, 0.05])
    got, off = probabilities(true / true.sum(), 0, np.array([True, True, True, False]), 0.1, 0.275, 0.03)
    np.testing.assert_allclose(got, true / 0.9)
    assert off == pytest.approx(1 / 0.54)  # 0.05 was kept, so it is 0.03 at least, and the root 0.54


def spikes_of(s: Scene, sequences: Sequences) -> np.ndarray:
    sorter, noise = RTSort(sequences, FS, len(s.x)), NoiseTracker(len(s.x), FS)
    out = []
    for a in range(0, s.x.shape[1], 20_000):
        x, q = (np.ascontiguousarray(v[:, a : a + 20_000]) for v in (s.x, s.logits))
        noise.process(x, None, a)
        out.append(sorter.process(x, q, None, noise, a))
    return np.concatenate([*out, sorter.flush()])


def test_assigning_with_imported_sequences_finds_the_units(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, truth: tuple[Scene, Sequences]
) -> None:
    s, own = truth
    path = saved(monkeypatch, tmp_path / "rt_sort.pickle", own)
    got, _ = import_rtsort(path, probe(tmp_path / "probe.json", own.positions_um))
    spikes = spikes_of(s, got)
    found = score(s.samples, s.units, spikes["sample"], spikes["unit"], FS, 0.4)
    assert sum(v["accuracy"] > 0.9 for v in found.values()) >= 4


def test_tensors_of_a_gpu_are_read_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, truth: tuple[Scene, Sequences]
) -> None:
    want = truth[1]
    plain, _ = import_rtsort(
        saved(monkeypatch, tmp_path / "a.pickle", want), probe(tmp_path / "probe.json", want.positions_um)
    )
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _storage: "cuda:0")
    path = saved(monkeypatch, tmp_path / "b.pickle", want)
    assert b"cuda:0" in path.read_bytes()
    got, _ = import_rtsort(path, tmp_path / "probe.json")
    for name in ("electrode", "latency", "amp", "prob", "root_amp_sd"):
        np.testing.assert_array_equal(getattr(got, name), getattr(plain, name))


class Runs:
    """Unpickling it calls what it was given."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call = call, args

    def __reduce__(self) -> Any:
        return self.call


def in_storage(inner: Any) -> bytes:
    """A tensor's bytes with something else where its storage should be."""
    f = io.BytesIO()
    for part in (rtsort_pickle.MAGIC, 1001, {}, inner):
        pickle.dump(part, f, 2)
    return f.getvalue()


@pytest.mark.parametrize(
    "way", ["itself", "attribute", "eval", "in a tensor", "import", "class of the package"]
)
def test_a_hostile_pickle_is_refused_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, truth: tuple[Scene, Sequences], way: str
) -> None:
    mark, own = tmp_path / "ran", truth[1]
    bad = Runs(os.system, f"touch {mark}")
    path, named = tmp_path / "rt_sort.pickle", "posix.system"
    if way == "itself":
        path.write_bytes(pickle.dumps(bad))
    elif way == "attribute":
        saved(monkeypatch, path, own, extra=bad)
    elif way == "eval":
        saved(monkeypatch, path, own, extra=Runs(eval, f"open({str(mark)!r}, 'w')"))
        named = "builtins.eval"
    elif way == "in a tensor":
        saved(monkeypatch, path, own, extra=Runs(torch.storage._load_from_bytes, in_storage(bad)))
    elif way == "import":
        saved(monkeypatch, path, own, extra=Runs(__import__, "antigravity"))
        named = "builtins.__import__"
    else:  # its __setstate__ would run where the package is installed
        made = sorter_class(monkeypatch, "spikelab.evil", "Helper")()
        made.x = bad
        saved(monkeypatch, path, own, extra=made)
    positions = probe(tmp_path / "probe.json", own.positions_um)
    with pytest.raises(ConfigError) as e:
        import_rtsort(path, positions)
    assert named in str(e.value) and "\n" not in str(e.value)
    assert not mark.exists()


def test_whatever_a_pickle_asks_the_interpreter_for_is_refused(tmp_path: Path) -> None:
    rtsort_pickle.reading = True
    try:
        for event in ("open", "os.system", "subprocess.Popen", "socket.connect", "import", "compile"):
            with pytest.raises(rtsort_pickle.Refused, match=event):
                rtsort_pickle.deny(event, ())
    finally:
        rtsort_pickle.reading = False
    rtsort_pickle.deny("open", ())


def test_a_truncated_pickle_is_refused_wherever_it_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, truth: tuple[Scene, Sequences]
) -> None:
    path = saved(monkeypatch, tmp_path / "rt_sort.pickle", truth[1])
    data = path.read_bytes()
    assert rtsort_pickle.load(data)[0] == f"{SPIKELAB}.RTSort"
    for stop in np.linspace(0, len(data) - 1, 150).astype(int):
        with pytest.raises(rtsort_pickle.Broken):
            rtsort_pickle.load(data[:stop])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="cut off") as e:
        import_rtsort(path, probe(tmp_path / "probe.json", truth[1].positions_um))
    assert "\n" not in str(e.value)


def test_what_is_no_sorter_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = sorter_class(monkeypatch, "spikelab.spikedata", "SpikeData")()
    positions = probe(tmp_path / "probe.json", np.arange(8.0).reshape(4, 2))
    bare = sorter_class(monkeypatch, SPIKELAB)()
    bare.samp_freq = 20
    for content, line in (
        (other, "holds a spikelab.spikedata.SpikeData, not an RTSort"), ({"samp_freq": 20}, "holds a dict"), (bare, "lacks seqs_latencies"),
        (torch.nn.MaxPool1d(3), "torch.nn.modules.pooling.MaxPool1d"), (json.JSONDecoder, "json.decoder.JSONDecoder"),
    ):  # fmt: skip
        path = tmp_path / "x.pickle"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ConfigError, match=line):
            import_rtsort(path, positions)
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(ConfigError, match="no pickle, or cut off"):
        import_rtsort(path, positions)
    with pytest.raises(ConfigError, match="cannot read"):
        import_rtsort(tmp_path / "absent.pickle", positions)


def test_tables_that_contradict_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, truth: tuple[Scene, Sequences]
) -> None:
    own = truth[1]
    positions = probe(tmp_path / "probe.json", own.positions_um)
    for changed, line in (
        ({"seqs_amps": torch.zeros(1, 2)}, "seqs_amps do not fit"), ({"comp_elecs_flattened": torch.tensor([0, 99])}, "comp_elecs"),
        ({"seqs_root_elecs_rel_comp_elecs": [500] * len(own)}, "root electrodes"),
        ({"seqs_amp_weights": torch.full((len(own), len(np.unique(own.electrode))), torch.nan)}, "weights that make no sense"),
    ):  # fmt: skip
        path = saved(monkeypatch, tmp_path / "rt_sort.pickle", own, **changed)
        with pytest.raises(ConfigError, match=line):
            import_rtsort(path, positions)


def test_positions_must_be_those_of_the_sorters_electrodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, truth: tuple[Scene, Sequences]
) -> None:
    own = truth[1]
    path = saved(monkeypatch, tmp_path / "rt_sort.pickle", own)
    few = probe(tmp_path / "few.json", own.positions_um[:-1])
    with pytest.raises(ConfigError, match=f"made on {own.n_channels} electrodes, the positions are of"):
        import_rtsort(path, few)
    turned = probe(tmp_path / "turned.json", own.positions_um[:, ::-1] * [1, -1])
    with pytest.raises(ConfigError, match="has a root at"):
        import_rtsort(path, turned)
    moved, _ = import_rtsort(path, probe(tmp_path / "moved.json", own.positions_um + np.array([1e3, -50.0])))
    np.testing.assert_array_equal(moved.roots, own.roots)  # another origin is the same array
    with pytest.raises(ConfigError, match="give --positions FILE or --recording FOLDER"):
        import_rtsort(path)


def test_a_sorter_of_chosen_channels_lands_on_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, truth: tuple[Scene, Sequences]
) -> None:
    own = truth[1]
    ids = (np.arange(own.n_channels) * 2 + 3).tolist()
    wide = np.full((ids[-1] + 4, 2), 900.0) + np.arange(ids[-1] + 4)[:, None]
    wide[ids] = own.positions_um
    path = saved(monkeypatch, tmp_path / "rt_sort.pickle", own, chan_ids=ids, max_chan_id=ids[-1])
    got, _ = import_rtsort(path, probe(tmp_path / "probe.json", wide))
    assert got.n_channels == len(wide)
    np.testing.assert_array_equal(got.roots, np.array(ids)[own.roots])


def recording(folder: Path, s: Scene, fs_hz: float = FS) -> Path:
    folder.mkdir()
    np.save(folder / "traces.npy", np.round(s.x[:, :2000].T).astype(np.int16))
    about = {
        "sampling_frequency": fs_hz,
        "lsb_uv": 1.0,
        "zero_code": 0,
        "n_channels": len(s.x),
        "dtype": "int16",
    }
    (folder / "params.json").write_text(json.dumps(about))
    probe(folder / "probe.json", s.positions)
    return folder


def test_the_command_writes_a_file_that_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, truth: tuple[Scene, Sequences], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    path = saved(monkeypatch, tmp_path / "rt_sort.pickle", truth[1])
    out, folder = tmp_path / "x.sequences.h5", recording(tmp_path / "rec", truth[0])
    given = [
        "import-rtsort",
        str(path),
        "--recording",
        str(folder),
        "--out",
        str(out),
        "--network",
        "rtsort-20k",
    ]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert f"{len(truth[1])} units" in said and "not in the pickle" in said
    got = Sequences.load(out)
    assert got.imported_from["file"] == "rt_sort.pickle" and len(got.imported_from["sha256"]) == 64
    assert got.network["name"] == "rtsort-20k" and got.inference_scaling is not None
    path.write_bytes(pickle.dumps(Runs(os.system, "true")))
    out.unlink()
    assert main(given) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "posix.system" in err and not out.exists()
    wrong = recording(tmp_path / "other", truth[0], 30_000.0)
    saved(monkeypatch, path, truth[1])
    assert main([*given[:2], "--recording", str(wrong), "--out", str(out)]) == 2
    assert "made at 20 kHz" in capsys.readouterr().err


REAL = os.environ.get("SPIKED_RTSORT_PICKLE"), os.environ.get("SPIKED_RTSORT_RECORDING")


@pytest.mark.skipif(
    not all(REAL), reason="SPIKED_RTSORT_PICKLE and SPIKED_RTSORT_RECORDING name no real sorter"
)
def test_a_real_sorter_is_read() -> None:
    pickled, folder = (Path(str(p)) for p in REAL)
    got, _ = import_rtsort(pickled, None, folder)
    assert len(got) > 0 and (got.n_spikes > 0).all()
    assert ((got.prob > 0) & (got.prob <= 1)).all() and (np.abs(got.latency) <= 30).all()
