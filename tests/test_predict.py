"""predict.py: the evaluation's own labels for anyone's CT, on the grid of its file; what is no CT is refused."""

import csv
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from torch.utils._python_dispatch import TorchDispatchMode

import train_seg
from ct import prepare, reading, tasks, volumes
from engine import backbones, distances, evaluate, figures, predict, runs
from segment import Segmenter
from views import resize


@pytest.fixture(scope="module")
def out(small_phantom, small_networks, tmp_path_factory):
    """A folder of runs with one finished segmentation run that keeps its validation predictions, and a stub."""
    out = tmp_path_factory.mktemp("predict")
    train_seg.main([str(a) for a in (
        "--data", small_phantom / "BTCV", "--store", small_phantom.parent / "seg", "--out", out, "--amp", "off",
        "--arch", "resnet_basic", "--backbone", "random", "--protocol", "linear-finetune", "--split", "25", "--draw",
        0, "--crop-size", 64, "--batch-size", 4, "--iterations", 6, "--save-predictions")])
    (out / "pretrained").mkdir()
    (out / "pretrained/config.json").write_text('{"arch": "resnet18", "data": "phantom"}')
    return out


RUN = "random-linear-finetune-25-0"


def image(small_phantom, case) -> Path:
    return small_phantom / f"BTCV/RawData/Training/img/img{case}.nii.gz"


def go(out, source):
    train_seg.main(["--predict", str(source), "--run", RUN, "--out", str(out)])


def labels(path):
    return np.asarray(nib.load(path).dataobj)


def test_a_prediction_is_the_evaluations_own_voxel_for_voxel(small_phantom, out):
    folder = out / "seg" / RUN / "predictions"
    kept = {name: labels(folder / name) for name in (f"img{case}.nii.gz" for case in tasks.cases("val"))}
    assert len(np.unique(np.concatenate([x.ravel() for x in kept.values()]))) > 1  # more than background
    shutil.rmtree(folder)
    go(out, small_phantom / "BTCV")  # a folder in BTCV's layout: all 30
    assert len(list(folder.glob("*.nii.gz"))) == 30
    for name, expected in kept.items():
        np.testing.assert_array_equal(labels(folder / name), expected)
    shutil.rmtree(folder)
    train_seg.main([str(a) for a in (  # a finished run that did not keep them
        "--data", small_phantom / "BTCV", "--store", small_phantom.parent / "seg", "--out", out, "--amp", "off",
        "--arch", "resnet_basic", "--backbone", "random", "--protocol", "linear-finetune", "--split", "25", "--draw",
        0, "--crop-size", 64, "--batch-size", 4, "--iterations", 6, "--save-predictions")])
    for name, expected in kept.items():
        np.testing.assert_array_equal(labels(folder / name), expected)


def test_the_csv_counts_what_the_files_hold(small_phantom, out):
    """dice.csv against the truth and prediction files, read as any other program would."""
    rows = list(csv.DictReader((out / "seg" / RUN / "dice.csv").open()))
    assert len(rows) == 6 * 14 and list(rows[0]) == list(evaluate.CASE_COLUMNS)
    for row in rows:
        c, case = int(row["organ id"]), row["case"]
        truth_file = nib.load(str(image(small_phantom, case)).replace("img", "label"))
        predicted, truth = labels(out / "seg" / RUN / f"predictions/img{case}.nii.gz") == c, labels(
            truth_file.get_filename()) == c
        assert row["organ"] == tasks.ORGANS[c]
        counted = [int((predicted & truth).sum()), int(predicted.sum()), int(truth.sum())]
        assert [int(row[k]) for k in ("intersection", "prediction", "truth")] == counted
        total = counted[1] + counted[2]
        assert row["dice"] == (f"{2 * counted[0] / total:.6f}" if total else "")
        distance = distances.hd95(predicted, truth, nib.affines.voxel_sizes(truth_file.affine))
        assert (row["hd95_mm"] == "") == (c == 0 or bool(np.isnan(distance)))
        assert row["hd95_mm"] == "" or float(row["hd95_mm"]) == pytest.approx(distance, abs=1e-3)
        voxels = 0 if np.isnan(distance) else distances.hd95(predicted, truth, (1, 1, 1))
        assert row["hd95_transunet_voxels"] == ("" if c == 0 else f"{voxels:.3f}")


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPL"])
def test_labels_lie_on_the_grid_of_the_file(small_phantom, out, tmp_path, axes):
    """The same patient stored along other axes, and oblique: the same label at the same place in the world."""
    source = nib.load(image(small_phantom, "0036"))
    data, affine = np.asarray(source.dataobj), source.affine
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    a = np.deg2rad(12) * (axes == "SPL")
    tilt = np.array([[1, 0, 0, 0], [0, np.cos(a), -np.sin(a), 0], [0, np.sin(a), np.cos(a), 0], [0, 0, 0, 1]])
    stored = nib.Nifti1Image(apply_orientation(data, turn), tilt @ affine @ inv_ornt_aff(turn, data.shape))
    nib.save(stored, tmp_path / f"{axes}.nii.gz")
    go(out, tmp_path / f"{axes}.nii.gz")
    written = nib.load(out / "seg" / RUN / f"predictions/{axes}.nii.gz")
    assert written.shape == stored.shape and written.get_data_dtype() == np.uint8
    np.testing.assert_allclose(written.affine, stored.affine, atol=1e-4)
    own = labels(out / "seg" / RUN / "predictions/img0036.nii.gz")
    assert own.any()
    np.testing.assert_array_equal(np.asarray(written.dataobj), apply_orientation(own, turn))


