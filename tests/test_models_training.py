"""Labels, scores and the training command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spiked_models import cards, networks, training
from spiked_models.examples import LIMIT_SD, MASKED, Labelled, draw, label
from spiked_models.scoring import count, found_in, logits_of, peaks_of, score
from spiked_models.synthesis import Noise, hdmea_grid, synthesize
from spiked_models.training import LEVEL, Plan, Trainee, _logits, batches, levelled, main, taught


def test_labels_sit_on_the_troughs() -> None:
    rec = synthesize(hdmea_grid(4, 4), 20_000, 3.0, 3, seed=8, noise=Noise(uv=2.0, spread=0.0), snr=(30, 50),
                     rate_hz=(3, 5), burst_p=0.0, n_background=0)  # fmt: skip
    data = label(rec)
    channel, frame = np.nonzero(data.labels == 1)
    inside = (frame > 10) & (frame < data.labels.shape[1] - 10)
    channel, frame = channel[inside], frame[inside]
    assert len(frame) > 50
    heights = data.traces[channel, frame]
    off = [np.abs(data.traces[c, f - 3 : f + 4] - np.median(data.traces[c])).argmax() - 3 for c, f in
           zip(channel[np.abs(heights) > 12], frame[np.abs(heights) > 12], strict=True)]  # fmt: skip
    assert np.mean(np.abs(off) <= 1) > 0.9
    assert (np.abs(heights) > LIMIT_SD - 2.5).mean() > 0.95
    assert (data.labels == MASKED).any()
    roots = rec.spikes[(rec.spikes["sample"] > 10) & (rec.spikes["sample"] < 59_990)]
    assert np.mean(data.labels[roots["channel"], roots["sample"]] == 1) > 0.9


def test_traces_are_in_units_of_the_noise() -> None:
    rec = synthesize(
        hdmea_grid(4, 4),
        20_000,
        2.0,
        0,
        seed=3,
        noise=Noise(uv=9.0, low_hz=300.0, drift_uv=40.0),
        n_background=0,
    )
    data = label(rec)
    fast = np.diff(data.traces, axis=1).std()
    calm = replace(rec.noise, drift_uv=0.0)
    still = label(synthesize(hdmea_grid(4, 4), 20_000, 2.0, 0, seed=3, noise=calm, n_background=0))
    assert fast == pytest.approx(np.diff(still.traces, axis=1).std(), rel=0.1)
    assert still.traces.std() == pytest.approx(1.0, rel=0.1)


def hand_made() -> tuple[Labelled, np.ndarray]:
    labels = np.zeros((2, 400), np.int8)
    labels[0, [100, 150, 200]] = 1
    labels[1, 100] = 1
    labels[1, 195:206] = MASKED
    logits = np.full((2, 400), -9.0, np.float32)
    logits[0, [100, 153, 300]] = 3  # hit, hit 3 frames off, false; the spike at 200 is missed
    logits[1, [120, 200]] = 3  # too far from 100: false and missed; the other is masked
    return Labelled(np.zeros((2, 400), np.float32), labels, 20_000.0), logits


def test_counting_by_hand() -> None:
    data, logits = hand_made()
    assert count(logits, data, 40, 0.5).tolist() == [2, 4, 4]
    assert count(logits, data, 40, 0.99).tolist() == [0, 0, 4]
    logits[0, 101:103] = (3, 2)  # a plateau has no strict peak at 100
    assert (0, 100) not in set(zip(*map(np.ndarray.tolist, peaks_of(logits, 0.5)), strict=True))


def test_whole_traces_equal_windows() -> None:
    torch.manual_seed(0)
    net = Trainee((21,) * 4, 4)
    data = draw(5, 20_000, 16, 0.2)
    logits = logits_of(lambda x: net(x).detach(), data, 40, 40, 1.0)
    assert logits.shape == data.traces.shape
    assert np.isfinite(logits[:, 40:-40]).all()
    assert np.isneginf(logits[:, :40]).all()
    x = torch.from_numpy(data.traces[:, 240:560].copy())
    x = x - x[:, 60:260].median(dim=1, keepdim=True).values
    assert np.abs(logits[:, 280:520] - net(x).detach().numpy()).max() < 1e-4


def test_a_network_against_its_own_detections() -> None:
    torch.manual_seed(0)
    net = Trainee((9, 2, 2, 9), 4)
    data = draw(6, 20_000, 16, 0.3)

    def logits(x: torch.Tensor) -> torch.Tensor:
        return 20 * (net(x).detach() + 5) - 2

    mine = logits_of(logits, data, 12, 6, 1.0)
    its = found_in(mine, data, 0.4)
    assert its.labels.min() == 0 and its.labels.sum() > 20
    figures = score([mine], [data], [its])
    assert figures["best f1 against the published network"] > 95


def test_windows_are_cut_from_the_recordings_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "POOL", 12)
    plan = Plan("x", 20_000, (9, 2, 2, 9), 6, 4, 2, 24, 7, 1e-3, 1, "", 0.0)
    fresh, kept, again = (list(batches(plan, 0, None, folder)) for folder in (None, tmp_path, tmp_path))
    for (x, y, told), (x2, y2, _), (x3, y3, _) in zip(fresh, kept, again, strict=True):
        assert told is None and x.shape == y.shape == (24, 320)
        assert torch.equal(x, x2) and torch.equal(x, x3) and torch.equal(y, y2) and torch.equal(y, y3)


def test_a_teacher_is_asked_where_it_can_see() -> None:
    teacher = networks.load("rtsort-20k-lite")
    recording = taught(4, 20_000.0, teacher, None)
    p, labels = recording.probability, recording.data.labels
    assert p is not None and p.shape == labels.shape
    known = slice(teacher.lookback, labels.shape[1] - teacher.lookahead)
    assert (p[:, known] >= 0).all() and (p[:, : teacher.lookback] < 0).all()
    assert (p[:, known][labels[:, known] == 1] > 0.1).mean() > 0.6
    assert (p[:, known][labels[:, known] == 0] > 0.1).mean() < 0.05


def test_levelling_moves_the_threshold_and_no_detection() -> None:
    torch.manual_seed(3)
    *others, (weight, bias) = Trainee((9, 2, 2, 9), 4).layers()
    layers = (*others, (20 * weight, bias + 4))
    net = networks.DetectionNetwork("raw", 20_000.0, layers, 1.0, 1.349, 0.2, 0.1, "", 9)
    x = torch.randn(3, 4000)
    before = net.batch_logits(x).numpy()
    after = replace(net, layers=levelled(layers, 0.2)).batch_logits(x).numpy()
    found, again = np.stack(peaks_of(before, 0.2)), np.stack(peaks_of(after, LEVEL))
    assert found.shape[1] > 50 and np.array_equal(found, again)


@pytest.mark.slow
def test_training_learns_and_writes_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "POOL", 16)
    common = ["--name", "tiny", "--width", "8", "--batch", "96", "--rate", "0.006", "--seed", "3",
              "--refresh", "20", "--validation", "2",
              "--work", str(tmp_path), "--out", str(tmp_path)]  # fmt: skip
    main([*common, "--steps", "100"])
    about = json.loads((tmp_path / "tiny.json").read_text())
    assert about["metrics"]["this network"]["stringent"]["f1"] > 40
    assert about["training"]["windows"] == 9600
    assert "--steps 100" in about["training"]["command"]
    monkeypatch.setattr(cards, "WEIGHTS", tmp_path)
    monkeypatch.setattr(networks, "WEIGHTS", tmp_path)
    net = networks.load("tiny")
    assert (net.width, net.kernel, net.sha256) == (8, 21, about["sha256"])
    assert net.stringent_p == about["threshold_stringent"]
    recordings = [draw((1 << 30) + i, 20_000, 24, 1.5) for i in range(2)]
    again = score(_logits(net, recordings), recordings)
    assert again["stringent"] == about["metrics"]["this network"]["stringent"]
    # Started again with the same arguments, it finds its checkpoint complete and arrives at the same weights.
    main([*common, "--steps", "100"])
    assert json.loads((tmp_path / "tiny.json").read_text())["sha256"] == about["sha256"]
    # A finished network goes through the end alone: it is level already, and its card says where it came from.
    assert abs(about["threshold_stringent"] - LEVEL) < 0.06
    (tmp_path / "tiny.checkpoint.pt").unlink()
    main([*common, "--steps", "0", "--start", "tiny"])
    anew = json.loads((tmp_path / "tiny.json").read_text())
    assert anew["training"]["start_sha256"] == about["sha256"] and anew["training"]["loss"] is None
    assert (
        anew["metrics"]["this network"]["stringent"]["f1"]
        >= about["metrics"]["this network"]["stringent"]["f1"]
    )


def test_a_start_with_less_lookahead_says_the_same_where_it_still_sees_enough() -> None:
    torch.manual_seed(2)
    layers = Trainee((9, 2, 2, 9), 4).layers()
    layers[3][0][:, :, 6:] = 0
    start = networks.DetectionNetwork("start", 20_000.0, tuple(layers), 1.0, 1.349, 0.3, 0.1, "", 9)
    hasty, x = Trainee((9, 2, 2, 9), 4), torch.randn(2, 90)
    hasty.begin_as(start, 3)
    assert torch.allclose(hasty(x)[:, :-3], start.batch_logits(x)[:, 3:], atol=1e-5)


def test_a_start_from_a_narrower_network_changes_no_logit() -> None:
    torch.manual_seed(1)
    small = Trainee((21,) * 4, 5)
    start = networks.DetectionNetwork("small", 20_000.0, tuple(small.layers()), 1.0, 1.349, 0.3, 0.1, "")
    wide = Trainee((21,) * 4, 12)
    wide.begin_as(start)
    x = torch.randn(3, 150)
    assert torch.allclose(wide(x), start.batch_logits(x), atol=1e-5)
    # Another rate: a slow wave sampled at 30 kHz gives nearly the logits it gives at 20 kHz.
    fast = Trainee((31,) * 4, 5)
    fast.begin_as(start)
    t20, t30 = torch.arange(200) / 20.0, torch.arange(300) / 30.0
    slow = start.batch_logits(torch.sin(t20)[None])[0]
    quick = fast(torch.sin(t30)[None])[0].detach()
    assert torch.allclose(quick[::3], slow[::2], atol=0.1 * float(slow.abs().max()))
    with pytest.raises(networks.NetworkError, match="wider"):
        Trainee((21,) * 4, 4).begin_as(start)
