"""train_seg.py through its own command: the three protocols, exact continuing, results, tables."""

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import augment
import datasets
import runtime
import svd_spectrum
import train_seg
import train_ssl
from segment import Segmenter


@pytest.fixture(scope="module")
def runs(small_phantom):
    """A folder of runs with one pre-trained backbone, whitened, of two steps."""
    out = small_phantom.parent / "runs"
    data, store = small_phantom / "AbdomenCT-1K", small_phantom.parent / "store"
    train_ssl.main([str(a) for a in ("--data", data, "--store", store, "--out", out, "--image-size", 64, "--amp", "off",
                                     "--batch-size", 8, "--bn-group", 4, "--queue", 32, "--zca-group", 16, "--local",
                                     "--zca", "--steps", 2)])
    return out


@pytest.fixture
def flags(small_phantom, runs):
    def make(*more, out=runs):
        data, store = small_phantom / "BTCV", small_phantom.parent / "seg"
        return [str(a) for a in ("--data", data, "--store", store, "--out", out, "--amp", "off", "--crop-size", 64,
                                 "--batch-size", 2, *more)]

    return make


def test_three_protocols_leave_results_and_are_skipped_when_done(flags, runs, capsys):
    train_seg.main(flags("--split", "12.5", "--draw", 1, "--iterations", 2))
    first = capsys.readouterr().out
    assert "PHANTOM" in first and "| 12.5 % | Ours: both |" in first
    lines = [json.loads(x) for x in (runs / "results.jsonl").read_text().splitlines()]
    assert [x["protocol"] for x in lines] == ["linear-frozen", "linear-finetune", "deeplabv3plus"]
    for x in lines:
        assert x["data"] == "phantom" and x["cases"] == datasets.cases("12.5", 1) and len(x["organs"]) == 13
        defined = [o for o in x["organs"] if o is not None]
        assert x["mDS"] == pytest.approx(statistics.fmean(defined))
        assert x["whitening"] == ("fold" if x["protocol"] == "linear-frozen" else "bn")
    train_seg.main(flags("--split", "12.5", "--draw", 1, "--iterations", 2))
    assert capsys.readouterr().out.count("done before") == 3
    assert len((runs / "results.jsonl").read_text().splitlines()) == 3


def test_frozen_means_frozen(flags, runs):
    train_seg.main(flags("--split", "25", "--draw", 0, "--iterations", 3, "--protocol", "linear-frozen"))
    state = torch.load(runs / "seg/phantom-moco-local-zca-linear-frozen-25-0/checkpoint.pt", weights_only=True)
    exported = torch.load(runs / "phantom-moco-local-zca/backbone.pth", weights_only=True)
    for name, weight in exported.items():  # parameters and buffers, the whitening folded
        assert torch.equal(state["model"][f"backbone.{name}"], weight), name


def test_stopped_and_continued_is_never_stopped(flags, tmp_path, monkeypatch):
    """Stopped by a signal after iteration 2 of 4, dropout and all."""
    def args(out):
        return [*flags("--split", "25", "--draw", 1, "--protocol", "deeplabv3plus", "--backbone", "random",
                       "--iterations", 4), "--out", str(out)]

    train_seg.main(args(tmp_path / "b"))
    real, asked = runtime.Processes.any, []
    monkeypatch.setattr(runtime.Processes, "any", lambda self, flag: asked.append(1) or len(asked) == 2
                        or real(self, flag))
    with pytest.raises(SystemExit):
        train_seg.main(args(tmp_path / "a"))
    train_seg.main(args(tmp_path / "a"))
    a, b = (tmp_path / x / "seg" / "random-deeplabv3plus-25-1" for x in "ab")
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    x, y = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (a, b))
    for name in x["model"]:
        assert torch.equal(x["model"][name], y["model"][name]), name
    x, y = (json.loads((f / "result.json").read_text()) for f in (a, b))
    assert x["organs"] == y["organs"]


def test_poly_schedule_and_crops_of_an_iteration(flags, small_phantom):
    args = train_seg.parse(flags("--split", "100", "--iterations", 100))
    train_seg.settle(args, False)
    assert args.lr == 0.01
    for t in (0, 37, 99):
        assert train_seg.lr(t, args) == pytest.approx(0.0099 * (1 - t / 100) ** 0.9 + 1e-4)
    store = datasets.prepare(small_phantom / "BTCV", small_phantom.parent / "seg", "segment")
    slices = store.of(datasets.cases("12.5", 0))
    whole = train_seg.Crops(args, store, slices, runtime.Processes(0, 1, torch.device("cpu")))
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
    images, masks = augment.apply_crops([label * 20], [label], params, size)
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
    flipped = augment.apply_crops([label * 20], [label], params | {"flip": np.array([True])}, size)[1]
    assert torch.equal(flipped[0, :shown, :shown], masks[0, :shown, :shown].flip(1))