def make(kind, shape=(24, 20, 6)):
    rng = np.random.default_rng(0)
    kinds = {"constant": np.zeros(shape), "labels": rng.integers(0, 14, shape),
             "many labels": rng.integers(0, 118, shape), "unit": rng.random(shape),
             "deviation": rng.normal(size=shape), "no intercept": rng.integers(900, 1400, shape),
             "16 bit": rng.integers(0, 65536, shape),
             "raw": rng.choice([24, 924, 1069, 1300], shape, p=[0.4, 0.25, 0.3, 0.05]) + rng.normal(0, 9, shape)}
    kinds["raw"][rng.random(shape) < 0.2] = -2000  # beside air, fat, muscle and bone, each 1024 too high
    return kinds[kind].astype(np.float32)


@pytest.mark.parametrize("kind", ["constant", "labels", "many labels", "unit", "deviation", "no intercept", "16 bit",
                                  "raw"])
def test_what_is_no_ct_is_refused(out, tmp_path, refusal, kind):
    nib.save(nib.Nifti1Image(make(kind), np.eye(4)), tmp_path / "x.nii.gz")
    line = refusal(train_seg.main, ["--predict", tmp_path / "x.nii.gz", "--run", RUN, "--out", out])
    assert "x.nii.gz: no CT by its values" in line
    assert not (out / "seg" / RUN / "predictions/x.nii.gz").exists()


def test_other_bad_input_ends_in_one_line(small_phantom, out, tmp_path, refusal, capsys):
    def line(source, run):
        return refusal(train_seg.main, ["--predict", source, "--run", run, "--out", out])

    good = image(small_phantom, "0035")
    assert "--run nothing: no such run" in line(good, "nothing")
    assert "--run pretrained: a pre-training run" in line(good, "pretrained")
    assert "--run " in line(good, out / "pretrained") and "pre-training" in line(good, out / "pretrained")
    assert "none.nii.gz: no such file" in line(tmp_path / "none.nii.gz", RUN)
    assert "text.txt: not a NIfTI name" in line(_text(tmp_path), RUN)
    (tmp_path / "empty").mkdir()
    assert "no .nii or .nii.gz volumes" in line(tmp_path / "empty", RUN)
    assert "give both" in refusal(train_seg.main, ["--predict", good, "--out", out])
    assert "give both" in refusal(train_seg.main, ["--run", RUN, "--out", out])
    half = tmp_path / "half"
    shutil.copytree(out / "seg" / RUN, half)
    (half / "result.json").unlink()
    assert "not finished yet" in line(good, half)


def _text(tmp_path):
    (tmp_path / "text.txt").write_text("no volume")
    return tmp_path / "text.txt"


def test_one_bad_volume_of_a_folder_keeps_no_other_from_being_predicted(small_phantom, out, tmp_path, refusal):
    """By a path to the run; and two files of one name keep apart."""
    for part, case in (("a", "0037"), ("b", "0038")):
        (tmp_path / part).mkdir()
        shutil.copy(image(small_phantom, case), tmp_path / part / "ct.nii.gz")
    nib.save(nib.Nifti1Image(make("labels"), np.eye(4)), tmp_path / "organs.nii.gz")
    line = refusal(train_seg.main, ["--predict", tmp_path, "--run", out / "seg" / RUN])
    assert "organs.nii.gz: no CT" in line
    folder = out / "seg" / RUN / "predictions"
    for name, case in (("a__ct", "0037"), ("b__ct", "0038")):
        np.testing.assert_array_equal(labels(folder / f"{name}.nii.gz"), labels(folder / f"img{case}.nii.gz"))


