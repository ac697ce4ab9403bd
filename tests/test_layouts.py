"""layouts.py, and the stores, audits and splits that follow: labelled data in the layouts that people have."""

import functools
import json
import os
import pathlib
import re
import shutil
import unicodedata
from collections import Counter

import nibabel as nib
import numpy as np
import pytest

import datasets
from ct import audit, intake, layouts, pool, prepare, reading, stores, tasks, volumes
from ct.volumes import BadInput

AFFINE = np.diag([-1.5, -1.5, 5.0, 1.0])  # LPS
SHAPE = (20, 16, 4)


def write(path, data, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def ct(seed):
    return np.random.default_rng(seed).integers(-1000, 1000, SHAPE).astype(np.int16)


def label(seed, ids=3):
    return np.random.default_rng(100 + seed).integers(0, ids, SHAPE).astype(np.uint8)


def write_json(path, told):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))


CASES = [f"spleen_{i}" for i in (2, 3, 10, 12, 13)]


def make_msd(folder, ids=3, channel=False):
    for i, case in enumerate(CASES):
        write(folder / f"imagesTr/{case}{'_0000' * channel}.nii.gz", ct(i))
        write(folder / f"labelsTr/{case}.nii.gz", label(i, ids))
    write_json(folder / "dataset.json", {
        "name": "Spleen", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen", "2": "liver"},
        "numTraining": len(CASES), "test": ["./imagesTs/spleen_1.nii.gz"],
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in CASES]})
    return folder


def make_nnunet(folder):
    make_msd(folder, channel=True)
    write_json(folder / "dataset.json", {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz",
                                         "labels": {"background": 0, "spleen": 1, "liver": 2}})
    return folder


def make_folders(folder, pair=("images", "labels"), channel=False):
    for i, case in enumerate(CASES):
        write(folder / pair[0] / f"{case}{'_0000' * channel}.nii.gz", ct(i))
        write(folder / pair[1] / f"{case}.nii.gz", label(i))
    return folder


def make_totalsegmentator(folder):
    for i, case in enumerate(CASES):
        write(folder / case / "ct.nii.gz", ct(i))
        for c, organ in enumerate(("liver", "spleen")):  # found sorted; below chosen in the order of the others
            write(folder / case / f"segmentations/{organ}.nii.gz", (label(i) == 2 - c).astype(np.uint8))
    return folder


def arrays(store):
    """{id: checksums of its slices and of its label maps} of a store's folder."""
    return {v["id"]: list(v["checksums"].values()) for v in store.volumes}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The default store lies below the folder that a command is started in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def msd(tmp_path):
    return make_msd(tmp_path / "Task09_Spleen")


def change(path, **fields):
    """A dataset.json with these fields instead; None: without them."""
    told = json.loads(path.read_text()) | fields
    write_json(path, {key: value for key, value in told.items() if value is not None})


# ---------------------------------------------------------------------------------------------------------- all alike


def test_every_layout_of_the_same_volumes_gives_the_same_store(tmp_path):
    (tmp_path / "names.txt").write_text("1 spleen\n2 liver\n")
    names = {"names": tmp_path / "names.txt"}
    made = {
        "msd": (make_msd(tmp_path / "msd"), {}), "v1": (make_msd(tmp_path / "v1", channel=True), {}),
        "nnunet": (make_nnunet(tmp_path / "nnunet"), {}), "own": (make_folders(tmp_path / "own"), names),
        "tr": (make_folders(tmp_path / "tr", ("imagesTr", "labelsTr"), channel=True), names),
        "img": (make_folders(tmp_path / "img", ("img", "label")), names),
        "total": (make_totalsegmentator(tmp_path / "total"), {"organs": ("spleen", "liver")})}
    stores = {name: datasets.prepare(folder, tmp_path / "s" / name, "segment", **flags)
              for name, (folder, flags) in made.items()}
    first = stores["msd"]
    assert [v["id"] for v in first.volumes] == sorted(CASES)
    for i, case in enumerate(CASES):
        z = int(first.of([case])[1])
        np.testing.assert_array_equal(first.slice(z, label=True), label(i)[:, :, 1].T)
        np.testing.assert_array_equal(first.slice(z), reading.window_to_uint8(ct(i)[:, :, 1].T, (-175, 250)))
    for name, store in stores.items():
        assert arrays(store) == arrays(first) and store.contents() == first.contents(), name
        assert store.task.labels == {0: "background", 1: "spleen", 2: "liver"} and store.task.name == name
        assert store.task.folder == tmp_path / "s" / name / "splits"


def test_ids_of_labels_become_classes_in_their_order(tmp_path):
    folder = make_msd(tmp_path / "D")
    for i, case in enumerate(CASES):
        write(folder / f"labelsTr/{case}.nii.gz", np.array([0, 700, 4], np.int16)[label(i)])
    change(folder / "dataset.json", labels={"700": "spleen", "4": "liver", "0": "background"})
    store = datasets.prepare(folder, tmp_path / "s", "segment")
    assert store.task.ids == (0, 4, 700) and store.task.organs == ("background", "liver", "spleen")
    truth = np.array([0, 2, 1], np.uint8)[label(0)]  # 700 is the last class
    case = store.of([CASES[0]])
    np.testing.assert_array_equal([store.slice(int(z), label=True) for z in case], truth.transpose(2, 1, 0))
    assert store.volumes[0]["voxels"] == np.bincount(label(2)[label(2) < 3], minlength=3)[[0, 2, 1]].tolist()
    back = np.array(store.task.ids)[truth.transpose(2, 1, 0)]
    read = volumes.read_volume(folder / f"imagesTr/{CASES[0]}.nii.gz")
    volumes.write_labels(tmp_path / "out.nii.gz", back, read)
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii.gz").dataobj, np.array([0, 700, 4])[label(0)])


def test_btcv_is_as_it_was(tmp_path, small_phantom):
    folder, index = prepare.prepare(small_phantom / "BTCV", tmp_path / "s", "segment")
    assert list(index) == ["format", "kind", "data", "window", "size", "volumes", "skipped"]
    assert all("ids" not in v for v in index["volumes"]) and stores.task_of(folder, index) is tasks.BTCV
    assert all(len(told.split()) == 5 for told in datasets.Store(folder, index).contents().values())
    assert stores.task_of(folder, {"kind": "pretrain"}) is None


def test_folders_named_img_and_label_are_btcvs_only_with_its_names(tmp_path):
    assert layouts.find(make_folders(tmp_path / "own", ("img", "label"))).layout == "two folders"
    write(tmp_path / "B/img/img0001.nii.gz", ct(0))
    write(tmp_path / "B/label/label0001.nii.gz", label(0))
    assert layouts.find(tmp_path / "B").layout == "BTCV"


