"""train_seg.py through its own command: the three protocols, exact continuing, results, tables."""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import narrow
import nibabel as nib
import numpy as np
import pytest
import torch
import torchvision
from operations import Operations
from torch._dynamo.testing import CompileCounterWithBackend

import datasets
import segment
import svd_spectrum
import train_seg
import train_ssl
from ct import tasks
from engine import backbones, evaluate, figures, origin, pace, predict, processes, runs, seeds
from segment import PROTOCOLS, Segmenter
from views import resize
from whitening import whiten_last_norm


@pytest.fixture(scope="module")
def pretrained(small_phantom):
    """A folder of runs with one pre-trained backbone, whitened, of two steps."""
    out = small_phantom.parent / "runs"
    data, store = small_phantom / "AbdomenCT-1K", small_phantom.parent / "store"
    train_ssl.main([str(a) for a in ("--data", data, "--store", store, "--out", out, "--image-size", 64, "--amp", "off",
                                     "--batch-size", 8, "--bn-group", 4, "--queue", 32, "--zca-group", 16, "--local",
                                     "--zca", "--init", "random", "--steps", 2)])
    return out


@pytest.fixture
def flags(small_phantom, pretrained, arch):
    def make(*more, out=pretrained):
        data, store = small_phantom / "BTCV", small_phantom.parent / "seg"
        return [str(a) for a in ("--data", data, "--store", store, "--out", out, "--amp", "off", "--crop-size", 64,
                                 "--batch-size", 2, *arch, *more)]

    return make


@pytest.fixture(scope="module")
def three(small_phantom, pretrained, drawing):
    """What the command of the three protocols printed on the first subset of a split: each left its result."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as told:
        patch.setattr(figures, "attempt", drawing)
        train_seg.main(three_flags(small_phantom, pretrained))
    return told.getvalue()


def three_flags(small_phantom, out):
    return [str(a) for a in ("--data", small_phantom / "BTCV", "--store", small_phantom.parent / "seg", "--out", out,
                             "--amp", "off", "--crop-size", 64, "--batch-size", 2, "--split", "12.5", "--draw", 1,
                             "--iterations", 2)]


def untimed(folder):
    """A run's log without what no other run has the same."""
    return [{k: v for k, v in r.items() if k not in pace.TIMES} for r in runs.read_log(folder / "log.jsonl")]


def test_three_protocols_leave_results_and_are_skipped_when_done(three, small_phantom, pretrained, capsys):
    first = three
    assert "PHANTOM" in first
    assert "\nmean Dice in % on the generated phantom, 12.5 % of the training volumes:\n  MoCo v2 + local" in first
    truth = [np.load(small_phantom.parent / f"seg/segment/label-{case}.npy") for case in tasks.cases("val")]
    occur = len(np.unique(np.concatenate([t.ravel() for t in truth]))) - 1
    assert 1 < occur < 13  # the phantom is a small one
    table = (pretrained / "report.md").read_text()
    assert first.count(f"({occur} classes, pooled over") == 3 and f"Mean Dice over {occur} organs" in table
    lines = [x for x in runs.read_log(pretrained / "results.jsonl") if (x["split"], x["draw"]) == ("12.5", 1)]
    assert [x["protocol"] for x in lines] == ["linear-frozen", "linear-finetune", "deeplabv3plus"]
    for x in lines:
        assert x["data"] == "phantom" and x["cases"] == tasks.cases("12.5", 1) and len(x["organs"]) == 13
        defined = [o for o in x["organs"] if o is not None]
        assert x["mDS"] == pytest.approx(statistics.fmean(defined)) and len(defined) == occur
        assert x["whitening"] == ("fold" if x["protocol"] == "linear-frozen" else "bn")
    before = (pretrained / "results.jsonl").read_text()
    train_seg.main(three_flags(small_phantom, pretrained))
    assert capsys.readouterr().out.count("done before") == 3 and before == (pretrained / "results.jsonl").read_text()


def test_frozen_means_frozen(three, pretrained):
    state = torch.load(pretrained / "seg/phantom-moco-local-zca-linear-frozen-12.5-1/checkpoint.pt", weights_only=True)
    exported = torch.load(pretrained / "phantom-moco-local-zca/backbone.pth", weights_only=True)
    for name, weight in exported.items():  # parameters and buffers, the whitening folded
        assert torch.equal(state["model"][f"backbone.{name}"], weight), name
    told = {r["protocol"]: r for r in runs.read_log(pretrained / "results.jsonl") if r["split"] == "12.5"}
    assert told["linear-frozen"]["backbone_before"] == told["linear-frozen"]["backbone_after"] == state["backbone"]
    assert told["linear-finetune"]["backbone_before"] != told["linear-finetune"]["backbone_after"]


def images(n=3):
    return torch.randn(n, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_backbone_opens_in_torchvision(pretrained):
    """Features, not only keys: those of the query encoder in evaluation mode, whitening and all."""
    weights = torch.load(pretrained / "phantom-moco-local-zca/backbone.pth", weights_only=True)
    net = torchvision.models.resnet18(weights=None)
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    state = torch.load(pretrained / "phantom-moco-local-zca/checkpoint.pt", weights_only=True)
    whitened = whiten_last_norm(torchvision.models.resnet18(weights=None), group_size=16)
    prefix = "encoder_q.backbone."
    whitened.load_state_dict({k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)},
                             strict=False)
    with torch.no_grad():
        expected, out = (torch.nn.Sequential(*list(m.eval().children())[:-2])(images()) for m in (whitened, net))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_backbone_opens_in_timm(pretrained):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    weights = torch.load(pretrained / "phantom-moco-local-zca/backbone.pth", weights_only=True)
    net, stock = timm.create_model("resnet18", num_classes=0), torchvision.models.resnet18(weights=None)
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    stock.load_state_dict(weights, strict=False)
    with torch.no_grad():
        expected = torch.nn.Sequential(*list(stock.eval().children())[:-2])(images())
        torch.testing.assert_close(net.eval().forward_features(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change, why", [
    (lambda w: {k.replace("conv1.weight", "stem.0.weight") if k == "conv1.weight" else k: v for k, v in w.items()},
     "1 of 120 weights missing"),
    (lambda w: w | {"conv1.weight": torch.zeros(32, 3, 3, 3)}, "1 of another shape"),
    (lambda w: {f"trunk.{k}": v for k, v in w.items()}, "120 of 120 weights missing"),
])
def test_backbones_with_another_stem_or_nothing_useful_are_refused(pretrained, flags, tmp_path, refusal, change, why):
    weights = torch.load(pretrained / "phantom-moco-local-zca/backbone.pth", weights_only=True)
    torch.save(change(weights), tmp_path / "other.pth")
    line = refusal(train_seg.main, flags("--split", "25", "--backbone", tmp_path / "other.pth"))
    assert "other.pth" in line and why in line and not (pretrained / "seg/other-linear-frozen-25-0").exists()


