"""coverage.py: organs that a mean must leave out, organs that one side of a split lacks, sets labelled by halves."""

import json

import nibabel as nib
import numpy as np
import pytest

import train_seg
from ct import coverage, phantom, tasks
from ct.tasks import BTCV
from ct.volumes import BadInput

LABELS = {0: "background", 1: "liver", 5: "spleen", 7: "label 7"}


def drawn(tmp_path, voxels, val):
    """A task of LABELS and the records of its volumes: {id: voxels of liver, spleen and label 7}; `val` validates."""
    task = tasks.of("mine", LABELS, tmp_path / "splits")
    (tmp_path / "cases").write_text("\n".join(val))
    tasks.draw_splits(task, voxels, val_cases=tmp_path / "cases")
    return [{"id": i, "voxels": [99, *counts]} for i, counts in voxels.items()], task


PLAIN = {f"p{i}": (500, 80, 0) for i in range(8)}


@pytest.mark.parametrize("change, left, told", [
    ({}, set(), []),
    ({"p7": (500, 80, 1)}, {3}, ["label 7: nothing to train on, 1 voxel in 1 volume (p7) to validate on; the mean Dice "
                                 "leaves it out"]),
    ({"p7": (500, 80, 3000)}, {3}, ["label 7: nothing to train on, 3,000 voxels in 1 volume (p7) to validate on; the "
                                    "mean Dice leaves it out"]),
    ({"p7": (500, 80, 3000), "p1": (500, 80, 2), "p2": (500, 80, 7)}, {3},
     ["label 7: 9 voxels in 2 volumes (p1, p2) to train on, 3,000 voxels in 1 volume (p7) to validate on; the mean "
      "Dice leaves it out"]),
    ({"p7": (500, 0, 0), "p6": (500, 2, 0)}, {2}, ["spleen: 480 voxels in 6 volumes (p0, p1, p2 ... 6 in all) to train "
                                                   "on, 2 voxels in 1 volume (p6) to validate on; the mean Dice leaves "
                                                   "it out"]),
    ({"p1": (500, 80, 1)}, set(), ["label 7: 1 voxel in 1 volume (p1) in all (a slip, a wrong id?)",
                                   "no validation volume has: label 7; this is not measured"]),
    ({"p6": (500, 0, 0), "p7": (500, 0, 0)}, set(), ["no validation volume has: spleen; this is not measured"])])
def test_what_a_mean_leaves_out_is_named(tmp_path, change, left, told):
    volumes, task = drawn(tmp_path, PLAIN | change, ["p6", "p7"])
    assert set(coverage.uncounted(volumes, task)) == left
    assert [line for line in coverage.remarks(volumes, task) if "in some of" not in line] == told


def test_an_organ_that_a_draw_lacks_is_counted_and_told(tmp_path):
    volumes, task = drawn(tmp_path, PLAIN | {"p6": (500, 80, 60), "p0": (500, 80, 60)}, ["p6", "p7"])
    task.file("25", 1).write_text("p1\np2\n")
    task.file("25", 2).write_text("p0\np2\n")
    lines = [line for line in coverage.remarks(volumes, task, "25", [1, 2]) if "in some of" not in line]
    assert lines == ["no training volume of 25 %, draw 1, has: label 7; this counts as 0 in the mean Dice"]
    assert coverage.uncounted(volumes, task) == {}


def test_one_organ_that_is_too_small_is_counted(tmp_path):
    volumes, task = drawn(tmp_path, {f"p{i}": (1, 0, 0) for i in range(8)}, ["p6", "p7"])
    assert coverage.uncounted(volumes, task) == {}  # there would be no mean