# ------------------------------------------------------------------------------------------------- what is left out


def test_what_has_no_label_is_told_and_not_missed(msd, tmp_path, capsys):
    for i in range(25):
        write(msd / f"imagesTs/spleen_{100 + i}.nii.gz", ct(i))
    write(msd / "imagesTr/spleen_77.nii.gz", ct(77))
    (msd / "imagesTr/._spleen_2.nii.gz").touch()
    for command in ("audit", "prepare"):
        prepare.main([command, "--data", str(msd)])
        told = capsys.readouterr().out
        assert "5 volumes, 20 slices" in told and "unusable: 0\n" in told
        assert f"no image by its name: 1\n  {msd}/imagesTr/._spleen_2.nii.gz: hidden file\n" in told
        assert re.search(r"without a label: 26\n  .*imagesTr/spleen_77.nii.gz: a volume without a label\n"
                         r"  .*imagesTs: 25 files, each a volume without a label \(spleen_100.nii.gz", told)
    store = datasets.prepare(msd, stores.default_store(msd), "segment")
    assert audit.remarks(store.volumes, store.skipped, store.task, "this") == [
        "left out, no images by their names: 1 (this lists them)", "left out, without a label: 26 (this lists them)"]


BROKEN = {  # what is done to a volume -> what is said of it
    "label missing": "labelsTr/spleen_3.nii.gz: missing, or a broken link; volume spleen_3 needs it",
    "image missing": "imagesTr/spleen_3.*.nii.gz: missing, or a broken link; volume spleen_3 needs it",
    "label is a broken link": "labelsTr/spleen_3.nii.gz: missing, or a broken link",
    "label damaged": "labelsTr/spleen_3.nii.gz: damaged gzip",
    "another grid": "labelsTr/spleen_3.nii.gz: .* one grid",
    "unknown id": "labelsTr/spleen_3.nii.gz: unknown label id 3; expected 0 to 2",
    "half": "labelsTr/spleen_3.nii.gz: label values are not all whole",
    "no CT": "imagesTr/spleen_3.*.nii.gz: no CT by its values"}


@pytest.mark.parametrize("make", [make_msd, make_nnunet])
@pytest.mark.parametrize("what", BROKEN)
def test_broken_volumes_are_named_and_may_be_left_out(tmp_path, what, make, capsys):
    if make is make_nnunet and what == "image missing":
        pytest.skip("nothing says that there should be one; see below")
    data = make(tmp_path / "D")
    path, image = data / "labelsTr/spleen_3.nii.gz", next(data.glob("imagesTr/spleen_3*"))
    if "missing" in what or "link" in what:
        (path if "label" in what else image).unlink()
        if "link" in what:
            path.symlink_to(tmp_path / "nowhere")
    elif what == "label damaged":
        path.write_bytes(path.read_bytes()[:-9])
    elif what == "no CT":
        write(image, label(1))
    else:
        write(path, {"another grid": label(1)[:, :, 1:], "unknown id": label(1, 4)}.get(what, label(1) / 2))
    write(data / "labelsTr/spleen_2.nii.gz", label(0, 9) + np.uint8(3))  # all bad ones are told at once
    with pytest.raises(BadInput) as caught:
        datasets.prepare(data, tmp_path / "s", "segment")
    said = str(caught.value) + "\n" + capsys.readouterr().err
    if "missing" not in what and "link" not in what:  # those are known before any is read
        assert re.search("spleen_2.nii.gz: unknown label id", said) and "(2 such volumes or files, all named" in said
    assert re.search(BROKEN[what], said), said
    store = datasets.prepare(data, tmp_path / "s", "segment", skip_bad=True)
    assert [v["id"] for v in store.volumes] == ["spleen_10", "spleen_12", "spleen_13"]
    assert sum(not s["no_image"] for s in store.skipped) == 2
    again = datasets.prepare(data, tmp_path / "s", "segment")  # the choice holds
    assert sorted(map(str, again.skipped)) == sorted(map(str, store.skipped)) and again.contents() == store.contents()
    with pytest.raises(SystemExit):
        prepare.main(["audit", "--data", str(data)])
    assert "unusable: 2\n" in capsys.readouterr().out


def test_in_nnunets_folders_what_has_no_partner_is_unusable(tmp_path):
    data = make_nnunet(tmp_path / "D")
    write(data / "imagesTr/spleen_2_0001.nii.gz", ct(9))
    (data / "imagesTr/spleen_3_0000.nii.gz").unlink()
    (data / "labelsTr/spleen_10.nii.gz").unlink()
    found = layouts.find(data)
    assert [v["id"] for v in found.volumes] == ["spleen_12", "spleen_13", "spleen_2"]
    told = {s["file"].rpartition("/")[2]: s["reason"] for s in found.skipped}
    assert told.keys() == {"spleen_2_0001.nii.gz", "spleen_3.nii.gz", "spleen_10.nii.gz"}
    assert "labels" in str(data / "labelsTr") and told["spleen_3.nii.gz"] == "a label without its image"
    assert not any(s["no_image"] for s in found.skipped)


def test_a_volume_without_any_organ_is_kept_and_odd(msd, tmp_path, capsys):
    write(msd / "labelsTr/spleen_3.nii.gz", np.zeros(SHAPE, np.uint8))
    prepare.main(["audit", "--data", str(msd)])
    told = capsys.readouterr().out
    assert re.search(r"warnings: 1\n  .*spleen_3.nii.gz: an empty label, all background; kept as a negative", told)
    assert re.search(r" 1 spleen +[\d,]+ voxels in 4 volumes", told)
    assert len(datasets.prepare(msd, tmp_path / "s", "segment").volumes) == 5


# ------------------------------------------------------------------------------------------------- what is refused