@pytest.mark.narrow
@pytest.mark.pictures
def test_stopped_and_continued_is_never_stopped(flags, tmp_path, monkeypatch):
    """Stopped by a signal after iteration 2 of 4, dropout and all."""
    def args(out):
        return [*flags("--split", "25", "--draw", 1, "--protocol", "linear-finetune", "--backbone", "random",
                       "--iterations", 4), "--out", str(out)]

    monkeypatch.setattr(train_seg, "EVAL_INTERVAL", 2)
    train_seg.main(args(tmp_path / "b"))
    real, asked = processes.Processes.any, []
    monkeypatch.setattr(processes.Processes, "any", lambda self, flag: asked.append(1) or len(asked) == 2
                        or real(self, flag))
    with pytest.raises(SystemExit):
        train_seg.main(args(tmp_path / "a"))
    train_seg.main(args(tmp_path / "a"))
    a, b = (tmp_path / x / "seg" / "random-linear-finetune-25-1" for x in "ab")
    assert (a / "validation.png").exists()
    assert untimed(a) == untimed(b) and len(untimed(a)) == 4
    curve = runs.read_log(a / "validation.jsonl")
    assert [r["step"] for r in curve] == [2, 4] and curve == runs.read_log(b / "validation.jsonl")
    x, y = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (a, b))
    for name in x["model"]:
        assert torch.equal(x["model"][name], y["model"][name]), name
    x, y = (json.loads((f / "result.json").read_text()) for f in (a, b))
    assert x["organs"] == y["organs"] == curve[-1]["organs"]


@pytest.mark.narrow
def test_a_checkpoint_is_written_before_the_validation_and_a_stop_is_seen_between_volumes(flags, tmp_path, monkeypatch):
    def args(out):
        return [*flags("--split", "25", "--draw", 1, "--protocol", "linear-frozen", "--backbone", "random",
                       "--iterations", 4), "--out", str(out)]

    monkeypatch.setattr(train_seg, "EVAL_INTERVAL", 2)
    train_seg.main(args(tmp_path / "b"))
    real, seen = evaluate.predictions, []

    def interrupted(trainer):
        for volume in real(trainer):
            seen.append(trainer)
            os.kill(os.getpid(), signal.SIGTERM)
            yield volume

    with monkeypatch.context() as m, pytest.raises(SystemExit) as stopped:
        m.setattr(evaluate, "predictions", interrupted)
        train_seg.main(args(tmp_path / "a"))
    a, b = (tmp_path / x / "seg" / "random-linear-frozen-25-1" for x in "ab")
    assert stopped.value.code == 143 and len(seen) == 1
    assert torch.load(a / "checkpoint.pt", weights_only=True)["step"] == 2 and not (a / "validation.jsonl").exists()
    train_seg.main(args(tmp_path / "a"))
    assert runs.read_log(a / "validation.jsonl") == runs.read_log(b / "validation.jsonl")
    assert [r["step"] for r in runs.read_log(a / "validation.jsonl")] == [2, 4]


def test_dropout_differs_between_ranks_and_between_iterations():
    def mask(*where):
        seeds.seed_torch(0, seeds.DROPOUT, *where)
        return torch.rand(50)

    assert torch.equal(mask(3, 1), mask(3, 1))
    assert not torch.equal(mask(3, 0), mask(3, 1)) and not torch.equal(mask(3, 1), mask(4, 1))


@pytest.mark.narrow
def test_other_channels_drop_out_at_every_iteration(flags, tmp_path, monkeypatch):
    real, dropped = torch.nn.Dropout2d.forward, []

    def forward(self, x):
        out = real(self, x)
        if self.training:
            dropped.append(tuple((out == 0).all(-1).all(-1).flatten().nonzero().flatten().tolist()))
        return out

    monkeypatch.setattr(torch.nn.Dropout2d, "forward", forward)
    monkeypatch.setattr(segment, "DROPOUT", 0.5)  # of 2 x 32 channels
    train_seg.main([*flags("--split", "25", "--draw", 1, "--protocol", "linear-finetune", "--backbone", "random",
                           "--iterations", 4), "--out", str(tmp_path)])
    assert len(dropped) == len({*dropped}) == 4


@pytest.mark.narrow
def test_a_run_that_stopped_between_training_and_result_is_evaluated_once(flags, tmp_path, monkeypatch):
    args = [*flags("--split", "25", "--draw", 1, "--protocol", "linear-frozen", "--backbone", "random",
                   "--iterations", 3), "--out", str(tmp_path)]
    monkeypatch.setattr(train_seg, "EVAL_INTERVAL", 2)
    with monkeypatch.context() as m, pytest.raises(RuntimeError):
        m.setattr(evaluate, "per_case", lambda *a: (_ for _ in ()).throw(RuntimeError))
        train_seg.main(args)
    folder = tmp_path / "seg/random-linear-frozen-25-1"
    assert not (folder / "result.json").exists()
    train_seg.main(args)
    assert [r["step"] for r in runs.read_log(folder / "validation.jsonl")] == [2, 3]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.narrow