def test_no_prediction_is_overwritten_by_another_volumes(small_phantom, out, tmp_path, refusal, capsys):
    def argv(source, *more):
        return ["--predict", source, "--run", RUN, "--out", out, *more]

    def predict_(*given):
        train_seg.main([str(a) for a in argv(*given)])

    for part, case in (("s0000", "0037"), ("s0001", "0038")):
        (tmp_path / part).mkdir()
        shutil.copy(image(small_phantom, case), tmp_path / part / "scan.nii.gz")
    first, second = tmp_path / "s0000/scan.nii.gz", tmp_path / "s0001/scan.nii.gz"
    predict_(first)
    path = out / "seg" / RUN / "predictions/scan.nii.gz"
    written = path.read_bytes()
    line = refusal(train_seg.main, argv(second))
    assert all(str(x) in line for x in (path, first, second, "--predict-out")) and path.read_bytes() == written
    assert "none.nii.gz: no such file" in refusal(train_seg.main, argv(tmp_path / "none.nii.gz"))
    (tmp_path / "gone").mkdir()
    assert "gone/scan.nii.gz: no such file" in refusal(train_seg.main, argv(tmp_path / "gone/scan.nii.gz"))
    predict_(first)  # its own: again
    (tmp_path / "moved").mkdir()
    first.rename(tmp_path / "moved/scan.nii.gz")
    predict_(tmp_path / "moved/scan.nii.gz")
    predict_(second, "--predict-out", tmp_path / "deep/out")
    assert (tmp_path / "deep/out/scan.nii.gz").exists() and labels(path).any()
    ours = {p.name for p in (tmp_path / "deep/out").iterdir()}
    assert ours == {"scan.nii.gz", "sources.jsonl", "volumes.csv"}  # and no picture in tests
    # the CT itself least of all, and no file that is not known
    ct = second.read_bytes()
    line = refusal(train_seg.main, argv(tmp_path / "s0001", "--predict-out", tmp_path / "s0001"))
    assert "no known volume" in line and second.read_bytes() == ct and len(list(second.parent.iterdir())) == 1
    assert "give both" in refusal(train_seg.main, ["--predict-out", tmp_path, "--out", out])
    (tmp_path / "file").write_text("")
    line = refusal(train_seg.main, argv(second, "--predict-out", tmp_path / "file"))
    assert "file/scan.nii.gz: cannot be written" in line and "give --predict-out FOLDER" in line
    (tmp_path / "closed/sources.jsonl").mkdir(parents=True)  # stands for a run's folder that may not be written
    line = refusal(train_seg.main, argv(second, "--predict-out", tmp_path / "closed"))
    assert "sources.jsonl: cannot be written" in line and "give --predict-out FOLDER" in line and "--out," not in line


def test_each_volume_of_a_folder_has_a_prediction_of_its_own_name(tmp_path):
    """a__ct in one place is not ct in the folder a of another."""
    for name in ("a/ct", "b/ct", "c/a__ct"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(make("unit"), np.eye(4)), tmp_path / f"{name}.nii.gz")
    found, _ = predict.find_volumes(tmp_path)
    assert sorted(found) == ["a__ct", "b__ct", "c__a__ct"] and len(set(found.values())) == 3


