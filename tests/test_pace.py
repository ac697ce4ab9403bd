"""How fast a loop is said to be: operations against torch's counter and by hand, rates and times by a clock."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import train_seg
from engine import pace, runs
from moco import Encoder
from segment import PROTOCOLS, Segmenter

SIDE, CLASSES = 64, 14


@pytest.mark.parametrize("arch, side", [("resnet50", 224), ("resnet18", 64)])
def test_operations_of_a_step_are_those_that_torch_counts(arch, side):
    """Of the key's forward, the query's forward and backward, for two images."""
    with torch.device("meta"):
        encoder, images = Encoder(torchvision.models.get_model(arch, weights=None), 128), torch.empty(2, 1, side, side)
    with FlopCounterMode(display=False) as counted:
        with torch.no_grad():
            encoder(images)
        encoder(images)[1].sum().backward()
    step = pace.operations(encoder, pace.features_of(side)) + pace.operations(
        encoder.requires_grad_(False), pace.features_of(side))  # of the query, of the key
    assert counted.get_total_flops() == 2 * step


@pytest.mark.parametrize("arch, billions", [("resnet50", 4.09), ("resnet18", 1.81), ("resnext50_32x4d", 4.23)])
def test_multiplications_of_an_image_are_those_that_torchvision_documents(arch, billions):
    """Of 224 px, with a classifier in place of the projector; the third network's kernels are in groups."""
    with torch.device("meta"):
        encoder = Encoder(torchvision.models.get_model(arch, weights=None), 128)
    forward = pace.operations(encoder.requires_grad_(False), pace.features_of(224)) / 2
    assert forward / 1e9 == pytest.approx(billions, rel=3e-3)


@pytest.mark.parametrize("larger, side, ms", [(4, 1024, 4), (9, 512, 0.6)])
def test_the_devices_peak_is_that_of_its_fastest_product(monkeypatch, larger, side, ms):
    """By a clock: of 512 rows one product takes 0.6 ms, the others 3; of 1024 rows one takes 4 or 9, the others 12."""
    pace.peak.cache_clear()
    ticks = [t for each in (3, 3, 0.6, *[3] * 13, *[12] * 15, larger) for t in (0, each)]
    clock = iter(np.cumsum(ticks) / 1e3)
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    before, tf32 = torch.get_rng_state(), torch.backends.cuda.matmul.allow_tf32
    assert pace.peak(torch.device("cpu"), "off") == pytest.approx(2 * side**3 / (1e-3 * ms))
    assert torch.equal(before, torch.get_rng_state()) and torch.backends.cuda.matmul.allow_tf32 == tf32
    pace.peak.cache_clear()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_operations_of_an_iteration_are_those_that_torch_counts(protocol):
    """Its counter's forward, where it is right also for groups; by hand what the backward adds to it."""
    def segmenter() -> Segmenter:
        return Segmenter(torchvision.models.resnet50(weights=None), protocol, CLASSES)

    with torch.device("meta"):
        model, images = segmenter().eval(), torch.empty(1, 3, SIDE, SIDE)
        labels = torch.zeros(1, SIDE, SIDE, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.loss(images, labels)
    forward, first = counted.get_total_flops(), 2 * 3 * 64 * 7**2 * (SIDE // 2) ** 2
    head = 2 * 2048 * CLASSES * (SIDE // 8) ** 2  # of a linear head, whose BN before it is trained
    expected = forward + 2 * head if protocol == "linear-frozen" else 3 * forward - first
    assert pace.operations(segmenter(), pace.iteration_of(SIDE)) == expected
    if protocol == "linear-frozen":
        kept = torch.zeros(2048, SIDE // 8, SIDE // 8)
        assert pace.operations(segmenter(), pace.iteration_of(SIDE, kept)) == 3 * head


def test_what_compiled_counts_in_no_rate_and_looks_in_the_time_left_alone(monkeypatch):
    """By a clock: a first step of 100 s, then four of 2 s, a look of 12 s, and four of 3 s; 20 in all."""
    clock = [0.0]
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(pace, "peak", lambda device, amp: 400.0)
    ranks = SimpleNamespace(world_size=2, device=None, is_main=True)
    speed = pace.Pace(50, 8, ranks, "off", 10, 30)

    def after(seconds: float, read: int | None = None) -> dict | None:
        clock[0] += seconds
        return read and speed.read(read)

    after(100)
    assert speed.restart(11) == 100
    assert after(8, 15) == {"images_per_s": 4.0, "mfu": 0.25, "seconds_left": 30} and speed.spent == 8
    after(12)
    speed.go_on()
    assert after(12, 19) == {"images_per_s": 2.67, "mfu": 0.1667, "seconds_left": 44}  # 32 s for 8 steps, of 11 more
    assert after(1, 29)["mfu"] == 1  # of a peak that was measured beside other work
    assert after(10, 30)["mfu"] == 0.01
    assert pace.words({"images_per_s": 2.67, "mfu": 0.1667}) == "2.7 images/s (17 % of the device's peak)"


@pytest.mark.narrow
def test_a_segmentations_log_has_them_and_it_says_the_time_left(small_phantom, arch, tmp_path, by_clock, capsys):
    """By a clock that goes 10 s an iteration, on a device of 40 operations a second."""
    by_clock(train_seg.Trainer, 10, 40, 80)
    train_seg.main([str(a) for a in ("--data", small_phantom / "BTCV", "--store", small_phantom.parent / "seg", "--out",
                                     tmp_path, "--amp", "off", "--backbone", "random", "--split", "25", "--draw", 0,
                                     "--protocol", "linear-frozen", "--crop-size", 64, "--batch-size", 2, *arch,
                                     "--iterations", 24)])
    told = runs.read_log(tmp_path / "seg/random-linear-frozen-25-0/log.jsonl")
    assert [(r["images_per_s"], r["mfu"], r["seconds_left"]) for r in told] == [
        *[(0.2, 0.4, 140)] * 10, *[(0.2, 0.4, 40)] * 10, *[(0.2, 0.4, 0)] * 4]
    line = r"random-linear-frozen-25-0: loss [\d.]+, 0\.2 images/s \(40 % of the device's peak\), about 2 min to go"
    assert re.search(line, capsys.readouterr().out)