@pytest.mark.parametrize("name,file", [("append", "results.jsonl"), ("write_text", "result.json")])
def test_a_run_that_counts_as_done_is_in_the_tables(flags, tmp_path, monkeypatch, name, file):
    """Ended between the two files of a result: the next start leaves both, and they agree."""
    args = [*flags("--split", "25", "--draw", 1, "--protocol", "linear-frozen", "--backbone", "random",
                   "--iterations", 2), "--out", str(tmp_path)]
    real = getattr(runs, name)

    def fail(path, *rest):
        if path.name == file:
            raise RuntimeError
        return real(path, *rest)

    with monkeypatch.context() as m, pytest.raises(RuntimeError):
        m.setattr(runs, name, fail)
        train_seg.main(args)
    train_seg.main(args)
    newest = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert json.loads((tmp_path / "seg/random-linear-frozen-25-1/result.json").read_text()) == newest


@pytest.mark.narrow
def test_a_frozen_backbone_that_changes_is_no_result(flags, tmp_path, monkeypatch):
    """As when its BN is left in training mode: its running statistics drift."""
    monkeypatch.setattr(Segmenter, "train", torch.nn.Module.train)
    with pytest.raises(RuntimeError, match="frozen backbone changed"):
        train_seg.main([*flags("--split", "25", "--draw", 1, "--protocol", "linear-frozen", "--backbone", "random",
                               "--iterations", 1), "--out", str(tmp_path)])
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.pictures
def test_without_matplotlib_everything_else_goes_on(flags, pretrained, tmp_path, monkeypatch, capsys):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figures._tell_once.cache_clear()
    train_seg.main([*flags("--split", "25", "--draw", 1, "--protocol", "linear-frozen", "--backbone", "random",
                           "--iterations", 1), "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert err.count("pictures need matplotlib") == 1 and "pip install matplotlib" in err
    assert (tmp_path / "seg/random-linear-frozen-25-1/dice.csv").exists()
    train_seg.main(["--report", "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.glob("report.*")} == {"report.md", "report.csv"}
    svd_spectrum.main([*flags()[:4], "--out", str(tmp_path), "--image-size", "64", "random", "--arch", "resnet18"])
    assert {p.name for p in tmp_path.glob("spectrum.*")} == {"spectrum.csv"}
    assert "report.png" not in capsys.readouterr().out


def test_poly_schedule_and_crops_of_an_iteration(flags, small_phantom):
    args = train_seg.parse(flags("--split", "100", "--iterations", 100))
    train_seg.resolve_defaults(args, False)
    assert args.lr == 0.01
    for t in (0, 37, 99):
        assert train_seg.lr(t, args) == pytest.approx(0.0099 * (1 - t / 100) ** 0.9 + 1e-4)
    store = datasets.prepare(small_phantom / "BTCV", small_phantom.parent / "seg", "segment")
    slices = store.of(tasks.cases("12.5", 0))
    whole = datasets.Crops(args, store, slices, processes.Processes(0, 1, torch.device("cpu")))
    drawn = [i for t in range(len(slices)) for i in whole.indices(t)]
    for epoch in range(2):  # a batch of 2, so two passes, each without replacement
        assert sorted(drawn[epoch * len(slices) :][: len(slices)]) == slices.tolist()


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_crops_show_images_and_labels_at_the_same_place(scale):
    """An image that equals its label map, and one point of each colour, against a direct computation."""
    side, size = 48, 32
    label = torch.from_numpy(np.kron(np.arange(9).reshape(3, 3), np.ones((16, 16), np.uint8)).astype(np.uint8))
    params = {"scale": np.array([scale]), "place": np.array([[0.3, 0.8]]), "flip": np.array([False]),
              "brightness": np.zeros(1), "contrast": np.ones(1)}
    one = (label[None] * 20, label[None], np.array([label.shape]))
    images, masks = datasets.apply_crops(*one, params, size)
    grey = (images[0, 0] * 0.229 + 0.485) * 255 / 20
    window = round(side / scale)
    shown = min(size, round(side * size / window))
    assert (masks[0, shown:] == 255).all() and (masks[0, :, shown:] == 255).all()
    top, left = (round(p * max(0, side - window)) for p in (0.3, 0.8))
    ratio = min(window, side) / shown
    for y in range(0, shown, 5):
        for x in range(0, shown, 5):
            assert masks[0, y, x] == label[top + int((y + 0.5) * ratio), left + int((x + 0.5) * ratio)]
    inside = masks[0, :shown, :shown]
    steady = (inside[1:-1, 1:-1] == inside[:-2, 1:-1]) & (inside[1:-1, 1:-1] == inside[2:, 1:-1]) \
        & (inside[1:-1, 1:-1] == inside[1:-1, :-2]) & (inside[1:-1, 1:-1] == inside[1:-1, 2:])
    assert (grey[:shown, :shown][1:-1, 1:-1][steady] - inside[1:-1, 1:-1][steady]).abs().max() < 0.5
    flipped = datasets.apply_crops(*one, params | {"flip": np.array([True])}, size)[1]
    assert torch.equal(flipped[0, :shown, :shown], masks[0, :shown, :shown].flip(1))


@pytest.mark.parametrize("crop", [resize.labelled_one_by_one, resize.labelled_by_products])
def test_crops_of_slices_of_any_shape_are_those_of_a_loop(crop, monkeypatch):
    """Both ways against a crop at a time by torch: images to a hundredth of a grey level, labels exactly."""
    rng, size = np.random.default_rng(0), 40
    shapes = np.concatenate([rng.integers(5, 150, (28, 2)), [[64, 64], [41, 150], [150, 41], [1, 1]]])
    slices, labels = ([rng.integers(0, top, s, np.uint8) for s in shapes] for top in (256, 14))
    store = SimpleNamespace(slice=lambda i, label=False: (labels if label else slices)[i])
    args = SimpleNamespace(seed=3, batch_size=len(shapes), crop_size=size, whole_slices=False, flip=True)
    crops = datasets.Crops(args, store, np.arange(len(shapes)), processes.Processes(0, 1, torch.device("cpu")))
    monkeypatch.setattr(resize, "labelled_one_by_one", crop)
    order, (images, masks) = crops.indices(5), crops.apply(5, crops.fetch(5))
    drawn = datasets.draw_crops(seeds.rng(3, seeds.CROPS, 5), len(shapes))
    smaller = 0
    for n, i in enumerate(order):
        window = max(1, round(min(shapes[i]) / drawn["scale"][n]))
        (y, h), (x, w) = ((round(p * max(0, side - window)), min(side, window))
                          for p, side in zip(drawn["place"][n], shapes[i].tolist(), strict=True))
        h_shown, w_shown = (min(size, max(1, round(side * size / window))) for side in (h, w))
        part, mask = (torch.from_numpy(a[i][y : y + h, x : x + w])[None, None].float() for a in (slices, labels))
        part = torch.nn.functional.interpolate(part, (h_shown, w_shown), mode="bilinear", antialias=True)[0, 0] / 255
        mask = torch.nn.functional.interpolate(mask, (h_shown, w_shown), mode="nearest-exact")[0, 0].long()
        rest = (0, size - w_shown, 0, size - h_shown)
        part, mask = (torch.nn.functional.pad(a.flip(1) if drawn["flip"][n] else a, rest, value=air)
                      for a, air in ((part, 0), (mask, 255)))
        part = ((part + drawn["brightness"][n]).clamp(0, 1) * drawn["contrast"][n]).clamp(0, 1)
        assert torch.equal(masks[n], mask)
        torch.testing.assert_close(images[n, 0] * 0.229 + 0.485, part.float(), rtol=0, atol=0.01 / 255)
        smaller += h_shown < size or w_shown < size
    assert 5 < smaller < len(shapes) - 5 and 5 < drawn["flip"].sum() < len(shapes) - 5


def test_without_flips_left_stays_left(flags):
    """Slices whose grey level is the column: it rises to the right in every crop, and labels have the same place."""
    args = train_seg.parse(flags("--split", "25", "--no-flip"))
    args.batch_size, args.crop_size, args.seed = 64, 32, 0
    columns = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1))
    store = SimpleNamespace(slice=lambda i, label=False: columns // 25 if label else columns)
    found = []
    for flip in (args.flip, True):
        args.flip = flip
        crops = datasets.Crops(args, store, np.arange(64), processes.Processes(0, 1, torch.device("cpu")))
        images, masks = crops.apply(3, crops.fetch(3))
        rows = images[:, 0, 0]  # what pads a small crop is 0 and comes last
        shown = [int((mask[0] < 255).sum()) for mask in masks]
        rising = [bool((row[:n].diff() >= -1e-6).all()) for row, n in zip(rows, shown, strict=True)]
        assert rising == [bool((mask[0, :n].diff() >= 0).all()) for mask, n in zip(masks, shown, strict=True)]
        found.append((sum(rising), images, masks, np.array(rising)))
    (alone, images, masks, _), (half, mirrored, _, unmirrored) = found
    assert alone == 64 and 20 < half < 44  # the toolbox mirrors each second one
    assert torch.equal(images[unmirrored], mirrored[unmirrored])  # nothing else is drawn otherwise


def test_runs_without_flips_are_others(flags, tmp_path, refusal, capsys):
    argv = flags("--split", "25", "--draw", 1, "--protocol", "linear-frozen", "--backbone", "random", "--iterations", 1,
                 "--no-whole-slices", "--out", tmp_path)
    train_seg.main([*argv, "--no-flip"])
    assert "iterations of 2 unmirrored crops" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.jsonl").read_text())["flip"] is False
    assert "flip: False there, True here" in refusal(train_seg.main, argv)
    (folder,) = (tmp_path / "seg").iterdir()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "flip"}))
    assert runs.differences(folder, config) == "flip: True there, False here"  # of before the flag: mirrored
    assert not runs.differences(folder, config | {"flip": True})