REFUSED = {  # fields of an MSD dataset.json, or what it is instead -> what is said
    "no JSON": ("{", "cannot be read as JSON"), "empty": ("", "cannot be read as JSON"),
    "bytes": ("\0\xff", "cannot be read as JSON"), "array": ("[1]", "a JSON list; expected an object"),
    "deep": ("[" * 100000, "cannot be read as JSON"), "neither": ({"training": None}, "neither MSD's"),
    "two names, one key": ('{"training": [], "labels": {"0": "background", "1": "a", "1": "b"}}', "1 stands twice"),
    "two names, one id": ({"labels": {"0": "background", "1": "a", "01": "b"}}, "two names for label id 1, a and b"),
    "one name twice": ({"labels": {"0": "background", "1": "a", "2": "a"}}, "label id 2 has the same name as"),
    "no background": ({"labels": {"1": "spleen"}}, "label id 0 is missing; it must be there"),
    "background elsewhere": ({"labels": {"0": "spleen", "1": "background"}}, "label id 0 is spleen"),
    "no id": ({"labels": {"0": "background", "x": "spleen"}}, "x is not a label id"),
    "negative": ({"labels": {"0": "background", "-1": "spleen"}}, "-1 is not a label id"),
    "too high": ({"labels": {"0": "background", "65536": "spleen"}}, "65536 is not a label id"),
    "no name": ({"labels": {"0": "background", "1": " "}}, "label id 1 has no name"),
    "name a list": ({"labels": {"0": "background", "1": [1]}}, "label id 1 has no name"),
    "no labels": ({"labels": None}, "labels must be an object"),
    "labels a list": ({"labels": ["a"]}, "labels must be an object"),
    "255 labels": ({"labels": {"0": "background"} | {str(i): f"l{i}" for i in range(1, 256)}}, "at most 254"),
    "MR": ({"modality": {"0": "MRI"}}, "modality MRI, no CT; if the volumes are CT in HU, write CT there"),
    "two channels": ({"modality": {"0": "CT", "1": "PET"}}, "2 channels in modality; expected one"),
    "no modality": ({"modality": None}, "modality must be an object"),
    "training empty": ({"training": []}, "training is not a list of images and labels"),
    "training of strings": ({"training": ["./imagesTr/a.nii.gz"]}, "an entry of training is not"),
    "climbing": ({"training": [{"image": "imagesTr/../../x.nii.gz", "label": "y.nii.gz"}]}, "'imagesTr/../../x.nii.gz' "
                 "lies outside its folder"),
    "absolute": ({"training": [{"image": "/etc/x.nii.gz", "label": "y.nii.gz"}]}, "'/etc/x.nii.gz' lies outside"),
    "climbing label": ({"training": [{"image": "x.nii.gz", "label": "../y.nii.gz"}]}, "'../y.nii.gz' lies outside"),
    "a nul": ({"training": [{"image": "x\0.nii.gz", "label": "y.nii.gz"}]}, "lies outside its folder"),
    "another ending": ({"training": [{"image": "a.mha", "label": "b.mha"}]}, "a.mha is not a .nii.gz or .nii"),
    "twice": ({"training": 2 * [{"image": "imagesTr/spleen_2.nii.gz", "label": "labelsTr/spleen_2.nii.gz"}]},
              "two files of one id, spleen_2"),
    "nothing there": ({"training": [{"image": "imagesTr/x.nii.gz", "label": "labelsTr/x.nii.gz"}]},
                      "no labelled volume there can be used; .*imagesTr/x.nii.gz: missing, or a broken link")}
NNUNET = {
    "MR": ({"channel_names": {"0": "MR"}}, "channel_names MR, no CT"),
    "noNorm": ({"channel_names": {"0": "noNorm"}}, "channel_names noNorm, no CT; if the volumes are CT in HU"),
    "two channels": ({"channel_names": {"0": "CT", "1": "CT"}}, "2 channels in channel_names"),
    "regions": ({"labels": {"background": 0, "whole": [1, 2], "spleen": 1}}, "whole is a region of several ids"),
    "ignore": ({"labels": {"background": 0, "spleen": 1, "ignore": 2}}, "has an ignore label"),
    "ending": ({"file_ending": ".png"}, "file_ending .png; convert"),
    "no ending": ({"file_ending": None}, "file_ending None"),
    "one id": ({"labels": {"background": 0, "a": 1, "b": 1}}, "two names for label id 1, a and b"),
    "a name twice": ('{"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "a": 2}}', "a stands twice"),
    "no background": ({"labels": {"spleen": 1}}, "label id 0 is missing"),
    "a fraction": ({"labels": {"background": 0, "spleen": 1.5}}, "1.5 is not a label id"),
    "true": ({"labels": {"background": 0, "spleen": True}}, "True is not a label id")}


@pytest.mark.parametrize("make, what", [*((make_msd, w) for w in REFUSED), *((make_nnunet, w) for w in NNUNET)])
def test_a_dataset_json_that_cannot_be_followed_is_one_line(tmp_path, make, what, refusal):
    data = make(tmp_path / "D")
    fields, match = (REFUSED if make is make_msd else NNUNET)[what]
    path = data / "dataset.json"
    if isinstance(fields, str):
        path.write_bytes(fields.encode("latin-1"))
    else:
        change(path, **fields)
    with pytest.raises(BadInput, match=match) as caught:
        datasets.prepare(data, tmp_path / "s", "segment")
    assert "\n" not in str(caught.value) and (str(path) in str(caught.value) or str(data) in str(caught.value))
    for command in ("prepare", "audit"):
        assert re.search(match, refusal(prepare.main, [command, "--data", data]))
    assert not (tmp_path / "s").exists() and not (tmp_path / "stores").exists()


def test_without_nnunets_folders_or_any_layout_it_is_said(tmp_path):
    data = make_nnunet(tmp_path / "D")
    (data / "labelsTr").rename(data / "masks")
    with pytest.raises(BadInput, match="labelsTr: no such folder"):
        layouts.find(data)
    (data / "dataset.json").unlink()
    with pytest.raises(BadInput, match="no labels in a known layout; expected BTCV's.*dataset.json.*images and labels"):
        layouts.find(data)
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        layouts.find(tmp_path / "nowhere")


def test_flags_that_a_layout_does_not_need_are_refused(tmp_path, msd, refusal):
    (tmp_path / "n.txt").write_text("1 a")
    for data in (msd, make_totalsegmentator(tmp_path / "T")):
        with pytest.raises(BadInput, match="--labels .*n.txt: .* names its labels itself"):
            layouts.find(data, names=tmp_path / "n.txt")
    for data in (msd, make_folders(tmp_path / "F")):
        with pytest.raises(BadInput, match="--organs: picks among TotalSegmentator's masks"):
            layouts.find(data, organs=("spleen",))
    line = refusal(prepare.main, ["prepare", "--kind", "pretrain", "--data", msd, "--organs", "spleen"])
    assert "--organs" in line and "segment" in line


# ------------------------------------------------------------------------------------------- what the lists say


def entry(case, images="imagesTr", labels="labelsTr"):
    return {"image": f"./{images}/{case}.nii.gz", "label": f"./{labels}/{case}.nii.gz"}


def splits(data, capsys, *flags):
    """(train, val) that prepare draws for a folder, and what it prints of them."""
    store = data.parent / f"s{len(list(data.parent.iterdir()))}"
    prepare.main(["prepare", "--data", str(data), "--store", str(store), *map(str, flags)])
    folder = store / "segment"
    task = stores.task_of(folder, json.loads((folder / "index.json").read_text()))
    return task.cases("100"), task.cases("val"), capsys.readouterr().out