def test_the_gate_of_training_is_that_of_predicting(small_phantom, out, tmp_path, capsys):
    """Labels are left out, what cannot be opened is an error, warnings are printed: as `audit` has it."""
    source = nib.load(image(small_phantom, "0037"))
    for name, low in (("ct/images/a.nii.gz", 0), ("ct/labels/a.nii.gz", 0), ("ct/b.nii.gz", -1000)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.clip(source.dataobj, low, 255).astype(np.int16), source.affine), tmp_path / name)
    (tmp_path / "ct/gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "ct/c.mha").touch()
    with pytest.raises(SystemExit) as caught:
        go(out, tmp_path / "ct")
    told, err = capsys.readouterr()
    assert caught.value.code == 1 and len(err.strip().splitlines()) == 2
    assert "ct/gone: a broken link" in err and "1 files of another format" in err and "c.mha" in err
    assert "left out, no images by their names: 1 " in told and "labels/a.nii.gz" in told
    assert told.index("images/a.nii.gz: HU from 0 to 255 only, never under -200") < told.index("predictions/a.nii.gz")
    assert "warning: " in told and "warnings: 1, printed above" in told and "predictions/b.nii.gz" in told


def test_predicting_takes_no_random_number_and_leaves_the_mode():
    model = Segmenter(backbones.architecture("resnet18"), "linear-frozen")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    levels = np.random.default_rng(0).integers(0, 256, (9, 40, 33)).astype(np.uint8)
    first = predict.volume(model, levels, 64, "off", torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before) and [m.training for m in model.modules()] == modes
    assert first.shape == levels.shape and first.dtype == np.uint8
    model.eval()
    np.testing.assert_array_equal(predict.volume(model, levels, 64, "off", torch.device("cpu")), first)
    assert not model.training


def test_volumes_in_ml_are_voxels_times_their_size(tmp_path, capsys):
    """By hand: a voxel of 0.5 x 0.8 x 5 mm holds 2 cubic mm, whatever the axis of the slices, sheared or not."""
    task = tasks.of("own", {0: "background", 3: "liver", 700: "tumour"}, tmp_path)
    flat, turned, sheared = np.diag([0.5, 0.8, 5, 1]), np.zeros((4, 4)), np.diag([1.0, 1, 2, 1])
    turned[[2, 0, 1, 3], [0, 1, 2, 3]] = [5, 0.5, 0.8, 1]
    sheared[1, 2] = 1.5  # a tilted gantry: slices move aside, which changes no volume
    for name, affine, shape in (("flat", flat, (40, 30, 6)), ("turned", turned, (6, 40, 30)),
                                ("sheared", sheared, (40, 30, 6))):
        nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), affine), tmp_path / f"{name}.nii.gz")
        labels = np.zeros((6, 30, 40), np.uint8)  # (Z, Y, X)
        labels[1:3, :10, :25] = 1  # 500 voxels
        labels[5, 29, :3] = 2
        read = volumes.read_volume(tmp_path / f"{name}.nii.gz")
        predict.write(tmp_path / "out", name, labels, read, task)
    written = predict.write_volumes(tmp_path / "out")
    assert written == tmp_path / "out/volumes.csv"
    rows = [tuple(row.values()) for row in csv.DictReader(written.open())]
    assert rows == [(name, *of) for name in ("flat", "turned", "sheared") for of in (
        ("3", "liver", "1.000"), ("700", "tumour", "0.006"))]
    # once more: the newest counts; a prediction of an older commit, whose ml are not known, is left out, and said
    predict.write(tmp_path / "out", "flat", labels * 0, volumes.read_volume(tmp_path / "flat.nii.gz"), task)
    runs.append(tmp_path / "out/sources.jsonl", [{"prediction": "old", "volume": "/x", "labels": {"0": "background"}}])
    assert not capsys.readouterr().err
    rows = [tuple(row.values()) for row in csv.DictReader(predict.write_volumes(tmp_path / "out").open())]
    assert "leaves out 1 prediction of an older version, which kept no ml (old); predict" in capsys.readouterr().err
    assert [r for r in rows if r[0] == "flat"] == [("flat", "3", "liver", "0.000"), ("flat", "700", "tumour", "0.000")]
    assert len(rows) == 6


@pytest.mark.parametrize("saved, asked, used", [
    ("bf16", "auto", "bf16"), ("off", "auto", "off"), ("fp16", "auto", "off"), ("off", "bf16", "bf16"),
    ("bf16", "off", "off")])
def test_a_run_predicts_in_its_own_precision(out, tmp_path, saved, asked, used):
    """On a CPU, which has no fp16, in float32 where that was the run's."""
    shutil.copy(out / "seg" / RUN / "config.json", tmp_path / "config.json")
    torch.save(torch.load(out / "seg" / RUN / "checkpoint.pt", weights_only=True) | {"amp": saved},
               tmp_path / "checkpoint.pt")
    assert predict.load(tmp_path, asked, torch.device("cpu"))[2] == used