def test_batched_crops_are_as_many_operations_for_any_batch():
    counts = []
    for batch in (2, 16):
        slices = torch.zeros(2, batch, 50, 60, dtype=torch.uint8)
        boxes = datasets.crop_boxes(np.tile([50, 60], (batch, 1)), drawn := datasets.undrawn_crops(batch), 32)
        with Operations() as operations:
            resize.labelled_by_products(*slices, *boxes, drawn["flip"], 32)
        counts.append(operations.seen)
    assert counts[0] == counts[1] and counts[0].total() <= 45, counts


def test_prediction_is_made_at_the_masks_own_resolution():
    torch.manual_seed(0)
    model = Segmenter(backbones.build_backbone("random", "resnet18"), "linear-finetune").eval()
    images = torch.randint(0, 256, (2, 50, 70), dtype=torch.uint8)
    labels = predict.slices(model, images, 64, "off")
    resized = torch.nn.functional.interpolate(images[:, None] / 255, (64, round(70 * 64 / 50)), mode="bilinear",
                                              antialias=True)
    logits = model(resize.normalise(resized))
    expected = torch.nn.functional.interpolate(logits, (50, 70), mode="bilinear").argmax(1)
    assert labels.dtype == torch.uint8 and torch.equal(labels.long(), expected)


def made(*flags, phantom=False, **more):
    """The config of a pre-training by these flags, as its run folder has it."""
    args = train_ssl.parse([str(f) for f in flags])
    train_ssl.resolve_defaults(args, phantom)
    config = {k: v for k, v in vars(args).items() if k not in train_ssl.NOT_IN_CONFIG}
    data = {"data": "phantom", "volumes": 40} if phantom else {"data": "AbdomenCT-1K", "volumes": 1062}
    if phantom and args.init.startswith("phantom-start"):
        start = made("--init", "random", "--no-geometric", "--epochs", 6, phantom=True)
        data["start"] = start | {"step": 138, "horizon": 138}
    return config | data | {"slices": 9, "store": "", "init_checksum": "", "normalisation": origin.NORMALISATION} | more