LISTS = {  # how a list says what is to validate on -> in whose words
    "MONAI": "validation of dataset.json", "val": "val of dataset.json", "AMOS": "validation of dataset.json",
    "dataset_0": "validation of dataset_0.json", "folds": "fold 0 of dataset.json", "one channel": "validation of",
    "nnU-Net": "fold 0 of splits_final.json", "nnU-Net's dataset": "fold 0 of splits_final.json"}


@pytest.mark.parametrize("how", LISTS)
def test_what_a_list_has_to_validate_on_is_validated_on(tmp_path, how, capsys):
    val, train = ["spleen_10", "spleen_13"], ["spleen_12", "spleen_2", "spleen_3"]
    data = (make_nnunet if "nnU-Net" in how else make_msd)(tmp_path / "D")
    if how == "AMOS":
        for part in ("images", "labels"):
            (data / f"{part}Va").mkdir()
            for case in val:
                (data / f"{part}Tr/{case}.nii.gz").rename(data / f"{part}Va/{case}.nii.gz")
    if "nnU-Net" in how:
        write_json(data / "splits_final.json", [{"train": train, "val": val}, {"train": val, "val": train}])
    elif how == "folds":
        change(data / "dataset.json", training=[entry(c) | {"fold": int(c not in val)} for c in CASES])
    else:
        where = ("imagesVa", "labelsVa") if how == "AMOS" else ("imagesTr", "labelsTr")
        held_out = [entry(c, *where) for c in val]
        if how == "one channel":
            held_out = [e | {"image": [e["image"]]} for e in held_out]
        change(data / "dataset.json", training=[entry(c) for c in train], numTraining=3,
               **{"val" if how == "val" else "validation": held_out})
    if how == "dataset_0":
        (data / "dataset.json").rename(data / "dataset_0.json")
    if how == "nnU-Net's dataset":
        change(data / "dataset.json", dataset={c: {"images": [f"imagesTr/{c}_0000.nii.gz"],
                                                   "label": f"labelsTr/{c}.nii.gz"} for c in CASES})
    found = layouts.find(data)
    assert [v["id"] for v in found.volumes] == sorted(train + val) and not found.skipped
    assert found.listed.source.startswith(LISTS[how]) and sorted(found.listed.cases) == val
    if how not in ("MONAI", "nnU-Net"):
        return
    drawn = splits(data, capsys)
    assert drawn[:2] == (train, val) and f"validation set: 2 volumes, {LISTS[how]}" in drawn[2]
    if how == "nnU-Net":
        return
    # a flag overrules
    (tmp_path / "cases").write_text("spleen_2")
    assert splits(data, capsys, "--val-cases", tmp_path / "cases")[1] == ["spleen_2"]
    drawn = splits(data, capsys, "--val", 0.6)
    assert len(drawn[1]) == 3 and "validation set" not in drawn[2]


def test_a_split_that_was_drawn_before_stays_and_the_lists_own_is_named(msd, tmp_path, capsys):
    args = ["prepare", "--data", str(msd), "--store", str(tmp_path / "s")]
    change(msd / "dataset.json", training=[entry(c) for c in CASES[1:]], numTraining=4)
    prepare.main(args)
    before = (tmp_path / "s/splits/task09_spleen_val.txt").read_text()
    assert len(before.split()) == 1 and "labelled, but listed nowhere: 1\n" in capsys.readouterr().out
    change(msd / "dataset.json", validation=[entry(CASES[0])])
    prepare.main(args)
    told = capsys.readouterr().out
    assert "task09_spleen_val.txt: made earlier, or edited, and not the data's own validation set (valid" in told
    assert "in no split: 1 volume (spleen_2)" in told
    assert (tmp_path / "s/splits/task09_spleen_val.txt").read_text() == before
    shutil.rmtree(tmp_path / "s/splits")
    prepare.main(args)
    assert (tmp_path / "s/splits/task09_spleen_val.txt").read_text() == "spleen_2\n"


def test_a_validation_list_that_cannot_be_followed_is_said(msd, tmp_path, capsys, refusal):
    change(msd / "dataset.json", validation=[entry(CASES[0])])
    assert "spleen_2 is in training and in validation, too" in refusal(prepare.main, ["audit", "--data", msd])
    change(msd / "dataset.json", validation=[entry(c, "imagesVa", "labelsVa") for c in ("spleen_20", "spleen_21")])
    told = splits(msd, capsys)[2]  # as AMOS22 was published: without the labels of its validation set
    assert "warnings: 1\n" in told
    assert "validation lists 2 volumes without a label file there; others are" in told
    write(msd / "imagesVa/spleen_20.nii.gz", ct(20))
    write(msd / "labelsVa/spleen_20.nii.gz", label(20))
    assert "imagesVa/spleen_21.nii.gz: missing, or a broken link; volume spleen_21 needs it" in refusal(
        prepare.main, ["prepare", "--data", msd])
    change(msd / "dataset.json", validation="all")
    assert "validation must be a list" in refusal(prepare.main, ["prepare", "--data", msd])


FOLDS = {"an object": ({}, "is not {train"), "empty": ([], "is not {train"), "no ids": ([{"train": [], "val": []}],
         "is not {train"), "both": ([{"train": CASES, "val": CASES[:1]}], "spleen_2 is in train and in val"),
         "missing": ([{"train": [*CASES[1:], "a", "b"], "val": CASES[:1]}], "lists a, b, of which nothing .*2 such"),
         "no JSON": (None, "cannot be read as JSON")}


@pytest.mark.parametrize("what", FOLDS)
def test_folds_that_cannot_be_followed_are_one_line(tmp_path, what, refusal):
    data, (folds, match) = make_nnunet(tmp_path / "D"), FOLDS[what]
    write_json(data / "splits_final.json", folds)
    if folds is None:
        (data / "splits_final.json").write_text("{")
    line = refusal(prepare.main, ["prepare", "--data", data])
    assert "splits_final.json" in line and re.search(match, line)


def test_volumes_that_no_list_has_are_named_with_their_labels(tmp_path, capsys):
    data = make_nnunet(tmp_path / "D")
    write_json(data / "splits_final.json", [{"train": CASES[:2], "val": CASES[2:3]}])
    for part, name in (("imagesTs", "x_1_0000"), ("labelsTs", "x_1"), ("imagesTs", "x_2_0000")):
        write(data / part / f"{name}.nii.gz", ct(1))
    prepare.main(["audit", "--data", str(data)])
    told = capsys.readouterr().out
    assert "D: 3 volumes" in told
    assert re.search(r"without a label: 1\n .*imagesTs/x_2_0000.nii.gz: .*\nlabelled, but listed nowhere: 3\n", told)
    store = datasets.prepare(data, tmp_path / "s", "segment")
    assert "left out, labelled, but listed nowhere: 3 (this lists them)" in audit.remarks(
        store.volumes, store.skipped, store.task, "this")


