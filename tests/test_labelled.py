"""Anyone's labelled CT through the public commands: from a layout's files to tables, pictures and predictions."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

import svd_spectrum
import train_seg
from ct import phantom
from ct.tasks import BTCV
from engine import runs

SHAPE = (4, 64, 64)

pytestmark = pytest.mark.usefixtures("small_networks")


def flags(data, out, *more):
    return [str(a) for a in ("--data", data, "--store", out / "store" / data.name, "--out", out, "--amp", "off",
                             "--arch", "resnet_basic", "--backbone", "random", "--crop-size", 64, "--batch-size", 2,
                             "--iterations", 2, *more)]


@pytest.fixture(scope="module")
def msd(tmp_path_factory):
    """All patients of the phantom as the Medical Segmentation Decathlon stores them."""
    folder = tmp_path_factory.mktemp("labelled") / "Task60_Phantom"
    phantom.write(folder, unlabelled=0, shape=SHAPE, layout="msd")
    return folder


def test_a_layout_changes_no_number(msd, small_phantom, tmp_path):
    """The same patients and split as MSD and as BTCV have them: equal counts, distances and results."""
    splits = tmp_path / "a" / "store" / msd.name / "splits"
    splits.mkdir(parents=True)
    for path in BTCV.folder.glob("btcv_*.txt"):
        shutil.copy(path, splits / path.name.replace("btcv", "task60_phantom"))
    found = []
    for data, out, suffix in ((msd, tmp_path / "a", "-task60_phantom"), (small_phantom / "BTCV", tmp_path / "b", "")):
        protocols = ("linear-frozen", "linear-finetune") if suffix else ("linear-finetune", "linear-frozen")
        for protocol in protocols:
            train_seg.main(flags(data, out, "--split", "25", "--draw", 1, "--protocol", protocol))
        folders = [out / "seg" / f"random-{p}-25-1{suffix}" for p in sorted(protocols)]
        results = [json.loads((f / "result.json").read_text()) for f in folders]
        found.append(([(f / "dice.csv").read_text() for f in folders],
                      [{k: v for k, v in r.items() if k.startswith(("mD", "per_", "hd95", "organs", "cases"))}
                       for r in results]))
    assert found[0] == found[1] and len(found[0][1][0]) > 8
    assert "labels" in json.loads((tmp_path / "a/seg/random-linear-frozen-25-1-task60_phantom/config.json").read_text())
    assert "labels" not in json.loads((tmp_path / "b/seg/random-linear-frozen-25-1/config.json").read_text())


@pytest.mark.pictures
def test_its_own_splits_tables_pictures_and_spectrum(msd, tmp_path, capsys):
    argv = flags(msd, tmp_path, "--split", "12.5", "--draw", 0, "--val", 0.1, "--protocol", "linear-frozen",
                 "--eval-every", 1)
    train_seg.main(argv)
    told = capsys.readouterr().out
    splits = tmp_path / "store" / msd.name / "splits"
    val, train = ((splits / f"task60_phantom_{x}.txt").read_text().split() for x in ("val", "train"))
    assert len(val) == 3 and len(train) == 27 and not {*val} & {*train}
    run = tmp_path / "seg" / "random-linear-frozen-12.5-0-task60_phantom"
    result = json.loads((run / "result.json").read_text())
    assert len(result["cases"]) == 4 and {*result["cases"]} <= {*train}
    assert {line.split(",")[0] for line in (run / "dice.csv").read_text().splitlines()[1:]} == {*val}
    assert (run / "overlays.png").exists() and "13 classes and background: logits and loss take 1 MB" in told
    assert [r["step"] for r in runs.read_log(run / "validation.jsonl")] == [1, 2]
    # with the files there, without --val: the same; with another share: refused
    train_seg.main([a for a in argv if a not in ("--val", "0.1")])
    assert "done before" in capsys.readouterr().out
    svd_spectrum.main([str(a) for a in ("random", "--data", msd, "--store", tmp_path / "store" / msd.name, "--out",
                                        tmp_path, "--arch", "resnet_basic")])
    assert f"{4 * len(val)} vectors" in capsys.readouterr().out and (tmp_path / "spectrum.csv").exists()


def test_other_splits_than_those_drawn_are_refused(msd, tmp_path, refusal):
    argv = flags(msd, tmp_path, "--split", "25", "--protocol", "linear-frozen")
    train_seg.main([*argv, "--draw", "0"])
    assert "task60_phantom_val.txt" in refusal(train_seg.main, [*argv, "--val", 0.5])


@pytest.fixture(scope="module")
def two_organs(msd, tmp_path_factory):
    """Two folders and no JSON; spleen and liver only, under the ids 3 and 200, and one patient without either."""
    folder = tmp_path_factory.mktemp("own") / "Own"
    (folder / "images").mkdir(parents=True), (folder / "labels").mkdir()
    for i in range(1, 11):
        shutil.copy(msd / "imagesTr" / f"{i:04d}.nii.gz", folder / "images" / f"{i:04d}_0000.nii.gz")
        image = nib.load(msd / "labelsTr" / f"{i:04d}.nii.gz")
        labels = np.asarray(image.dataobj)
        own = np.select([labels == 1, labels == 6], [3, 200]).astype(np.uint8) * (i != 4)
        nib.save(nib.Nifti1Image(own, image.affine, image.header), folder / "labels" / f"{i:04d}.nii.gz")
    (folder / "names.txt").write_text("0 background\n3 spleen\n200 liver\n")
    return folder


def test_ids_are_those_of_the_files_again_in_predictions(two_organs, tmp_path, capsys):
    more = ("--split", "100", "--protocol", "linear-frozen", "--labels", two_organs / "names.txt")
    train_seg.main(flags(two_organs, tmp_path, *more, "--save-predictions"))
    assert "Mean Dice over 2 classes" in (tmp_path / "report.md").read_text()
    run = tmp_path / "seg" / "random-linear-frozen-100-0-own"
    assert len(json.loads((run / "result.json").read_text())["organs"]) == 2
    assert {tuple(line.split(",")[1:3]) for line in (run / "dice.csv").read_text().splitlines()[1:]} == {
        ("0", "background"), ("3", "spleen"), ("200", "liver")}
    written = sorted((run / "predictions").glob("*.nii.gz"))
    val = (tmp_path / "store/Own/splits/own_val.txt").read_text().split()
    assert [p.name.removesuffix(".nii.gz") for p in written] == val
    found = np.unique(np.concatenate([np.asarray(nib.load(p).dataobj).ravel() for p in written]))
    assert {*found.tolist()} <= {0, 3, 200} and len(found) > 1
    sources = runs.read_log(run / "predictions" / "sources.jsonl")
    assert all(s["labels"] == {"0": "background", "3": "spleen", "200": "liver"} for s in sources)
    # by --predict, from the run alone: the same voxels
    case = written[0].name.removesuffix(".nii.gz")
    train_seg.main(["--predict", str(two_organs / "images" / f"{case}_0000.nii.gz"), "--run", run.name, "--out",
                    str(tmp_path), "--predict-out", str(tmp_path / "again"), "--amp", "off"])
    again = np.asarray(nib.load(tmp_path / "again" / f"{case}_0000.nii.gz").dataobj)
    np.testing.assert_array_equal(again, np.asarray(nib.load(written[0]).dataobj))


def test_without_names_ids_are_found_and_other_choices_are_other_tables(two_organs, tmp_path, capsys):
    argv = flags(two_organs, tmp_path, "--split", "100", "--protocol", "linear-frozen")
    train_seg.main(argv)
    assert json.loads((tmp_path / "seg/random-linear-frozen-100-0-own/config.json").read_text())["labels"] == {
        "0": "background", "3": "label 3", "200": "label 200"}
    train_seg.main([*argv, "--labels", str(two_organs / "names.txt"), "--overwrite"])
    capsys.readouterr()
    train_seg.main(["--report", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert told.count("label 3, label 200. Mean Dice") == told.count("spleen, liver. Mean Dice") == 1


@pytest.mark.pictures
def test_one_organ_and_104(msd, tmp_path):
    """The names of a dataset.json decide how many classes there are, however many of them occur."""
    for count in (1, 104):
        data = tmp_path / f"T{count}"
        shutil.copytree(msd, data)
        told = json.loads((data / "dataset.json").read_text())
        told["labels"] = {"0": "background", **{str(i): f"organ {i}" for i in range(1, count + 1)}}
        (data / "dataset.json").write_text(json.dumps(told))
        if count == 1:
            for path in (data / "labelsTr").iterdir():
                image = nib.load(path)
                nib.save(nib.Nifti1Image(np.asarray(image.dataobj) == 6, image.affine, image.header,
                                         dtype=np.uint8), path)
        train_seg.main(flags(data, tmp_path, "--split", "25", "--draw", 2, "--protocol", "linear-finetune"))
        run = tmp_path / "seg" / f"random-linear-finetune-25-2-t{count}"
        assert len(json.loads((run / "result.json").read_text())["organs"]) == count and (run / "overlays.png").exists()
    train_seg.main(["--report", "--out", str(tmp_path)])
    assert (tmp_path / "report.png").exists()


def test_btcvs_splits_stay_as_they_are(small_phantom, tmp_path, refusal):
    before = {p.name: p.read_bytes() for p in BTCV.folder.iterdir()}
    argv = flags(small_phantom / "BTCV", tmp_path, "--split", "25", "--draw", 0, "--protocol", "linear-frozen")
    line = refusal(train_seg.main, [*argv, "--val", 0.5])
    assert "btcv_val.txt" in line
    train_seg.main(argv)
    assert {p.name: p.read_bytes() for p in BTCV.folder.iterdir()} == before