def result(split, draw, mds, backbone="moco", data="BTCV", slices=3779, protocol="linear-finetune", config=None,
           gap=0.3, step=184, **more):
    """A line of results.jsonl as the paper's settings, or the phantom's preset, make it."""
    config = config or (made(phantom=data == "phantom") if "moco" in backbone else None)
    preset = dict(arch="resnet50", iterations=40000, crop_size=512, batch_size=16, lr=0.01, whole_slices=False)
    if data == "phantom":
        preset = dict(arch="resnet18", crop_size=96, batch_size=16) | {
            "linear-frozen": dict(iterations=300, lr=0.2, whole_slices=True),
            "linear-finetune": dict(iterations=100, lr=0.05, whole_slices=False),
            "deeplabv3plus": dict(iterations=60, lr=0.05, whole_slices=False)}[protocol]
    known = dict.fromkeys(("step", "horizon", "gap", "view_px", "slice_px"))
    if config:
        known = {"step": step, "horizon": 184, "gap": gap, "view_px": config["image_size"], "slice_px": config["size"],
                 "config": json.loads(json.dumps(config))}
    return preset | {"data": data, "slices": slices, "split": split, "draw": draw, "backbone": backbone, "seed": 0,
                     "protocol": protocol, "mDS": mds, "organs": [mds] * 12 + [None], "window": [-175, 250],
                     "whitening": "fold" if protocol == "linear-frozen" else "bn",
                     "pretraining": known | {"checksum": f"{backbone} {mds}"}} | more