@pytest.mark.pictures
def test_a_prediction_leaves_its_picture_and_the_volumes_that_its_file_holds(small_phantom, out, tmp_path, capsys):
    source = image(small_phantom, "0037")
    train_seg.main(["--predict", str(source), "--run", RUN, "--out", str(out), "--predict-out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {"img0037.nii.gz", "img0037-overlay.png", "sources.jsonl",
                                                    "volumes.csv"}
    assert (tmp_path / "img0037-overlay.png").stat().st_size > 10_000
    assert f"volumes in ml: {tmp_path / 'volumes.csv'}" in capsys.readouterr().out
    written = nib.load(tmp_path / "img0037.nii.gz")
    voxel = np.prod(nib.affines.voxel_sizes(written.affine)) / 1000
    rows = {int(r["class id"]): r for r in csv.DictReader((tmp_path / "volumes.csv").open())}
    assert {c: r["class"] for c, r in rows.items()} == dict(enumerate(tasks.ORGANS[1:], 1))
    for c, row in rows.items():
        assert float(row["ml"]) == pytest.approx((labels(tmp_path / "img0037.nii.gz") == c).sum() * voxel, abs=1e-3)


@pytest.mark.pictures
def test_without_matplotlib_a_prediction_has_its_files(small_phantom, out, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figures._tell_once.cache_clear()
    train_seg.main(["--predict", str(image(small_phantom, "0037")), "--run", RUN, "--out", str(out), "--predict-out",
                    str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {"img0037.nii.gz", "sources.jsonl", "volumes.csv"}
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pictures need matplotlib" in err


@pytest.mark.parametrize("held, expected", [([], [0, 2, 4, 5, 7, 9]), ([3], [3]), (range(2, 10), [2, 3, 5, 6, 8, 9]),
                                            ([1, 4, 9], [1, 4, 9])])
def test_slices_to_look_at_are_spread_over_those_that_hold_a_class(held, expected):
    levels, found = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((4, 4), np.uint8), np.zeros((10, 4, 4))
    found[list(held), 1, 2] = 5
    rows = predict.spread(levels, found.astype(np.uint8))
    assert [caption for caption, *_ in rows] == [f"slice {z}" for z in expected]
    assert [int(shown[0, 0]) for _, shown, _ in rows] == expected  # its own slice
    assert all((truth == found[z]).all() for z, (_, _, truth) in zip(expected, rows, strict=True))


class Largest(TorchDispatchMode):
    """The most elements that the result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out])
                                             if isinstance(x, torch.Tensor)), 0)
        return out


def at_once(model, images, side):
    """The labels as argmax over all logits at full size gives them."""
    logits = model(resize.whole(images, side).contiguous(memory_format=torch.channels_last))
    return torch.nn.functional.interpolate(logits, images.shape[1:], mode="bilinear").argmax(1).to(torch.uint8)


# after parts of 16 a rest of 0, 1, 3, 4, 9, 15
@pytest.mark.parametrize("classes", [2, 14, 16, 17, 19, 20, 33, 105, 255])
@pytest.mark.parametrize("size", [(45, 70), (80, 64)])
@torch.no_grad()
def test_labels_part_by_part_are_those_of_all_logits_at_once(monkeypatch, size, classes):
    """Every twentieth class has equal logits, so that a bit decides: the first of them wins, as of argmax."""
    model, seen = Segmenter(backbones.architecture("resnet18"), "linear-frozen", classes).eval(), Largest()
    images = torch.randint(0, 256, (2, *size), dtype=torch.uint8)
    monkeypatch.setattr(model, "features", lambda _: None)
    for logits in (torch.randn(2, 20, 8, 10).repeat(1, 13, 1, 1)[:, :classes], torch.zeros(2, classes, 8, 10)):
        logits = logits.contiguous(memory_format=torch.channels_last)
        monkeypatch.setattr(model, "coarse", lambda _, logits=logits: logits)
        expected = at_once(model, images, 64)
        with seen:
            labels = predict.slices(model, images, 64, "off")
        assert labels.dtype == torch.uint8 and torch.equal(labels, expected)
    assert not labels.any() and seen.elements <= min(max(classes, 3), 19) * 2 * 64 * 100  # 3: the channels of images


@pytest.mark.parametrize("classes", [14, 105])
@pytest.mark.parametrize("protocol", ["linear-frozen", "deeplabv3plus"])
@torch.no_grad()
def test_labels_of_a_whole_model_are_those_of_all_its_logits(protocol, classes):
    model = Segmenter(backbones.architecture("resnet18"), protocol, classes).eval()
    model = model.to(memory_format=torch.channels_last)
    torch.nn.init.normal_([m for m in model.decode_head.modules() if isinstance(m, torch.nn.Conv2d)][-1].weight)
    images = torch.randint(0, 256, (2, 45, 70), dtype=torch.uint8)
    for amp in ("off", "bf16"):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            expected = at_once(model, images, 64)
        assert torch.equal(predict.slices(model, images, 64, amp), expected) and expected.any()


def test_real_ct_is_accepted(real_ct, tmp_path):
    for name in ("nifti/example_ct_sm.nii.gz", "nifti/aorta_ct.nii.gz", "BTCV/RawData/Training/img/img0035.nii.gz"):
        read, levels, _, _ = reading.read_ct(real_ct / name, prepare.WINDOW)
        assert isinstance(read, volumes.Volume) and levels.shape == read.hu.shape
    with pytest.raises(volumes.BadInput, match="no CT by its values"):
        reading.read_ct(real_ct / "nifti/example_ct_sm_label.nii.gz", prepare.WINDOW)