def test_the_number_that_a_list_gives_of_itself_is_counted(tmp_path, capsys, refusal):
    nnunet, listed = make_nnunet(tmp_path / "N"), make_msd(tmp_path / "M")
    for told in (5, 12, 4, "12"):
        change(nnunet / "dataset.json", numTraining=told)
        if told == 5:
            assert not layouts.find(nnunet).skipped
            continue
        line = refusal(prepare.main, ["prepare", "--data", nnunet, "--store", tmp_path / "s"])
        assert f"numTraining is {told}, the pairs of image and label that are there are 5" in line
    datasets.prepare(nnunet, tmp_path / "s", "segment", skip_bad=True)
    assert len(datasets.prepare(nnunet, tmp_path / "s", "segment").volumes) == 5  # the choice holds
    (nnunet / "labelsTr/spleen_2.nii.gz").unlink()
    change(nnunet / "dataset.json", numTraining=5)
    assert "(2 such volumes" in refusal_of(prepare.main, ["prepare", "--data", str(nnunet)], capsys)
    change(listed / "dataset.json", numTraining=80)  # as MONAI's list of BTCV: what is missing has a name there
    prepare.main(["prepare", "--data", str(listed)])
    assert re.search(r"unusable: 0\nwarnings: 1\n .*dataset.json: numTraining is 80, and training lists 5\n",
                     capsys.readouterr().out)