@pytest.mark.pictures
def test_report_states_mean_deviation_and_what_was_not_run(tmp_path, capsys):
    rows = [result("12.5", d, m) for d, m in enumerate((0.40, 0.46, 0.43))]
    rows += [result("25", 0, 0.5), result("25", 0, 0.6), result("100", 0, 0.7, "mine", config=made()),
             result("100", 0, 0.1, "phantom-moco", "phantom", 1193, gap=0.003),
             result("100", 0, 0.3, "phantom-moco-seed1", "phantom", 1193, seed=1,
                    config=made("--seed", 1, phantom=True)),
             result("100", 0, 0.5, "phantom-moco-local-zca-aligned", "phantom", 1193, step=9,
                    config=made("--local", "--zca", "--geometric", phantom=True)),
             result("100", 0, 0.4, "phantom-author-zca", "phantom", 1193, window=[-1024, 3071],
                    config=made("--recipe", "author", "--zca", "--bn-group", 64, phantom=True, zca_group=512)),
             result("100", 0, 0.2, slices=231), result("12.5", 0, 0.3, "imagenet", lr=4),
             result("12.5", 1, 0.31, "imagenet")]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train_seg.main(["--report", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| 46.04 ± 4.37 | 43.00 ± 3.00 (n = 3) |" in out  # the paper's, those of here
    assert "| 66.17 ± 6.16 | 60.00 (n = 1) |" in out  # the newest of two counts
    assert "| 42.55 ± 2.41 | 31.00 (n = 1) |" in out  # of two learning rates the paper's; the other one is another row
    assert "| 12.5 % | No SSL (segmentation: learning rate 4 instead of 0.01) | 30.00 (n = 1) |" in out
    assert "| 100 % | mine (made as MoCo v2; views of 224 px of slices of 512 px) | 70.00 (n = 1) |" in out
    # seeds are replicates; what did not train, or has not finished, says so; nothing is shown of what was not run
    assert re.search(r"\| 100 % \| MoCo v2 \(\*\*did not train\*\*[^|]*\) \| 20.00 ± 14.14 \(n = 2\) \|$", out, re.M)
    assert re.search(r"Beyond the paper, on the generated phantom.*?\| 100 % \| MoCo v2 \+ aligned local \+ ZCA "
                     r"\(\*\*unfinished: step 9 of 184\*\*\) \| 50.00", out, re.S)
    assert re.search(r"\| 100 % \| MoCo v2 \+ ZCA, first author's settings \(HU -1024 to 3071\) \| 40.00", out)
    assert "no BTCV results" in out and "views of 64 px of slices of 192 px" in out
    assert "on BTCV of 231 slices" in out  # a folder of that name with other slices is another data set
    # Table 2 has no result, as the run named mine is not the paper's by its name
    heads = re.findall(r"^(?:Table|The paper's rows|Beyond|Others).*?, on (?:\w+)", out, re.M)
    assert [re.split(r",| \(", h)[0] for h in heads] == ["Table 1", "Others", "The paper's rows", "The paper's rows",
                                                        "Beyond the paper"]
    assert out.count("**the settings differ:**") == 1 and "lr 4" in out
    assert (tmp_path / "report.md").read_text() in out
    assert (tmp_path / "report.png").stat().st_size > 10_000
    cells = list(csv.DictReader((tmp_path / "report.csv").open()))
    # three protocols: Table 1 of BTCV and two others of it; three rows of the phantom, one of the third
    assert len(cells) == 3 * (9 + 2 + 3 + 1)

    def cell(data, split, method, protocol="linear-finetune"):
        return [c for c in cells if (c["data"], c["split"], c["method"], c["protocol"])
                == (data, split, method, protocol)][0]

    told = cell("BTCV", "12.5", "MoCo v2")
    assert [told[k] for k in ("paper mDS", "paper sd", "mDS", "sd", "n")] == ["46.04", "4.37", "43.00", "3.00", "3"]
    told = cell("BTCV", "100", "MoCo v2 + local + ZCA", "deeplabv3plus")
    assert [told[k] for k in ("paper mDS", "paper sd", "mDS", "sd", "n", "settings")] == ["81.22", "", "", "", "", ""]
    told = cell("phantom", "100", "MoCo v2")
    assert [told[k] for k in ("paper mDS", "mDS", "sd", "n")] == ["", "20.00", "14.14", "2"]
    assert told["remarks"].startswith("did not train: it does not tell slices apart; views of 64 px")
    assert cell("phantom", "100", "MoCo v2 + aligned local + ZCA")["remarks"].startswith("unfinished: step 9 of 184")


def test_after_a_command_its_own_rows_are_shown(flags, tmp_path, capsys):
    """Not those of other commands: another split, another backbone; of other draws its own row's."""
    def run(*more):
        capsys.readouterr()
        train_seg.main([*flags("--protocol", "linear-frozen", "--iterations", 1, "--backbone", "random"),
                        *map(str, more), "--out", str(tmp_path)])
        return capsys.readouterr().out

    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "x.pth")
    run("--split", "12.5", "--draw", 0)
    run("--split", "25", "--draw", 0, "--backbone", tmp_path / "x.pth", "--row", "theirs")
    for draw, number in ((1, "1"), (0, "2")):
        out = run("--split", "25", "--draw", draw)
        assert re.findall(r"^  ([^:]*): linear-frozen [\d.].*\(n = (\d)\)$", out, re.M) == [("Random weights", number)]
        assert "25 % of the training volumes:" in out and not re.search(r"^\|", out, re.M)
    assert f"train_seg.py --report --out {tmp_path}" in out
    train_seg.main(["--report", "--out", str(tmp_path)])
    assert len(re.findall(r"^\| [\d.]+ % \|", capsys.readouterr().out, re.M)) == 3


@pytest.mark.narrow
def test_whole_slices_train_the_frozen_head_as_without_kept_features(flags, tmp_path, monkeypatch):
    """Features computed once are those of every iteration: the same losses as with the backbone run each time."""
    args = [*flags("--split", "25", "--draw", 1, "--protocol", "linear-frozen", "--backbone", "random",
                   "--iterations", 4), "--whole-slices"]
    train_seg.main([*args, "--out", str(tmp_path / "once")])

    def each_time(trainer, t, pairs):
        seeds.seed_torch(trainer.args.seed, seeds.DROPOUT, t)
        loss = trainer.model(*trainer.crops.whole(pairs))
        loss.backward()
        trainer.optimizer.param_groups[0]["lr"] = train_seg.lr(t, trainer.args)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss.detach()

    monkeypatch.setattr(train_seg.Trainer, "step", each_time)
    train_seg.main([*args, "--out", str(tmp_path / "each")])
    once, each = (runs.read_log(tmp_path / x / "seg/random-linear-frozen-25-1/log.jsonl") for x in ("once", "each"))
    assert [r["loss"] for r in once] == pytest.approx([r["loss"] for r in each], abs=1e-5) and len(once) == 4


@pytest.mark.narrow
def test_a_backbone_made_anew_is_another_run(flags, arch, small_phantom, tmp_path, refusal, capsys):
    data, store = small_phantom / "AbdomenCT-1K", small_phantom.parent / "store"

    def pretrain(*more):
        train_ssl.main([str(a) for a in ("--data", data, "--store", store, "--out", tmp_path, "--image-size", 64,
                                         "--amp", "off", "--batch-size", 8, "--bn-group", 4, "--queue", 32, "--init",
                                         "random", "--name", "mine", *arch, *more)])

    pretrain("--steps", 1)
    args = flags("--split", "25", "--draw", 1, "--protocol", "linear-frozen", "--backbone", "mine", "--iterations", 1,
                 out=tmp_path)
    train_seg.main(args)
    result = json.loads((tmp_path / "seg/mine-linear-frozen-25-1/result.json").read_text())
    assert result["pretraining"]["step"] == 1 < result["pretraining"]["horizon"]
    assert (result["pretraining"]["view_px"], result["pretraining"]["slice_px"]) == (64, 192)
    pretrain("--steps", 2)
    assert "note: mine: its pre-training is at step 1 of" in capsys.readouterr().out
    line = refusal(train_seg.main, args)
    assert "pretraining.checksum" in line and "pretraining.step: 1 there, 2 here" in line and "--overwrite" in line
    train_seg.main([*args, "--overwrite"])


@pytest.mark.narrow
def test_a_corrected_label_is_another_run(small_phantom, arch, tmp_path, refusal, capsys):
    """Of a case that the run has not seen, it is not; and what is refused names the case."""
    data = tmp_path / "BTCV"
    shutil.copytree(small_phantom / "BTCV", data)
    args = [str(a) for a in ("--data", data, "--store", tmp_path / "s", "--out", tmp_path, "--amp", "off",
                             "--crop-size", 64, "--batch-size", 2, "--split", "12.5", "--draw", 0, "--backbone",
                             "random", "--protocol", "linear-frozen", "--iterations", 1, *arch)]

    def correct(case):
        path = data / f"RawData/Training/label/label{case}.nii.gz"
        image = nib.load(path)
        labels = np.asarray(image.dataobj).copy()
        labels[:9] = np.where(labels[:9] == 6, 0, 6)
        nib.save(nib.Nifti1Image(labels, image.affine, image.header), path)

    train_seg.main(args)
    used = {*tasks.cases("12.5", 0), *tasks.cases("val")}
    correct(next(c for c in tasks.cases("100") if c not in used))
    capsys.readouterr()
    train_seg.main(args)
    assert "done before" in capsys.readouterr().out
    for case in (tasks.cases("12.5", 0)[1], "0037"):
        correct(case)
        with pytest.raises(SystemExit):
            train_seg.main(args)
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf"store\.{case}: (\w{{8}}) \w{{8}} .* there, \1 \w{{8}} .* here", line), line  # one image
        assert "other settings (store." in line and "--overwrite" in line
    result = json.loads((tmp_path / "seg/random-linear-frozen-12.5-0/result.json").read_text())
    assert set(result["store"]) == used


@pytest.mark.pictures
def test_spectrum_command(flags, pretrained, small_phantom, capsys):
    svd_spectrum.main(["--data", str(small_phantom / "BTCV"), "--store", str(small_phantom.parent / "seg"), "--out",
                       str(pretrained), "--image-size", "64"])
    assert "effective rank" in capsys.readouterr().out
    assert (pretrained / "spectrum.png").stat().st_size > 10_000
    header, row = (pretrained / "spectrum.csv").read_text().splitlines()
    assert row.split(",")[:2] == ["phantom-moco-local-zca", "phantom"] and len(next(csv.reader([row]))) == 6 + 512
    told = dict(zip(header.split(","), next(csv.reader([row])), strict=True))["remarks"]
    assert told.startswith("unfinished: step 2 of ") and "zca group 16 instead of 64; from random weights" in told


