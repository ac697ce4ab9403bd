"""engine/probe.py against brute force, and a pre-training that is the same with it and without."""

import copy
import json
from types import SimpleNamespace

import narrow
import numpy as np
import pytest
import torch

import datasets
import metrics
import train_ssl
from ct.volumes import BadInput
from engine import pace, probe, processes, runs
from segment import dilate

ALONE = processes.Processes(0, 1, torch.device("cpu"))


def least_squares(x: np.ndarray, y: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What `probe.ridge` gives, (d + 1, classes) with the bias last, by numpy: of rows appended for the penalty."""
    x, y = x[labels != 255], y[labels != 255]
    number = y.sum(0)
    w = (y / np.sqrt(number.clip(1))).sum(1)  # of a position
    w /= w.sum()
    mean = w @ x
    deviation = np.sqrt(w @ (x - mean) ** 2).clip(1e-6)  # some features are zero everywhere
    z, target = (x - mean) / deviation, y - w @ y
    root = np.sqrt(w)[:, None]
    rows = np.concatenate([root * z, np.sqrt(probe.PENALTY) * np.eye(x.shape[1])])
    solution = np.linalg.lstsq(rows, np.concatenate([root * target, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    solution /= deviation[:, None]
    return np.concatenate([solution, (w @ y - mean @ solution)[None]])


def test_the_ridge_is_numpys_least_squares_with_rows_for_its_penalty():
    rng = np.random.default_rng(0)
    x = rng.normal(3, [0.1, 1, 10, 100, 1], (300, 5)) @ rng.normal(size=(5, 5))
    labels = rng.choice([0, 1, 3, 255], 300, p=[0.7, 0.2, 0.05, 0.05]).astype(np.uint8)  # class 2 does not occur
    weights = probe.class_weights(torch.from_numpy(labels), 4)
    number = [(labels == c).sum() for c in range(4)]
    assert weights.tolist() == pytest.approx([number[0] ** -0.5, number[1] ** -0.5, 0, number[3] ** -0.5])
    parts = [(torch.from_numpy(x[a:b]), torch.from_numpy(labels[a:b])) for a, b in ((0, 7), (7, 200), (200, 300))]
    a, b = probe.ridge(iter(parts), weights)
    expected = least_squares(x, np.eye(256)[labels][:, :4], labels)
    np.testing.assert_allclose(torch.cat([a, b[None]]), expected, rtol=1e-8, atol=1e-12)
    # a feature that never changes is worth nothing, and one that is not finite makes all of it not finite
    constant = [(torch.cat([x, torch.full_like(x[:, :1], 7.3)], 1), y) for x, y in parts]
    same, b_same = probe.ridge(constant, weights)
    assert (same[-1] == 0).all()
    torch.testing.assert_close(constant[1][0] @ same + b_same, parts[1][0] @ a + b, rtol=1e-6, atol=1e-6)
    parts[1][0][3, 2] = torch.inf
    assert not probe.ridge(parts, weights)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(24, 24), (30, 18), (17, 40)])
def test_labels_of_positions_are_those_in_the_middle_of_their_part(shape):
    labels = np.random.default_rng(1).integers(0, 14, shape).astype(np.uint8)
    found, (height, width), long = probe.at_positions(labels, 4), shape, max(shape)
    for i in range(4):
        for j in range(4):
            y = int(long * (i + 0.5) / 4) - (long - height) // 2
            x = int(long * (j + 0.5) / 4) - (long - width) // 2
            assert found[i, j] == (labels[y, x] if 0 <= y < height and 0 <= x < width else 255)


@pytest.fixture
def trainer(small_phantom, tmp_path, monkeypatch):
    """A trainer whose last norm is a whitening with statistics of its own, and the labelled store."""
    monkeypatch.setattr(probe, "FITTED", 40)
    monkeypatch.setattr(probe, "SCORED", 10)
    narrow.register(monkeypatch)
    args = train_ssl.parse(["--zca", "--zca-group", "4", "--arch", "resnet_basic", "--init", "random", "--data", ".",
                            "--batch-size", "8", "--bn-group", "4", "--queue", "32", "--image-size", "72", "--size",
                            "64"])
    train_ssl.resolve_defaults(args, True)
    moco = train_ssl.build(args, True)
    zca = moco.encoder_q.backbone.layer4[-1].bn2
    with torch.no_grad():
        zca.running_whitening.add_(0.2 * torch.randn(zca.running_whitening.shape))
        zca.running_mean.add_(torch.rand(zca.running_mean.shape))
    store = datasets.prepare(small_phantom / "BTCV", small_phantom.parent / "seg", "segment")
    return train_ssl.Trainer(args, moco, datasets.Batches(args, 24, ALONE), ALONE, "off"), store


def test_its_dice_is_that_of_brute_force(trainer):
    """The encoder itself with its whitening in place, numpy's least squares, Dice by loops."""
    trainer, store = trainer
    found = probe.Probe(trainer, store)
    assert [len(found.fitted[0]), len(found.scored[0])] == [40, 10] and found.fitted[1].shape == (40, 9, 9)
    given = {kind: [store.of([c]) for c in store.task.cases(kind)] for kind in ("100", "val")}
    levels = {kind: {store.slice(int(i)).tobytes() for case in cases for i in case} for kind, cases in given.items()}
    assert not levels["100"] & levels["val"]
    net = dilate(copy.deepcopy(trainer.moco.encoder_q.backbone)).eval()
    sets = {}
    for kind, (slices, labels) in (("100", found.fitted), ("val", found.scored)):
        assert all(s.numpy().tobytes() in levels[kind] for s in slices)
        assert ((labels > 0) & (labels < 255)).flatten(1).any(1).all()
        images = torch.nn.functional.interpolate(slices[:, None].float(), (72, 72), mode="bilinear", antialias=True)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        with torch.no_grad():
            x = net.maxpool(net.relu(net.bn1(net.conv1((images / 255 - mean) / std))))
            x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        sets[kind] = x.permute(0, 2, 3, 1).reshape(-1, 32).double().numpy(), labels.numpy().ravel()
    x, labels = sets["100"]
    solution = least_squares(x, np.eye(256)[labels][:, :14], labels)
    x, truth = sets["val"]
    predicted = (x @ solution[:-1] + solution[-1]).argmax(1)
    dice = []
    for organ in range(1, 14):
        if (truth == organ).any():
            both = sum(1 for p, t in zip(predicted, truth, strict=True) if p == organ == t)
            sizes = sum(int(p == organ) + int(t == organ) for p, t in zip(predicted, truth, strict=True) if t != 255)
            dice.append(2 * both / sizes)
    assert len(dice) > 5 and 0.05 < np.mean(dice) < 0.95
    assert found.start == pytest.approx(np.mean(dice), abs=0.002)  # where rounding moves a position over a border
    assert found.look() == {"probe_dice": found.start, "probe_dice_start": found.start}


def test_a_look_changes_nothing_and_sees_weights_that_changed(trainer):
    trainer, store = trainer
    found, before = probe.Probe(trainer, store), copy.deepcopy(trainer.moco.state_dict())
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    found.look()
    assert torch.equal(torch.rand(3), drawn)  # nothing was drawn
    assert all(torch.equal(v, before[k]) for k, v in trainer.moco.state_dict().items())
    assert all(m.training for m in trainer.moco.modules())
    assert trainer.moco.encoder_q.backbone.layer4[0].conv1.stride == (2, 2)
    with torch.no_grad():
        for p in trainer.moco.encoder_q.backbone.layer4.parameters():
            p.normal_()
    assert found.look()["probe_dice"] != found.start == found.look()["probe_dice_start"]
    with torch.no_grad():
        trainer.moco.encoder_q.backbone.conv1.weight[0] = torch.nan
    assert np.isnan(found.dice())


def test_which_slices_is_a_function_of_the_store(trainer):
    trainer, store = trainer
    first = probe.Probe(trainer, store)
    trainer.args.seed = trainer.batches.seed = 3
    other = probe.Probe(trainer, store)
    for one, same in zip((*first.fitted, *first.scored), (*other.fitted, *other.scored), strict=True):
        assert torch.equal(one, same)


def test_a_run_with_it_is_the_run_without(small_phantom, tmp_path, monkeypatch, capsys):
    """Stopped and continued with it, never stopped without: equal weights, optimizer and queue; its keys in the log."""
    monkeypatch.chdir(tmp_path)  # its store lies in stores/
    narrow.register(monkeypatch)
    monkeypatch.setattr(probe, "FITTED", 24)
    monkeypatch.setattr(probe, "SCORED", 8)
    common = ["--data", small_phantom / "AbdomenCT-1K", "--store", small_phantom.parent / "store", "--amp", "off",
              "--init", "random", "--image-size", 64, "--batch-size", 8, "--bn-group", 4, "--queue", 32, "--local",
              "--zca", "--zca-group", 4, "--arch", "resnet_basic"]
    with_it = ["--probe", small_phantom / "BTCV"]
    for out, steps, more in (("a", 2, with_it), ("a", 4, with_it), ("b", 4, [])):
        capsys.readouterr()
        train_ssl.main([str(x) for x in (*common, "--out", out, "--steps", steps, *more)])
        told = capsys.readouterr().out
        lines = [line for line in told.splitlines() if line.startswith("probe: ")]
        assert len(lines) == (2 if more else 0) and (", probe " in told) == bool(more)
        if more:
            assert "to 24 slices and scored on 8 of other cases, 8 x 8 positions" in lines[0]
            assert f"after step {steps}" in lines[1] and "before the first step" in lines[1]
    one, other = ((tmp_path / x / "phantom-moco-local-zca") for x in "ab")
    logs = [runs.read_log(folder / "log.jsonl") for folder in (one, other)]
    assert [("probe_dice" in r, "probe_dice_start" in r) for r in logs[0]] == [(False,) * 2, (True,) * 2] * 2
    assert logs[0][1]["probe_dice_start"] == logs[0][3]["probe_dice_start"]  # the initial weights', also when continued
    assert all(0 < r["probe_dice"] < 1 for r in logs[0] if "probe_dice" in r)
    timed = ("probe_dice", "probe_dice_start", *pace.TIMES)
    assert [{k: v for k, v in r.items() if k not in timed} for r in logs[0]] == [
        {k: v for k, v in r.items() if k not in timed} for r in logs[1]]
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other))
    assert a["gap"] == b["gap"] and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    momentum = [x["optimizer"]["state"] for x in (a, b)]
    assert all(torch.equal(v["momentum_buffer"], momentum[1][k]["momentum_buffer"]) for k, v in momentum[0].items())
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())