def refusal_of(main, argv, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    return capsys.readouterr().err


@pytest.mark.parametrize("labels", [{"background": 0, "spleen": 1, "liver": 2},
                                    {"0": "background", "1": "spleen", "2": "liver"}])
@pytest.mark.parametrize("make", [make_msd, make_nnunet])
def test_ids_and_names_stand_in_either_order(tmp_path, make, labels):
    data = make(tmp_path / "D")
    change(data / "dataset.json", labels=labels, **({"modality": "CT"} if make is make_msd else {}))
    assert layouts.find(data).labels == {0: "background", 1: "spleen", 2: "liver"}


# ------------------------------------------------------------------------------------------- what belongs together


NAMES = {"BTCV's in MSD's folders": ("imagesTr/img{}", "labelsTr/label{}"), "channel": ("images/{}_0000", "labels/{}"),
         "words behind": ("images/{}_image", "labels/{}-mask"), "one word": ("images/ct_{}", "labels/ct_{}_seg"),
         "LiTS": ("images/volume-{}", "labels/segmentation-{}"), "folders": ("images/{0}/{0}", "labels/{0}/{0}"),
         "folders with endings": ("imagesTr/{0}.nii.gz/{0}", "labelsTr/{0}.nii.gz/{0}"),
         "NFD": ("images/Mu\u0308ller_{}", "labels/M\u00fcller_{}")}


@pytest.mark.parametrize("how", NAMES)
def test_image_and_label_are_found_by_what_their_names_share(tmp_path, how):
    data = tmp_path / "D"
    for i in range(3):
        write(data / f"{NAMES[how][0].format(f'001{i}')}.nii.gz", ct(i))
        write(data / f"{NAMES[how][1].format(f'001{i}')}.nii.gz", label(i))
    assert not layouts.find(data).skipped
    store = datasets.prepare(data, tmp_path / "s", "segment")
    for i, v in enumerate(store.volumes):
        assert unicodedata.is_normalized("NFC", v["id"])
        np.testing.assert_array_equal(store.slice(4 * i, label=True), label(i)[:, :, 0].T)


def test_names_that_fit_two_are_refused(tmp_path):
    for name in ("images/img1", "images/scan1", "labels/label1"):
        write(tmp_path / f"A/{name}.nii.gz", ct(0))
    with pytest.raises(BadInput, match="label1.nii.gz: its name does not say which image .*, beside .*img1.*scan1"):
        layouts.find(tmp_path / "A")
    for name in ("images/img1", "labels/label1", "labels/mask1"):
        write(tmp_path / f"B/{name}.nii.gz", ct(0))
    with pytest.raises(BadInput, match="labels/mask1.nii.gz: its name does not say which .*, beside .*label1.nii.gz"):
        layouts.find(tmp_path / "B")


@pytest.mark.parametrize("inner", ["{0}.nii.gz/{0}.nii.gz", "{0}/{0}.nii.gz", "{0}.nii/{0}.nii"])
def test_files_in_folders_of_their_own_name_are_those_files(tmp_path, inner):
    for case in ("0001", "0002"):
        for part, name in (("img", f"img{case}"), ("label", f"label{case}")):
            data = ct(int(case)) if part == "img" else 3 * label(int(case)) // 2 * np.uint8(2)
            write(tmp_path / "B/RawData/Training" / part / inner.format(name), data)
    found = layouts.find(tmp_path / "B")
    assert found.layout == "BTCV" and [v["id"] for v in found.volumes] == ["0001", "0002"] and not found.skipped
    assert [v["id"] for v in intake.find_volumes(tmp_path / "B", "pretrain")[0]] == ["0001", "0002"]
    assert len(datasets.prepare(tmp_path / "B", tmp_path / "s", "segment").volumes) == 2
    msd = make_msd(tmp_path / "M")
    for path in [*msd.glob("imagesTr/*"), *msd.glob("labelsTr/*")]:
        place = path.parent / inner.format(volumes.stem(path))
        path.rename(path.with_suffix(".moved"))
        place.parent.mkdir()
        path.with_suffix(".moved").rename(place)
    assert [v["id"] for v in layouts.find(msd).volumes] == sorted(CASES)


def test_names_that_only_look_equal(tmp_path, capsys):
    one, other = "Mu\u0308ller", "M\u00fcller"  # the same to the eye
    data = make_msd(tmp_path / "D")
    for part, name in (("images", one), ("labels", other)):
        (data / f"{part}Tr/spleen_2.nii.gz").rename(data / f"{part}Tr/{name}.nii.gz")
    change(data / "dataset.json", training=[entry(c) for c in (*CASES[1:], other)])
    assert other in [v["id"] for v in layouts.find(data).volumes]
    (tmp_path / "cases").write_text(one, encoding="utf-8")
    assert splits(data, capsys, "--val-cases", tmp_path / "cases")[1] == [other]
    for name in (one, other):
        write(tmp_path / f"two/{name}.nii.gz", ct(0))
    with pytest.raises(BadInput, match="two files of one id, .*they look the same"):
        intake.find_volumes(tmp_path / "two", "pretrain")


EIGHT = {8: 1, 4: 2, 3: 3, 2: 4, 6: 5, 11: 6, 1: 7, 7: 8}  # BTCV's ids -> of its 8 organs, as mmsegmentation has them
FLARE = {6: 1, 2: 2, 1: 3, 11: 4, 8: 5, 9: 6, 12: 7, 13: 8, 4: 9, 5: 10, 7: 11, 3: 13}
IDS = {"eight": EIGHT, "FLARE22": FLARE, "AbdomenCT-1K": {6: 1, 2: 2, 3: 2, 1: 3, 11: 4}, "liver alone": {6: 1},
       "all": {i: i for i in range(14)}, "liver as it is": {6: 6}, "eight as they are": {i: i for i in EIGHT},
       "the first eight": {i: i for i in range(9)}, "no liver": {1: 1, 7: 7, 8: 8}}


@pytest.mark.parametrize("ids", IDS)
def test_ids_that_are_not_btcvs_are_not_told_as_its_organs(small_phantom, tmp_path, ids, capsys, refusal):
    data, source = tmp_path / "B", small_phantom / "BTCV/RawData/Training"
    table = np.zeros(14, np.uint8)
    table[list(IDS[ids])] = list(IDS[ids].values())
    for case in ("0001", "0004", "0021"):
        image = nib.load(source / f"label/label{case}.nii.gz")
        write(data / f"label/label{case}.nii.gz", table[np.asarray(image.dataobj)], image.affine)
        (data / "img").mkdir(exist_ok=True)
        shutil.copy(source / f"img/img{case}.nii.gz", data / "img")
    if list(IDS).index(ids) > 3:
        assert len(datasets.prepare(data, tmp_path / "s", "segment").volumes) == 3
        return
    line = refusal(prepare.main, ["prepare", "--data", data])
    assert f"{data}: its label ids seem to be others than BTCV's" in line and "--labels FILE" in line
    assert "unusable: 1\n" in refusal_out(prepare.main, ["audit", "--data", str(data)], capsys)
    (tmp_path / "names").write_text("".join(f"{i} organ {i}\n" for i in sorted({*IDS[ids].values()})))
    store = datasets.prepare(data, tmp_path / "s", "segment", names=tmp_path / "names")
    assert store.task.organs[1] == "organ 1" and [v["id"] for v in store.volumes] == ["img0001", "img0004", "img0021"]
    np.testing.assert_array_equal(np.sum([v["voxels"] for v in store.volumes], 0)[1],
                                  sum((np.asarray(nib.load(p).dataobj) == 1).sum() for p in data.glob("label/*")))


def refusal_out(main, argv, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ two folders


def test_ids_are_found_and_read_once(tmp_path, monkeypatch, capsys):
    data, read = make_folders(tmp_path / "D", channel=True), []
    write(data / "labels/spleen_3.nii.gz", np.array([0, 5, 2], np.uint8)[label(1)])
    real = pool.in_processes
    monkeypatch.setattr(pool, "in_processes", lambda work, items, *rest: read.append(len(items)) or real(
        work, items, *rest))
    store = datasets.prepare(data, tmp_path / "s", "segment")
    assert store.task.labels == {0: "background", 1: "label 1", 2: "label 2", 5: "label 5"} and read == [5, 5]
    again = datasets.prepare(data, tmp_path / "s", "segment")
    assert again.task == store.task and again.contents() == store.contents() and read[2:] == [0]
    write(data / "labels/spleen_3.nii.gz", label(1))
    third = datasets.prepare(data, tmp_path / "s", "segment")
    assert third.task.ids == (0, 1, 2) and read[3:] == [1, 5]  # all have other classes
    prepare.main(["audit", "--data", str(data), "--kind", "segment", "--store", str(tmp_path / "s")])
    assert re.search(r" 2 label 2 +[\d,]+ voxels in 5 volumes", capsys.readouterr().out) and read[5:] == [0, 5]


def test_names_come_from_a_file(tmp_path, capsys):
    data = make_folders(tmp_path / "D")
    (tmp_path / "names.txt").write_text("\ufeff0 background\n2\tleft kidney \n\n1 spleen\n9 never seen\n", "utf-8")
    flags = ["--data", str(data), "--labels", str(tmp_path / "names.txt")]
    for command in ("audit", "prepare"):
        prepare.main([command, *flags])
        out = capsys.readouterr().out
        assert "5 volumes, 20 slices" in out
    store = stores.default_store(data)
    (made,) = (p for p in store.iterdir() if p.name.startswith("segment"))
    index = json.loads((made / "index.json").read_text())
    assert made.name != "segment"
    assert index["task"] == {"name": "D", "labels": {"0": "background", "1": "spleen", "2": "left kidney",
                                                     "9": "never seen"}}
    assert sorted(p.name for p in (store / "splits").iterdir())[-2:] == ["d_train.txt", "d_val.txt"]
    assert audit.absent_organs(index["volumes"], stores.task_of(made, index)) == ["never seen"]
    unnamed = datasets.prepare(data, store, "segment")
    assert unnamed.folder.name == "segment" and unnamed.task.labels[2] == "label 2"  # beside it
    assert unnamed.task.folder == store / "splits"


@pytest.mark.parametrize("text, match", [
    ("1 a\n1 b", "two names for label id 1, a and b"), ("1 a\n2 a", "label id 2 has the same name as another"),
    ("0 spleen", "label id 0 is spleen"), ("1", "'1' is not an id and its name"), ("a 1", "a is not a label id"),
    (b"\xff\xfe\x00", "cannot be read as text"), (None, "names.txt: cannot be read as text .No such file")])
def test_a_file_of_names_that_cannot_be_used_is_one_line(tmp_path, text, match):
    data, path = make_folders(tmp_path / "D"), tmp_path / "names.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=match) as caught:
        datasets.prepare(data, tmp_path / "s", "segment", names=path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_ids_that_cannot_be_classes_are_refused(tmp_path):
    data = make_folders(tmp_path / "D")
    (tmp_path / "names.txt").write_text("1 spleen")
    with pytest.raises(BadInput, match=r"labels/spleen_\d+.nii.gz: unknown label id 2; expected 0 to 1"):
        datasets.prepare(data, tmp_path / "s", "segment", names=tmp_path / "names.txt")
    write(data / "labels/spleen_2.nii.gz", np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE))
    with pytest.raises(BadInput, match="D: 1279 labels beside the background; at most 254"):
        datasets.prepare(data, tmp_path / "s", "segment")
    write(data / "labels/spleen_2.nii.gz", -ct(0).clip(0))
    with pytest.raises(BadInput, match="spleen_2.nii.gz: unknown label id -"):
        datasets.prepare(data, tmp_path / "s", "segment")
    for case in CASES:
        write(data / f"labels/{case}.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(BadInput, match="D: no label file there holds an organ"):
        datasets.prepare(data, tmp_path / "s", "segment")
    for case in CASES:
        (data / f"labels/{case}.nii.gz").write_bytes(b"")
    with pytest.raises(BadInput, match="labels/.*: empty file"):
        datasets.prepare(data, tmp_path / "s", "segment")


def test_two_files_of_one_id_are_refused(tmp_path):
    data = make_folders(tmp_path / "D")
    write(data / "images/spleen_2_0000.nii.gz", ct(7))
    with pytest.raises(BadInput, match="spleen_2.nii.gz and .*spleen_2_0000.nii.gz: two files of one id, spleen_2|"
                                       "spleen_2_0000.nii.gz and .*spleen_2.nii.gz: two files of one id, spleen_2"):
        layouts.find(data)


# ------------------------------------------------------------------------------------------------ TotalSegmentator


def test_the_later_of_two_masks_wins_and_is_counted(tmp_path, capsys):
    data = make_totalsegmentator(tmp_path / "T")
    both = np.zeros(SHAPE, np.uint8)
    both[2:5, 3, 1] = 1
    masks = [write(data / CASES[0] / f"segmentations/{organ}.nii.gz", np.roll(both, i, 0))
             for i, organ in enumerate(("liver", "spleen"))]
    for organs in (("spleen", "liver"), ("liver", "spleen")):
        store = datasets.prepare(data, tmp_path / "s", "segment", organs=organs)
        place = [v["id"] for v in store.volumes].index(CASES[0])
        assert store.volumes[place]["voxels"][1:] == [1, 3]
        assert store.volumes[place]["odd"] == ["2 voxels in several organs; the later in the list keeps them"]
        truth = np.zeros(SHAPE, np.uint8)
        truth[2:6, 3, 1] = [2, 2, 2, 1] if organs[1] == "liver" else [1, 2, 2, 2]
        np.testing.assert_array_equal(store.slice(int(store.of([CASES[0]])[1]), label=True), truth[:, :, 1].T)
    assert len({p.name for p in (tmp_path / "s").iterdir()}) == 2  # a store for each choice
    for mask in masks:  # each of them is a source
        before = store.contents()
        write(mask, np.roll(both, 9, 0))
        store = datasets.prepare(data, tmp_path / "s", "segment", organs=organs)
        assert [case for case, told in store.contents().items() if told != before[case]] == [CASES[0]]
    prepare.main(["audit", "--data", str(data), "--organs", "spleen"])
    out = capsys.readouterr().out
    assert re.search(r" 1 spleen +[\d,]+ voxels in 5 volumes", out) and "liver" not in out
    prepare.main(["prepare", "--data", str(data), "--kind", "segment"])
    store = datasets.prepare(data, stores.default_store(data), "segment")
    assert store.task.organs == ("background", "liver", "spleen")


@pytest.mark.parametrize("what, match", [
    ("missing", r"spleen_3/segmentations/liver.nii.gz: missing, or a broken link; volume spleen_3 needs it"),
    ("no masks", r"spleen_3/segmentations/liver.nii.gz: missing.*\(2 such\)"),
    ("two", "liver.nii.gz: unknown label id 2; expected 0 to 1"), ("grid", "liver.nii.gz: .* one grid"),
    ("unknown", "--organs kidney: no subject of .*segmentations/kidney.nii.gz; there are liver, spleen"),
    ("again", "--organs: liver is named twice"), ("background", "label id 3 has the same name as another, background")])
def test_masks_that_cannot_be_used_are_one_line(tmp_path, what, match):
    data, organs = make_totalsegmentator(tmp_path / "T"), None
    path = data / "spleen_3/segmentations/liver.nii.gz"
    if what == "no masks":
        for mask in path.parent.iterdir():
            mask.unlink()
        path.parent.rmdir()
    if what == "missing":
        path.unlink()
    if what == "two":
        write(path, label(1))
    if what == "grid":
        write(path, label(1, 2)[1:])
    if what == "background":
        path.rename(path.with_name("background.nii.gz"))
        organs = ("liver", "spleen", "background")
    organs = {"unknown": ("liver", "kidney"), "again": ("liver", "liver")}.get(what, organs)
    with pytest.raises(BadInput, match=match) as caught:
        datasets.prepare(data, tmp_path / "s", "segment", organs=organs)
    assert "\n" not in str(caught.value)


def test_a_start_looks_at_each_file_once(tmp_path, monkeypatch):
    """Of 129,000 masks on a file server each look is a request: one walk, and size and time of each file."""
    data = make_totalsegmentator(tmp_path / "T")
    datasets.prepare(data, tmp_path / "s", "segment")
    looks = {name: Counter() for name in ("stat", "lstat", "scandir")}

    def look(real, seen, path=".", *args, **kw):
        seen[str(path)] += 1
        return real(path, *args, **kw)

    for name, seen in looks.items():
        monkeypatch.setattr(os, name, functools.partial(look, getattr(os, name), seen))
    if accessor := getattr(pathlib, "_NormalAccessor", None):  # of Python 3.10: what pathlib calls
        monkeypatch.setattr(accessor, "stat", staticmethod(os.stat))
    assert intake.locate(data, "BTCV") == (data, False)
    assert sum(seen[str(p)] for seen in looks.values() for p in data.rglob("*.nii.gz")) == 0
    looks["scandir"].clear()
    datasets.prepare(data, tmp_path / "s", "segment")
    monkeypatch.undo()
    assert {looks["stat"][str(p)] for p in data.rglob("*.nii.gz")} == {1} and len([*data.rglob("*.nii.gz")]) == 15
    assert not sum(looks["lstat"][str(p)] for p in data.rglob("*.nii.gz"))
    assert {looks["scandir"][str(p)] for p in (data, *data.glob("*"), *data.glob("*/segmentations"))} == {1}


# ------------------------------------------------------------------------------------------- identity, audit, splits


def test_what_the_labels_mean_is_part_of_the_fingerprint(msd, tmp_path):
    def prepared():
        store = datasets.prepare(msd, tmp_path / "s", "segment")
        return store, [(store.folder / f"{v['id']}.npy").stat().st_mtime_ns for v in store.volumes]

    first, made = prepared()
    change(msd / "dataset.json", labels={"0": "background", "1": "liver", "2": "spleen"})
    second, again = prepared()
    assert arrays(first) == arrays(second) and made == again  # the same ids: nothing is made anew
    assert all(a != b for a, b in zip(first.contents().values(), second.contents().values(), strict=True))
    change(msd / "dataset.json", labels={"0": "background", "2": "spleen", "1": "a", "9": "b"})
    assert prepared()[0].task.ids == (0, 1, 2, 9) and prepared()[1] != made  # other classes, other arrays
    assert prepared()[1] == prepared()[1]
    before = prepared()[0].contents()
    write(msd / "labelsTr/spleen_3.nii.gz", label(77))
    assert [k for k, v in prepared()[0].contents().items() if v != before[k]] == ["spleen_3"]


def test_audit_tells_of_a_task_what_it_tells_of_btcv(msd, tmp_path, capsys):
    drawn = []
    write(msd / "imagesTr/spleen_3_venous.nii.gz", ct(9))
    write(msd / "labelsTr/spleen_3_venous.nii.gz", label(9, 2))
    told = json.loads((msd / "dataset.json").read_text())["training"]
    change(msd / "dataset.json", training=[*told, {"image": "imagesTr/spleen_3_venous.nii.gz",
                                                   "label": "labelsTr/spleen_3_venous.nii.gz"}])
    prepare.main(["audit", "--data", str(msd)], lambda *args: drawn.append(args) or True)
    out = capsys.readouterr().out
    assert "6 volumes, 24 slices\n" in out and "paper" not in out and "train:" not in out
    seen = [label(i) for i in range(5)] + [label(9, 2)]
    for c, organ, count in ((1, "spleen", 6), (2, "liver", 5)):
        assert f" {c} {organ:26s} {sum((x == c).sum() for x in seen):14,d} voxels in {count} volumes" in out
    assert "these seem to be one patient's, spleen_3: spleen_3, spleen_3_venous\n" in out
    path, slices, titles, labels, names = drawn[0]
    assert names[:3] == ("background", "spleen", "liver")
    assert path.name == "audit-segment.png" and titles[0] == "spleen_10 slice 2"
    np.testing.assert_array_equal(labels[0], label(2)[:, :, 2].T)
    prepare.main(["prepare", "--data", str(msd)])
    capsys.readouterr()
    prepare.main(["audit", "--data", str(msd)])
    assert "  train: 5 volumes, 20 slices\n  val: 1 volume, 4 slices\n" in capsys.readouterr().out


def test_prepare_draws_the_splits_once_beside_the_store(msd, tmp_path, capsys, refusal):
    (tmp_path / "cases").write_text("spleen_2\nspleen_3\n")
    flags = ["prepare", "--data", str(msd), "--store", str(tmp_path / "s")]
    prepare.main([*flags, "--val-cases", str(tmp_path / "cases")])
    assert f"splits: {tmp_path}/s/splits/task09_spleen_val.txt and" in capsys.readouterr().out
    for window in ([], ["--window", "0", "100"]):
        prepare.main([*flags, *window])
        folder = tmp_path / "s" / ("segment-0-100" if window else "segment")
        task = stores.task_of(folder, json.loads((folder / "index.json").read_text()))
        assert task.cases("val") == ["spleen_2", "spleen_3"] and len(task.cases("100")) == 3
        assert task == tasks.of("Task09_Spleen", {0: "background", 1: "spleen", 2: "liver"}, tmp_path / "s/splits")
    line = refusal(prepare.main, [*flags, "--val", "0.8"])
    assert "task09_spleen_val.txt" in line and "--val" in line
    prepare.main([*flags[:3], "--val", "0.4", "--patient-regex", r"spleen_\d"])
    assert audit.verify(tmp_path / "s") == 0


def test_real_ct_in_other_layouts_gives_the_same_store(real_ct, tmp_path):
    """The small real CT in BTCV's layout, its files under MSD's and nnU-Net's names."""
    training = real_ct / "BTCV/RawData/Training"
    cases = sorted(p.name[3:7] for p in (training / "img").iterdir())
    for name, channel in (("msd", ""), ("nnunet", "_0000")):
        for part, source in (("imagesTr", "img"), ("labelsTr", "label")):
            (tmp_path / name / part).mkdir(parents=True)
            for case in cases:
                (tmp_path / name / part / f"{case}{channel * (source == 'img')}.nii.gz").symlink_to(
                    training / source / f"{source}{case}.nii.gz")
    labels = {str(i): organ for i, organ in enumerate(tasks.ORGANS)}
    write_json(tmp_path / "msd/dataset.json", {"modality": {"0": "CT"}, "labels": labels, "training": [
        {"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases]})
    write_json(tmp_path / "nnunet/dataset.json", {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz",
                                                  "labels": {organ: int(i) for i, organ in labels.items()}})
    stores = [datasets.prepare(folder, tmp_path / "s" / folder.name, "segment")
              for folder in (real_ct / "BTCV", tmp_path / "msd", tmp_path / "nnunet")]
    first = arrays(stores[0])
    assert len(first) == 30 and all(arrays(store) == first for store in stores)
    assert all(store.task.labels == tasks.BTCV.labels for store in stores) and stores[0].task is tasks.BTCV
    assert stores[1].task != tasks.BTCV


def test_real_ct_of_totalsegmentator(real_ct, tmp_path):
    """Its own example, in its own layout: masks of the 13 organs against the one label map they are in."""
    image, truth = real_ct / "nifti/example_ct_sm.nii.gz", nib.load(real_ct / "nifti/example_ct_sm_label.nii.gz")
    voxels = np.asarray(truth.dataobj)
    write(tmp_path / "own/images/s0000.nii.gz", np.asarray(nib.load(image).dataobj), nib.load(image).affine)
    write(tmp_path / "own/labels/s0000.nii.gz", voxels, truth.affine)
    (tmp_path / "T/s0000").mkdir(parents=True)
    (tmp_path / "T/s0000/ct.nii.gz").symlink_to(image)
    organs = tasks.ORGANS[1:]
    for i, organ in enumerate(organs, 1):
        write(tmp_path / f"T/s0000/segmentations/{organ}.nii.gz", (voxels == i).astype(np.uint8), truth.affine)
    (tmp_path / "names.txt").write_text("".join(f"{i} {organ}\n" for i, organ in enumerate(organs, 1)))
    total = datasets.prepare(tmp_path / "T", tmp_path / "t", "segment", organs=organs)
    own = datasets.prepare(tmp_path / "own", tmp_path / "o", "segment", names=tmp_path / "names.txt")
    assert arrays(total) == arrays(own) and total.task.labels == own.task.labels == tasks.BTCV.labels
    assert not any("in several organs" in line for line in total.volumes[0]["odd"])