def test_the_spectrums_flags_do_what_they_say(pretrained, small_phantom, tmp_path, capsys, monkeypatch, refusal):
    """--amp computes in what it names; not one flag that it takes is never looked at."""
    argv = ["--data", str(small_phantom / "BTCV"), "--store", str(small_phantom.parent / "seg"), "--out",
            str(pretrained), "--image-size", "64", "moco-local-zca"]
    read, parse = set(), svd_spectrum.parse

    class Flags(SimpleNamespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(svd_spectrum, "parse", lambda argv: Flags(**vars(parse(argv))))
    told = []
    for amp in ((), ("--amp", "bf16")):
        svd_spectrum.main([*argv, *amp])
        told.append((capsys.readouterr().out, (pretrained / "spectrum.csv").read_text().splitlines()[1]))
    assert not vars(parse(argv)).keys() - read and parse(argv).amp == "off"
    assert "in bf16" not in told[0][0] and "slices), in bf16" in told[1][0]
    ranks = [float(line.split(",")[3]) for _, line in told]
    assert ranks[0] != ranks[1] == pytest.approx(ranks[0], rel=0.05)
    assert "--checkpoint-minutes" in refusal(svd_spectrum.main, [*argv, "--checkpoint-minutes", "5"])


def test_of_several_processes_one_alone_writes(flags, pretrained, small_phantom, tmp_path, capsys, monkeypatch):
    """What needs no other process: spectrum, report, predictions, here asked for in process 1 of 2."""
    data, store = small_phantom / "BTCV", small_phantom.parent / "seg"
    volume = data / "RawData/Training/img/img0001.nii.gz"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(processes, "start", lambda *_: processes.Processes(1, 2, torch.device("cpu")))
    monkeypatch.setattr(processes, "on_main", lambda main, work: [])
    out = tmp_path / "runs"
    for name in ("phantom-moco-local-zca", "seg"):
        if (pretrained / name).exists():
            shutil.copytree(pretrained / name, out / name)
    (out / "results.jsonl").write_text(json.dumps(result("25", 0, 0.5)) + "\n")
    (out / "seg/x").mkdir(parents=True)
    (out / "seg/x/config.json").write_text(json.dumps({"data": "phantom", "arch": "resnet18", "crop_size": 64,
                                                       "protocol": "linear-frozen", "window": [-175, 250]}))
    (out / "seg/x/checkpoint.pt").touch()
    (out / "seg/x/result.json").write_text("{}")
    before = sorted(out.rglob("*"))
    svd_spectrum.main([str(a) for a in ("--data", data, "--store", store, "--out", out, "moco-local-zca")])
    train_seg.main(["--report", "--out", str(out)])
    train_seg.main(["--predict", str(volume), "--run", "x", "--out", str(out)])
    assert sorted(out.rglob("*")) == before and not capsys.readouterr().out


def test_bad_input_ends_in_one_line(flags, pretrained, tmp_path, refusal, small_phantom):
    def line(*more):
        return refusal(train_seg.main, flags(*more))

    assert "--split 50: no such split" in line("--split", "50")
    assert "--draw 3: split 25 has random subsets 0 to 2" in line("--split", "25", "--draw", 3)
    assert "--split is missing" in line()
    assert "moco-nope: no such run" in line("--split", "25", "--backbone", "moco-nope")
    assert "--batch-size: 1: must be" in line("--split", "25", "--batch-size", 1)
    torch.save({"a": 1}, tmp_path / "x.pth")
    assert "x.pth: not a backbone of architecture resnet18" in line("--split", "25", "--backbone", tmp_path / "x.pth")
    assert "no results yet" in refusal(train_seg.main, ["--report", "--out", tmp_path])
    assert "no such run" in refusal(svd_spectrum.main, [*flags()[:6], "nothing"])
    assert not list((pretrained / "seg").glob("x-*"))  # nothing half-begun stays behind
    # a case of the split is missing
    lone = tmp_path / "BTCV/RawData/Training"
    for part in ("img", "label"):
        (lone / part).mkdir(parents=True)
        for p in (small_phantom / "BTCV/RawData/Training" / part).glob("*00[0-9][0-9].nii.gz"):
            if "0037" not in p.name:
                (lone / part / p.name).symlink_to(p)
    assert "case 0037 is missing" in line("--split", "25", "--data", tmp_path / "BTCV", "--store", tmp_path / "s")


@pytest.fixture
def unmarked(small_phantom, tmp_path):
    """BTCV's layout with volumes of the phantom that do not say so: real CT to every command."""
    places = [Path(f"RawData/Training/{part}/{part}{case}.nii.gz") for part in ("img", "label")
              for case in (*tasks.cases("12.5", 0), *tasks.cases("val"))]
    for place in places:
        image = nib.load(small_phantom / "BTCV" / place)
        image.header["descrip"] = b""
        (tmp_path / "BTCV" / place).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), tmp_path / "BTCV" / place)
    return tmp_path / "BTCV"


def test_backbones_of_the_phantom_and_of_real_ct_do_not_meet(flags, pretrained, unmarked, tmp_path, refusal):
    shutil.copytree(pretrained / "phantom-moco-local-zca", tmp_path / "mine")
    config = json.loads((tmp_path / "mine/config.json").read_text())
    (tmp_path / "mine/config.json").write_text(json.dumps(config | {"data": "my_ct"}))
    small = ("--split", "12.5", "--draw", 0, "--protocol", "linear-frozen", "--iterations", 1)
    ours, theirs = tmp_path / "mine", pretrained / "phantom-moco-local-zca"
    real = ("--data", unmarked, "--store", tmp_path / "s", "--arch", "resnet18")
    ssl = ("--data", unmarked / "RawData/Training/img", "--arch", "resnet18", "--image-size", 32, "--batch-size", 8,
           "--bn-group", 4, "--queue", 32, "--size", 64, "--steps", 1)
    for told in (refusal(train_seg.main, [*flags(*small), *real, "--backbone", theirs]),
                 refusal(svd_spectrum.main, [*real, "--image-size", 64, theirs]),
                 refusal(train_ssl.main, [*ssl, "--store", tmp_path / "s", "--out", tmp_path / "o", "--init", theirs])):
        assert "was pre-trained on the phantom, and these slices are real CT" in told
    assert "these slices are the phantom's; give your CT by --data" in refusal(
        train_seg.main, flags(*small, "--backbone", ours))
    train_seg.main([str(a) for a in (*flags(*small), *real, "--backbone", ours, "--out", tmp_path / "o")])
    assert json.loads((tmp_path / "o/results.jsonl").read_text())["data"] == "BTCV"  # where each belongs it is used