def test_prediction_is_made_at_the_masks_own_resolution():
    torch.manual_seed(0)
    model = Segmenter(runtime.build_backbone("random", "resnet18"), "linear-finetune").eval()
    images = torch.randint(0, 256, (2, 50, 70), dtype=torch.uint8)
    labels = train_seg.predict(model, images, 64, "off")
    resized = torch.nn.functional.interpolate(images[:, None] / 255, (64, round(70 * 64 / 50)), mode="bilinear",
                                              antialias=True)
    logits = model(augment.normalise(resized))
    expected = torch.nn.functional.interpolate(logits, (50, 70), mode="bilinear").argmax(1)
    assert labels.dtype == torch.uint8 and torch.equal(labels.long(), expected)


def test_report_states_mean_deviation_and_what_was_not_run(tmp_path, capsys):
    def result(split, draw, mds, backbone="moco", data="BTCV"):
        return {"data": data, "split": split, "draw": draw, "backbone": backbone, "protocol": "linear-finetune",
                "mDS": mds}

    rows = [result("12.5", d, m) for d, m in enumerate((0.40, 0.46, 0.43))] + [result("25", 0, 0.5),
            result("25", 0, 0.6), result("100", 0, 0.7, "mine"), result("100", 0, 0.1, "phantom-moco", "phantom")]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train_seg.main(["--report", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| 46.04 ± 4.37 | 43.00 ± 3.00 |" in out  # the paper's, ours
    assert "| 66.17 ± 6.16 | 60.00 (n = 1) |" in out  # the newest of two counts
    assert "- mine, linear-finetune, 100 %, draw 0: 70.00" in out and "not run" in out
    assert "| 78.21 | 10.00 |" in out and "not BTCV results" in out
    assert len(re.findall(r"^Table 1", out, re.M)) == 2  # phantom and real never share a table


def test_spectrum_command(flags, runs, small_phantom, capsys):
    svd_spectrum.main(["--data", str(small_phantom / "BTCV"), "--store", str(small_phantom.parent / "seg"), "--out",
                       str(runs), "--image-size", "64"])
    assert "effective rank" in capsys.readouterr().out
    assert (runs / "spectrum.png").stat().st_size > 10_000
    header, row = (runs / "spectrum.csv").read_text().splitlines()
    assert row.split(",")[:2] == ["phantom-moco-local-zca", "phantom"] and len(row.split(",")) == 4 + 512


def test_bad_input_ends_in_one_line(flags, runs, tmp_path, refusal, small_phantom):
    def line(*more):
        return refusal(train_seg.main, flags(*more))

    assert "--split 50: no such split" in line("--split", "50")
    assert "--draw 3: split 25 has draws 0 to 2" in line("--split", "25", "--draw", 3)
    assert "--split is missing" in line()
    assert "--backbone moco-nope: no such run" in line("--split", "25", "--backbone", "moco-nope")
    assert "batch-size 1" in line("--split", "25", "--batch-size", 1)
    torch.save({"a": 1}, tmp_path / "x.pth")
    assert "x.pth: not a backbone of architecture resnet18" in line("--split", "25", "--backbone", tmp_path / "x.pth")
    assert "no results yet" in refusal(train_seg.main, ["--report", "--out", tmp_path])
    assert "no such run" in refusal(svd_spectrum.main, [*flags()[:6], "nothing"])
    assert not list((runs / "seg").glob("x-*"))  # nothing half-begun stays behind
    # a case of the split is missing
    lone = tmp_path / "BTCV/RawData/Training"
    for part in ("img", "label"):
        (lone / part).mkdir(parents=True)
        for p in (small_phantom / "BTCV/RawData/Training" / part).glob("*00[0-9][0-9].nii.gz"):
            if "0037" not in p.name:
                (lone / part / p.name).symlink_to(p)
    assert "case 0037 is missing" in line("--split", "25", "--data", tmp_path / "BTCV", "--store", tmp_path / "s")


def test_phantom_backbones_meet_only_phantom_segmentation(flags, runs, tmp_path, refusal, real_ct):
    line = refusal(train_seg.main, ["--data", real_ct / "BTCV", "--store", tmp_path, "--out", runs, "--split", "100",
                                    "--backbone", "phantom-moco-local-zca", "--arch", "resnet18", "--crop-size", 64])
    assert "measured on the phantom only" in line


def test_results_name_what_they_were_made_from(runs):
    for line in (runs / "results.jsonl").read_text().splitlines():
        assert {"seed", "commit", "hardware", "date", "wall_s", "iterations", "lr"} <= json.loads(line).keys()
    assert Path(runs / "seg").is_dir()