def test_sets_that_were_labelled_by_halves(tmp_path):
    """Liver in one half, spleen and label 7 in the other: both told, as what is trained."""
    halves = {f"a{i}": (500, 0, 0) for i in range(5)} | {f"b{i}": (0, 80, 60) for i in range(4)} | {"c": (0, 0, 0)}
    task = tasks.of("mine", LABELS, tmp_path / "nowhere")
    assert coverage.remarks([{"id": i, "voxels": [99, *v]} for i, v in halves.items()], task) == [
        "labelled in some of the volumes only: liver in 5 of 10, spleen in 4 of 10, label 7 in 4 of 10; elsewhere they "
        "are background, in training and in the Dice",
        "2 sets of volumes have no organ in common; were they merged? liver in 5 (a0, a1 ... 5 in all); spleen, "
        "label 7 in 4 (b0, b1 ... 4 in all)"]
    # one organ in all, the other in half of the cases
    half = {f"a{i}": (500, 0, 0) for i in range(5)} | {f"b{i}": (500, 80, 0) for i in range(5)}
    lines = coverage.remarks([{"id": i, "voxels": [99, *v]} for i, v in half.items()], task)
    assert len(lines) == 1 and "spleen in 5 of 10;" in lines[0]
    few = {f"a{i}": (500, 80, 0) for i in range(9)} | {"b": (500, 0, 0)}  # one spleen was taken out: no reason to speak
    assert coverage.remarks([{"id": i, "voxels": [99, *v]} for i, v in few.items()], task) == []


def test_the_phantom_gives_no_alarm():
    """One patient of it has all organs, each in hundreds of voxels, at the size that is built in."""
    volumes = [{"id": i, "voxels": [10**6, *[122] * 13]} for i in (*BTCV.cases("100"), *BTCV.cases("val"))]
    assert coverage.remarks(volumes, BTCV, "12.5", range(3)) == []


def test_a_stray_voxel_is_no_organ_of_the_mean(tmp_path, capsys):
    """Two folders, ids as found: a voxel of id 99 in a validation map is told before training and left out of means."""
    data = tmp_path / "Own"
    phantom.write(tmp_path / "msd", labelled=5, unlabelled=0, shape=(4, 64, 64), layout="msd")
    data.mkdir()
    for folder in ("images", "labels"):
        (tmp_path / "msd" / f"{folder}Tr").rename(data / folder)
    path = data / "labels" / "0003.nii.gz"
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] = 99
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), path)
    (tmp_path / "val").write_text("0003\n")
    train_seg.main([str(a) for a in (
        "--data", data, "--store", tmp_path / "s", "--out", tmp_path, "--amp", "off", "--arch", "resnet18",
        "--backbone", "random", "--crop-size", 64, "--batch-size", 2, "--iterations", 1, "--split", 100,
        "--protocol", "linear-frozen", "--val-cases", tmp_path / "val", "--no-whole-slices")])
    told = capsys.readouterr().out
    line = "label 99: nothing to train on, 1 voxel in 1 volume (0003) to validate on"
    assert f"{line}; the mean Dice leaves it out" in told[: told.index("mDS")]
    result = json.loads((tmp_path / "seg/random-linear-frozen-100-0-own/result.json").read_text())
    assert result["uncounted"].pop("label 99") == line.removeprefix("label 99: ")
    names = list(result["labels"].values())[1:]
    left = {names.index(n) for n in ("label 99", *result["uncounted"])}
    truth = [int((voxels == int(i)).sum()) for i in list(result["labels"])[1:]]
    counted = [d for c, d in enumerate(result["organs"]) if truth[c] and c not in left]
    assert result["organs"][-1] is None and len(counted) > 2 and result["mDS"] == pytest.approx(np.mean(counted))
    assert [o is None for o in result["organs"]] == [not n or c in left for c, n in enumerate(truth)]
    assert result["hd95_mm_organs"][-1] is None and result["hd95_transunet_voxels"] is not None
    # the counts themselves stay in dice.csv
    last = (tmp_path / "seg/random-linear-frozen-100-0-own/dice.csv").read_text().splitlines()[-1].split(",")
    assert last[:3] == ["0003", "99", "label 99"] and last[5] == "1"


def test_a_validation_set_without_any_organ_is_refused_where_a_dice_is_asked_for(tmp_path):
    volumes, task = drawn(tmp_path, PLAIN | {"p6": (0, 0, 0), "p7": (0, 0, 0)}, ["p6", "p7"])
    with pytest.raises(BadInput, match="no validation volume has an organ"):
        coverage.remarks(volumes, task, "100", [0])
    coverage.remarks(volumes, task)  # as of the spectrum, which needs none