def test_results_name_what_they_were_made_from(three, pretrained):
    found = [r for r in runs.read_log(pretrained / "results.jsonl") if r["split"] == "12.5"]
    for told in found:
        assert {"seed", "commit", "hardware", "date", "wall_s", "iterations", "lr", "crop_size", "batch_size", "window",
                "arch", "whitening", "amp", "hd95_mm", "processes"} <= told.keys()
        assert len(told["hd95_mm_organs"]) == len(told["hd95_volumes"]) == 13
        split = tasks.SPLITS / f"btcv_{told['split']}_{told['draw']}.txt"
        assert told["split_sha256"] == hashlib.sha256(split.read_bytes()).hexdigest()
    folders = list((pretrained / "seg").glob("phantom-moco-local-zca-*-12.5-1"))
    assert len(found) == len(folders) == 3
    for folder in folders:
        assert {"config.json", "log.jsonl", "checkpoint.pt", "result.json", "dice.csv", "validation.jsonl",
                "overlays.png"} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("amp", ["bf16", "off"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_iteration_on_a_gpu_waits_for_nothing(flags, small_phantom, monkeypatch, request, protocol, amp):
    store = datasets.prepare(small_phantom / "BTCV", small_phantom.parent / "seg", "segment")
    args = train_seg.parse(flags("--split", "12.5", "--iterations", 4, "--no-whole-slices"))
    train_seg.resolve_defaults(args, True)
    model = Segmenter(backbones.architecture("resnet18"), protocol, 14)
    device, waits = request.getfixturevalue("fake_gpu")
    monkeypatch.setattr(backbones, "checksum", lambda _: "")
    ranks = processes.Processes(0, 1, device)
    args = train_seg.recipe(args, protocol)
    crops = datasets.Crops(args, store, store.of(tasks.cases("12.5", 0)), ranks)
    trainer = train_seg.Trainer(args, model, crops, ranks, amp)
    fused = []  # torch has no fake kernel for it
    monkeypatch.setattr(torch, "_fused_sgd_", lambda weights, *rest, **kw: fused.append(len(weights)))
    for t in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        pairs = crops.fetch(t)
        with waits() as seen:
            loss = trainer.step(t, pairs)
        assert loss.device == device and seen.copies == 3 and not seen.found
    assert fused == [sum(p.requires_grad for p in model.parameters())] * 2


def test_a_checkpoint_of_another_device_keeps_this_ones_optimizer(flags, small_phantom):
    """Fused on a GPU, where fp16's scaler would else trust one that is not; not on a CPU."""
    store = datasets.prepare(small_phantom / "BTCV", small_phantom.parent / "seg", "segment")
    args = train_seg.parse(flags("--split", "12.5", "--protocol", "linear-frozen"))
    train_seg.resolve_defaults(args, True)
    ranks, args = processes.Processes(0, 1, torch.device("cpu")), train_seg.recipe(args, "linear-frozen")
    crops = datasets.Crops(args, store, store.of(tasks.cases("12.5", 0)), ranks)
    trainer = train_seg.Trainer(args, Segmenter(backbones.architecture("resnet18"), "linear-frozen"), crops, ranks,
                                "off")
    state = trainer.state(1)
    state["optimizer"]["param_groups"][0]["fused"] = True
    trainer.load(state)
    assert trainer.optimizer.param_groups[0]["fused"] is None


def test_an_iterations_loss_compiles_as_one_graph(monkeypatch):
    """Its loss and gradients by the compiler's tracing of both passes, in bf16 as on a GPU; prediction goes without."""
    torch.manual_seed(0)
    model, count = Segmenter(narrow.narrow_basic(), "deeplabv3plus"), CompileCounterWithBackend("aot_eager")
    images, labels, found = torch.randn(2, 3, 64, 64), torch.randint(0, 14, (2, 64, 64)), []
    for compiled in (False, True, True):
        if compiled and not count.frame_count:
            model.compile(dynamic=False, fullgraph=True, backend=count)
        model.zero_grad()
        seeds.seed_torch(0, seeds.DROPOUT)
        with processes.autocast("bf16", images.device):
            loss = model(images, labels)
        loss.backward()
        found.append(torch.cat([loss.detach()[None], *(p.grad.ravel() for p in model.parameters() if p.requires_grad)]))
        predict.slices(model, torch.zeros(2, 40, 50, dtype=torch.uint8), 64, "off")
    assert count.frame_count == 1
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-2, atol=1e-3 * found[0].abs().max().item())


@pytest.mark.narrow
def test_compiling_changes_no_number_and_no_setting(flags, tmp_path, monkeypatch, capsys):
    """A run whose loss goes through the compiler's tracing alone, across a validation and a start that continues it."""
    real, count = torch.nn.Module.compile, CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: real(self, backend=count, fullgraph=True, **kw))
    monkeypatch.setattr(train_seg, "EVAL_INTERVAL", 2)
    args = flags("--split", "25", "--draw", 1, "--protocol", "linear-frozen", "--backbone", "random", "--iterations", 4)
    train_seg.main([*args, "--out", str(tmp_path / "plain")])
    asked, answer = [], processes.Processes.any
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(processes.Processes, "any", lambda self, flag: asked.append(1) or len(asked) == 3
                  or answer(self, flag))
        train_seg.main([*args, "--compile", "--out", str(tmp_path / "compiled")])
    train_seg.main([*args, "--compile", "--out", str(tmp_path / "compiled")])
    plain, compiled = (tmp_path / x / "seg/random-linear-frozen-25-1" for x in ("plain", "compiled"))
    for name in ("validation.jsonl", "config.json"):
        assert (plain / name).read_text() == (compiled / name).read_text()
    assert untimed(plain) == untimed(compiled)
    assert count.frame_count == 1 and "compiled in" in capsys.readouterr().out