def test_what_cannot_be_probed_is_refused(trainer, tmp_path, refusal):
    trainer, store = trainer
    assert probe.begin(trainer, store, None, ALONE) is None
    assert probe.begin(trainer, store, store, processes.Processes(1, 2, ALONE.device)) is None  # not the main one
    with pytest.raises(BadInput, match="real CT and the phantom"):
        probe.begin(trainer, SimpleNamespace(is_phantom=False), store, ALONE)
    empty = SimpleNamespace(of=store.of, slice=lambda i, label=False: np.zeros((8, 8), np.uint8), data="some/folder")
    with pytest.raises(BadInput, match="--probe some/folder: no slice of 0035, 0036, 0037 ... holds a class"):
        probe.with_organs(empty, store.task.cases("val"), 5, 64, 8)
    line = refusal(train_ssl.main, ["--data", store.data.replace("BTCV", "AbdomenCT-1K"), "--out", tmp_path, "--init",
                                    "random", "--probe", tmp_path / "nowhere"])
    assert "nowhere: no such folder" in line


def test_a_summary_has_the_last_the_best_and_the_first():
    log = [{"step": s, "loss": 1.0} | ({"probe_dice": d, "probe_dice_start": 0.111} if d else {})
           for s, d in ((1, None), (2000, 0.2), (3000, 0.187), (3001, None))]
    assert probe.summary(log) == ["probe: mean Dice 11.1 % before the first step, at best 20.0 % after step 2,000, "
                                  "18.7 % after step 3,000"]
    assert probe.summary(log[:1]) == []


def test_real_ct_is_probed(real_ct, small_networks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_ssl.main(["--data", str(real_ct / "AbdomenCT-1K"), "--out", "runs", "--arch", "resnet_basic", "--init",
                    "random", "--image-size", "64", "--batch-size", "64", "--queue", "64", "--steps", "4",
                    "--epochs", "1", "--probe", str(real_ct / "BTCV")])
    last = runs.read_log(tmp_path / "runs/moco/log.jsonl")[-1]
    assert 0 < last["probe_dice"] < 1 and 0 < last["probe_dice_start"] < 1 and last["step"] == 4


def test_the_mean_is_that_of_the_evaluation():
    """`metrics.summarise`'s mDS of rows by part is that of all positions together."""
    rng = np.random.default_rng(2)
    predicted, truth = rng.integers(0, 4, (2, 60))
    parts = np.stack([metrics.counts(predicted[i : i + 20], truth[i : i + 20], 4).T for i in (0, 20, 40)])
    whole = metrics.counts(predicted, truth, 4).T[None]
    assert metrics.summarise(parts, range(3))["mDS"] == metrics.summarise(whole, [0])["mDS"]
